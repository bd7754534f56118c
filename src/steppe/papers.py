"""Papers, and the BibTeX entries of those behind an optimizer. Each paper is defined in the file of its method."""

import dataclasses
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Paper:
    """One paper, with the facts of its arXiv record and of the conference that published it."""

    key: str
    """The key of its BibTeX entry: first author, year, method."""
    authors: tuple[str, ...]
    """Full names, in the paper's order."""
    title: str
    """The title, with BibTeX braces around words that keep their capitals."""
    arxiv: str
    """The arXiv number, such as 2010.01412."""
    year: int
    """The year of the conference, or of the preprint where there is none."""
    venue: str | None = None
    """The conference or journal; None for a preprint."""

    @property
    def url(self) -> str:
        """The address of its arXiv page."""
        return f"https://arxiv.org/abs/{self.arxiv}"

    @property
    def short(self) -> str:
        """Authors, year and arXiv number, for use in a sentence.

        Example:
            >>> SAM.short
            'Foret et al. 2021, arXiv 2010.01412'
        """
        last = [name.split()[-1] for name in self.authors]
        who = last[0] if len(last) == 1 else f"{last[0]} and {last[1]}" if len(last) == 2 else f"{last[0]} et al."
        return f"{who} {self.year}, arXiv {self.arxiv}"

    def bibtex(self) -> str:
        """Return the BibTeX entry.

        Example:
            >>> print(SAM.bibtex())
            @inproceedings{foret2021sam,
              title = {Sharpness-Aware Minimization for Efficiently Improving Generalization},
              author = {Pierre Foret and Ariel Kleiner and Hossein Mobahi and Behnam Neyshabur},
              booktitle = {International Conference on Learning Representations (ICLR)},
              year = {2021},
              eprint = {2010.01412},
              archivePrefix = {arXiv},
            }
        """
        fields = {
            "title": self.title,
            "author": " and ".join(self.authors),
            **({"booktitle": self.venue} if self.venue else {}),
            "year": str(self.year),
            "eprint": self.arxiv,
            "archivePrefix": "arXiv",
        }
        body = "\n".join(f"{name} = {{{value}}}," for name, value in fields.items())
        return f"@{'inproceedings' if self.venue else 'misc'}{{{self.key},\n{textwrap.indent(body, '  ')}\n}}"


def citation(*used: object) -> str:
    r"""Return the BibTeX entries of the papers behind an optimizer, its rules and their modifiers, a closure or a loss.

    The paper of an object is its attribute ``paper``, also for objects of your own; an object without this attribute
    adds nothing. If one of the objects is a :class:`steppe.SAM`, the paper of SAM comes first.

    Args:
        *used: An optimizer, and any other objects of Steppe, such as ``steppe.closures.fraction``.

    Returns:
        The entries, separated by empty lines; an empty string for a plain optimizer.

    Raises:
        TypeError: The name or the function of a method is given, not the optimizer that the function returns.

    Example:
        >>> import steppe, torch
        >>> base = torch.optim.SGD([torch.nn.Parameter(torch.zeros(2))], lr=0.1)
        >>> optimizer = steppe.variants.gsam(base)
        >>> [entry.split(",")[0] for entry in citation(optimizer).split("\n\n")]
        ['@inproceedings{foret2021sam', '@inproceedings{zhuang2022gsam']
    """
    for name in filter(None, map(_name_of_method, used)):
        raise TypeError(
            f"citation() takes an optimizer, its rules or a closure, got the method {name!r}: give the optimizer that "
            f"steppe.variants.{name}(...) returns, or run `steppe methods {name} --bibtex`"
        )
    papers = dict.fromkeys(paper for part in used for paper in papers_of(part))
    return "\n\n".join(paper.bibtex() for paper in papers)


def _name_of_method(part: object) -> str | None:
    """Return the name if it is one, or a function of steppe.variants: its rules are known only when it is called."""
    if isinstance(part, FunctionType) and part.__module__.startswith("steppe.methods.") and "paper" not in vars(part):
        return part.__name__
    return part if isinstance(part, str) else None


def cites(paper: Paper) -> Callable[[_F], _F]:
    """Return a decorator that sets the attribute ``paper`` of a function."""

    def mark(function: _F) -> _F:
        function.paper = paper  # type: ignore[attr-defined]
        return function

    return mark


def papers_of(part: Any) -> Iterator[Paper]:
    """Yield the papers of an object, its base classes, its rules and its fields, in order and with repetitions."""
    for place in (*reversed(type(part).__mro__), part):
        paper = getattr(place, "__dict__", {}).get("paper")
        if isinstance(paper, Paper):
            yield paper
    slots = [getattr(part, name, None) for name in ("perturbation", "combination", "cadence")]
    fields = dataclasses.fields(part) if dataclasses.is_dataclass(part) and not isinstance(part, Paper) else ()
    for inner in (*slots, *(getattr(part, field.name) for field in fields)):
        if dataclasses.is_dataclass(inner) and not isinstance(inner, Paper):
            yield from papers_of(inner)


ICLR = "International Conference on Learning Representations (ICLR)"
ICML = "International Conference on Machine Learning (ICML)"
NEURIPS = "Advances in Neural Information Processing Systems (NeurIPS)"
CVPR = "IEEE/CVF Conference on Computer Vision and Pattern Recognition (CVPR)"

SAM = Paper(
    "foret2021sam",
    ("Pierre Foret", "Ariel Kleiner", "Hossein Mobahi", "Behnam Neyshabur"),
    "Sharpness-Aware Minimization for Efficiently Improving Generalization",
    "2010.01412",
    2021,
    ICLR,
)
