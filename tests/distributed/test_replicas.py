"""C21, C22: replicas with a shared perturbation train as one process does; with one for each rank, m-sharpness."""

import contextlib

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.nn.functional import all_reduce

import steppe
from layouts import BATCH_SIZE, close, ddp, method, network, own_share, plain, run, samples, train, weights
from ranks import start_ranks
from support import DRIVES, bits, each_in_turn

OPTIONS = {
    "static graph": {"static_graph": True},
    "unused parameters": {"find_unused_parameters": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "static graph, bucket views": {"static_graph": True, "gradient_as_bucket_view": True},
}
SOME = ["sam", "gsam", "looksam", "friendly_sam", "msam", "lookbehind_sam", "sampa"]


# One perturbation for all ranks.


def train_with_options(name, options):
    return train(lambda model: ddp(model, **options), method(name), 4)


@pytest.mark.parametrize(("name", "options"), each_in_turn(SOME, OPTIONS))
def test_shared_perturbation_equals_one_process(name, options):
    expected = train(plain, method(name), 4)
    for found in start_ranks()(train_with_options, name, OPTIONS[options]):
        close(found, expected)


class Partial(nn.Module):
    """A network that uses one of its two branches."""

    def __init__(self):
        super().__init__()
        self.layers, self.other = network(), nn.Linear(5, 3).double()

    def forward(self, x):
        return self.layers(x)


def train_with_an_unused_branch():
    model = ddp(Partial(), find_unused_parameters=True)
    optimizer = method("gsam")(model)
    run(model, optimizer, range(3))
    return weights(model), [p.grad is None for p in model.module.other.parameters()]


def test_unused_parameters_keep_no_gradient():
    model = Partial()
    run(model, method("gsam")(model), range(3))
    for found, unused in start_ranks()(train_with_an_unused_branch):
        close(found, weights(model))
        assert unused == [True, True]


def train_by(drive):
    model = ddp(network())
    optimizer = method("sam")(model)
    x, y = own_share(*samples(0))
    for _ in range(3):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y))
    return weights(model)


@pytest.mark.parametrize("drive", DRIVES)
def test_each_api_equals_one_process(drive):
    model = network()
    optimizer = method("sam")(model)
    x, y = samples(0)
    for _ in range(3):
        DRIVES[drive](optimizer, lambda: F.cross_entropy(model(x), y))
    for found in start_ranks()(train_by, drive):
        close(found, weights(model))


def micro_batches_without_sync():
    """Average gradients at the last micro-batch of each pass only, which saves communication."""
    model = ddp(network())
    optimizer = method("gsam")(model)
    x, y = own_share(*samples(0))
    for _ in range(3):
        for sam_pass in optimizer.passes():
            with sam_pass:
                with model.no_sync():
                    (F.cross_entropy(model(x[:2]), y[:2]) / 2).backward()
                (F.cross_entropy(model(x[2:]), y[2:]) / 2).backward()
        optimizer.step()
    return weights(model)


def test_micro_batches_with_no_sync_in_a_pass_equal_one_batch():
    model = network()
    optimizer = method("gsam")(model)
    x, y = samples(0)
    for _ in range(3):
        DRIVES["passes"](optimizer, lambda: F.cross_entropy(model(x), y))
    for found in start_ranks()(micro_batches_without_sync):
        close(found, weights(model))


def own_passes_without_sync(inside):
    """Give each micro-batch a perturbation of its own, but average the gradients of the last one only."""
    model = ddp(network())
    optimizer = method("sam")(model)
    x, y = own_share(*samples(0))
    with pytest.raises(RuntimeError, match=r"some micro-batches of a step in no_sync\(\)"):
        for last, part in enumerate((slice(2), slice(2, None))):
            sync = contextlib.nullcontext if last else model.no_sync
            with contextlib.nullcontext() if inside else sync():
                for sam_pass in optimizer.passes(accumulate=bool(last)):
                    with sam_pass, sync() if inside else contextlib.nullcontext():
                        (F.cross_entropy(model(x[part]), y[part]) / 2).backward()
    optimizer.zero_grad()
    run(model, optimizer, range(4))
    return weights(model)


@pytest.mark.parametrize("inside", [False, True])
def test_micro_batches_with_passes_of_their_own_in_no_sync_are_an_error(inside):
    expected = train(plain, method("sam"), 4)
    for found in start_ranks()(own_passes_without_sync, inside):
        close(found, expected)


class SynchronizedNorm(nn.BatchNorm1d):
    """The statistics of SyncBatchNorm, which has no kernels for CPUs, by two all-reduces."""

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        n = len(x) * dist.get_world_size()
        mean = all_reduce(x.sum(0)) / n
        variance = all_reduce((x - mean).square().sum(0)) / n
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * n / (n - 1), self.momentum)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def network_with(norm):
    model = network()
    model[1] = norm(7).double()
    return model


def train_with_synchronized_norms():
    model = ddp(network_with(SynchronizedNorm))
    run(model, method("sam")(model), range(4))
    return weights(model), list(model.buffers())


def test_synchronized_batch_norm_has_statistics_of_all_ranks_after_one_pass():
    model = network_with(nn.BatchNorm1d)
    run(model, method("sam")(model), range(4))
    for found, buffers in start_ranks()(train_with_synchronized_norms):
        close(found, weights(model))
        close(buffers, list(model.buffers()))
        assert buffers[-1] == 4


# A perturbation for each rank.


def train_per_rank(name, steps, options, more):
    return train(lambda model: warm_up(ddp(model, **options)), method(name, per_rank=True, **more), steps)


def warm_up(model):
    """Run one ordinary backward, from which torch learns a static graph."""
    if model.static_graph:
        model(samples(0)[0]).sum().backward()
        model.zero_grad()
    return model


def by_hand(steps, *, direction, combine=lambda g, g_s: g_s, rho=0.1):
    """Train by m-sharpness, in the paper's notation: e_r from the samples of rank r, and the mean of all g_s."""
    model = network()
    params = list(model.parameters())
    base = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    for step in range(steps):
        x, y = samples(step)
        w = [p.detach().clone() for p in params]
        parts = [(x[:4], y[:4]), (x[4:], y[4:])]
        unperturbed = [torch.autograd.grad(F.cross_entropy(model(a), b), params) for a, b in parts]
        perturbed = []
        for g, (a, b) in zip(unperturbed, parts, strict=True):
            with torch.no_grad():
                for p, value, d in zip(params, w, direction(w, g), strict=True):
                    p.copy_(value + rho * d)
            perturbed.append(torch.autograd.grad(F.cross_entropy(model(a), b), params))
        with torch.no_grad():
            for p, value in zip(params, w, strict=True):
                p.copy_(value)
        means = [[(a + b) / 2 for a, b in zip(*both, strict=True)] for both in (unperturbed, perturbed)]
        for p, d in zip(params, combine(*means), strict=True):
            p.grad = d
        base.step()
    return [p.detach() for p in params]


def along_g(w, g):
    length = torch.cat([p.flatten() for p in g]).norm()
    return [p / length for p in g]


def adaptive(w, g):
    T = [p.abs() + 0.01 for p in w]
    length = torch.cat([(t * p).flatten() for t, p in zip(T, g, strict=True)]).norm()
    return [t * t * p / length for t, p in zip(T, g, strict=True)]


def weighted(g, g_s):
    return [a + 9 * (b - a) for a, b in zip(g, g_s, strict=True)]


@pytest.mark.parametrize("options", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("sam", {"direction": along_g}),
        ("asam", {"direction": adaptive}),
        ("wsam", {"direction": along_g, "combine": weighted}),
    ],
)
def test_perturbation_for_each_rank_is_m_sharpness(name, rule, options):
    expected = by_hand(4, **rule)
    for found in start_ranks()(train_per_rank, name, 4, options, {}):
        close(found, expected)
    assert max((a - b).abs().max() for a, b in zip(expected, train(plain, method(name), 4), strict=True)) > 1e-5


def test_perturbation_for_each_rank_equals_micro_batches_in_one_process():
    model = network()
    optimizer = method("sam", ascent_steps=2)(model)
    for step in range(4):
        steppe.closures.micro_batches(
            optimizer, lambda x, y: F.cross_entropy(model(x), y), samples(step), m=BATCH_SIZE // 2
        )
    for found in start_ranks()(train_per_rank, "sam", 4, {}, {"ascent_steps": 2}):
        close(found, weights(model))


def communications(per_rank):
    """Return the number of averages of gradients in four steps of Late SAM, of which the last two perturb."""
    model = ddp(network())
    calls = []

    def hook(state, bucket):
        calls.append(1)
        return dist.all_reduce(bucket.buffer().div_(2), async_op=True).get_future().then(lambda f: f.value()[0])

    model.register_comm_hook(None, hook)
    run(model, method("late_sam", start=0.5, total_steps=4, per_rank=per_rank)(model), range(4))
    return len(calls)


@pytest.mark.parametrize(("per_rank", "expected"), [(False, 6), (True, 4)])
def test_gradient_of_the_perturbation_of_each_rank_is_not_communicated(per_rank, expected):
    assert start_ranks()(communications, per_rank) == [expected] * 2


def thousand_steps(per_rank):
    torch.manual_seed(0)
    model = ddp(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 3)))
    base = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = steppe.SAM(base, rho=0.05, model=model, per_rank=per_rank)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for _ in range(1000):
        x, y = torch.randn(4, 5, generator=generator), torch.randint(3, (4,), generator=generator)
        DRIVES["passes"](optimizer, lambda x=x, y=y: F.cross_entropy(model(x), y))
    return bits(model.parameters()), optimizer.skipped_steps


@pytest.mark.slow
@pytest.mark.parametrize("per_rank", [False, True])
def test_replicas_are_identical_after_1000_steps(per_rank):
    (first, skipped), (second, _) = start_ranks()(thousand_steps, per_rank)
    assert first == second
    assert skipped == 0


def overflow_on_one_rank(per_rank, perturbed):
    """Take a step with a NaN on rank 1, in the pass at w or in the pass at w + e."""
    model = ddp(network())
    optimizer = method("wsam", per_rank=per_rank)(model)
    before = bits(model.parameters())
    x, y = own_share(*samples(0))
    for sam_pass in optimizer.passes():
        with sam_pass:
            bad = dist.get_rank() == 1 and sam_pass.is_perturbed == perturbed
            F.cross_entropy(model(x * float("nan") if bad else x), y).backward()
    with pytest.warns(RuntimeWarning, match="not finite"):
        optimizer.step()
    return bits(model.parameters()) == before, optimizer.skipped_steps


@pytest.mark.parametrize("perturbed", [False, True], ids=["at w", "at w + e"])
@pytest.mark.parametrize("per_rank", [False, True])
def test_nan_on_one_rank_skips_the_step_on_all(per_rank, perturbed):
    assert start_ranks()(overflow_on_one_rank, per_rank, perturbed) == [(True, 1)] * 2


class Branches(nn.Module):
    """A network in which rank 1 does not use one of two branches."""

    def __init__(self):
        super().__init__()
        self.layers, self.extra = network(), nn.Linear(5, 3).double()

    def forward(self, x, with_extra):
        return self.layers(x) + self.extra(x) if with_extra else self.layers(x)


def train_with_uneven_branches():
    model = ddp(Branches(), find_unused_parameters=True)
    optimizer = method("wsam", per_rank=True)(model)
    x, y = own_share(*samples(0))
    for _ in range(3):
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(model(x, dist.get_rank() == 0), y).backward()
        optimizer.step()
    return bits(model.parameters())


def test_branch_that_one_rank_does_not_use_keeps_the_replicas_identical():
    first, second = start_ranks()(train_with_uneven_branches)
    assert first == second


def errors_of_per_rank():
    model = ddp(network())
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    messages = []
    for make in (
        lambda: steppe.SAM(base, model=model.module, per_rank=True),
        lambda: steppe.SAM(base, per_rank=True),
        lambda: steppe.variants.msam(base, model=model, per_rank=True),
        lambda: steppe.variants.aesam(base, total_steps=9, model=model, per_rank=True),
        lambda: steppe.variants.sampa(base, model=model, per_rank=True),
        lambda: run(model, steppe.variants.friendly_sam(base, model=model, per_rank=True), range(1)),
        lambda: DRIVES["classic"](steppe.SAM(base, model=model, per_rank=True), lambda: model(samples(0)[0]).sum()),
    ):
        with pytest.raises((TypeError, ValueError, RuntimeError)) as error:
            make()
        messages.append(str(error.value))
        dist.barrier()
    cold = ddp(network(), static_graph=True)
    with pytest.raises(RuntimeError, match="learns the graph"):
        run(cold, method("sam", per_rank=True)(cold), range(1))
    run(warm_up(cold), method("sam", per_rank=True)(cold), range(1))  # the error has changed nothing
    return messages


def test_per_rank_that_does_not_fit_is_an_error_with_the_reason():
    messages, _ = start_ranks()(errors_of_per_rank)
    hints = ["Sequential", "NoneType", "does not use the gradient", "differs between the ranks", "its own"]
    for message, hint in zip(
        messages, [*hints, "keeps a memory", "averaged the ranks' gradients already"], strict=True
    ):
        assert hint in message


def train_on_uneven_data(per_rank):
    model = ddp(network())
    optimizer = method("sam", per_rank=per_rank)(model)
    with model.join():
        if per_rank:
            with pytest.raises(RuntimeError, match=r"per_rank=True inside model.join\(\)"):
                run(model, optimizer, range(1))
        else:
            run(model, optimizer, range(2 + dist.get_rank()))
    return weights(model)


def test_uneven_data_under_join_train_with_a_shared_perturbation_and_are_refused_per_rank():
    first, second = start_ranks()(train_on_uneven_data, False)
    assert bits(first) == bits(second)
    start_ranks()(train_on_uneven_data, True)
