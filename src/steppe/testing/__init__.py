"""The contract as checks that anyone can run on a rule, or on any combination of rules.

Each check takes ``make``, which builds your optimizer around the check's model, and raises ``AssertionError`` when the
statement in its first line does not hold. :data:`~steppe.testing.CHECKS` has all of them:

>>> import steppe, torch
>>> def make(model):
...     base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
...     return steppe.SAM(base, rho=0.1, model=model, perturbation=steppe.Adaptive())
>>> for check in CHECKS:
...     check(make)

The checks do not depend on the formula of the rule; :func:`matches_reference` compares it with your own slow reference.
Under pytest, ``@pytest.mark.parametrize("check", steppe.testing.CHECKS)`` makes a test of each. They run on the CPU in
a few seconds; fake tensors show without a GPU that a rule does not wait for one.
"""

from steppe.testing._problems import Make, Net
from steppe.testing.checks import (
    CHECKS,
    Check,
    complex_parameters_work,
    copies_continue_identically,
    gradients_may_be_absent_or_zero,
    no_value_is_read_on_the_host,
    radius_zero_is_the_base,
    resumes_to_the_bit,
    rules_are_stateless,
    scale_free_rules_ignore_the_scale,
    side_effects_are_those_of_one_pass,
    steps_that_are_not_finite_are_skipped,
    weights_are_restored_exactly,
)
from steppe.testing.reference import matches_reference, passes_per_step

__all__ = [
    "CHECKS",
    "Check",
    "Make",
    "Net",
    "complex_parameters_work",
    "copies_continue_identically",
    "gradients_may_be_absent_or_zero",
    "matches_reference",
    "no_value_is_read_on_the_host",
    "passes_per_step",
    "radius_zero_is_the_base",
    "resumes_to_the_bit",
    "rules_are_stateless",
    "scale_free_rules_ignore_the_scale",
    "side_effects_are_those_of_one_pass",
    "steps_that_are_not_finite_are_skipped",
    "weights_are_restored_exactly",
]
