"""refresh_statistics(): the statistics of BatchNorm layers for the averaged weights."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, update_bn
from torch.utils.data import DataLoader, TensorDataset

from averaged_training import sgd
from steppe.averaging import SWA
from support import bits, model_bits, plain, saved_and_loaded


class DictNet(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 4))
        self.layers.append(nn.BatchNorm1d(4, momentum=0.3))

    def forward(self, x):
        return self.layers(x)


def averaged_net():
    model = DictNet()
    averaged = SWA(model)
    averaged.update_parameters()
    for p in model.parameters():
        p.data.add_(0.5)
    averaged.update_parameters()
    return model, averaged


X = torch.randn(12, 3, generator=torch.Generator().manual_seed(0))


def test_statistics_are_those_of_update_bn():
    (_, averaged), (_, by_hand) = averaged_net(), averaged_net()
    before = model_bits(averaged)
    torch.manual_seed(1)
    averaged.refresh_statistics(X.split(4))
    torch.manual_seed(1)
    update_bn(X.split(4), by_hand)
    assert model_bits(averaged) == model_bits(by_hand) != before
    assert averaged.module.layers[4].momentum == 0.3


@pytest.mark.parametrize(
    ("batches", "forward"),
    [
        (list(X.split(4)), None),
        ([(x, None) for x in X.split(4)], None),
        ([{"x": x} for x in X.split(4)], lambda module, batch: module(batch["x"])),
        ([{"x": x} for x in X.split(4)], lambda module, batch: module(**batch)),
        ([(None, x) for x in X.split(4)], lambda module, batch: module(batch[1])),
        (DataLoader(TensorDataset(X, X), batch_size=4), None),
    ],
    ids=["tensors", "pairs", "dict", "keywords", "second", "loader"],
)
def test_batches_of_each_form_give_the_same_statistics_and_change_nothing_else(batches, forward):
    _, reference = averaged_net()
    torch.manual_seed(1)
    reference.refresh_statistics(X.split(4))
    model, averaged = averaged_net()
    averaged.eval()
    model_before, weights = model_bits(model), bits(averaged.module.parameters())
    torch.manual_seed(1)
    generator = torch.get_rng_state()
    averaged.refresh_statistics(batches, forward)
    assert torch.equal(torch.get_rng_state(), generator)
    assert (model_bits(model), bits(averaged.module.parameters())) == (model_before, weights)
    assert not any(m.training for m in averaged.modules())
    for name, buffer in averaged.module.named_buffers():
        if isinstance(batches, DataLoader) and name.startswith("layers.4"):
            continue  # the loader draws its seed before the dropout masks
        assert torch.equal(buffer, reference.module.get_buffer(name)), name


def test_layers_frozen_in_training_keep_their_statistics_and_use_them():
    model = DictNet()
    model.layers[2].p = 0.0
    model.layers[1].eval()
    model.layers[1].running_mean.fill_(3.0)
    averaged = SWA(model)
    averaged.update_parameters()
    model.eval()
    averaged.eval()
    averaged.refresh_statistics([X])
    first = averaged.module.layers[1]
    assert first.running_mean.tolist() == [3.0] * 4
    assert int(first.num_batches_tracked) == 0
    assert int(averaged.module.layers[4].num_batches_tracked) == 1
    torch.testing.assert_close(averaged.module.layers[4].running_mean, averaged.module.layers[:4](X).mean(0))
    model.train()
    averaged.update_parameters()  # now no layer is frozen
    averaged.refresh_statistics([X])
    torch.testing.assert_close(first.running_mean, averaged.module.layers[0](X).mean(0))


def test_batches_are_weighted_by_their_samples():
    model = nn.Sequential(nn.BatchNorm1d(3))
    averaged = SWA(model)
    averaged.refresh_statistics([X[:10], X[10:]])
    torch.testing.assert_close(averaged.module[0].running_mean, X.mean(0))
    variance = (10 * X[:10].var(0) + 2 * X[10:].var(0)) / 12
    torch.testing.assert_close(averaged.module[0].running_var, variance)


def head_in_training(model):
    model.eval()
    model.layers[3:].train()


def all_in_evaluation(model):
    model.eval()


def first_in_evaluation(model):
    model.layers[1].eval()


@pytest.mark.parametrize("freeze", [head_in_training, all_in_evaluation, first_in_evaluation])
@pytest.mark.parametrize("script", ["training", "another"])
def test_frozen_layers_keep_their_statistics_also_after_a_checkpoint(freeze, script):
    model = DictNet()
    freeze(model)
    optimizer = sgd(model)
    averaged = SWA(model, optimizer)
    plain(optimizer, lambda: model(X).square().mean())
    if script == "another":
        checkpoint = saved_and_loaded(averaged.state_dict())
        averaged = SWA(DictNet().eval())
        averaged.load_state_dict(checkpoint)
    frozen = [not model.layers[i].training for i in (1, 4)]
    averaged.refresh_statistics([3.0 + X])
    kept = [torch.equal(averaged.module.layers[i].running_mean, model.layers[i].running_mean) for i in (1, 4)]
    assert frozen[0]
    assert kept == frozen


def test_checkpoint_from_before_frozen_layers_were_in_it_loads():
    model = DictNet()
    model.layers[1].eval()
    averaged = SWA(model)
    checkpoint = averaged.state_dict()
    assert checkpoint.pop("frozen").tolist() == [True, False]
    averaged.load_state_dict(checkpoint)
    assert averaged.frozen.tolist() == [True, False]
    assert "frozen" not in checkpoint
    torchs = AveragedModel(model)
    torchs.load_state_dict(averaged.state_dict(), strict=False)
    averaged.load_state_dict({**torchs.state_dict(), "n_steps": averaged.n_steps})


def test_buffers_that_are_no_batch_norm_statistics_stay():
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.BatchNorm1d(3))
    averaged = SWA(model)
    before = bits(averaged.module[0].buffers())
    averaged.refresh_statistics([X])
    assert bits(averaged.module[0].buffers()) == before
    assert int(averaged.module[1].num_batches_tracked) == 1


@pytest.mark.parametrize(
    ("batches", "forward", "error", "message"),
    [
        ([], None, ValueError, "got no batch"),
        ([{"x": X}], None, TypeError, r"a batch of refresh_statistics\(\) is a dict"),
        ([X[:4], X[:, :2]], None, RuntimeError, "shapes cannot be multiplied"),
        ([X[:11], X[11:]], None, ValueError, "batch 1, counted from 0, has a single value per channel"),
    ],
    ids=["none", "dict", "second fails", "one sample"],
)
def test_error_leaves_statistics_momenta_and_modes(batches, forward, error, message):
    _, averaged = averaged_net()
    averaged.module.layers[1].eval()
    before = model_bits(averaged)
    with pytest.raises(error, match=message):
        averaged.refresh_statistics(batches, forward)
    assert model_bits(averaged) == before
    assert averaged.module.layers[4].momentum == 0.3
    assert [m.training for m in averaged.module.layers] == [True, False, True, True, True]


def test_model_without_batch_norm_reads_no_batch():
    averaged = SWA(nn.Linear(2, 1))
    averaged.refresh_statistics(iter([]))


def test_refreshing_within_applied_raises_as_the_model_in_the_block_would_keep_its_statistics():
    averaged = SWA(DictNet())
    with averaged.applied(), pytest.raises(RuntimeError, match="Call it before the block"):
        averaged.refresh_statistics([torch.randn(4, 3)])
    averaged.refresh_statistics([torch.randn(4, 3)])
