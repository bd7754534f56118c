import pytest
import torch

from steppe.experiments.data.sampling import wrong_labels

LABELS = torch.arange(60) % 6


@pytest.mark.parametrize("kind", ["uniform", "next"])
def test_wrong_labels_of_a_smaller_fraction_are_a_subset(kind: str) -> None:
    small, large = (wrong_labels(LABELS, fraction, 0, classes=6, kind=kind) for fraction in (0.2, 0.5))  # type: ignore[arg-type]
    wrong = [noisy != LABELS for noisy in (small, large)]
    assert [int(w.sum()) for w in wrong] == [12, 30]
    assert bool((wrong[0] <= wrong[1]).all())
    assert torch.equal(small[wrong[0]], large[wrong[0]])


def test_both_kinds_choose_the_same_samples() -> None:
    uniform, following = (wrong_labels(LABELS, 0.3, 5, classes=6, kind=kind) for kind in ("uniform", "next"))
    assert torch.equal(uniform != LABELS, following != LABELS)
    assert not torch.equal(uniform, following)


def test_wrong_labels_are_the_next_class_and_the_first_after_the_last() -> None:
    noisy = wrong_labels(LABELS, 0.5, 1, classes=6, kind="next")
    wrong = noisy != LABELS
    assert torch.equal(noisy[wrong], (LABELS[wrong] + 1) % 6)
    assert bool((LABELS[wrong] == 5).any())


def test_uniform_labels_reach_every_other_class() -> None:
    noisy = wrong_labels(torch.full((300,), 2), 1.0, 0, classes=4)
    assert noisy.unique().tolist() == [0, 1, 3]


def test_given_labels_and_global_generators_are_unchanged() -> None:
    labels, state = LABELS.clone(), torch.get_rng_state()
    wrong_labels(labels, 0.9, 0, classes=6)
    assert torch.equal(labels, LABELS)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(wrong_labels(LABELS, 0.0, 0, classes=6), LABELS)


@pytest.mark.parametrize(
    "options", [{"fraction": 1.1}, {"fraction": -0.1}, {"fraction": float("nan")}, {"classes": 1}, {"kind": "other"}]
)
def test_impossible_noise_raises(options: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="a fraction is from 0 to 1"):
        wrong_labels(LABELS, **({"fraction": 0.1, "seed": 0, "classes": 6} | options))  # type: ignore[arg-type]
