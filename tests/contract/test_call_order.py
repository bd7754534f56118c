"""Contract C8 and C9: meaning of step(), and errors for calls out of order."""

import warnings

import pytest
import torch

import steppe
from steppe import SAM
from support import by_closure, by_passes, parameter


def test_c8_step_calls_the_closure_once_a_pass_and_returns_the_loss_at_w():
    w = parameter(3.0, 4.0)
    for interval, want in ((1, [2, 2, 2]), (2, [2, 1, 2])):
        optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=1.0, cadence=steppe.Periodic(interval))
        counts = []
        for _ in range(3):
            losses = []

            def closure(losses=losses, optimizer=optimizer):
                optimizer.zero_grad()
                loss = w.square().sum()
                loss.backward()
                losses.append(loss.item())
                return loss

            assert optimizer.step(closure).item() == pytest.approx(25.0)
            counts.append(len(losses))
            assert losses[1:] == [pytest.approx(36.0)] * (len(losses) - 1), "|w + e| = 5 + rho"
        assert counts == want


@pytest.mark.parametrize("api", ["passes", "first_step"])
@pytest.mark.parametrize("argument", [[], [lambda: 1 / 0], [None]])
def test_c8_step_after_the_passes_takes_the_base_step_and_ignores_its_argument(api, argument):
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    if api == "passes":
        for sam_pass in optimizer.passes():
            with sam_pass:
                w.square().sum().backward()
    else:
        w.square().sum().backward()
        optimizer.first_step(zero_grad=True)
        w.square().sum().backward()
    optimizer.step(*argument)
    want = torch.tensor([3.0, 4.0]) - 0.1 * 2 * torch.tensor([3.6, 4.8])
    torch.testing.assert_close(w.detach(), want)


def test_c8_step_without_passes_is_a_base_step_and_warns_once():
    w = parameter(3.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    w.grad = torch.tensor([1.0])
    with pytest.warns(UserWarning, match="a plain step of SGD"):
        optimizer.step()
    assert w.item() == pytest.approx(2.9)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_c8_step_without_passes_warns_for_a_base_without_learning_rate():
    class Fixed(torch.optim.Optimizer):
        def __init__(self, params):
            super().__init__(params, {})

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p -= 0.1 * p.grad

    w = parameter(3.0)
    optimizer = SAM(Fixed([w]), rho=1.0)
    w.grad = torch.tensor([1.0])
    with pytest.warns(UserWarning, match="a plain step of Fixed"):
        optimizer.step()


def test_c8_step_skipped_by_a_scaler_does_not_affect_the_next_step():
    w = parameter(3.0, 4.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=1.0)
    for sam_pass in optimizer.passes():
        with sam_pass:
            w.square().sum().backward()
    optimizer.zero_grad()  # the scaler did not call step()
    calls = []
    by_closure(optimizer, lambda: (calls.append(1), w.square().sum())[1])
    assert len(calls) == 2


def test_c9_calls_out_of_order_raise_with_the_call_to_make():
    w = parameter(1.0)
    optimizer = SAM(torch.optim.SGD([w], lr=0.1))
    with pytest.raises(RuntimeError, match=r"second_step\(\) was called before first_step\(\)"):
        optimizer.second_step()
    w.square().sum().backward()
    optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"first_step\(\) was called between first_step\(\) and second_step\(\)"):
        optimizer.first_step()
    with pytest.raises(RuntimeError, match=r"passes\(\) was called between"):
        next(optimizer.passes())
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) was called between"):
        optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    with pytest.raises(RuntimeError, match="was not entered"):
        for _ in optimizer.passes():
            w.square().sum().backward()
    for sam_pass in optimizer.passes():
        with sam_pass:
            with pytest.raises(RuntimeError, match="inside a pass"):
                optimizer.step()
            with pytest.raises(RuntimeError, match="inside a pass"):
                next(optimizer.passes())
            w.square().sum().backward()
        with pytest.raises(RuntimeError, match="inside the loop over passes"):
            optimizer.step()  # one indentation too many
        with pytest.raises(RuntimeError, match="has already run"), sam_pass:
            pass
        break
    with pytest.raises(RuntimeError, match=r"restore\(\) aborts the step"):
        optimizer.step()
    optimizer.restore()
    by_passes(optimizer, lambda: w.square().sum())
