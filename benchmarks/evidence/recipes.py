"""The experiments of docs/evidence: a recipe, its settings, the radii that are searched, and what decides."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from steppe.experiments.config.method_spec import MethodSpec
from steppe.experiments.robustness.corruptions import CORRUPTIONS
from steppe.methods.registry import CARDS

RADII = (0.05, 0.1, 0.2)
WRONG_LABELS = {f"{100 * share:.0f} % wrong": share for share in (0.2, 0.4, 0.6)}
"""The settings of the recipe noisy-labels, each with its share of wrong labels."""


@dataclass(frozen=True)
class Evidence:
    """A recipe of `steppe compare`, its radii chosen on held-out data and then confirmed by other seeds."""

    tuned: Sequence[str | tuple[str, ...]]
    """The methods whose radius is searched; of a tuple, only the best one on the held-out data is confirmed."""
    others: Sequence[str] = ()
    """Further methods of the comparison, such as the averaged base."""
    settings: Mapping[str, Sequence[str]] = field(default_factory=lambda: {"": ()})
    """Further options of the recipe, by the name of a setting."""
    others_in: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further methods of settings, by their names, besides `others`."""
    tuned_in: Mapping[str, Sequence[str | tuple[str, ...]]] = field(default_factory=dict)
    """What settings search in place of `tuned`, by their names: some methods cannot train some tasks."""
    chosen_in: Mapping[str, str] = field(default_factory=dict)
    """Settings that have no search of their own, each with the earlier setting whose search they confirm."""
    tuned_there: Sequence[str | tuple[str, ...]] = ()
    """What those settings confirm, in place of `tuned`."""
    confirmed_by: int | None = None
    """Runs of each method that confirm the radii; by default as many as the recipe has."""
    confirmed_there_by: int | None = None
    """Such runs in the settings that have no search of their own, in place of `confirmed_by`."""
    recipe: str = ""
    """By default the name of the experiment."""
    base: str = "sgd"
    radii: Sequence[float] = RADII
    """The radii that are searched, in units of the method's usual one where SAM's is 1.

    Of a method without a radius the weight `lmbda` is searched, as if its default were SAM's radius of 0.1.
    """
    wider: int = 0
    """How often a search goes on, at two smaller or two larger radii, while its best one is the smallest or largest."""
    objective: str = "metric"
    """What decides on the held-out data, see `steppe tune --objective`."""
    seeds: int = 2
    """Runs of each trial of the search."""
    measures: Sequence[str] = ("accuracy", "accuracy under corruptions", "calibration error")
    """What the tables show; the first one decides."""
    drawn: Sequence[str] = ()
    """What the figure shows of these; by default everything."""
    side_by_side: Sequence[str] = ()
    """Settings of many methods, which one table shows side by side, without controls and figure."""

    def searches(self, setting: str, searched: Mapping[str, Any]) -> Mapping[str, Sequence[str]]:
        """Return the methods to search next, by what is searched ("rho=0.1,0.2"); each entry is a `steppe tune`.

        Args:
            setting: The setting that is searched.
            searched: Its `trials` so far, and the `best` of each method: its value on the held-out data, and its spec.
        """
        found: dict[str, list[str]] = {}
        for method in (method for group in _groups(self._tuned(setting)) for method in group):
            if values := self._next_values(method, searched):
                numbers = ",".join(f"{value:g}" for value in values)
                found.setdefault(f"{_searched_argument(method)}={numbers}", []).append(str(method))
        return found

    def best(self, setting: str, searched: Mapping[str, tuple[float, str]]) -> list[str]:
        """Return the specs to confirm, of the best value on the held-out data and its spec for each tuned method."""
        groups = _groups(self._tuned(setting))
        return [max(searched[str(method)] for method in group)[1] for group in groups]

    def confirming_runs(self, setting: str) -> int | None:
        """Return the runs of each method that confirm the radii of a setting; None: as many as the recipe has."""
        return self.confirmed_there_by or self.confirmed_by if setting in self.chosen_in else self.confirmed_by

    def folder(self, name: str, setting: str) -> str:
        """Return the run folder of a setting: that of the first one that is trained alike, whose runs it shares."""
        alike = next(other for other, options in self.settings.items() if options == self.settings[setting])
        return "-".join([name, *alike.replace("%", "").replace(",", "").split()])

    def _next_values(self, method: MethodSpec, searched: Mapping[str, Any]) -> Sequence[float]:
        """Return the values at which a method is searched next; none if its search is at its end."""
        name = _searched_argument(method)
        unit = method.definition.rho_factor if name == "rho" else CARDS[method.name].defaults[name] / 0.1
        usual = [unit * radius for radius in self.radii]
        tried = [trial["values"][name] for trial in searched["trials"] if trial["method"] == str(method)]
        if not tried:
            return usual
        best = dict(MethodSpec.parse(searched["best"][str(method)][1]).overrides)[name]
        if best == max(tried) < 0.99 * max(usual) * 4**self.wider:
            return [2 * best, 4 * best]
        if best == min(tried) > 1.01 * min(usual) / 4**self.wider:
            return [best / 4, best / 2]
        return []

    def _tuned(self, setting: str) -> Sequence[str | tuple[str, ...]]:
        """Return the methods whose best radii a setting confirms."""
        return self.tuned_there if setting in self.chosen_in else self.tuned_in.get(setting, self.tuned)


def _searched_argument(method: MethodSpec) -> str:
    """Return the argument of a method that is searched."""
    return "rho" if "rho" in method.definition.arguments else "lmbda"


def _groups(tuned: Sequence[str | tuple[str, ...]]) -> list[list[MethodSpec]]:
    return [[MethodSpec.parse(text) for text in ([one] if isinstance(one, str) else one)] for one in tuned]


FAMILY = (
    *("sam", "asam", "gsam", "friendly_sam", "vasso", "looksam", "late_sam", "random_sam", "fraction_sam", "aesam"),
    *("esam", "sam_on", "sparse_sam", "dynamic_sparse_sam", "fisher_sam", "layerwise_sam", "wsam", "pgn", "zsharp"),
    *("sampa", "lookbehind_sam", "sam:ascent_steps=2", "micro_batch_sam:m=16", "msam", "rwp", "arwp", "bsam"),
    *("mixed_rwp", "mixed_arwp"),
)
"""The methods of `family` that have a radius."""

NEWER = (
    *("bisam", "c_flat", "eigen_sam", "functional_sam", "gam", "le_sam", "sagm", "saner", "sassha", "stable_sam"),
    *("stale_sam", "unified_sam"),
)
"""Further methods that have a radius, in a comparison of their own."""

ONE_PASS = (("msam", "stale_sam"), ("rwp", "arwp"), ("saf",))
"""Methods of one pass for a step: along former gradients, with random noise, with a loss of former outputs."""

CHEAPER = (
    ("late_sam:start=0.9", "looksam:interval=10", "random_sam:p=0.1", "fraction_sam:fraction=0.1"),
    ("late_sam:start=0.75", "looksam:interval=4", "random_sam:p=0.25", "fraction_sam:fraction=0.25"),
    ("late_sam:start=0.667", "looksam:interval=3", "random_sam:p=0.333", "fraction_sam:fraction=0.333", "mesa"),
)
"""Methods of 1.1, of 1.25 and of 4/3 passes for a step."""

_WITH_NOISE = ("accuracy", "accuracy under gaussian_noise", "accuracy under corruptions", "calibration error")
_WRONG = ("--label-noise", "0.4")
_LARGER = ("--dataset", "fashion-mnist", "--shots", "1200", "--epochs", "10")
_ADAPTERS = "steppe.experiments.tasks.adapters"
_ON_MORE_SENTENCES = ("--epochs", "8", "--eval-every", "2")

EVIDENCE: Mapping[str, Evidence] = {
    "noisy-labels": Evidence(
        ["sam"],
        ["sgd+ema"],
        radii=(*RADII, 0.4),
        settings={name: ["--label-noise", str(share)] for name, share in WRONG_LABELS.items()},
    ),
    "corruptions": Evidence(
        ["sam"],
        objective="accuracy under corruptions",
        seeds=3,
        measures=[
            "accuracy under corruptions",
            *(f"accuracy under {name}" for name in CORRUPTIONS),
            *("accuracy", "calibration error", "accuracy at 3 bits"),
        ],
    ),
    "annealed": Evidence(
        ["sam", "late_sam", "looksam"],
        ["sgd+ema"],
        measures=_WITH_NOISE,
    ),
    "forgetting": Evidence(
        ["sam"],
        ["sgd+ema"],
        settings={
            "rotated": ["--then", "rotated"],
            "digits": ["--then", "digits"],
            # seeds from 10: the rate was chosen by looking at networks of the first ones
            "rotated, small steps": ["--then", "rotated", "--then-lr", "0.001", "--first-seed", "10"],
        },
        objective="accuracy after the second task",
        measures=["accuracy after the second task", "accuracy forgotten", "accuracy on the second task", "accuracy"],
    ),
    "vit": Evidence(
        ["sam"],
        objective="accuracy under corruptions",
        base="adamw",
        measures=[
            *("accuracy under corruptions", "accuracy under gaussian_noise", "accuracy"),
            *("calibration error", "accuracy at 3 bits"),
        ],
    ),
    "text": Evidence(["sam"], base="base", seeds=3, measures=["accuracy"]),
    "price": Evidence(
        [*ONE_PASS, *CHEAPER, "sam"],
        ["sgd+ema"],
        recipe="annealed",
        wider=2,
        settings={
            "3,000 images, 40 % wrong": _WRONG,
            "3,000 images": (),
            "12,000 images, 40 % wrong": [*_LARGER, *_WRONG],
            "12,000 images": _LARGER,
        },
        others_in={"3,000 images": ["fraction_sam:rho=0.2,fraction=0.333"]},  # the choice of a narrower search before
        chosen_in={"12,000 images, 40 % wrong": "3,000 images, 40 % wrong", "12,000 images": "3,000 images"},
        tuned_there=["saf", "fraction_sam:fraction=0.25", "sam"],  # the cheapest that twenty seeds confirmed in both
        confirmed_by=20,
        measures=_WITH_NOISE,
        drawn=["accuracy", "accuracy under gaussian_noise", "calibration error"],
    ),
    "weight-decay": Evidence(
        ["sam"],
        ["sgd+ema"],
        recipe="annealed",
        radii=(0.025, *RADII),
        settings={"40 % wrong, weight decay 0.03": [*_WRONG, "--weight-decay", "0.03"]},
        measures=_WITH_NOISE,
    ),
    "family": Evidence(
        FAMILY,
        ["saf", "mesa"],
        recipe="annealed",
        settings={
            "correct labels": (),
            "40 % wrong": _WRONG,
            "correct labels, ten seeds": (),
            "40 % wrong, ten seeds": _WRONG,
        },
        chosen_in={"correct labels, ten seeds": "correct labels", "40 % wrong, ten seeds": "40 % wrong"},
        tuned_there=["sam", "asam", "gsam", "friendly_sam", "rwp", "arwp"],  # twenty seeds of the cheaper ones: price
        seeds=1,
        confirmed_by=3,
        confirmed_there_by=10,
        measures=_WITH_NOISE,
        side_by_side=["correct labels", "40 % wrong"],
    ),
    "newer-methods": Evidence(
        ["sam", *NEWER],
        recipe="annealed",
        settings={"correct labels": (), "40 % wrong": _WRONG},
        seeds=1,
        confirmed_by=3,
        measures=_WITH_NOISE,
        side_by_side=["correct labels", "40 % wrong"],
    ),
    "adapters": Evidence(
        ["sam", "late_sam", "merged_sam", "flat_lora"],
        base="base",
        settings={
            "LoRA": (),
            "LoRA, 40 % wrong": ["--task", f"{_ADAPTERS}:lora_wrong_labels", *_ON_MORE_SENTENCES],
            "full": ["--task", f"{_ADAPTERS}:full"],
            "full, 40 % wrong": ["--task", f"{_ADAPTERS}:full_wrong_labels", *_ON_MORE_SENTENCES],
        },
        tuned_in={setting: ["sam", "late_sam"] for setting in ("full", "full, 40 % wrong")},
        measures=["accuracy", "accuracy after the second task", "accuracy forgotten", "accuracy on the second task"],
        drawn=["accuracy"],
    ),
}
"""By the name of the experiment, in the order in which they are run."""
