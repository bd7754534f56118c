"""Requirements of the capture of a step in a CUDA graph, without a GPU; tests/test_cuda.py captures one."""

import pytest
import torch
import torch._dynamo
from torch._subclasses.fake_tensor import FakeTensorMode

import steppe
from fake_cuda import fake_parameters, step_with_ones
from steppe import SAM
from support import by_passes, net, train


@pytest.mark.parametrize("rule", [steppe.L2(), steppe.Adaptive(), steppe.Friendly()], ids=str)
def test_tensors_kept_between_steps_keep_their_storage(rule):
    """A CUDA graph writes to the addresses of its capture, so kept tensors must not move."""
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reuse = steppe.GradientReuse()
    optimizer = SAM(base, rho=0.1, model=model, perturbation=rule, combination=reuse)
    pointers = []
    for step in range(3):
        train(model, optimizer, by_passes, 1, start=step)
        engine = optimizer._engine
        kept = [*model.parameters(), *model.buffers(), *engine._displacement._copies.values()]
        kept += [t for rules in engine.memory.values() for own in rules.values() for t in own.values()]
        kept += [s["momentum_buffer"] for s in base.state.values()]
        pointers.append([t.data_ptr() for t in kept])
    assert pointers[0] == pointers[1] == pointers[2]


def test_capture_with_generators_or_a_decision_on_the_host_raises(monkeypatch):
    monkeypatch.setattr("steppe._engine.capture.is_capturing", lambda parameter: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = fake_parameters()
        base = torch.optim.AdamW(params, lr=0.1, fused=True)
        step_with_ones(SAM(base, rho=torch.empty((), device="cuda"), replay_rng=False), params, "passes")
        with pytest.raises(RuntimeError, match=r"capture.*replay_rng=False"):
            step_with_ones(SAM(base, rho=0.1), params, "passes")
        with pytest.raises(RuntimeError, match=r"capture with Periodic\(interval=5\).*host"):
            step_with_ones(steppe.variants.looksam(base, replay_rng=False), params, "passes")


def test_recording_allows_one_graph_for_each_kind_of_step(monkeypatch):
    monkeypatch.setattr("steppe._engine.capture.is_capturing", lambda parameter: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = fake_parameters()
        base = torch.optim.AdamW(params, lr=0.1, fused=True)
        optimizer = SAM(base, rho=0.1, cadence=steppe.Periodic(3), replay_rng=False)
        perturbed = []
        for step in range(7):
            perturbs = optimizer.perturbs_next
            if step in (3, 4):  # two replays: the device repeats the captured step, and the host counts
                optimizer.replayed()
            else:
                before = optimizer._engine.steps
                with optimizer.recording():
                    step_with_ones(optimizer, params, "passes")
                assert optimizer._engine.steps == before + 1
            perturbed.append(perturbs)
        assert perturbed == [True, False, False, True, False, False, True]
        with pytest.raises(RuntimeError, match=r"capture with Periodic\(interval=3\).*recording"):
            step_with_ones(optimizer, params, "passes")
        by_gradient = steppe.variants.aesam(base, total_steps=10, replay_rng=False)
        assert by_gradient.perturbs_next is None
        with pytest.raises(RuntimeError, match="gradient at w"), by_gradient.recording():
            pass
