import pytest
from tiny import recipe

from steppe.experiments.config.recipe import Recipe
from steppe.experiments.config.resolve import resolve
from steppe.experiments.errors import ExperimentError


def test_open_options_resolve_to_the_fastest_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr("torch.backends.mkldnn.is_available", lambda: True)
    given = Recipe().replace(device="cpu")
    assert (given.hardware.amp, given.hardware.cuda_graphs, given.hardware.threads) == (None, None, None)
    found = resolve(given)
    assert (found.hardware.amp, found.hardware.cuda_graphs, found.hardware.threads) == (True, False, 1)
    assert resolve(found) == found
    assert resolve(given.replace(amp=False)).hardware.amp is False
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert resolve(given).hardware.amp is False
    monkeypatch.delattr("torch.cpu._is_avx512_bf16_supported")  # a torch that does not say
    assert resolve(given).hardware.amp is False


@pytest.mark.parametrize("has", [True, False])
def test_open_options_resolve_on_a_gpu(monkeypatch: pytest.MonkeyPatch, has: bool) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda *, including_emulation: has and not including_emulation)
    found = resolve(Recipe())
    assert (found.hardware.device, found.hardware.amp, found.hardware.cuda_graphs, found.hardware.threads) == (
        "cuda",
        has,
        True,
        None,
    )


def test_batch_norm_in_two_processes_on_cpus_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert resolve(recipe(norm="group")).model.norm == "group"
    with pytest.raises(ExperimentError, match=r"SyncBatchNorm .* use --norm group"):
        resolve(recipe(norm="batch"))


@pytest.mark.parametrize(("width", "threads", "fits"), [(8, 2, False), (12, 4, False), (8, 1, True), (16, 2, True)])
def test_channels_last_that_makes_torch_write_beyond_its_memory_raises(width: int, threads: int, fits: bool) -> None:
    asked = recipe(width=width, threads=threads, channels_last=True)
    if fits:
        assert resolve(asked).hardware.channels_last
    else:
        with pytest.raises(ExperimentError, match="--threads 1"):
            resolve(asked)
