from pathlib import Path

import pytest
import torch
from tiny import CPU, dataset, recipe, samples, split, train_run, training_of, untimed

from steppe.experiments.analysis.summary import setting
from steppe.experiments.config.presets import RECIPES
from steppe.experiments.data.datasets import Dataset, load
from steppe.experiments.data.sampling import few_shot, hold_out, mislabeled
from steppe.experiments.errors import ExperimentError
from steppe.experiments.storage.run_folder import RunFolder
from steppe.experiments.training.evaluation import evaluate


@pytest.fixture(scope="module")
def whole() -> Dataset:
    return load("digits")


def test_few_shots_are_stratified_seeded_and_nested(whole: Dataset) -> None:
    seven, three, other = (few_shot(whole.train, shots, seed) for shots, seed in ((7, 0), (3, 0), (7, 1)))
    assert torch.equal(torch.bincount(seven.labels), torch.full((10,), 7))
    keys = [{image.numpy().tobytes() for image in s.images} for s in (seven, three, other, whole.test, whole.train)]
    assert len(keys[0]) == 70
    assert keys[1] < keys[0]
    assert keys[0] <= keys[4]
    assert not keys[0] & keys[3]
    assert keys[0] != keys[2]
    again = few_shot(whole.train, 7, 0)
    assert torch.equal(again.images, seven.images)
    assert torch.equal(again.labels, seven.labels)
    for image, label in zip(seven.images, seven.labels, strict=True):  # each keeps its own label
        at = (whole.train.images == image).flatten(1).all(1).nonzero()[0]
        assert whole.train.labels[at] == label
    with pytest.raises(ExperimentError, match=r"shots=900: class 0 has 119 training images.*--shots 119 or fewer"):
        few_shot(whole.train, 900, 0)


def test_run_folder_rejects_another_number_of_shots(tmp_path: Path) -> None:
    demo = RECIPES["demo"][0]
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.claim(demo, 1)
    with pytest.raises(ExperimentError, match=r"holds another configuration.*: shots was None and is 3\. Use"):
        folder.claim(demo.replace(shots=3), 1)


def test_validation_set_is_disjoint_balanced_and_always_the_same() -> None:
    given = load("sample")
    one, two = hold_out(given, 6), hold_out(given, 6)
    assert torch.equal(one.test.images, two.test.images)
    assert len(one.train) == 2500
    assert one.test.labels.bincount().tolist() == [50] * 10
    # both together are the training images, each once
    rows = torch.cat([one.train.images, one.test.images]).flatten(1).unique(dim=0)
    assert torch.equal(rows, given.train.images.flatten(1).unique(dim=0))
    assert len(one.train) + len(one.test) == len(given.train)


def test_too_few_images_of_a_class_raise() -> None:
    with pytest.raises(ExperimentError, match="none can be held out"):
        hold_out(dataset(train=10), 60)


def test_exact_fraction_of_labels_is_wrong_and_smaller_fractions_are_subsets() -> None:
    clean = split(200, 0)
    small, large, other = mislabeled(clean, 0.1, 0), mislabeled(clean, 0.33, 0), mislabeled(clean, 0.33, 1)
    wrong = [noisy.labels != clean.labels for noisy in (small, large, other)]
    assert [int(w.sum()) for w in wrong] == [20, 66, 66]
    assert bool((wrong[0] <= wrong[1]).all())
    assert torch.equal(small.labels[wrong[0]], large.labels[wrong[0]])
    assert not torch.equal(wrong[1], wrong[2])
    assert torch.equal(large.images, clean.images)
    assert torch.equal(clean.labels, split(200, 0).labels)  # what was given is not written to
    assert torch.equal(mislabeled(clean, 0.33, 0).labels, large.labels)


def test_wrong_classes_are_uniform() -> None:
    zeros = type(split(1, 0))(torch.zeros(9000, 1, 1, 1, dtype=torch.uint8), torch.full((9000,), 7))
    counts = torch.bincount(mislabeled(zeros, 0.999999, 3).labels, minlength=10)
    assert counts[7] == 0
    assert counts[counts > 0].shape == (9,)
    assert ((counts[counts > 0] - 1000).abs() < 6 * 1000**0.5).all()


def test_draw_of_wrong_labels_is_stable_across_versions() -> None:
    # a run that goes on must find the labels that it was begun with
    assert split(20, 0).labels.tolist() == [4, 9, 3, 0, 3, 9, 7, 3, 7, 3, 1, 6, 6, 9, 8, 6, 6, 8, 4, 3]
    noisy = mislabeled(split(20, 0), 0.5, 0)
    assert noisy.labels.tolist() == [4, 9, 3, 8, 4, 6, 2, 3, 8, 2, 1, 6, 5, 4, 5, 6, 6, 8, 4, 0]


def test_methods_of_a_seed_share_wrong_training_labels_and_correct_test_labels() -> None:
    runs = list(recipe(label_noise=0.25, shots=3, seeds=2).runs())
    sgd, sam, other, _ = (training_of(run) for run in runs)
    few = few_shot(dataset().train, 3, 0)
    assert torch.equal(sgd.samples["train"].tensors[0], few.images)  # the noise leaves the draw of the images alone
    assert int((sgd.samples["train"].tensors[1] != few.labels).sum()) == 8  # of 30, to the nearest image
    assert torch.equal(sgd.samples["train"].tensors[1], sam.samples["train"].tensors[1])
    assert not torch.equal(sgd.samples["train"].tensors[1], other.samples["train"].tensors[1])
    assert torch.equal(sgd.samples["test"].tensors[1], dataset().test.labels)


def test_noise_leaves_initial_weights_unchanged_and_training_is_measured_on_noisy_labels(tmp_path: Path) -> None:
    (run,) = recipe(methods=("sgd",), label_noise=0.5).runs()
    (plain,) = recipe(methods=("sgd",)).runs()
    noisy, clean = training_of(run), training_of(plain)
    assert all(map(torch.equal, noisy.network.state_dict().values(), clean.network.state_dict().values()))
    noisy.epoch, noisy.spent = 2, noisy.spent + 2 * noisy.samples_per_epoch  # as if: a measurement is due
    (record,) = noisy.measure(lambda: None)
    fitted = samples(mislabeled(dataset().train, 0.5, 0))
    score = evaluate(noisy.task, noisy.network, fitted, 500, CPU, noisy.autocast, lambda: None)
    assert (record["train_loss"], record["train_accuracy"]) == (score["loss"], score["accuracy"])
    assert record["gap"] == record["train_accuracy"] - record["test_accuracy"]
    assert untimed(train_run(run, tmp_path / "a")) != untimed(train_run(plain, tmp_path / "b"))


def test_next_class_is_the_wrong_label_of_the_same_images() -> None:
    (uniform,), (following,) = (
        recipe(methods=("sgd",), label_noise=0.4, label_noise_kind=kind, seeds=1).runs() for kind in ("uniform", "next")
    )
    clean = dataset().train.labels
    drawn, labels = (training_of(run).samples["train"].tensors[1] for run in (uniform, following))
    assert torch.equal(drawn, mislabeled(dataset().train, 0.4, 0).labels)
    assert torch.equal(labels, torch.where(drawn == clean, clean, (clean + 1) % 10))


def test_kind_of_noise_without_noise_raises() -> None:
    with pytest.raises(ValueError, match=r"label_noise_kind=next with label_noise=0: .* no effect"):
        recipe(label_noise_kind="next")


@pytest.mark.parametrize("share", [-0.1, 1.0, 20.0, float("nan")])
def test_invalid_fraction_of_noise_raises(share: float) -> None:
    with pytest.raises(ValueError, match=r"label_noise=.*fraction of"):
        recipe(label_noise=share)


def test_label_noise_is_part_of_a_runs_configuration(tmp_path: Path) -> None:
    demo = RECIPES["demo"][0]
    assert recipe(label_noise=0.1).result_options()["label_noise"] == 0.1
    folder = RunFolder(tmp_path / "run")
    folder.path.mkdir()
    folder.claim(demo, 1)
    with pytest.raises(ExperimentError, match=r"label_noise was 0\.0 and is 0\.3"):
        folder.claim(demo.replace(label_noise=0.3), 1)


def test_title_names_the_label_noise() -> None:
    assert "a sample of Fashion-MNIST, 5 images a class, 12.5 % wrong training labels: SGD" in setting(
        recipe(shots=5, label_noise=0.125)
    )
    assert "12.5 % wrong training labels (the next class): SGD" in setting(
        recipe(label_noise=0.125, label_noise_kind="next")
    )
