"""Contract C27: number of operations and temporaries of a step."""

import collections
import gc
import weakref

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import steppe
from fake_cuda import CUDA_BASES, step_with_ones
from steppe import SAM
from support import bits

RULES = [steppe.L2(), steppe.Adaptive()]


class Count(TorchDispatchMode):
    """Count operations by name."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if not str(func).startswith("prim.") and "detach" not in str(func):  # queries and views do no work
            self.operations[str(func)] += 1
        return func(*args, **(kwargs or {}))


def count_operations(num_tensors: int, rule, base, device: str) -> int:
    """Return the number of operations of a perturbation and its restoration."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        params = [nn.Parameter(torch.empty(3, 5, device=device)) for _ in range(num_tensors)]
        optimizer = SAM(base(params), rho=0.1, perturbation=rule)
        step_with_ones(optimizer, params, "passes")
        for p in params:
            p.grad = torch.ones_like(p)
        point = optimizer._engine.point()
        with Count() as count:
            optimizer._engine.begin_perturbed_pass(point, rule, keep_unperturbed=False)
            optimizer._engine.restore()
    return sum(count.operations.values())


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_c27_number_of_operations_does_not_grow_with_the_number_of_tensors(rule):
    few, many = (count_operations(n, rule, CUDA_BASES["sgd"], "cuda") for n in (10, 100))
    assert few == many
    assert many < 40


def test_c27_step_makes_no_temporaries_of_the_size_of_the_weights():
    """Memory traffic: norm 1N, copy 2N, perturbation 3N, restore 2N; nothing of size N is allocated after step 1."""
    n = 1 << 16
    params = [nn.Parameter(torch.randn(n)) for _ in range(4)]
    optimizer = SAM(torch.optim.SGD(params, lr=0.1), rho=0.1)
    step_with_ones(optimizer, params, "passes")
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

    point = optimizer._engine.point()
    with Allocated() as allocated:
        optimizer._engine.begin_perturbed_pass(point, steppe.L2(), keep_unperturbed=False)
        optimizer._engine.restore()
    assert 0 < allocated.largest <= 2 * n * len(params) / 256, "only the norms of the pieces are allocated"


def test_first_gradient_is_freed_before_the_second_pass():
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
