"""The contract for random combinations of perturbation, combination, cadence and subset of the model."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import steppe
from steppe import rules, testing
from steppe.methods.esam import Stochastic

share = st.floats(0.05, 0.95)
perturbations = st.one_of(
    st.just(steppe.L2()),
    st.builds(steppe.Adaptive, st.floats(0.0, 0.1)),
    st.just(steppe.LInf()),
    st.builds(steppe.Friendly, share, share),
    st.builds(steppe.VarianceSuppressed, share),
    st.builds(steppe.ZScore, share),
    st.just(steppe.Momentum()),
    st.builds(steppe.GaussianNoise, seed=st.integers(0, 9), filterwise=st.booleans()),
    st.builds(steppe.Fisher, share),
    st.builds(steppe.LayerWise),
)
combinations = st.one_of(
    st.just(steppe.PerturbedGradient()),
    st.builds(steppe.SurrogateGap, share),
    st.builds(steppe.WeightedSharpness, st.floats(0.0, 0.9)),
    st.builds(steppe.PenalizedNorm, share),
    st.builds(steppe.GradientReuse, share),
)
cadences = st.one_of(
    st.builds(steppe.Periodic, st.integers(1, 3)),
    st.builds(steppe.LatePhase, share, st.integers(2, 10)),
    st.builds(steppe.Bernoulli, share, st.integers(0, 9)),
    st.builds(steppe.GradientNormThreshold, st.integers(2, 20)),
)
SUBSETS = {
    "all": lambda rule, model: rule,
    "norm layers": lambda rule, model: steppe.ParameterSubset(rule, steppe.norm_layers(model)),
    "last layers": lambda rule, model: steppe.ParameterSubset(rule, rules.last_layers(model, 2)),
    "half the weights": lambda rule, model: Stochastic(rule, 0.5),
    "two ascent steps": lambda rule, model: steppe.AscentSteps(rule, 2) if steppe.rules.needs_gradient(rule) else rule,
}


def fits(perturbation, combination, cadence) -> bool:
    """A cadence that needs g fits only where another rule makes the pass at w."""
    has_pass_at_w = steppe.rules.needs_gradient(perturbation) or combination.needs_unperturbed_gradient
    return has_pass_at_w or not steppe.rules.needs_gradient(cadence)


@pytest.mark.slow
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(perturbations, combinations, cadences, st.sampled_from(sorted(SUBSETS)), st.sampled_from(["sgd", "adamw"]))
def test_any_combination_keeps_the_contract(perturbation, combination, cadence, subset, base):
    def make(model):
        params = model.parameters()
        momentum = (
            torch.optim.SGD(params, lr=0.03, momentum=0.9) if base == "sgd" else torch.optim.AdamW(params, lr=0.01)
        )
        has_layers = len(list(model.modules())) > 4
        rule = SUBSETS[subset if has_layers or subset != "last layers" else "all"](perturbation, model)
        return steppe.SAM(momentum, 0.1, model=model, perturbation=rule, combination=combination, cadence=cadence)

    if not fits(perturbation, combination, cadence):
        with pytest.raises(ValueError, match="needs the gradient at w"):
            testing.passes_per_step(make, 1)
        return
    for check in testing.CHECKS:
        check(make)
