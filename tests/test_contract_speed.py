"""The contract, C25 to C27: no synchronization, no recompilation, no work that grows with the number of tensors."""

import collections
import gc
import weakref

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import steppe
from steppe import SAM
from support import DRIVES, batch, bits, by_closure, by_passes, net, train

CUDA_BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
}
RULES = [steppe.L2(), steppe.Adaptive()]


class Count(TorchDispatchMode):
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith("prim.") and "detach" not in str(func):  # questions and views, no work
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


def one_step(optimizer: SAM, params: list[nn.Parameter], drive: str) -> None:
    """One step with gradients made by hand: a CPU build of torch has no autograd for CUDA tensors."""

    def give():
        for p in params:
            p.grad = torch.ones_like(p)

    if drive == "passes":
        for sam_pass in optimizer.passes():
            with sam_pass:
                give()
        optimizer.step()
    elif drive == "closure":
        optimizer.step(give)
    else:
        give()
        optimizer.first_step(zero_grad=True)
        give()
        optimizer.second_step(zero_grad=True)


# C25


@pytest.mark.parametrize("drive", DRIVES)
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("base", CUDA_BASES)
def test_c25_no_host_synchronization(base, rule, drive):
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(n, 3, device="cuda")) for n in range(1, 5)]
        optimizer = SAM(CUDA_BASES[base](params), rho=0.1, perturbation=rule)
        for _ in range(3):
            one_step(optimizer, params, drive)
        assert optimizer._engine.steps == 3
        assert optimizer._engine.gradients.skipped.device.type == "cuda", (
            "the count stays on the device until it is asked for"
        )
        with pytest.raises(Exception, match="_local_scalar_dense|not linked"):
            int(optimizer._engine.gradients.skipped)  # and this is how a synchronization shows itself here


class Scales:
    """What a loss scaler is for an optimizer, on tensors that are not there."""

    def is_enabled(self):
        return True

    def scale(self, x):
        return x * torch.empty((), device="cuda")

    def _maybe_opt_step(self, optimizer):  # the name by which a scaler is known to have called
        optimizer.step()


@pytest.mark.parametrize("rule", [steppe.L2(), steppe.Friendly(), steppe.Fisher()], ids=str)
def test_c25_nor_to_know_the_loss_scale(rule):
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(n, 3, device="cuda")) for n in range(1, 5)]
        scaler = Scales()
        optimizer = SAM(torch.optim.SGD(params, lr=0.1), rho=0.1, perturbation=rule, scaler=scaler)
        for _ in range(2):
            for sam_pass in optimizer.passes():
                with sam_pass:
                    for p in params:
                        p.grad = torch.ones_like(p)
            scaler._maybe_opt_step(optimizer)
        assert optimizer._engine.steps == 2


def test_c25_a_radius_may_live_on_the_device():
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(3, device="cuda"))]
        optimizer = SAM(torch.optim.SGD(params, lr=0.1), rho=torch.empty((), device="cuda"))
        one_step(optimizer, params, "passes")
        assert optimizer._engine.steps == 1
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=torch.tensor(0.5))
    by_passes(optimizer, lambda: w.square().sum().div(2))
    torch.testing.assert_close(w.detach(), torch.tensor([-0.3, -0.4]))


# C26


def compilable() -> nn.Module:
    model = net(dropout=0.0)
    model.layers[4].momentum = 0.1  # with None, BatchNorm itself reads its counter on the host
    return model


def test_c26_a_compiled_model_is_not_compiled_again_after_the_first_step():
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
def test_c26_a_compiled_step_clears_its_state(how):
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
            assert optimizer._engine.stage is steppe.sam.Stage.AT_W
            assert not optimizer._engine._displacement.active
        assert optimizer._engine.steps == 4
        results.append(w.detach().clone())
    torch.testing.assert_close(*results)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["sam", "gsam", "looksam", "friendly_sam", "lookbehind_sam"])
def test_c26_nor_for_other_methods_with_a_schedule_and_a_compiled_base(name):
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


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # of the loss, at which Dynamo looks
def test_c26_a_whole_compiled_training_step():
    """Dynamo cannot look into our step; it has to leave it whole, and not to drop what it writes."""
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

        run = torch.compile(step, backend="eager") if compiled else step
        for t in range(3):
            run(*batch(t))
        assert optimizer._engine.steps == 3
        results.append([p.detach().clone() for p in model.parameters()])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


# CUDA graphs: what a capture needs, without a GPU. tests/test_cuda.py captures one.


@pytest.mark.parametrize("rule", [steppe.L2(), steppe.Adaptive(), steppe.Friendly()], ids=str)
def test_what_outlives_a_step_keeps_its_storage(rule):
    """A graph writes where it wrote when it was captured."""
    model = net()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    reuse = steppe.GradientReuse()
    optimizer = SAM(base, rho=0.1, model=model, perturbation=rule, combination=reuse)
    places = []
    for step in range(3):
        train(model, optimizer, by_passes, 1, start=step)
        engine = optimizer._engine
        kept = [*model.parameters(), *model.buffers(), *engine._displacement._copies.values()]
        kept += [t for rules in engine.memory.values() for own in rules.values() for t in own.values()]
        kept += [s["momentum_buffer"] for s in base.state.values()]
        places.append([t.data_ptr() for t in kept])
    assert places[0] == places[1] == places[2]


def test_a_capture_is_done_without_generators_or_refused(monkeypatch):
    monkeypatch.setattr("steppe._engine.capture.is_capturing", lambda parameter: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(n, 3, device="cuda")) for n in range(1, 5)]
        base = torch.optim.AdamW(params, lr=0.1, fused=True)
        one_step(SAM(base, rho=torch.empty((), device="cuda"), replay_rng=False), params, "passes")
        with pytest.raises(RuntimeError, match=r"capture.*replay_rng=False"):
            one_step(SAM(base, rho=0.1), params, "passes")
        with pytest.raises(RuntimeError, match=r"capture with Every\(k=5\).*host"):
            one_step(steppe.variants.looksam(base, replay_rng=False), params, "passes")


def test_a_graph_for_each_kind_of_step(monkeypatch):
    monkeypatch.setattr("steppe._engine.capture.is_capturing", lambda parameter: True)
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(n, 3, device="cuda")) for n in range(1, 5)]
        base = torch.optim.AdamW(params, lr=0.1, fused=True)
        optimizer = SAM(base, rho=0.1, cadence=steppe.Periodic(3), replay_rng=False)
        climbed = []
        for step in range(7):
            kind = optimizer.perturbs_next
            if step in (3, 4):  # two replays: the device does what the captured steps did, and the host counts
                optimizer.replayed()
            else:
                before = optimizer._engine.steps
                with optimizer.recording():
                    one_step(optimizer, params, "passes")
                assert optimizer._engine.steps == before + 1
            climbed.append(kind)
        assert climbed == [True, False, False, True, False, False, True]
        with pytest.raises(RuntimeError, match=r"capture with Every\(k=3\).*recording"):
            one_step(optimizer, params, "passes")
        by_gradient = steppe.variants.aesam(base, total_steps=10, replay_rng=False)
        assert by_gradient.perturbs_next is None
        with pytest.raises(RuntimeError, match="gradient at w"), by_gradient.recording():
            pass


# C27


def operations(tensors: int, rule, base, device: str) -> int:
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(3, 5, device=device)) for _ in range(tensors)]
        optimizer = SAM(base(params), rho=0.1, perturbation=rule)
        one_step(optimizer, params, "passes")
        for p in params:
            p.grad = torch.ones_like(p)
        at = optimizer._engine.point()
        with Count() as count:
            optimizer._engine.perturb(at, rule, keep_unperturbed=False)
            optimizer._engine.restore()
    return sum(count.operations.values())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_c27_operations_do_not_grow_with_the_number_of_tensors(rule):
    few, many = (operations(n, rule, CUDA_BASES["sgd"], "cuda") for n in (10, 100))
    assert few == many
    assert many < 40


def test_c27_no_temporaries_of_the_size_of_the_weights():
    """Norm 1N, backup 2N, climb 3N, restore 2N: nothing of size N is allocated on the way after the first step."""
    n = 1 << 16
    params = [nn.Parameter(torch.randn(n)) for _ in range(4)]
    optimizer = SAM(torch.optim.SGD(params, lr=0.1), rho=0.1)
    one_step(optimizer, params, "passes")
    for p in params:
        p.grad = torch.ones_like(p)

    class Allocated(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            known = {t.untyped_storage().data_ptr() for t in tree_flatten((args, kwargs))[0] if torch.is_tensor(t)}
            out = func(*args, **(kwargs or {}))
            new = [t for t in tree_flatten(out)[0] if torch.is_tensor(t)]
            new = [t for t in new if t.untyped_storage().data_ptr() not in known]
            self.largest = max([self.largest, *(t.numel() for t in new)])
            return out

    at = optimizer._engine.point()
    with Allocated() as allocated:
        optimizer._engine.perturb(at, steppe.L2(), keep_unperturbed=False)
        optimizer._engine.restore()
    assert 0 < allocated.largest <= 2 * n * len(params) / 256, "only the norms of the pieces"


def test_the_first_gradient_is_not_kept_alive_through_the_second_pass():
    w = nn.Parameter(torch.ones(3))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.1)
    first = lambda: None  # noqa: E731
    for sam_pass in optimizer.passes():
        with sam_pass:
            if sam_pass.is_perturbed:
                gc.collect()
                assert first() is None
            w.square().sum().backward()
        first = weakref.ref(w.grad)
    optimizer.step()
    assert bits([w]) != bits([torch.ones(3)])
