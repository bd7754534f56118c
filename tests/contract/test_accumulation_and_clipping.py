"""Contract C19 and C20: gradient accumulation and clipping."""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steppe import SAM, closures, variants
from support import BASES, batch, bits, by_closure


def micro_batches(parts: int = 3):
    x, y = batch(n=12)
    return list(zip(x.chunk(parts), y.chunk(parts), strict=True))


def linear(dtype=torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, 3)).to(dtype)


@pytest.mark.parametrize("drive", ["closure", "passes"])
def test_c19_micro_batches_in_both_passes_equal_one_big_batch(drive):
    whole, parts = linear(), linear()
    x, y = batch(n=12)
    optimizer = SAM(BASES["momentum"](whole.parameters()), rho=0.2)
    accumulating = SAM(BASES["momentum"](parts.parameters()), rho=0.2)

    def backward():
        for mx, my in micro_batches():
            (F.cross_entropy(parts(mx.double()), my) / 3).backward()

    for _ in range(4):
        by_closure(optimizer, lambda: F.cross_entropy(whole(x.double()), y))
        if drive == "passes":
            for sam_pass in accumulating.passes():
                with sam_pass:
                    backward()
            accumulating.step()
        else:
            accumulating.step(lambda: (accumulating.zero_grad(), backward())[0])
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_c19_accumulate_option_perturbs_for_each_micro_batch():
    model, reference = linear(), linear()
    optimizer = SAM(torch.optim.SGD(model.parameters(), lr=0.1), rho=0.2)
    for index, (x, y) in enumerate(micro_batches()):
        for sam_pass in optimizer.passes(accumulate=index > 0):
            with sam_pass:
                (F.cross_entropy(model(x.double()), y) / 3).backward()
    optimizer.step()

    params = list(reference.parameters())
    total = [torch.zeros_like(p) for p in params]
    for x, y in micro_batches():
        g = torch.autograd.grad(F.cross_entropy(reference(x.double()), y), params)
        n = torch.cat([t.reshape(-1) for t in g]).norm()
        shifted = copy.deepcopy(reference)
        with torch.no_grad():
            for p, d in zip(shifted.parameters(), g, strict=True):
                p += 0.2 * d / n
        up = torch.autograd.grad(F.cross_entropy(shifted(x.double()), y), list(shifted.parameters()))
        total = [t + u / 3 for t, u in zip(total, up, strict=True)]
    for p, q, t in zip(model.parameters(), params, total, strict=True):
        torch.testing.assert_close(p.detach(), q.detach() - 0.1 * t, rtol=1e-12, atol=1e-12)


def test_c19_gradients_accumulated_before_step_with_closure_raise():
    model = linear()
    optimizer = SAM(BASES["sgd"](model.parameters()), rho=0.2)
    (x0, y0), (x1, y1), _ = micro_batches()

    def closure():  # like that of a framework: it does not clear the gradients
        loss = F.cross_entropy(model(x1.double()), y1)
        loss.backward()
        return loss

    for step in range(2):
        F.cross_entropy(model(x0.double()), y0).backward()
        before = bits(model.parameters())
        for _ in range(2):  # what was refused is not forgotten
            with pytest.raises(RuntimeError, match=r"accumulated before step\(closure\)"):
                optimizer.step(closure)
        assert bits(model.parameters()) == before
        optimizer.zero_grad()
        optimizer.step(closure)  # nothing is accumulated
        optimizer.step(closure)  # gradients left by a step of SAM do not count, and are cleared
        assert step in (0, 1)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_c19_stale_gradients_cleared_by_the_closure_are_allowed(set_to_none):
    model, twin = linear(), linear()
    optimizer, other = (SAM(BASES["sgd"](m.parameters()), rho=0.2) for m in (model, twin))
    (x, y), (stale_x, stale_y), _ = micro_batches()
    F.cross_entropy(model(stale_x.double()), stale_y).backward()

    def closure():
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = F.cross_entropy(model(x.double()), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    by_closure(other, lambda: F.cross_entropy(twin(x.double()), y))
    assert bits(model.parameters()) == bits(twin.parameters())


def test_c20_clipping_after_the_passes_acts_on_the_update_gradient_only():
    w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)
    visited = []
    for sam_pass in optimizer.passes():
        with sam_pass:
            visited.append(w.detach().clone())
            w.square().sum().backward()
    nn.utils.clip_grad_norm_([w], 0.5)
    optimizer.step()
    torch.testing.assert_close(visited[1], torch.tensor([3.6, 4.8], dtype=torch.float64))
    torch.testing.assert_close(w.detach(), torch.tensor([3.0 - 0.3, 4.0 - 0.4], dtype=torch.float64), atol=1e-6, rtol=0)


def test_c20_clipping_by_norm_in_the_closure_does_not_change_the_perturbation():
    visited = []
    for clip in (1e9, 0.5):
        w = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
        optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)

        def closure(w=w, optimizer=optimizer, clip=clip):
            optimizer.zero_grad()
            visited.append(w.detach().clone())
            loss = w.square().sum()
            loss.backward()
            nn.utils.clip_grad_norm_([w], clip)
            return loss

        optimizer.step(closure)
    torch.testing.assert_close(visited[1], visited[3])


METHODS_WITH_MICRO_BATCHES = {
    "sam": SAM,
    "asam": variants.asam,
    "friendly_sam": variants.friendly_sam,
    "wsam": lambda base, **options: variants.wsam(base, decoupled=True, **options),
}


@pytest.mark.parametrize("name", METHODS_WITH_MICRO_BATCHES)
@pytest.mark.parametrize("fail_in", ["first pass", "second pass", "between"])
@pytest.mark.parametrize("failing", [0, 1, 2])
def test_c19_micro_batch_that_has_failed_is_left_out_of_the_step(name, fail_in, failing):
    """The guard of many loops: a micro-batch that does not fit into the memory is left out, and the step is taken."""
    kept = []  # tracebacks, as by a logger: Python then closes a loop late
    weights = []
    for fails in (True, False):
        model = linear()
        optimizer = METHODS_WITH_MICRO_BATCHES[name](BASES["momentum"](model.parameters()), rho=0.2)

        def loop(x, y, *, fail, accumulate=True, model=model, optimizer=optimizer):
            for sam_pass in optimizer.passes(accumulate=accumulate, loss_weight=1 / 3):
                with sam_pass:
                    (F.cross_entropy(model(x.double()), y) / 3).backward()
                    if fail and fail_in == ("first pass" if sam_pass.is_first else "second pass"):
                        raise MemoryError
                if fail and fail_in == "between":
                    raise MemoryError

        for number in range(2):
            optimizer.zero_grad()
            begun = False
            for index, (x, y) in enumerate(micro_batches()):
                fail = number == 1 and index == failing
                if fail and not fails:
                    continue
                try:
                    loop(x, y, fail=fail, accumulate=begun or index != 0 or not fails)
                except MemoryError as error:
                    kept.append(error)
                    continue
                begun = True
            optimizer.step()
        weights.append(bits(model.parameters()))
    assert weights[0] == weights[1]


def test_c19_batch_given_up_after_a_micro_batch_has_failed_is_no_part_of_the_next_step():
    models = linear(), linear()
    optimizers = [SAM(BASES["momentum"](model.parameters()), rho=0.2) for model in models]

    def loss(x, y, *, model, fail_at=None):
        if len(x) == fail_at:
            raise MemoryError
        return F.cross_entropy(model(x.double()), y)

    with pytest.raises(MemoryError):
        closures.micro_batches(optimizers[0], lambda *b: loss(*b, model=models[0], fail_at=2), batch(n=12), m=5)
    for model, optimizer in zip(models, optimizers, strict=True):
        optimizer.step(lambda model=model: loss(*batch(1), model=model))
    assert bits(models[0].parameters()) == bits(models[1].parameters())


def test_c19_micro_batches_given_up_by_an_exception_are_dropped_without_a_warning():
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = SAM(torch.optim.SGD([w], lr=1.0), rho=1.0)
    for fail in (True, False):
        with contextlib.suppress(MemoryError):
            for index in range(2):
                for sam_pass in optimizer.passes(accumulate=index > 0):
                    with sam_pass:
                        (w.square().sum() / 2).backward()
                        if fail and index:
                            raise MemoryError
            optimizer.step()
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, 4.0]) - 2 * torch.tensor([3.6, 4.8]))


def equal_gradients(a, b, c, x):
    """Return a loss in which a and b have the same gradient, of which c's is a part."""
    return ((x + a + b + torch.cat([c, c.new_zeros(2)])) ** 4).mean()


@pytest.mark.parametrize("method", ["sam", "gsam"])
def test_c19_parameters_whose_gradients_share_memory_accumulate_like_others(method):
    found = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (4, 4, 2)]
        optimizer = getattr(variants, method)(torch.optim.SGD(parameters, lr=0.1), rho=0.05)
        for index, x in enumerate(torch.randn(3, 6, 4, dtype=torch.float64)):
            for sam_pass in optimizer.passes(accumulate=index > 0):
                with sam_pass:
                    loss = equal_gradients(*parameters, x) / 3
                    if by_hand:
                        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                            p.grad = g
                    else:
                        loss.backward()
        optimizer.step()
        found.append(parameters)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("method", ["sam", "gsam", "gam", "c_flat", "looksam", "wsam", "sampa", "mixed_rwp"])
def test_gradients_that_autograd_returns_expanded_are_written_like_others(method):
    found = []
    for by_hand in (False, True):
        torch.manual_seed(0)
        parameters = [nn.Parameter(torch.randn(n, dtype=torch.float64)) for n in (5, 3)]
        w, v = parameters
        optimizer = getattr(variants, method)(torch.optim.SGD(parameters, lr=0.1, momentum=0.9), rho=0.05)

        def closure(parameters=parameters, w=w, v=v, optimizer=optimizer, by_hand=by_hand):
            loss = w.sum() * 2 + v.square().sum()
            optimizer.zero_grad()
            if by_hand:
                for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
                    p.grad = g
            else:
                loss.backward()
            return loss

        torch.manual_seed(1)
        for _ in range(3):
            optimizer.step(closure)
        found.append(parameters)
    for p, q in zip(*found, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


def test_gradients_in_parts_of_one_buffer_stay_in_it():
    parameters = [nn.Parameter(torch.randn(2, 3)), nn.Parameter(torch.randn(3))]
    buffer = torch.ones(9)
    optimizer = SAM(torch.optim.SGD(parameters, lr=0.1), rho=0.05)
    for sam_pass in optimizer.passes():
        with sam_pass:
            parameters[0].grad, parameters[1].grad = buffer[:6].view(2, 3), buffer[6:]
    optimizer.step()
    assert [p.grad.data_ptr() - buffer.data_ptr() for p in parameters] == [0, 24]
