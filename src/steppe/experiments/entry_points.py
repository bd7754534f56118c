"""Objects in a user's code, named as "package.module:name"."""

import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from steppe.experiments.errors import ExperimentError, OptionError, closest, place, typed


def check_name(option: str, name: str) -> None:
    """Raise OptionError, which says how to write it, where it cannot be a name.

    >>> check_name("model", "nets.py:resnet")
    Traceback (most recent call last):
        ...
    steppe.experiments.errors.OptionError: model='nets.py:resnet': name the module as in an import, nets:resnet
    """
    module, _, attribute = name.partition(":")
    imported = re.sub(r"[/\\]", ".", module.removesuffix(".py").removeprefix("./"))
    wrong = next((part for part in imported.split(".") if not part.isidentifier()), None)
    if not module or not all(part.isidentifier() for part in attribute.split(".")):
        reason = "write package.module:name, a module and the name of an object in it, as flowers:task"
    elif wrong is not None:
        reason = (
            f"a module that is called {wrong!r} cannot be imported, as names of Python have letters, digits and _ only "
            "and do not begin with a digit: rename the file or folder"
        )
    elif imported != module:
        reason = f"name the module as in an import, {imported}:{attribute}"
    else:
        return
    raise OptionError(f"{option}={name!r}: {reason}")


def load_entry_point(option: str, name: str) -> Any:
    """Import it, from the current folder first, as `python -m` does.

    Raises ExperimentError when that fails, also where the file is damaged; in one line that names the file.
    """
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)  # permanently: a factory may import when it is called
    module, _, attribute = name.partition(":")
    with one_line_errors(f"--{option} {name}: importing {module} raised "):
        try:
            return pkgutil.resolve_name(name)
        except ModuleNotFoundError as error:
            missing = error.name or module
            inside = "" if module == missing or module.startswith(f"{missing}.") else f", which {module} imports"
            raise ExperimentError(
                f"--{option} {name}: there is no module {missing}{inside}, neither in the current folder ({here}) nor "
                f"among the installed ones{_closest(missing, _modules_beside(missing, here))}"
            ) from error
        except AttributeError as error:
            if module not in sys.modules:  # the module's own code has failed
                raise
            file = getattr(sys.modules[module], "__file__", None)
            known = [known for known in dir(error.obj) if not known.startswith("_")]
            close = _closest(error.name or attribute, known)
            raise ExperimentError(f"--{option} {name}: {module} ({file}) has no {attribute}{close}") from error
        except Exception as error:
            if place(error):
                raise
            # what cannot be compiled may have no place at all, as a file with a null byte
            spec = None
            with suppress(Exception):  # it imports the packages around the module
                spec = importlib.util.find_spec(module)
            file = module if spec is None else spec.origin
            raise ExperimentError(f"--{option} {name}: {file} cannot be imported ({typed(error)})") from error


def _modules_beside(missing: str, here: str) -> list[str]:
    """Return the modules in the package of a missing one, or else in the current folder."""
    package, _, _ = missing.rpartition(".")
    paths = getattr(sys.modules.get(package), "__path__", []) if package else [here]
    return [f"{package}.{one.name}".lstrip(".") for one in pkgutil.iter_modules(paths)]


def _closest(name: str, known: Sequence[str]) -> str:
    return closest(name, known).removesuffix(".")


def call_factory(option: str, name: str, factory: Callable[[], Any]) -> Any:
    """Call a function of the user's; its errors are one line that names the option."""
    with one_line_errors(f"--{option} {name}: calling it raised "):
        return factory()


@contextmanager
def one_line_errors(before: str, after: str = "") -> Iterator[None]:
    """Turn any error of the user's code into an ExperimentError, its type and first line between two texts.

    So is SystemExit: a script that reads its own command line when it is imported would end the command with status 2.
    """
    try:
        yield
    except ExperimentError:
        raise
    except (Exception, SystemExit) as error:
        raise ExperimentError(f"{before}{typed(error)}{place(error)}{after}") from error
