"""Steppe in skorch: a net that trains with SAM, with a learning-rate schedule, clipping and a grid search over rho."""

import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping, LRScheduler
from skorch.utils import TeeGenerator

import steppe


class SAMClassifier(NeuralNetClassifier):
    """A NeuralNetClassifier whose optimizer is a steppe.SAM."""

    def get_params_for_optimizer(self, prefix, named_parameters):
        """Give SAM the module, so that the second pass does not change BatchNorm's statistics."""
        args, kwargs = super().get_params_for_optimizer(prefix, named_parameters)
        return args, {"model": self.module_, **kwargs}

    def train_step(self, batch, **fit_params):
        """Run the passes of one step; callbacks get the update gradient, and the history gets the loss at w."""
        for sam_pass in self.optimizer_.passes():
            with sam_pass:
                step = self.train_step_single(batch, **fit_params)
                if sam_pass.is_first:
                    first = step
        parameters = TeeGenerator(self.get_all_learnable_params())
        self.notify("on_grad_computed", named_parameters=parameters, batch=batch, training=True)
        self.optimizer_.step()
        return first


def net(**kwargs):
    """Return a net; ``optimizer`` may be any function of (params, model=, lr=, ...) that returns a steppe.SAM."""
    module = torch.nn.Sequential(
        torch.nn.Linear(64, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Linear(32, 10)
    )
    sgd = {"optimizer__base_class": torch.optim.SGD, "optimizer__momentum": 0.9, "lr": 0.05}
    rest = {"criterion": torch.nn.CrossEntropyLoss, "batch_size": 64, "max_epochs": 5, "verbose": 0}
    return SAMClassifier(module, optimizer=steppe.SAM, **{**sgd, **rest, **kwargs})


def main():
    """Search rho; rho = 0 is plain SGD."""
    torch.set_num_threads(1)  # the net is tiny
    torch.manual_seed(0)
    x, y = load_digits(return_X_y=True)
    callbacks = [("clip", GradientNormClipping(1.0)), ("schedule", LRScheduler("StepLR", step_size=2, gamma=0.5))]
    search = GridSearchCV(net(callbacks=callbacks, train_split=None), {"optimizer__rho": [0.0, 0.05, 0.2]}, cv=3)
    search.fit((x / 16).astype("float32"), y)
    for rho, accuracy in zip(search.param_grid["optimizer__rho"], search.cv_results_["mean_test_score"], strict=True):
        print(f"rho = {rho}: {accuracy:.1%} in cross-validation")


if __name__ == "__main__":
    main()
