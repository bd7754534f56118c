"""Contract C26: compiled models and compiled steps."""

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters

import steppe
from steppe import SAM
from support import batch, by_closure, by_passes, net, train


def compilable() -> nn.Module:
    model = net(dropout=0.0)
    model.layers[4].momentum = 0.1  # with None, BatchNorm itself reads its counter on the host
    return model


def test_c26_compiled_model_is_not_recompiled_after_the_first_step():
    torch._dynamo.reset()
    counters.clear()
    model = compilable()
    compiled = torch.compile(model, backend="aot_eager")
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.1, model=model)
    eager = compilable()
    eager_optimizer = SAM(torch.optim.SGD(eager.parameters(), lr=0.1, momentum=0.9), rho=0.1, model=eager)
    train(compiled, optimizer, by_closure, 1)
    graphs = counters["stats"]["unique_graphs"]
    assert graphs > 0
    train(compiled, optimizer, by_closure, 4, start=1)
    assert counters["stats"]["unique_graphs"] == graphs
    train(eager, eager_optimizer, by_closure, 5)
    for p, q in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.parametrize("how", ["after passes", "classic"])
def test_c26_compiled_step_clears_its_state(how):
    torch._dynamo.reset()
    results = []
    for compiled in (False, True):
        w = nn.Parameter(torch.tensor([3.0, 4.0]))
        optimizer = SAM(torch.optim.SGD([w], lr=0.1, momentum=0.9), rho=1.0, cadence=steppe.Periodic(2))
        step = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for _ in range(4):
            if how == "after passes":
                for sam_pass in optimizer.passes():
                    with sam_pass:
                        w.square().sum().backward()
            else:
                optimizer.zero_grad()
                w.square().sum().backward()
                optimizer.first_step(zero_grad=True)
                w.square().sum().backward()
            step()
            assert optimizer._engine.stage is steppe.sam.Stage.IDLE
            assert not optimizer._engine._displacement.active
        assert optimizer._engine.steps == 4
        results.append(w.detach().clone())
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    "name",
    [
        "looksam",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("sam", "gsam", "friendly_sam", "lookbehind_sam")),
    ],
)
def test_c26_methods_with_a_schedule_and_a_compiled_base_are_not_recompiled(name):
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        model = compilable()
        base = torch.optim.SGD(model.parameters(), lr=torch.tensor(0.05), momentum=0.9)
        run = torch.compile(model, backend="aot_eager") if compiled else model
        if compiled:
            base.step = torch.compile(base.step, backend="aot_eager")
        optimizer = getattr(steppe.variants, name)(base, rho=0.1, model=model)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        for step in range(6):
            train(run, optimizer, by_passes, 1, start=step)
            schedule.step()
            if step == 1:
                graphs = counters["stats"]["unique_graphs"]
        assert counters["stats"]["unique_graphs"] == graphs
        assert (graphs > 0) == compiled
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # Dynamo reads .grad of the loss
@pytest.mark.parametrize("form", ["closure", "passes"])
def test_c26_compiled_training_step_equals_the_eager_one(form):
    """Dynamo cannot trace SAM's step; it must run the step eagerly and keep its side effects."""
    results = []
    for compiled in (False, True):
        torch._dynamo.reset()
        model = compilable()
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), rho=0.1, model=model)

        def step(x, y, model=model, optimizer=optimizer):
            def closure():
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(x), y)
                loss.backward()
                return loss

            return optimizer.step(closure)

        def loop(x, y, model=model, optimizer=optimizer):
            for sam_pass in optimizer.passes():
                with sam_pass:
                    nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()

        step = step if form == "closure" else loop
        run = torch.compile(step, backend="eager") if compiled else step
        for t in range(3):
            run(*batch(t))
        assert optimizer._engine.steps == 3
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()
