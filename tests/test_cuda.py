"""Tests that need a GPU: steps in CUDA graphs, no synchronization, flatness equal to that on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import steppe
from steppe.experiments.config.methods import METHODS
from steppe.experiments.config.recipe import Recipe
from steppe.experiments.data.datasets import Dataset, Split
from steppe.experiments.tasks.images import images_task
from steppe.experiments.training.run import train as train_run
from steppe.experiments.training.stopping import Stopped
from steppe.experiments.world import join
from stops import StopAfter
from support import batch, net

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=torch.tensor(0.1, device="cuda"), momentum=0.9, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01, device="cuda"), fused=True, capturable=True),
}
RULES = {
    "sam": {},
    "asam": {"perturbation": steppe.Adaptive()},
    "f-sam": {"perturbation": steppe.Friendly()},
    "gsam": {"combination": steppe.SurrogateGap()},
    "looksam": {"combination": steppe.GradientReuse()},
}


def warm_up(base, rules):
    """Return a network after three steps, its batch, a function that takes a further step, and the stream."""
    model = net(dropout=0.0).cuda()
    model.layers[4].momentum = 0.1  # with None, BatchNorm itself reads its counter on the host
    optimizer = steppe.SAM(BASES[base](model.parameters()), rho=0.1, model=model, replay_rng=False, **RULES[rules])
    x, y = (t.cuda() for t in batch(0))

    def step():
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(model(x), y).backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.synchronize()
    return model, (x, y), step, stream


def trained(base, rules, *, captured: bool, steps: int = 8) -> list[torch.Tensor]:
    model, xy, step, stream = warm_up(base, rules)
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph, stream=stream):
            step()
    for t in range(steps):
        for target, value in zip(xy, batch(t), strict=True):
            target.copy_(value)
        (graph.replay if captured else step)()
    return [p.detach().clone() for p in model.parameters()]


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("base", BASES)
def test_captured_step_equals_the_eager_step(base, rules):
    found, expected = (trained(base, rules, captured=captured) for captured in (True, False))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("base", BASES)
def test_step_does_not_synchronize_with_the_host(base, rules):
    *_, step, _ = warm_up(base, rules)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_replays_count_skipped_steps():
    model = net(dropout=0.0).cuda()
    model.layers[4].momentum = 0.1
    optimizer = steppe.SAM(BASES["sgd"](model.parameters()), rho=0.1, model=model, replay_rng=False)
    x, y = (t.cuda() for t in batch(0))

    def step():
        for sam_pass in optimizer.passes():
            with sam_pass:
                F.cross_entropy(model(x), y).backward()
        optimizer.step()

    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        step()
    before = [p.detach().clone() for p in model.parameters()]
    x[0] = float("nan")
    graph.replay()
    graph.replay()
    assert optimizer.skipped_steps == 2
    assert all(map(torch.equal, model.parameters(), before))


# Runs of the experiments with and without graphs: 72 images in batches of 14 and 15.

CAPTURABLE = [name for name, method in METHODS.items() if method.capturable]


def images(n: int, seed: int) -> Split:
    g = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 10, (n,), generator=g)
    noise = torch.randint(0, 128, (n, 1, 28, 28), generator=g)
    return Split((noise + 12 * labels.view(-1, 1, 1, 1)).to(torch.uint8), labels)


def experiment(folder: Path, method: str, *, stops: tuple[int, ...] = (), **fields) -> dict:
    """Train to the end, with interruptions, and return the last checkpoint."""
    base = "adamw" if method == "adamw" else "sgd"
    options = {"width": 8, "batch_size": 16, "epochs": 8, "seeds": 1, "base": base, "lr": 0.01, "amp": False}
    recipe = Recipe().replace(methods=(method,), device="cuda", **{**options, **fields})
    run, data = next(recipe.runs()), Dataset("made", images(72, 0), images(50, 1), "made for tests")
    task = images_task(data, run.recipe)
    with join(recipe.hardware.device, recipe.hardware.threads) as world:
        for steps in stops:
            with pytest.raises(Stopped):
                train_run(run, folder, task, world, stop=StopAfter(steps))
        train_run(run, folder, task, world)
    return torch.load(folder / "checkpoint.pt", weights_only=True)


@pytest.mark.parametrize("method", CAPTURABLE)
def test_run_with_cuda_graphs_equals_the_run_without(method, tmp_path):
    found, expected = (experiment(tmp_path / str(on), method, cuda_graphs=on) for on in (True, False))
    assert found["steps"] == expected["steps"]
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-4, atol=1e-5)
    steps, expected_steps = (state["optimizer"]["param_groups"][0].get("sam_step") for state in (found, expected))
    assert steps == expected_steps


OPTIONS = {
    "float32": {},
    "bfloat16": {"amp": True, "channels_last": True},
    "without graphs": {"cuda_graphs": False},
    "momentum": {"momentum": 0.9},
}


@pytest.mark.parametrize("method", ["sgd", "sam", "fraction_sam", "looksam:interval=2"])
@pytest.mark.parametrize("options", OPTIONS)
def test_resumed_run_ends_with_the_same_bits(options, method, tmp_path):
    straight = experiment(tmp_path / "straight", method, **OPTIONS[options])
    resumed = experiment(tmp_path / "resumed", method, stops=(2, 9), checkpoint_seconds=0, **OPTIONS[options])
    assert straight["steps"] == resumed["steps"]
    assert all(torch.equal(straight["model"][name], resumed["model"][name]) for name in straight["model"])


def test_captured_compiled_step_equals_the_eager_step(tmp_path):
    found, expected = (
        experiment(tmp_path / str(on), "sam", cuda_graphs=on, compile=on, width=16) for on in (True, False)
    )
    torch.testing.assert_close(found["model"], expected["model"], rtol=1e-2, atol=1e-3)


def test_flatness_on_gpu_equals_flatness_on_cpu():
    model = net(dropout=0.3).double()
    x, y = (t.double() if t.is_floating_point() else t for t in batch(0))
    found = []
    for device in ("cpu", "cuda"):
        objective = steppe.flatness.Objective(model.to(device), (x, y), loss=F.cross_entropy, batch_size=5)
        vector = torch.linspace(-1.0, 1.0, objective.n, dtype=torch.float64, device=device)
        loss, gradient = objective.gradient()
        product = steppe.flatness.Hessian(objective)(vector[None])[0]
        top = steppe.flatness.eigenvalues(steppe.flatness.Hessian(objective), tol=1e-8).values
        found.append([t.cpu() for t in (loss, gradient, product, top)])
    torch.testing.assert_close(found[1], found[0], rtol=1e-8, atol=1e-10)


def test_attention_on_gpu_is_differentiated_twice():
    model = torch.nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, device="cuda")
    x = torch.randn(4, 6, 16, device="cuda")
    objective = steppe.flatness.Objective(model, (x, x), loss=F.mse_loss)
    product = steppe.flatness.Hessian(objective)(torch.ones(1, objective.n, device="cuda"))
    assert product.isfinite().all()
    assert product.norm() > 0


def test_flatness_measurement_leaves_the_gpu_generator_unchanged():
    model, (x, y) = net(dropout=0.3).cuda(), batch(0)
    torch.cuda.manual_seed(3)
    expected = torch.rand(1, device="cuda")
    torch.cuda.manual_seed(3)
    steppe.flatness.sharpness(steppe.flatness.Objective(model, (x, y), loss=F.cross_entropy), rho=0.05, ascent_steps=2)
    assert torch.equal(torch.rand(1, device="cuda"), expected)


@pytest.mark.parametrize("name", ["sam", "gsam"])
def test_fsdp2_by_accelerate_equals_one_process(name, tmp_path):
    """Train by the engine that Accelerate chooses on GPUs, in a process for each of at most two."""
    pytest.importorskip("accelerate")
    script, file = Path(__file__).parent / "integrations" / "fsdp2_gpu_worker.py", tmp_path / "weights.pt"
    processes = f"--nproc-per-node={min(2, torch.cuda.device_count())}"
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", processes, script, file, name]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run(launch, env=env, capture_output=True, text=True, timeout=240, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    from fsdp2_of_accelerate import by_hand

    from layouts import method

    torch.testing.assert_close(torch.load(file), by_hand(method(name)), rtol=1e-10, atol=1e-12)
