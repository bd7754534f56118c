"""Contract C29: an exception at any line of a step leaves the weights at w, and the next call works."""

import copy
import gc
import pickle
import sys
import warnings
from collections.abc import Callable, Collection, Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from named_methods import WRAPPERS, build
from torch import nn

import steppe
from steppe.methods.bsam import BSAM
from steppe.methods.lookbehind_sam import Lookbehind
from steppe.methods.sampa import SAMPa
from steppe.methods.sassha import SASSHA
from steppe.methods.wsam import DecoupledWSAM
from steppe.sam import Stage
from support import BASES, bits, by_classic, by_closure, by_passes, observed, parameter, rest_is_slow

SOURCE = str(Path(steppe.__file__).parent) + "/"
METHODS: dict[str, Callable[[nn.Module], steppe.SAM]] = {
    **{name: build(name, "sgd" if name != "msam" else "momentum") for name in WRAPPERS},
    "lookbehind-adaptive": lambda m: Lookbehind(BASES["sgd"](m.parameters()), 0.1, ascent_steps=2, alpha=None, model=m),
    "lookbehind-unperturbed": lambda m: Lookbehind(
        BASES["sgd"](m.parameters()), 0.1, alpha=0.5, cadence=steppe.Periodic(2), model=m
    ),
    "decoupled_wsam": lambda m: DecoupledWSAM(BASES["sgd"](m.parameters()), 0.1, gamma=0.8, model=m),
    "bsam": lambda m: BSAM(
        [{"params": [m[0].weight]}, {"params": [m[0].bias, *m[1].parameters()]}], 0.05, n_data=500, rho=0.1, model=m
    ),
    "sassha": lambda m: SASSHA(m.parameters(), 0.05, interval=1, model=m),
}
REFUSE_CLASSIC = {
    "gam",
    "c_flat",
    "lookbehind_sam",
    "lookbehind-adaptive",
    "lookbehind-unperturbed",
    "sampa",
    "bsam",
    "sassha",
    "ascent_steps",
    "rwp",
    "mixed_rwp",
    "arwp",
    "msam",
    "stale_sam",
}

Line = tuple[str, int]
OF_THE_ENGINE = ("step", "engine", "side_effects", "closure", "gradients", "displacement")
MODULES = {
    "sam": {
        "closure": ("sam.py", *(f"_engine/{module}.py" for module in OF_THE_ENGINE)),
        "passes": ("sam.py", "_engine/step.py", "_engine/passes.py"),  # the rest runs as in a step by a closure
        "classic": ("sam.py", "_engine/step.py"),
    },
    "sampa": {"closure": ("methods/",), "passes": ("methods/_base.py",)},
}
"""Modules at whose lines a step is interrupted; another slow test has every method and all modules."""


def by_passes_in_contexts(optimizer: steppe.SAM, loss: Callable[[], torch.Tensor]) -> None:
    loss = observed(optimizer, loss)
    for sam_pass in optimizer.passes():
        with sam_pass.around(nullcontext()):
            loss().backward()
    optimizer.step()


DRIVES = {"closure": by_closure, "passes": by_passes_in_contexts, "classic": by_classic}


class Interrupt(BaseException):
    """As KeyboardInterrupt: no ordinary except clause catches it."""


class Problem:
    """A small network and its optimizer after one step, and the drive of the next."""

    def __init__(self, name: str, drive: str) -> None:
        torch.manual_seed(0)
        nn.modules.module._global_forward_pre_hooks.clear()  # of problems before, until they are collected
        self.model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
        self.optimizer = METHODS[name](self.model)
        self.x = torch.linspace(-1, 1, 12).reshape(4, 3) ** 3
        self.drive = DRIVES[drive]
        self.step()

    def loss(self) -> torch.Tensor:
        return (self.model(self.x) - self.x[:, :2]).square().mean()

    def step(self) -> None:
        self.drive(self.optimizer, self.loss)

    def weights(self) -> list[bytes]:
        return bits(self.model.parameters())


def traced(problem: Problem, at: int | None) -> list[Line]:
    """Take a step, raise at a line event of the package (by its number), and return the lines up to there."""
    lines: list[Line] = []

    def local(frame, event, _):
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) - 1 == at:
                sys.settrace(None)
                raise Interrupt
        return local

    before = sys.gettrace()
    gc.disable()  # it would call functions of the package at any time, and the numbers of the lines would differ
    sys.settrace(lambda frame, event, _: local if frame.f_code.co_filename.startswith(SOURCE) else None)
    try:
        problem.step()
    except Interrupt:
        pass
    finally:
        sys.settrace(before)
        gc.enable()
    return lines


def events(lines: list[Line], covered: set[Line], modules: Collection[str] = ("",)) -> Iterator[int]:
    """Yield the last event at each line of these modules that no earlier method has covered."""
    lasts = {line: number for number, line in enumerate(lines)}
    for line in lasts.keys() - covered:
        if line[0].removeprefix(SOURCE).startswith(tuple(modules)):
            yield lasts[line]
    covered.update(lines)


def first_and_last_events(lines: list[Line], covered: set[Line]) -> Iterator[int]:
    """Yield the first and the last event at each line that no earlier method has covered."""
    firsts = {line: number for number, line in reversed(list(enumerate(lines)))}
    for number in list(events(lines, covered)):
        yield from {firsts[lines[number]], number}


def check_interrupt(name: str, drive: str, at: int, after: list[bytes]) -> str:
    """Raise at one line of a step, and return what is wrong then, or an empty string."""
    problem = Problem(name, drive)
    before = problem.weights()
    path, number = traced(problem, at)[-1]
    where = f"{name}, {drive}, {path.removeprefix(SOURCE)}:{number}: "
    stage = problem.optimizer._engine.stage
    if drive == "classic" and stage is Stage.AFTER_FIRST_STEP:
        problem.optimizer.second_step()  # the interrupt came before its first line
        return "" if problem.weights() == after else where + "second_step() after the interrupt is another step"
    if problem.weights() not in (before, after):
        return where + "the weights are neither w nor the new w"
    if problem.optimizer._engine.displaced():
        return where + "a displacement is left"
    if stage not in (Stage.IDLE, Stage.INCOMPLETE, Stage.READY, Stage.BETWEEN_PASSES):
        return where + f"the step is left {stage.value}"
    redo = problem.weights() == before and name == "sam"
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "passes.. was called again before step")
            problem.step()
    except Exception as error:
        return where + f"the next step raises {error!r}"
    if redo and problem.weights() != after:
        return where + "the next step is another one"
    return ""


# an interrupt in a loop over passes() that Python is closing is printed, not raised
as_python_closes_loops = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@as_python_closes_loops
@pytest.mark.parametrize(
    ("name", "drive"),
    rest_is_slow([(name, drive) for name, of in MODULES.items() for drive in of], lambda name, drive: name == "sam"),
)
def test_c29_interrupt_in_a_step_restores_the_weights_and_the_next_step_works(name, drive):
    problem = Problem(name, drive)
    lines = traced(problem, None)
    after = problem.weights()
    wrong = [check_interrupt(name, drive, at, after) for at in events(lines, set(), MODULES[name][drive])]
    assert len(wrong) > 20
    assert [message for message in wrong if message] == []


@pytest.mark.slow
@as_python_closes_loops
@pytest.mark.parametrize("drive", DRIVES)
def test_c29_interrupt_at_any_line_of_every_method_restores_the_weights_and_the_next_step_works(drive):
    covered: set[Line] = set()
    wrong = []
    for name in sorted(METHODS, key=lambda name: (name != "sam", name)):
        if drive == "classic" and name in REFUSE_CLASSIC:
            continue
        problem = Problem(name, drive)
        lines = traced(problem, None)
        after = problem.weights()
        wrong += [check_interrupt(name, drive, at, after) for at in first_and_last_events(lines, covered)]
    assert len(wrong) > 1000
    assert [message for message in wrong if message] == []


def interrupted_before_second_step() -> tuple[Problem, list[bytes], list[bytes]]:
    """Return a problem at w + e after both backwards of the classic API, with w and the weights after the step."""
    problem, twin = Problem("sam", "classic"), Problem("sam", "classic")
    twin.step()
    before, optimizer = problem.weights(), problem.optimizer
    optimizer.zero_grad()
    problem.loss().backward()
    optimizer.first_step(zero_grad=True)
    problem.loss().backward()
    assert problem.weights() != before
    return problem, before, twin.weights()


@pytest.mark.parametrize("call", ["second_step", "step", "step_closure"])
def test_c29_call_that_ends_a_step_completes_an_interrupted_classic_step(call):
    problem, _, after = interrupted_before_second_step()
    if call == "second_step":
        problem.optimizer.second_step()
    else:
        problem.optimizer.step(*[lambda: 1 / 0] * (call == "step_closure"))
    assert problem.weights() == after


NEXT_CALLS: dict[str, Callable[[Problem], object]] = {
    "zero_grad": lambda problem: problem.optimizer.zero_grad(),
    "state_dict": lambda problem: problem.optimizer.state_dict(),
    "copy": lambda problem: copy.deepcopy(problem.optimizer),
    "first_step": lambda problem: problem.optimizer.first_step(),
    "passes": lambda problem: next(problem.optimizer.passes()),
    "load_state_dict": lambda problem: problem.optimizer.load_state_dict({}),
    "add_param_group": lambda problem: problem.optimizer.add_param_group({"params": [parameter(1.0)]}),
}


@pytest.mark.parametrize("call", NEXT_CALLS)
def test_c29_no_call_loses_the_weights_of_an_interrupted_classic_step(call):
    problem, before, after = interrupted_before_second_step()
    if call in ("zero_grad", "state_dict", "copy"):
        NEXT_CALLS[call](problem)
    else:
        with pytest.raises(RuntimeError, match=r"restore\(\) aborts the step and restores the weights"):
            NEXT_CALLS[call](problem)
    problem.optimizer.restore()
    assert problem.weights() == before
    problem.step()
    assert problem.weights() == after


def test_c29_interrupt_after_the_step_of_the_base_makes_the_next_step_of_sampa_a_first_one(monkeypatch):
    w, v = parameter(1.0), parameter(1.0)
    optimizer, twin = (SAMPa(torch.optim.SGD([p], lr=0.1), rho=0.5) for p in (w, v))
    for _ in range(2):
        by_closure(optimizer, lambda: w.square().sum())
        by_closure(twin, lambda: v.square().sum())
    with monkeypatch.context() as patch, pytest.raises(Interrupt):
        patch.setattr(optimizer, "point", lambda *_: (_ for _ in ()).throw(Interrupt()))
        by_closure(optimizer, lambda: w.square().sum())
    by_closure(twin, lambda: v.square().sum())
    assert bits([w]) == bits([v])
    start = w.item()
    by_closure(optimizer, lambda: w.square().sum())
    assert w.item() == pytest.approx(start - 0.1 * 2 * start)


def test_c29_copy_in_the_middle_of_a_step_is_a_copy_at_w():
    for copied in (copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))):
        for drive in ("first_step", "passes"):
            problem = Problem("sam", "classic")
            model, optimizer, before = problem.model, problem.optimizer, problem.weights()
            if drive == "first_step":
                problem.loss().backward()
                optimizer.first_step(zero_grad=True)
                twin, twin_optimizer = copied((model, optimizer))
                assert problem.weights() != before
                optimizer.restore()
            else:
                for sam_pass in optimizer.passes():
                    with sam_pass:
                        problem.loss().backward()
                        twin, twin_optimizer = copied((model, optimizer))
            assert bits(twin.parameters()) == before == problem.weights()
            by_passes(twin_optimizer, lambda twin=twin, x=problem.x: (twin(x) - x[:, :2]).square().mean())


def test_c29_out_of_memory_in_the_rule_or_the_closure_does_not_affect_the_next_step():
    class Flaky(steppe.L2):
        fails = True

        def __call__(self, point):
            if Flaky.fails:
                Flaky.fails = False
                raise torch.OutOfMemoryError("once")
            return super().__call__(point)

    w = parameter(3.0, 4.0)
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.5, perturbation=Flaky())
    with pytest.raises(torch.OutOfMemoryError):
        by_closure(optimizer, lambda: w.square().sum())
    assert w.tolist() == [3.0, 4.0]
    by_closure(optimizer, lambda: w.square().sum())
    torch.testing.assert_close(w.detach(), torch.tensor([3.0, 4.0]) - 0.1 * 2 * torch.tensor([3.3, 4.4]))


def test_c29_loop_that_goes_on_after_an_exception_in_a_pass_raises():
    w = parameter(3.0)
    optimizer = steppe.SAM(torch.optim.SGD([w], lr=0.1), rho=0.5)

    def loop():
        for sam_pass in optimizer.passes():
            try:
                with sam_pass:
                    w.square().sum().backward()
                    if sam_pass.is_perturbed:
                        raise torch.OutOfMemoryError("in the second pass")
            except torch.OutOfMemoryError:
                continue

    with pytest.raises(RuntimeError, match="went on after an exception inside a pass"):
        loop()
    with pytest.raises(RuntimeError, match="there is no update gradient"):
        optimizer.step()
    assert w.item() == 3.0
    by_passes(optimizer, lambda: w.square().sum())
    assert w.item() == pytest.approx(3.0 - 0.1 * 7.0)
