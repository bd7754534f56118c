"""Contract C14 to C16: the second pass leaves buffers, generators, casts and other gradients as one pass does."""

import copy
import functools
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steppe import SAM, frozen_stats
from steppe._engine import side_effects
from steppe.methods.aesam import GradientNormThreshold
from steppe.methods.late_sam import LatePhase
from steppe.methods.random_sam import Bernoulli
from steppe.rules.periodic import Periodic
from support import BASES, DRIVES, batch, bits, by_closure, every_drive, model_bits, net, parameter, plain, train


class EvoNorm(nn.Module):
    """A norm that reads its running variance in training, and replaces the buffer instead of writing into it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.register_buffer("running_var", torch.ones(channels))
        self.register_buffer("calls", None)

    def forward(self, x):
        variance = x.var(dim=(0, *range(2, x.dim())), unbiased=False)
        if self.training:
            self.running_var = (0.9 * self.running_var + 0.1 * variance).detach()
            self.calls = torch.ones(()) if self.calls is None else self.calls + 1
        shape = (1, -1) + (1,) * (x.dim() - 2)
        return x * self.weight.view(shape) / self.running_var.view(shape).sqrt()


NORMS = {
    "batch": lambda: nn.BatchNorm2d(4),
    "cumulative": lambda: nn.BatchNorm2d(4, momentum=None),
    "sync": lambda: nn.SyncBatchNorm(4),
    "instance": lambda: nn.InstanceNorm2d(4, track_running_stats=True, affine=True),
    "evo": lambda: EvoNorm(4),
    "spectral": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 1)),
    "lazy": lambda: nn.LazyBatchNorm2d(),
}


def model_with(norm: str) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), NORMS[norm](), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3))
    if norm == "lazy":
        model(batch()[0])
        model[1].reset_running_stats()
    return model


@every_drive
@pytest.mark.parametrize("norm", NORMS)
def test_c14_buffers_equal_those_after_one_pass_without_sam(norm, drive):
    model, twin = model_with(norm), model_with(norm)
    # With lr = 0, the weights and therefore the first passes are the same with and without SAM.
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=2.0, model=model)
    train(model, optimizer, DRIVES[drive], 3)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), plain, 3)
    assert model_bits(model) == model_bits(twin)
    unprotected = model_with(norm)
    with pytest.warns(UserWarning, match=r"both passes changed the buffers .* Give SAM .* model=model"):
        train(unprotected, SAM(torch.optim.SGD(unprotected.parameters(), lr=0.0), rho=2.0), DRIVES[drive], 3)
    assert model_bits(unprotected) != model_bits(twin), "without model= the second pass must change the buffers"


def test_c14_both_passes_read_the_same_buffers():
    model = model_with("evo")
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=0.0, model=model)
    x, y = batch()
    losses = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            losses.append(F.cross_entropy(model(x), y))
            losses[-1].backward()
    assert losses[0].item() == losses[1].item(), "same weights, same buffers, same loss"


def test_c14_modules_in_eval_mode_are_unchanged_and_all_modes_are_kept():
    model = net()
    model.layers[1].eval()
    frozen = copy.deepcopy(model.layers[1].state_dict())
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=1.0, model=model)
    modes = [m.training for m in model.modules()]
    train(model, optimizer, by_closure, 2)
    assert [m.training for m in model.modules()] == modes
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        assert torch.equal(model.layers[1].state_dict()[name], frozen[name])


def test_c14_model_copied_inside_a_pass_updates_its_statistics():
    model = net(dropout=0.0)
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=1.0, model=model)
    x, y = batch()
    for sam_pass in optimizer.passes():
        with sam_pass:
            F.cross_entropy(model(x), y).backward()
            saved = copy.deepcopy(model)
    before = saved.layers[1].num_batches_tracked.item()
    saved(x)
    assert saved.layers[1].num_batches_tracked.item() == before + 1
    assert saved.layers[1].momentum == 0.1
    assert saved.layers[4].momentum is None


def test_c14_frozen_stats_restores_buffers_also_after_an_exception():
    model = model_with("batch")
    x, _ = batch()
    model(x)
    before = model_bits(model)
    with frozen_stats(model):
        model(x + 1)
        assert model_bits(model) != before
    assert model_bits(model) == before
    with pytest.raises(ZeroDivisionError), frozen_stats(model):
        model(x + 1)
        1 / 0  # noqa: B018
    assert model_bits(model) == before
    model(x)
    assert model_bits(model) != before


def test_c14_frozen_stats_restores_expanded_replaced_and_deleted_buffers():
    model = nn.Linear(2, 1)
    model.register_buffer("wide", torch.zeros(1).expand(5))
    model.register_buffer("count", torch.zeros(()))
    count = model.count
    with frozen_stats(model):
        model.count += 1
        model.register_buffer("new", torch.ones(1))
        del model.wide
    assert model.count is count
    assert count.item() == 0
    assert list(model._buffers) == ["wide", "count"]


@every_drive
def test_parameters_of_other_optimizers_get_the_gradient_of_one_pass(drive):
    model, twin = net(dropout=0.0), net(dropout=0.0)
    own, others = list(model.parameters())[:4], list(model.parameters())[4:]
    optimizer = SAM(torch.optim.SGD(own, lr=0.0), rho=1.0, model=model)
    train(model, optimizer, DRIVES[drive], 1)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), plain, 1)
    for p, q in zip(others, list(twin.parameters())[4:], strict=True):
        assert bits([p.grad]) == bits([q.grad])


def test_interrupt_before_second_pass_keeps_buffers_and_gradients_of_the_first(monkeypatch):
    model, twin = net(), net()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=1.0, model=model)
    train(model, optimizer, by_closure, 1)
    train(twin, torch.optim.SGD(twin.parameters(), lr=0.0), plain, 1)
    with monkeypatch.context() as patched:
        patched.setattr(side_effects.UntrainedGradients, "clear", lambda self: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            train(model, optimizer, by_closure, 1, start=1)
    x, _ = batch(1)
    twin(x)
    assert model_bits(model) == model_bits(twin)
    assert all(p.grad is not None for p in model.parameters())


CADENCES = {
    "periodic": Periodic(3),
    "late phase": LatePhase(0.5, 6),
    "bernoulli": Bernoulli(0.5, seed=2),
    "gradient norm": GradientNormThreshold(6, 0.0, 0.0, delta=0.1),
}


@every_drive
@pytest.mark.parametrize("cadence", CADENCES)
def test_c14_steps_without_a_perturbation_leave_the_trace_of_one_pass(cadence, drive):
    """Against step(closure), which makes one pass in such steps, and which the classic API cannot know beforehand."""
    results = []
    for way in (drive, "closure"):
        model, other = net(dtype=torch.float64), parameter(1.0, dtype=torch.float64)
        optimizer = SAM(BASES["momentum"](model.parameters()), rho=0.1, model=model, cadence=CADENCES[cadence])
        perturbed = []
        for step in range(6):
            model.train().register_parameter("other", other)  # of another optimizer
            other.grad = None
            x, y = batch(step, dtype=torch.float64)
            torch.manual_seed(step)
            passes = []

            def loss(model=model, other=other, x=x, y=y, passes=passes):
                passes.append(model.layers[0].weight.detach().clone())
                return F.cross_entropy(model(x) * other, y)

            w = model.layers[0].weight.detach().clone()
            DRIVES[way](optimizer, loss)
            perturbed.append(not all(torch.equal(w, at) for at in passes))
            results.append((way, model_bits(model), bits([other.grad, torch.rand(3)])))
        assert set(perturbed) == {True, False}
    first, second = results[:6], results[6:]
    assert [r[1:] for r in first] == [r[1:] for r in second]


@every_drive
def test_c15_second_pass_has_the_dropout_masks_of_the_first(drive):
    equal_masks = []
    for replay in (True, False):
        w = nn.Parameter(torch.ones(64))
        optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.1, replay_rng=replay)
        dropped = []

        def loss(w=w, dropped=dropped):
            dropped.append(F.dropout(torch.ones(64), 0.5))
            return (w * dropped[-1]).sum()

        DRIVES[drive](optimizer, loss)
        equal_masks.append(torch.equal(*dropped))
    assert equal_masks == [True, False]


@every_drive
def test_c15_generators_advance_as_in_one_pass(drive):
    def draw():
        return torch.rand(3).tolist(), random.random(), np.random.rand()

    w = nn.Parameter(torch.ones(2))
    optimizer = SAM(torch.optim.SGD([w], lr=0.0), rho=0.1)
    draws = []

    def seed():
        torch.manual_seed(1)
        random.seed(1)
        np.random.seed(1)

    seed()
    DRIVES[drive](optimizer, lambda: (draws.append(draw()), w.sum())[1])
    after = draw()
    seed()
    assert draws == [draw()] * 2
    assert after == draw()


@pytest.mark.parametrize("drive", ["closure", "passes", "classic"])
def test_c16_open_autocast_region_does_not_reuse_weights_cast_at_w(drive):
    torch.manual_seed(0)
    model = nn.Linear(8, 1)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.0), rho=1.0, model=model)
    x = torch.randn(4, 8)
    losses = []

    def loss():
        losses.append(model(x).float().square().mean())
        return losses[-1]

    with torch.autocast("cpu", dtype=torch.bfloat16):
        DRIVES[drive](optimizer, loss)
        loss()
    at_w, perturbed, again = (v.item() for v in losses)
    assert perturbed > at_w * 1.05, "the second pass ran with casts of w"
    assert again == at_w, "the pass after the step ran with casts of w + e"


@pytest.mark.parametrize("name_of_the_input", ["x", "in a list"])
def test_c14_gradients_of_inputs_are_those_of_the_first_pass_in_each_pass(name_of_the_input):
    """Adversarial training (FGM): the batch is new in each step, and nobody clears its gradient."""
    ends = []
    for clears in (False, True):
        model = net(dropout=0.0)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.3, model=model)
        for step in range(3):
            x, y = batch(step)
            inputs = [x]

            def closure(inputs=inputs, y=y, clears=clears, model=model, optimizer=optimizer):
                x = inputs[0]
                if clears:
                    x.grad = None
                x.requires_grad_(True)
                F.cross_entropy(model(x), y).backward()
                adversarial = x.detach() + 0.5 * x.grad / x.grad.norm()
                optimizer.zero_grad()
                loss = F.cross_entropy(model(adversarial), y)
                loss.backward()
                return loss

            if name_of_the_input == "x":
                optimizer.step(lambda x=x, y=y: closure([x], y))
            else:
                optimizer.step(closure)
            assert clears or x.grad is not None
        ends.append(model_bits(model))
    assert ends[0] == ends[1]


@pytest.mark.parametrize("kind", [lambda value: value.requires_grad_(), nn.Parameter])
def test_c14_plain_tensors_may_be_parameters_and_others_have_the_gradient_of_one_pass(kind):
    """Such as SAC's temperature, which has an optimizer of its own."""
    w, temperature = torch.tensor([3.0], requires_grad=True), kind(torch.tensor([3.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)
    gradient = 0.0
    for _ in range(2):
        before = w.item()
        optimizer.step(lambda: (w.square() * temperature).sum())
        assert w.item() == pytest.approx(before - 0.1 * 2 * (before + 0.5) * 3)
        gradient += before**2
        assert temperature.grad.item() == pytest.approx(gradient)


class Adversary:
    """Trains on clean inputs first, and with a perturbation of them afterwards ("free" adversarial training)."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.kind, self.model = kind, nn.Linear(4, 3).double()
        self.x, self.y = torch.randn(8, 4, dtype=torch.float64), torch.randint(3, (8,))
        self.delta = None
        self.optimizer = SAM(torch.optim.SGD(self.model.parameters(), lr=0.0), rho=0.5, model=self.model)

    def loss(self, x):
        return F.cross_entropy(self.model(x), self.y)

    def closure(self):
        if self.delta is None:
            return self.loss(self.x)
        return self.loss(self.x + (self.delta[0] if isinstance(self.delta, list) else self.delta))

    def lazy_closure(self):
        if self.delta is None:
            self.delta = torch.zeros_like(self.x, requires_grad=True)
        return self.closure()

    def adversarial_step(self):
        """Return the perturbation of a step whose closure makes a gradient of it."""
        model, x, y = self.model, self.x, self.y
        delta = torch.zeros_like(x, requires_grad=self.kind != "same closure, asks for the gradient late")
        if self.kind == "another closure":
            self.optimizer.step(lambda: F.cross_entropy(model(x + delta), y))
        elif self.kind == "made by the closure":
            self.optimizer.step(self.lazy_closure)
            return self.delta
        elif self.kind == "same closure, asks for the gradient late":
            self.delta = delta
            self.optimizer.step(lambda: (delta.requires_grad_(), self.closure())[1])
        else:
            self.delta = [delta] if self.kind == "in a list" else delta
            self.optimizer.step(self.closure)
        return delta


@pytest.mark.parametrize("warm", [0, 2])
@pytest.mark.parametrize(
    "kind",
    [
        "same closure",
        "in a list",
        "another closure",
        "made by the closure",
        "same closure, asks for the gradient late",
    ],
)
def test_c14_adversarial_training_may_begin_after_the_first_step(kind, warm):
    adversary = Adversary(kind)
    for _ in range(warm):
        adversary.optimizer.step(adversary.closure)
    delta = adversary.adversarial_step()
    (want,) = torch.autograd.grad(adversary.loss(adversary.x + delta), delta)
    torch.testing.assert_close(delta.grad, want)


class Trainer:
    """Holds an input with a gradient, and is a closure itself."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0]))
        self.delta, self.steps = torch.tensor([2.0], requires_grad=True), torch.tensor(0)

    def __call__(self) -> torch.Tensor:
        return (self.w.square() * self.delta).sum()


class Caller:
    """Is a closure that calls a function."""

    def __init__(self, function) -> None:
        self.function = function

    def __call__(self) -> torch.Tensor:
        return self.function()


class TrainedModule(Trainer, nn.Module):
    """Both, as in Lightning."""


CLOSURES = {
    "function": lambda trainer: lambda: trainer(),
    "method": lambda trainer: trainer.__call__,
    "partial": lambda trainer: functools.partial(Trainer.__call__, trainer),
    "object": lambda trainer: trainer,
    "decorated": lambda trainer: torch.enable_grad()(lambda: trainer()),
    "called by another function": lambda trainer: (lambda loss: lambda: loss())(trainer.__call__),
    "held by an object": lambda trainer: Caller(lambda: trainer()),
    "compiled": lambda trainer: torch.compile(lambda: trainer(), backend="eager"),
}


@pytest.mark.parametrize("form", CLOSURES)
@pytest.mark.parametrize("kind", [Trainer, TrainedModule])
def test_c14_inputs_that_an_object_holds_have_the_gradient_of_one_pass(kind, form):
    trainer = kind()
    optimizer = SAM(torch.optim.SGD([trainer.w], lr=0.1), rho=0.5)
    gradient = 0.0
    for _ in range(2):
        gradient += trainer.w.item() ** 2
        optimizer.step(CLOSURES[form](trainer))
        assert trainer.delta.grad.item() == pytest.approx(gradient)
    if form == "compiled":
        torch._dynamo.reset()


def test_c14_gradients_of_untrained_parameters_that_the_closure_names_are_those_of_one_pass():
    """They are protected as parameters of the model, and as inputs of the closure."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3))
    twin, x = copy.deepcopy(model), torch.randn(8, 4)
    frozen, other = list(model[0].parameters()), twin[0]
    optimizer = SAM(torch.optim.SGD(model[1].parameters(), lr=0.1), rho=0.5, model=model)
    base = torch.optim.SGD(twin[1].parameters(), lr=0.0)
    for _ in range(2):
        twin.load_state_dict(model.state_dict())

        def closure():
            assert len(frozen) == 2
            return model(x).square().mean()

        optimizer.step(closure)
        plain(base, lambda: twin(x).square().mean())
        assert bits(p.grad for p in frozen) == bits(p.grad for p in other.parameters())
