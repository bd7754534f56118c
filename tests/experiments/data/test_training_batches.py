import dataclasses

import torch
from tiny import batches_of, dataset

from steppe.experiments.data.batches import count, order
from steppe.experiments.data.datasets import normalize


def test_an_epoch_has_every_image_once_in_batches_of_nearly_equal_size() -> None:
    train = dataset().train
    given = list(batches_of(train, 16))
    assert [batch.size for batch in given] == [14, 14, 15, 14, 15]
    assert len(given) == count(72, 16)
    assert sorted(order(72, 0, 0).tolist()) == list(range(72))
    resumed = list(batches_of(train, 16, first=3))
    assert torch.equal(resumed[0].inputs, given[3].inputs)
    assert len(resumed) == 2


def test_orders_differ_by_seed_and_by_epoch() -> None:
    orders = {tuple(order(50, seed, epoch).tolist()) for seed in (0, 1, 2) for epoch in (0, 1, 2)}
    assert len(orders) == 9
    assert torch.equal(order(50, 1, 2), order(50, 1, 2))


def test_batch_indices_are_positions_in_the_split() -> None:
    train = dataset().train
    for batch in batches_of(train, 16, epoch=3):
        assert torch.equal(batch.targets, train.labels[batch.indices])
        assert batch.epoch == 3
        assert len(batch) == len(batch.indices) == batch.size


def test_a_batch_is_gathered_at_first_use() -> None:
    train = dataset().train
    batch = next(batches_of(train, 16, epoch=3))
    assert torch.equal(batch.inputs, normalize(train.images[batch.indices]))
    indices = batch.indices.flip(0)
    assert torch.equal(dataclasses.replace(batch, indices=indices).inputs, batch.inputs.flip(0))
