"""Contract C28 and C32: the second pass leaves no trace in ``model=``, and what it changes elsewhere is named."""

import collections
import copy
import enum
import gc
import random
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrize

from steppe import SAM, variants
from support import DRIVES, every_drive, model_bits, plain


def pair(seed: int = 0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=g), torch.randint(3, (16,), generator=g)


class MomentumEncoder(nn.Module):
    """A forward that assigns to parameters without gradients, and counts."""

    def __init__(self, write: str) -> None:
        super().__init__()
        self.write, self.calls = write, 0
        self.query, self.head = nn.Linear(6, 4), nn.Linear(8, 3)
        self.key = copy.deepcopy(self.query).requires_grad_(False)

    def forward(self, x):
        self.calls += 1
        for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            if self.write == "data":
                k.data = 0.9 * k.data + 0.1 * q.data
            elif self.write == "data in place":
                k.data.mul_(0.9).add_(q.data, alpha=0.1)
            else:
                with torch.no_grad():
                    k.lerp_(q, 0.1)
        return self.head(torch.cat([self.query(x), self.key(x)], 1))


class Observer(nn.Module):
    """A buffer that the first forward resizes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.register_buffer("largest", torch.zeros(0))

    def forward(self, x):
        now = x.detach().abs().amax(0)
        if self.largest.numel() == 0:
            self.largest.resize_(now.shape).copy_(now)
        self.largest.copy_(torch.maximum(0.9 * self.largest, now))
        return self.linear(x / self.largest)


class Recurrent(nn.Module):
    """State in attributes: a tensor, a tuple, a list of fixed length, and a log that grows."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.mean, self.state, self.slots, self.log = None, (torch.zeros(()), 0), [0.0, 0.0], []

    def forward(self, x):
        self.mean = x.mean(0) if self.mean is None else self.mean.lerp(x.mean(0), 0.1)
        self.state = (self.state[0] + 1, self.state[1] + 1)
        self.slots[self.state[1] % 2] += 1.0
        self.log.append(self.state[1])
        return self.linear(x - self.mean) * (1 + 0.1 * self.state[0]) + self.slots[0]


class ActNorm(nn.Module):
    """Initializes its own parameter from the first batch; ``.data`` leaves no mark on it."""

    def __init__(self, flag: str) -> None:
        super().__init__()
        self.flag, self.done, self.inits = flag, False, []
        self.scale, self.linear = nn.Parameter(torch.ones(6)), nn.Linear(6, 3)
        self.register_buffer("ready", torch.zeros((), dtype=torch.bool))

    def forward(self, x):
        if not (self.done if self.flag == "attribute" else self.ready):
            self.scale.data.copy_(1 / x.std(0))
            self.inits.append(1)
            self.done = True
            self.ready.fill_(True)
        return self.linear(x * self.scale)


class Center(nn.Parameter):
    """A parameter that tells others what it is."""


class Centered(nn.Module):
    """An untrained parameter of a class of its own, which the forward moves."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.center = nn.Linear(6, 3), Center(torch.zeros(3), requires_grad=False)

    def forward(self, x):
        out = self.linear(x)
        with torch.no_grad():
            self.center.lerp_(out.mean(0), 0.1)
        return out - self.center


class Hidden(nn.Module):
    """Hidden states that keep their graph: the next forward detaches them where it begins."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.rnn, self.mean = nn.LSTMCell(6, 4), nn.RNNCell(4, 3), None
        self.memory, self.layers = (torch.zeros(16, 4), torch.zeros(16, 4)), [torch.zeros(16, 3)]

    def forward(self, x):
        h, c = self.memory
        self.memory = self.lstm(x, (h.detach(), c.detach()))
        self.layers[0] = self.rnn(self.memory[0], self.layers[0].detach())
        before = 0.0 if self.mean is None else self.mean.detach()
        self.mean = 0.9 * before + 0.1 * self.layers[0].mean(0)
        return self.layers[0] - self.mean


class Layers(nn.Module):
    """State in attributes of torch's own layers, which have no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 4), nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
        self.body.calls, self.body.mean, self.head.shift = 0, torch.zeros(4), 0.0
        self.body._is_hf_initialized = True  # what a framework sets

    def forward(self, x):
        hidden = self.body(x) - self.body.mean
        self.body.calls += 1
        self.body.mean = 0.9 * self.body.mean + 0.1 * hidden.detach().mean(0)
        self.head.shift += 0.1 * self.body.calls
        self.head.seen = getattr(self.head, "seen", 0) + 1  # the first forward makes it
        return self.head(hidden) * (1 + self.head.shift)


class Phase(enum.Enum):
    EVEN, ODD = 0, 1


class Nested(nn.Module):
    """State in attributes: hidden states of several layers, values of NumPy, a deque, a long list; and in a hook."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)
        self.linear.mean = 0.0
        self.linear.register_forward_hook(self.center)
        self.hidden = [(torch.zeros(3), torch.zeros(3)), (torch.zeros(3), {"cell": torch.zeros(3)})]
        self.number, self.array = np.float32(0), np.zeros(2)
        self.recent, self.many = collections.deque([0.0, 0.0], maxlen=3), [0.0] * 200
        self.phase, self.counts = Phase.EVEN, collections.Counter(calls=1)

    @staticmethod
    def center(linear, inputs, output):
        before = linear.mean
        linear.mean = 0.9 * linear.mean + 0.1 * float(output.detach().mean())
        return output - before

    def forward(self, x):
        out = self.linear(x)
        mean = out.detach().mean(0) + 1
        shift = self.hidden[0][1] + self.hidden[1][1]["cell"] + float(self.number) + self.array[0]
        shift = shift + self.recent[-1] + self.many[7] + self.phase.value + 0.1 * self.counts["calls"]
        self.hidden = [(h + mean, mean) for h, _ in self.hidden[:1]] + [
            (mean, {"cell": self.hidden[1][1]["cell"] + mean})
        ]
        self.number = np.float32(self.number + 0.1)
        self.array += 0.1
        self.recent.append(float(mean[0]))
        self.many[7] += 0.1
        self.phase = Phase(1 - self.phase.value)
        self.counts["calls"] += 1
        return out + 0.1 * shift


class FirstBuffer(nn.Module):
    """A buffer that the first forward registers, the only one of its module."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        out = self.linear(x)
        if not hasattr(self, "mean"):
            self.register_buffer("mean", out.detach().mean(0))
        out = out - self.mean
        self.mean = 0.9 * self.mean + 0.1 * out.detach().mean(0)
        return out


class Codebook(nn.Module):
    """Codes of ``nn.Embedding``, which need a gradient by default and never have one: the forward moves them."""

    def __init__(self, *, by_data: bool, begin: int = 0) -> None:
        super().__init__()
        self.by_data, self.begin = by_data, begin
        self.register_buffer("calls", torch.tensor(0))
        self.encoder, self.codes, self.decoder = nn.Linear(6, 2), nn.Embedding(5, 2), nn.Linear(2, 3)

    def forward(self, x):
        z = self.encoder(x)
        codes = self.codes.weight.detach()
        nearest = torch.cdist(z.detach(), codes).argmin(1)
        quantized = codes[nearest]
        counts = F.one_hot(nearest, 5).to(z.dtype)
        means = counts.T @ z.detach() / (counts.sum(0)[:, None] + 1e-3)
        if self.calls >= self.begin and self.by_data:
            self.codes.weight.data.lerp_(means, 0.1)
        elif self.calls >= self.begin:
            with torch.no_grad():
                self.codes.weight.lerp_(means, 0.1)
        self.calls += 1
        return self.decoder(z + (quantized - z).detach())


MODELS = {
    "parameters assigned by data": lambda: MomentumEncoder("data"),
    "parameters changed in place by data": lambda: MomentumEncoder("data in place"),
    "parameters changed in place": lambda: MomentumEncoder("in place"),
    "parameters of a class of their own": Centered,
    "resized buffer": Observer,
    "attributes": Recurrent,
    "nested attributes": Nested,
    "hidden states with graphs": Hidden,
    "attributes of layers": Layers,
    "first buffer": FirstBuffer,
    "codebook": lambda: Codebook(by_data=False),
    "codebook, by data": lambda: Codebook(by_data=True),
    "codebook, from the third step on": lambda: Codebook(by_data=False, begin=2),
    "codebook, by data, from the third step on": lambda: Codebook(by_data=True, begin=2),
    "initialization, attribute": lambda: ActNorm("attribute"),
    "initialization, buffer": lambda: ActNorm("buffer"),
    "spectral norm": lambda: nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 3)),
    "hook of spectral norm": lambda: nn.Sequential(nn.utils.spectral_norm(nn.Linear(6, 8)), nn.Linear(8, 3)),
    "script": lambda: torch.jit.script(nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))),
}


def trained(model: nn.Module):
    return [p for p in model.parameters() if p.requires_grad]


@every_drive
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:.*(weight_norm|spectral_norm|torch.jit).*")
def test_c28_radius_zero_is_the_base_whatever_the_forward_changes(kind, drive):
    torch.manual_seed(0)
    model = MODELS[kind]()
    torch.manual_seed(0)
    twin = MODELS[kind]()
    optimizer = SAM(torch.optim.SGD(trained(model), lr=0.1), rho=0.0, model=model)
    base = torch.optim.SGD(trained(twin), lr=0.1)
    for step in range(4):
        x, y = pair(step)
        DRIVES[drive](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        plain(base, lambda x=x, y=y: F.cross_entropy(twin(x), y))
        assert model_bits(model) == model_bits(twin)
    for name in ("calls", "state", "slots", "inits"):
        assert getattr(model, name, None) == getattr(twin, name, None)
    if kind == "attributes":
        assert torch.equal(model.mean, twin.mean)
        assert len(model.log) == 8, "a list that grows is a log"
    if kind == "attributes of layers":
        assert model.head.seen == twin.head.seen


@every_drive
def test_c28_hidden_state_of_the_first_pass_is_the_only_one_that_is_alive_after_a_step(drive):
    model = Hidden()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    left = []  # by each forward

    def loss():
        value = F.cross_entropy(model(x), y)
        left.append(weakref.ref(model.memory[0]))
        return value

    for step in range(3):
        x, y = pair(step)
        DRIVES[drive](optimizer, loss)
        assert [state() is model.memory[0] for state in left[-2:]] == [True, False]
        assert all(state() is None for i, state in enumerate(left) if i != len(left) - 2)


class Graph(nn.Module):
    """A tensor without a storage in an attribute and in a buffer, both assigned anew by each forward."""

    def __init__(self, form) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.form, self.linear, self.adjacency = form, nn.Linear(6, 3), form(torch.eye(16))
        self.register_buffer("neighbors", form(torch.eye(16)))

    def forward(self, x):
        out = dense(self.adjacency) @ self.linear(x) + dense(self.neighbors)[:, :3]
        self.adjacency = self.form(0.9 * dense(self.adjacency))
        self.neighbors = self.form(0.8 * dense(self.neighbors))
        return out


def dense(t):
    return t if t.layout is torch.strided else t.to_dense()


FORMS = {"coo": torch.Tensor.to_sparse, "csr": torch.Tensor.to_sparse_csr}
if torch.backends.mkldnn.is_available():
    FORMS["mkldnn"] = torch.Tensor.to_mkldnn


@every_drive
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support", "ignore:both passes changed")
def test_c28_tensors_without_a_storage_are_kept_as_objects(form, drive):
    inside, outside, twin = (Graph(FORMS[form]) for _ in range(3))
    a = SAM(torch.optim.SGD(inside.parameters(), lr=0.1), rho=0.0, model=inside)
    b = SAM(torch.optim.SGD(outside.parameters(), lr=0.1), rho=0.0)
    base = torch.optim.SGD(twin.parameters(), lr=0.1)
    for step in range(3):
        x, y = pair(step)
        DRIVES[drive](a, lambda x=x, y=y: F.cross_entropy(inside(x), y))
        DRIVES[drive](b, lambda x=x, y=y: F.cross_entropy(outside(x), y))
        plain(base, lambda x=x, y=y: F.cross_entropy(twin(x), y))
        assert torch.equal(inside.linear.weight, twin.linear.weight)
        assert torch.equal(dense(inside.adjacency), dense(twin.adjacency))
        assert torch.equal(dense(inside.neighbors), dense(twin.neighbors))


@every_drive
@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind.startswith("parameters")])
def test_c28_parameters_without_gradients_may_be_in_the_optimizer(kind, drive):
    results = []
    for choose in (trained, lambda model: list(model.parameters())):
        torch.manual_seed(0)
        model = MODELS[kind]()
        optimizer = SAM(torch.optim.SGD(choose(model), lr=0.1, momentum=0.9), rho=0.5, model=model)
        for step in range(4):
            x, y = pair(step)
            DRIVES[drive](optimizer, lambda x=x, y=y, model=model: F.cross_entropy(model(x), y))
        results.append(model_bits(model))
    assert results[0] == results[1]


class Noisy(nn.Module):
    """Draws from a generator of its own."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.linear, self.masks = nn.Linear(6, 3), []
        self.generators = {
            "torch": [torch.Generator().manual_seed(1)],
            "numpy": (np.random.default_rng(1),),
            "legacy": {"a": np.random.RandomState(1)},
            "python": random.Random(1),
        }[kind]
        self.kind = kind

    def forward(self, x):
        if self.kind == "torch":
            noise = torch.rand(6, generator=self.generators[0])
        elif self.kind == "numpy":
            noise = torch.from_numpy(self.generators[0].random(6)).float()
        elif self.kind == "legacy":
            noise = torch.from_numpy(self.generators["a"].rand(6)).float()
        else:
            noise = torch.tensor([self.generators.random() for _ in range(6)])
        self.masks.append(noise)
        return self.linear(x * noise)


@pytest.mark.parametrize("drive", ["closure", "passes", "classic"])
@pytest.mark.parametrize("kind", ["torch", "numpy", "legacy", "python"])
def test_c28_generators_in_modules_are_replayed(kind, drive):
    model = Noisy(kind)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, y = pair()
    for _ in range(2):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y))
    first, again, second, third = model.masks
    assert torch.equal(first, again)
    assert torch.equal(second, third)
    assert not torch.equal(first, second)


def test_c28_frozen_parameters_that_outnumber_the_trained_ones_are_copied_once_written(monkeypatch):
    from steppe._engine import model_state

    monkeypatch.setattr(model_state, "LARGE", 0)
    model, twin = MomentumEncoder("in place"), MomentumEncoder("in place")
    twin.load_state_dict(model.state_dict())
    optimizer = SAM(torch.optim.SGD(model.head.parameters(), lr=0.1), rho=0.0, model=model)
    base = torch.optim.SGD(twin.head.parameters(), lr=0.1)
    x, y = pair()
    with pytest.warns(UserWarning, match="the forward writes to 2 parameters that this optimizer does not train"):
        DRIVES["passes"](optimizer, lambda: F.cross_entropy(model(x), y))
    plain(base, lambda: F.cross_entropy(twin(x), y))
    model.load_state_dict(twin.state_dict())
    for _ in range(2):
        DRIVES["passes"](optimizer, lambda: F.cross_entropy(model(x), y))
        plain(base, lambda: F.cross_entropy(twin(x), y))
    assert model_bits(model) == model_bits(twin)


def test_c28_classic_step_after_one_by_passes_does_not_begin_in_the_state_before_that():
    model = Recurrent()
    optimizer = SAM(torch.optim.SGD(trained(model), lr=0.1), rho=0.0, model=model)
    for step, drive in enumerate(["passes", "passes", "classic", "classic"]):
        x, y = pair(step)
        DRIVES[drive](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
    assert model.log == [1, 1, 2, 2, 3, 4, 4, 4], "the first classic step has no forward before it that is expected"


def test_c28_classic_passes_of_a_model_whose_parameters_functional_call_replaces():
    def loss(model, x, y):  # rounded weights, with the gradient of those that are not
        rounded = {name: p + ((p * 4).round() / 4 - p).detach() for name, p in model.named_parameters()}
        return F.cross_entropy(functional_call(model, rounded, (x,)), y)

    results = []
    for drive in ("closure", "classic"):
        torch.manual_seed(0)
        model = nn.Linear(6, 3)
        optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.3), rho=0.5, model=model)
        for step in range(4):
            x, y = pair(step)
            DRIVES[drive](optimizer, lambda x=x, y=y, model=model: loss(model, x, y))
        assert isinstance(model.weight, nn.Parameter)
        results.append(model_bits(model))
    assert results[0] == results[1]


@pytest.mark.parametrize("method", ["rwp", "arwp", "bsam", "msam", "sampa"])
@pytest.mark.parametrize("model", ["initialization", "limited norm"])
def test_c28_write_that_a_first_pass_away_from_w_loses_warns_once(method, model):
    first = ActNorm("buffer") if model == "initialization" else nn.Embedding(6, 3, max_norm=0.5)
    x, y = pair()
    x = x if model == "initialization" else torch.arange(len(y)) % 6
    if method == "bsam":
        optimizer = variants.bsam(first.parameters(), lr=0.1, n_data=len(y), model=first)
    else:
        base = torch.optim.SGD(first.parameters(), lr=0.1, momentum=0.9)
        optimizer = getattr(variants, method)(base, rho=0.01, model=first)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(3):
            optimizer.step(lambda: F.cross_entropy(first(x), y))
    begins_at_w = model == "initialization" and method in ("msam", "sampa")  # which have no perturbation then
    assert len(found) == (0 if begins_at_w else 1)
    assert all("the forward writes to 1 of the weights that this optimizer trains" in str(w.message) for w in found)


@every_drive
def test_c28_weights_cached_by_parametrize_are_dropped(drive):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(6, 3))
    optimizer = SAM(torch.optim.SGD(layer.parameters(), lr=0.0), rho=1.0, model=layer)
    x, y = pair()
    losses = []

    def loss():
        losses.append(F.cross_entropy(layer(x), y))
        return losses[-1]

    with parametrize.cached():
        DRIVES[drive](optimizer, loss)
    assert losses[1] > losses[0]


def parts():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8)), nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))


@every_drive
@pytest.mark.parametrize("form", [list, tuple, lambda parts: dict(zip("ab", parts, strict=True))])
def test_c32_model_may_be_several_modules(form, drive):
    a, b = parts()
    c, d = parts()
    optimizer = SAM(torch.optim.SGD([*a.parameters(), *b.parameters()], lr=0.0), rho=1.0, model=form([a, b]))
    base = torch.optim.SGD([*c.parameters(), *d.parameters()], lr=0.0)
    x, y = pair()
    for _ in range(2):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(b(a(x)), y))
        plain(base, lambda: F.cross_entropy(d(c(x)), y))
    assert model_bits(a) == model_bits(c)
    assert model_bits(b) == model_bits(d)


@every_drive
@pytest.mark.parametrize("trained", ["all", "body"])
def test_c28_lazy_modules_are_initialized_by_the_first_pass(trained, drive):
    def model():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 4), nn.LazyBatchNorm1d(), nn.LazyLinear(3))

    lazy, twin = model(), model()
    parameters = {"all": lambda m: m.parameters(), "body": lambda m: m[0].parameters()}[trained]
    optimizer = SAM(torch.optim.SGD(parameters(lazy), lr=0.1), rho=0.0, model=lazy)
    base = torch.optim.SGD(parameters(twin), lr=0.1)
    for step in range(3):
        x, y = pair(step)
        torch.manual_seed(step)
        DRIVES[drive](optimizer, lambda x=x, y=y: F.cross_entropy(lazy(x), y))
        torch.manual_seed(step)
        plain(base, lambda x=x, y=y: F.cross_entropy(twin(x), y))
        assert model_bits(lazy) == model_bits(twin)
    assert lazy[2].in_features == 4
    assert lazy[1].num_features == 4


def test_c28_method_that_perturbs_before_the_first_forward_says_what_lazy_modules_need():
    model = nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 3))
    optimizer = variants.rwp(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.05, model=model)
    x, y = pair()
    with pytest.raises(ValueError, match="run one forward before the first step"):
        DRIVES["passes"](optimizer, lambda: F.cross_entropy(model(x), y))
    optimizer.restore()
    model(x)
    DRIVES["passes"](optimizer, lambda: F.cross_entropy(model(x), y))


def test_c32_model_that_is_no_module_raises():
    a, b = parts()
    base = torch.optim.SGD(a.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="model= is a generator"):
        SAM(base, model=(m for m in (a, b)))
    with pytest.raises(TypeError, match="model= holds a SGD at position 1"):
        SAM(base, model=[a, base])


@every_drive
def test_c32_modules_outside_of_model_are_named_once_and_protected(drive):
    a, b = parts()
    c, d = parts()
    optimizer = SAM(torch.optim.SGD(a.parameters(), lr=0.0), rho=1.0, model=a)
    base = torch.optim.SGD(c.parameters(), lr=0.0)
    x, y = pair()
    for step in range(3):
        for p in [*b.parameters(), *d.parameters()]:
            p.grad = None
        if step == 0:
            with pytest.warns(
                UserWarning, match=r"buffers .* of Sequential \('0'\) and gradients of .*model=\[model"
            ) as w:
                DRIVES[drive](optimizer, lambda: F.cross_entropy(b(a(x)), y))
            assert len(w) == 1
            assert w[0].filename.endswith(("support.py", "test_state_of_the_model.py"))
        else:
            DRIVES[drive](optimizer, lambda: F.cross_entropy(b(a(x)), y))
        plain(base, lambda: F.cross_entropy(d(c(x)), y))
        assert model_bits(b) == model_bits(d)
        for p, q in zip(b.parameters(), d.parameters(), strict=True):
            assert torch.equal(p.grad, q.grad)
    gc.collect()  # optimizers of other tests may have hooks
    assert not nn.modules.module._global_forward_pre_hooks


class LossWithState(nn.Module):
    """A running number and a center, which are assigned, and the last outputs, which are kept with their graph."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.center, self.last = 1.0, torch.zeros(3), None

    def forward(self, outputs, y):
        loss = F.cross_entropy(outputs - self.center, y)
        self.scale = 0.9 * self.scale + 0.1 * loss.item()
        self.center.lerp_(outputs.detach().mean(0), 0.1)
        self.last = outputs
        return loss / self.scale


@every_drive
def test_c32_attributes_of_a_loss_outside_of_model_are_protected_from_the_first_step_on(drive):
    a, c = (nn.Linear(6, 3) for _ in range(2))
    c.load_state_dict(a.state_dict())
    loss, other = LossWithState(), LossWithState()
    optimizer = SAM(torch.optim.SGD(a.parameters(), lr=0.1), rho=0.0, model=a)
    base = torch.optim.SGD(c.parameters(), lr=0.1)
    for step in range(3):
        x, y = pair(step)
        DRIVES[drive](optimizer, lambda x=x, y=y: loss(a(x), y))
        plain(base, lambda x=x, y=y: other(c(x), y))
        assert model_bits(a) == model_bits(c)
    assert loss.scale == other.scale
    assert torch.equal(loss.center, other.center)


class LossWithTeacher(nn.Module):
    def __init__(self, student) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self._student = (student,)

    def forward(self, x, outputs):
        with torch.no_grad():
            for t, p in zip(self.teacher.parameters(), self._student[0].parameters(), strict=True):
                t.lerp_(p, 0.1)
        return F.mse_loss(outputs, self.teacher(x) + 1)


@every_drive
def test_c32_teacher_that_a_loss_outside_of_model_moves_is_named_and_moved_once_a_step_afterwards(drive):
    model = nn.Linear(6, 3)
    loss = LossWithTeacher(model)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.5, model=model)
    x, _ = pair()
    with pytest.warns(UserWarning, match=r"parameters without gradients of LossWithTeacher \('teacher'\)"):
        DRIVES[drive](optimizer, lambda: loss(x, model(x)))
    before, w = loss.teacher.weight.clone(), model.weight.detach().clone()
    DRIVES[drive](optimizer, lambda: loss(x, model(x)))
    torch.testing.assert_close(loss.teacher.weight, before.lerp(w, 0.1))


def test_c32_two_optimizers_in_step_at_once_leave_each_others_models():
    a, b = parts()[0], parts()[0]
    first = SAM(torch.optim.SGD(a.parameters(), lr=0.1), rho=0.1, model=a)
    second = SAM(torch.optim.SGD(b.parameters(), lr=0.1), rho=0.1, model=b)
    x, _ = pair()
    for one, other in zip(first.passes(), second.passes(), strict=True):
        with one, other:
            (a(x).square().mean() + b(x).square().mean()).backward()
    first.step()
    second.step()
    assert a[1].num_batches_tracked == b[1].num_batches_tracked == 1


def test_c33_second_pass_that_did_not_run_the_model_is_named():
    model = nn.Linear(6, 3)
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    x, y = pair()
    loss = F.cross_entropy(model(x), y)
    for sam_pass in optimizer.passes():
        with sam_pass:
            loss.backward(retain_graph=True)
    with pytest.warns(UserWarning, match="the second pass did not run the model"):
        optimizer.step()


class Machine(nn.Module):
    """Computes its loss in a method of its own: a hinge, which is linear in the weights, or a factorization."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w, self.b = nn.Parameter(0.1 * torch.randn(6)), nn.Parameter(torch.zeros(()))

    def hinge(self, x, y):
        return F.relu(1 - (2.0 * (y > 0) - 1) * (x @ self.w + self.b)).mean()

    def absolute(self, x, y):
        return F.l1_loss(x @ self.w, y + 10.0)

    def square(self, x, y):
        return (x @ self.w + self.b - y).square().mean()


@every_drive
@pytest.mark.parametrize(("loss", "rho"), [("hinge", 0.01), ("absolute", 0.01), ("square", 0.0)])
def test_c33_loss_of_a_method_of_the_model_may_have_the_same_gradient_in_both_passes(loss, rho, drive):
    model = Machine()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=rho, model=model)
    x, y = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DRIVES[drive](optimizer, lambda: getattr(model, loss)(x, y))


def test_c33_second_pass_that_scales_a_loss_from_before_it_is_named():
    model = Machine()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.1, model=model)
    loss = model.hinge(*pair())
    for sam_pass in optimizer.passes():
        with sam_pass:
            (1024 * loss).backward(retain_graph=True)
    with pytest.warns(UserWarning, match="the second pass did not run the model"):
        optimizer.step()


@every_drive
def test_c32_module_outside_of_model_may_be_initialized_by_its_first_pass(drive):
    a, b = nn.Linear(6, 8), nn.Sequential(nn.LazyBatchNorm1d(), nn.Linear(8, 3))
    b.register_buffer("expanded", torch.ones(1).expand(4))
    optimizer = SAM(torch.optim.SGD(a.parameters(), lr=0.1), rho=0.1, model=a)
    x, y = torch.randn(16, 6), torch.randint(3, (16,))
    with pytest.warns(UserWarning, match="both passes changed"):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(b(a(x)), y))
    assert b[0].num_batches_tracked == 1
    DRIVES[drive](optimizer, lambda: F.cross_entropy(b(a(x)), y))
    assert b[0].num_batches_tracked == 2


class Ensemble(nn.Module):
    """Three networks whose forward is one, as in torch's tutorial; their stacked buffers lie in an attribute."""

    def __init__(self, *, norm: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        networks = [nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3) if norm else nn.Tanh()) for _ in range(3)]
        stacked, self.buffers_of_networks = torch.func.stack_module_state(networks)
        self.names, self.weights = list(stacked), nn.ParameterList(stacked.values())
        self.network = (copy.deepcopy(networks[0]).to("meta"),)

    def forward(self, x):
        def forward(parameters, buffers):
            return torch.func.functional_call(self.network[0], (parameters, buffers), (x,))

        return torch.vmap(forward)(dict(zip(self.names, self.weights, strict=True)), self.buffers_of_networks).mean(0)


@every_drive
@pytest.mark.parametrize("norm", [False, True])
def test_c32_ensemble_under_vmap_is_trained_and_protected_by_a_module_that_holds_its_tensors(norm, drive):
    model, alone, twin = (Ensemble(norm=norm) for _ in range(3))
    optimizer = SAM(torch.optim.SGD(model.weights, lr=0.1), rho=0.0, model=model)
    without_model = SAM(torch.optim.SGD(alone.weights, lr=0.1), rho=0.0)
    base = torch.optim.SGD(twin.weights, lr=0.1)
    for step in range(3):
        x, y = pair(step)
        DRIVES[drive](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
        DRIVES[drive](without_model, lambda x=x, y=y: F.cross_entropy(alone(x), y))
        plain(base, lambda x=x, y=y: F.cross_entropy(twin(x), y))
        for a, b, c in zip(model.weights, alone.weights, twin.weights, strict=True):
            assert torch.equal(a, c)
            assert torch.equal(b, c)
    for name, buffer in twin.buffers_of_networks.items():
        assert torch.equal(model.buffers_of_networks[name], buffer)


def test_c32_module_that_runs_with_parameters_of_others_names_what_model_must_hold():
    network = nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3))
    parameters = {name: nn.Parameter(p.detach().clone()) for name, p in network.named_parameters()}
    buffers = {name: b.clone() for name, b in network.named_buffers()}
    x, y = pair()
    with pytest.raises(ValueError, match="functional_call, one that holds"):
        SAM(torch.optim.SGD(parameters.values(), lr=0.1), rho=0.1, model=network)
    optimizer = SAM(torch.optim.SGD(parameters.values(), lr=0.1), rho=0.1)

    def loss():
        halves = {name: 0.5 * p for name, p in parameters.items()}  # no leaves: torch warns where their .grad is read
        return F.cross_entropy(torch.func.functional_call(network, (halves, buffers), (x,)), y)

    with pytest.warns(UserWarning, match="for torch.func.functional_call, a module that holds") as w:
        DRIVES["passes"](optimizer, loss)
    assert len(w) == 1
