"""The checks of the contract, each for any rule: they raise AssertionError when their first line does not hold."""

import copy
import io
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from steppe._tensors import random as random_tensors
from steppe.rules import ascent_steps, needs_gradient, scale_free
from steppe.rules.perturbed_gradient import PerturbedGradient
from steppe.sam import SAM
from steppe.testing._problems import (
    ComplexOrPairs,
    Make,
    batch_loss,
    bits,
    bits_in_place,
    closure_of,
    closure_of_batch,
    count_passes,
    expect,
    expect_same_bits,
    expect_skips,
    network,
    seeded,
    train,
)

Check = Callable[[Make], None]
"""A check: it builds optimizers with a function :data:`Make`, and raises an AssertionError if a statement is broken."""


class _PassInterruptedError(Exception):
    pass


def resumes_to_the_bit(make: Make) -> None:
    """A run resumed from a checkpoint, at any step, ends with the same bits as an uninterrupted one."""
    straight = network()
    train(straight, make(straight), 9)
    for after in (1, 4):
        model = network()
        optimizer = make(model)
        train(model, optimizer, after)
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        model = network(seed=9)
        optimizer = make(model)
        model.load_state_dict(weights)
        optimizer.load_state_dict(state)
        train(model, optimizer, 9 - after, start=after)
        why = f"a checkpoint after step {after} does not hold all that the next steps depend on"
        expect_same_bits(straight, model, why)


def copies_continue_identically(make: Make) -> None:
    """A deep copy of model and optimizer takes the same next steps, to the bit."""
    model = network()
    optimizer = make(model)
    train(model, optimizer, 3)
    twin, twin_optimizer = copy.deepcopy((model, optimizer))
    train(model, optimizer, 3, start=3)
    train(twin, twin_optimizer, 3, start=3)
    expect_same_bits(model, twin, "something that the next step depends on is not copied with the optimizer")


def rules_are_stateless(make: Make) -> None:
    """Two optimizers that share the rule objects do not change each other's steps."""
    undisturbed = network()
    train(undisturbed, make(undisturbed), 6)
    model, other = network(), network(seed=5)
    optimizer = make(model)
    # A rule may name parameters of the model (ParameterSubset): the neighbor has these as well, and does not move them.
    groups: list[dict[str, Any]] = [{"params": other.parameters()}, {"params": model.parameters(), "lr": 0.0}]
    neighbor = SAM(
        torch.optim.SGD(groups, lr=0.1, momentum=0.9),
        0.3,
        model=[other, model],
        perturbation=optimizer.perturbation,
        combination=optimizer.combination,
        cadence=optimizer.cadence,
    )
    for step in range(6):
        train(other, neighbor, 1, start=step + 50)
        train(model, optimizer, 1, start=step)
    expect_same_bits(undisturbed, model, "a rule keeps state in itself: memory belongs into Point.memory_of(self)")


def weights_are_restored_exactly(make: Make) -> None:
    """Between two passes, and after an exception in any of them, the weights are at w, to the bit and in place."""
    for dtype in (torch.float32, torch.bfloat16):
        model = network().to(dtype)
        optimizer = make(model)
        train(model, optimizer, 2)
        for fail_in in (None, *range(ascent_steps(optimizer.perturbation) + 1)):
            before = bits_in_place(model.parameters())
            try:
                for number, sam_pass in enumerate(optimizer.passes()):
                    with sam_pass:
                        batch_loss(model, 7).backward()  # type: ignore[no-untyped-call]
                        if number == fail_in:
                            raise _PassInterruptedError
                    expect(
                        bits_in_place(model.parameters()) == before, f"the weights are not at w after a pass ({dtype})"
                    )
            except _PassInterruptedError:
                pass
            expect(bits_in_place(model.parameters()) == before, f"the weights were not restored in place ({dtype})")
            optimizer.restore()
        train(model, optimizer, 3)
        expect(all(p.isfinite().all() for p in model.parameters()), f"the weights are not finite ({dtype})")


def side_effects_are_those_of_one_pass(make: Make) -> None:
    """Buffers and random generators are as after one ordinary pass at w."""
    model, twin = network(), network()
    optimizer = make(model)
    train(model, optimizer, 2)
    twin.load_state_dict(model.state_dict())
    states = []
    for trained in (twin, model):
        torch.manual_seed(11)
        if trained is twin:
            batch_loss(twin, 7)
        else:
            for sam_pass in optimizer.passes():
                with sam_pass:
                    batch_loss(model, 7).backward()  # type: ignore[no-untyped-call]
                    single_pass = sam_pass.is_perturbed and sam_pass.is_first
        states.append(torch.get_rng_state())
    expect(torch.equal(*states), "the random generators moved on by more than one pass")
    if not single_pass:  # where the only pass is at w + e, its statistics are those of w + e
        expect(bits(model.buffers()) == bits(twin.buffers()), "a pass at w + e changed the model's buffers")


def radius_zero_is_the_base(make: Make) -> None:
    """With rho = 0 the steps are the base optimizer's: to the bit if the update uses g_s, else up to rounding."""
    model, twin = network(), network()
    optimizer, plain = make(model), make(twin).base
    for group in (*optimizer.param_groups, *plain.param_groups):
        group["sam_rho"] = 0.0
    for step in range(6):
        torch.manual_seed(step)
        optimizer.step(closure_of_batch(model, optimizer, step))
        torch.manual_seed(step)
        plain.zero_grad()
        batch_loss(twin, step).backward()  # type: ignore[no-untyped-call]
        plain.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    if isinstance(optimizer.combination, PerturbedGradient):
        expect_same_bits(model, twin, "with rho = 0 the steps are not those of the base optimizer")


def steps_that_are_not_finite_are_skipped(make: Make) -> None:
    """A NaN in any pass skips the step, leaves the weights unchanged, and enters no memory."""
    for bad in range(max(count_passes(make, 20))):
        model = network()
        optimizer = make(model)
        train(model, optimizer, 2)
        calls: list[int] = []

        def poisoned(model: nn.Module = model, calls: list[int] = calls, bad: int = bad) -> Tensor:
            calls.append(1)
            return batch_loss(model, 7) * (float("nan") if len(calls) == bad + 1 else 1.0)

        for _ in range(20):
            before = bits_in_place(model.parameters())
            calls.clear()
            with expect_skips():
                optimizer.step(closure_of(optimizer, poisoned))
            if optimizer.skipped_steps:
                break
        expect(optimizer.skipped_steps == 1, f"a NaN in pass {bad + 1} did not skip the step")
        expect(bits_in_place(model.parameters()) == before, "a skipped step changed the weights")
        with expect_skips():
            train(model, optimizer, 12, start=8)
        expect(optimizer.skipped_steps == 1, "a NaN entered the memory: later steps were skipped too")
        expect(
            all(p.isfinite().all() for p in model.parameters()), "a NaN entered the memory: the weights are not finite"
        )


def scale_free_rules_ignore_the_scale(make: Make) -> None:
    """A perturbation with ``scale_free = True`` is the same for a loss that is multiplied by a number."""
    perturbed: list[list[Tensor]] = []
    for factor in (1.0, 1024.0):
        model = network()
        optimizer = make(model)
        rules = scale_free(optimizer.perturbation), scale_free(optimizer.combination), scale_free(optimizer.cadence)
        if not all(rules):
            return  # what another rule keeps of the gradients, or decides by them, may change the perturbation, too
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the weights stay, so that only the perturbations can differ
        perturbed.append([])
        for step in range(3):
            for sam_pass in optimizer.passes():
                with sam_pass, seeded(step):
                    perturbed[-1] += [p.detach().clone() for p in model.parameters()]
                    (batch_loss(model, step) * factor).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    plain, scaled = perturbed
    expect(
        len(plain) == len(scaled) and all(map(_are_close, plain, scaled)),
        "the perturbation declares scale_free = True, but depends on the scale of the loss: with a loss scaler it "
        "would be too long by the scale. Declare scale_free = False, or divide by a norm of the gradient",
    )


def _are_close(one: Tensor, other: Tensor) -> bool:
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def gradients_may_be_absent_or_zero(make: Make) -> None:
    """A parameter with a gradient in one pass only, or in none, and gradients that are zero, stay finite."""
    for absent in (
        (lambda sam_pass: sam_pass.is_perturbed),
        (lambda sam_pass: not sam_pass.is_perturbed),
        (lambda sam_pass: True),
    ):
        model = network()
        optimizer = make(model)
        for step in range(4):
            for sam_pass in optimizer.passes():
                with sam_pass:
                    batch_loss(model, step).backward()  # type: ignore[no-untyped-call]
                    if absent(sam_pass):
                        model.layers[3].weight.grad = None
            optimizer.step()
        expect(
            all(p.isfinite().all() for p in model.parameters()), "an absent gradient made weights that are not finite"
        )
    model = network()
    optimizer = make(model)
    with expect_skips():
        for step in range(3):
            optimizer.step(closure_of(optimizer, lambda: batch_loss(model, step) * 0.0))  # noqa: B023
    expect(
        not optimizer.skipped_steps,
        "a zero gradient made a perturbation that is not finite (0 / 0?), and the step was skipped",
    )
    expect(all(p.isfinite().all() for p in model.parameters()), "a zero gradient made weights that are not finite")


def complex_parameters_work(make: Make) -> None:
    """A complex parameter is perturbed and updated like the real one of twice the size."""
    ends = []
    for as_complex in (True, False):
        model = ComplexOrPairs(as_complex)
        optimizer = make(model)
        for _ in range(4):
            optimizer.step(closure_of(optimizer, model))
        ends.append(torch.view_as_real(model.w.detach()) if as_complex else model.w.detach())
    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-9)


def no_value_is_read_on_the_host(make: Make) -> None:
    """No value is read on the host, as fake CUDA tensors show; only a cadence that needs the gradient may do so."""
    with FakeTensorMode(allow_non_fake_inputs=True), mock.patch.object(random_tensors, "generator", return_value=None):
        model = nn.Sequential(nn.Linear(3, 3, device="meta"), nn.LayerNorm(3, device="meta"))
        for layer in model:
            for name, p in layer.named_parameters():
                setattr(layer, name, nn.Parameter(torch.empty(p.shape, device="cuda")))
        optimizer = make(model)
        if needs_gradient(optimizer.cadence):
            return

        def set_gradients() -> None:
            for p in model.parameters():
                p.grad = torch.ones_like(p)

        for _ in range(12):
            optimizer.step(set_gradients)


CHECKS: tuple[Check, ...] = (
    resumes_to_the_bit,
    copies_continue_identically,
    rules_are_stateless,
    weights_are_restored_exactly,
    side_effects_are_those_of_one_pass,
    radius_zero_is_the_base,
    scale_free_rules_ignore_the_scale,
    steps_that_are_not_finite_are_skipped,
    gradients_may_be_absent_or_zero,
    complex_parameters_work,
    no_value_is_read_on_the_host,
)
"""All checks."""
