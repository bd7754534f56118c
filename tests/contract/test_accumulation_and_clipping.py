"""Contract C19 and C20: gradient accumulation and clipping."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from steppe import SAM
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
