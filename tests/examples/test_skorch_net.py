"""examples/skorch_net.py against SAM by hand: history, callbacks, schedules, resuming and searching."""

import pickle

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("skorch")
pytest.importorskip("sklearn")

import skorch
from example_files import load_example
from sam_by_hand import assert_close, relative_distance, sam_by_hand
from sklearn.model_selection import GridSearchCV
from skorch.callbacks import Callback, GradientNormClipping, LRScheduler

import steppe
from support import model_bits

EPOCHS, BATCH = 3, 16


@pytest.fixture(scope="module")
def skorch_net():
    return load_example("skorch_net.py")


@pytest.fixture(scope="module")
def data():
    g = torch.Generator().manual_seed(1)
    x = torch.randn(48, 64, generator=g)
    return x.numpy(), (x[:, :10].argmax(1)).numpy()


def fresh(skorch_net, **kwargs):
    torch.manual_seed(0)
    return skorch_net.net(max_epochs=EPOCHS, batch_size=BATCH, train_split=None, **kwargs)


def by_hand(module, data, *, rho=0.1, epochs=EPOCHS, clip=None, gamma=1.0):
    """Train the module with SAM by hand; return it and the mean loss at w of each epoch."""
    x, y = map(torch.tensor, data)
    base = torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(base, step_size=1, gamma=gamma)
    means = []
    module.train()
    for _ in range(epochs):
        losses = []
        for i in range(0, len(x), BATCH):

            def backward(i=i):
                loss = F.cross_entropy(module(x[i : i + BATCH]), y[i : i + BATCH])
                loss.backward()
                return loss

            losses.append(sam_by_hand(module, base, rho, backward, clip))
        scheduler.step()
        means.append(float(torch.stack(losses).mean()))
    return module, means


def test_weights_statistics_and_history_equal_sam_by_hand(skorch_net, data):
    net = fresh(skorch_net, optimizer__rho=0.1).fit(*data)
    reference, losses = by_hand(fresh(skorch_net).initialize().module_, data)
    assert_close(net.module_, reference, rtol=5e-6)
    assert net.history[:, "train_loss"] == pytest.approx(losses, rel=1e-5)
    assert relative_distance(net.module_, by_hand(fresh(skorch_net).initialize().module_, data, rho=0.0)[0]) > 0.01


def test_second_pass_is_not_counted_by_callbacks_history_and_batchnorm(skorch_net, data):
    seen = []

    class Count(Callback):
        def on_grad_computed(self, net, **kwargs):
            seen.append("grad")

        def on_batch_end(self, net, **kwargs):
            seen.append("batch")

    net = fresh(skorch_net, callbacks=[Count()]).initialize()
    forwards = []
    net.module_.register_forward_hook(lambda *_: forwards.append(1))
    net.partial_fit(*data)
    assert seen == ["grad", "batch"] * (EPOCHS * 3)
    assert len(forwards) == 2 * EPOCHS * 3
    assert net.module_[1].num_batches_tracked == EPOCHS * 3
    assert net.history[-1, "train_batch_count"] == 3


def test_clipping_callback_acts_on_the_update_gradient(skorch_net, data):
    net = fresh(skorch_net, optimizer__rho=0.1, callbacks=[GradientNormClipping(0.1)]).fit(*data)
    reference, _ = by_hand(fresh(skorch_net).initialize().module_, data, clip=0.1)
    assert_close(net.module_, reference, rtol=5e-6)
    assert relative_distance(net.module_, by_hand(fresh(skorch_net).initialize().module_, data)[0]) > 0.01


def test_schedule_callback_reaches_the_base_optimizer(skorch_net, data):
    schedule = LRScheduler("StepLR", step_size=1, gamma=0.5)
    net = fresh(skorch_net, optimizer__rho=0.1, callbacks=[schedule]).fit(*data)
    reference, _ = by_hand(fresh(skorch_net).initialize().module_, data, gamma=0.5)
    assert_close(net.module_, reference, rtol=5e-6)


def looksam(params, *, model, rho=0.05, lr):
    """Make a method with a memory and a cadence, as skorch's ``optimizer``."""
    return steppe.variants.looksam(torch.optim.SGD(params, lr=lr, momentum=0.9), rho=rho, interval=3, model=model)


@pytest.mark.parametrize("optimizer", [steppe.SAM, looksam])
def test_loading_saved_params_resumes_with_the_same_bits(skorch_net, data, optimizer, tmp_path):
    def build():
        net = fresh(skorch_net)
        if optimizer is looksam:
            rest = {"criterion": net.criterion, "lr": net.lr, "batch_size": BATCH, "train_split": None, "verbose": 0}
            net = skorch_net.SAMClassifier(net.module, optimizer=looksam, **rest)
        return net.initialize()

    through = build().partial_fit(*data, epochs=1)
    files = {f"f_{part}": str(tmp_path / part) for part in ("params", "optimizer", "history")}
    through.save_params(**files)
    through.partial_fit(*data, epochs=2)
    resumed = build()
    resumed.load_params(**files)
    resumed.partial_fit(*data, epochs=2)
    assert model_bits(through.module_) == model_bits(resumed.module_)
    assert through.history[:, "train_loss"] == resumed.history[:, "train_loss"]


def test_pickled_net_resumes_with_the_same_bits(skorch_net, data):
    net = skorch.NeuralNetClassifier(
        fresh(skorch_net).module, criterion=torch.nn.CrossEntropyLoss, optimizer=steppe.SAM, verbose=0,
        optimizer__base_class=torch.optim.SGD, optimizer__momentum=0.9, train_split=None, max_epochs=1,
    )  # fmt: skip
    with pytest.warns(UserWarning, match="without model="):
        net.fit(*data)
    twin = pickle.loads(pickle.dumps(net))
    net.partial_fit(*data)
    with pytest.warns(UserWarning, match="without model="):
        twin.partial_fit(*data)
    assert model_bits(net.module_) == model_bits(twin.module_)


def test_plain_skorch_net_without_batchnorm_equals_sam_by_hand(skorch_net, data):
    """skorch calls step(closure). With BatchNorm both passes would change its statistics, because SAM has no model."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.Tanh(), torch.nn.Linear(32, 10))
    net = skorch.NeuralNetClassifier(
        module, criterion=torch.nn.CrossEntropyLoss, optimizer=steppe.SAM, optimizer__base_class=torch.optim.SGD,
        optimizer__rho=0.1, optimizer__momentum=0.9, lr=0.05, max_epochs=EPOCHS, batch_size=BATCH, train_split=None,
        verbose=0,
    )  # fmt: skip
    start = pickle.loads(pickle.dumps(module))
    net.fit(*data)
    reference, losses = by_hand(start, data)
    assert_close(net.module_, reference, rtol=5e-6)
    assert net.history[:, "train_loss"] == pytest.approx(losses, rel=1e-5)


def test_grid_search_over_rho_trains_with_each_value(skorch_net, data):
    search = GridSearchCV(fresh(skorch_net), {"optimizer__rho": [0.0, 0.2]}, cv=2, refit=False, scoring=rho_of)
    search.fit(*data)
    assert search.cv_results_["mean_test_score"].tolist() == [0.0, 0.2]


def rho_of(net, x, y) -> float:
    return net.optimizer_.param_groups[0]["sam_rho"]


def test_setting_rho_under_the_wrong_name_in_an_initialized_net_raises(skorch_net, data):
    net = fresh(skorch_net, optimizer__rho=0.1).initialize()
    net.set_params(optimizer__sam_rho=0.2)
    net.partial_fit(*data, epochs=1)
    net.set_params(optimizer__rho=0.3)
    with pytest.raises(ValueError, match="the radius of a group is 'sam_rho'"):
        net.partial_fit(*data, epochs=1)
