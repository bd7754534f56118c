"""Errors that a user can fix: the command line prints one clear line and no traceback."""


class ExperimentError(RuntimeError):
    """States the cause, the consequence and the remedy; the command line prints it and exits with 1."""


class DataError(ExperimentError):
    """A data set is missing or damaged; the message names the file and the remedies."""


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message as a part of a sentence, or its type if there is none."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__).rstrip(".")
