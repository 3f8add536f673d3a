"""What the commands have in common: options on the command line, and errors of one line."""

import sys
from contextlib import contextmanager

import torch
import tyro

from smollm import InputError


def parse(options: type, description: str, default=None):
    """The command line, as an instance of the dataclass `options`, whose comments are the help.
    What is not given has its value in `default`. From now on, errors are told in one line."""
    sys.excepthook = one_line_errors
    return tyro.cli(options, description=description, default=default, use_underscores=True,
                    config=(tyro.conf.FlagConversionOff,))


def check_range(o, low, high, *names: str):
    """InputError unless these options are None, or at least low and below high."""
    for name in names:
        value = getattr(o, name)
        if value is not None and not low <= value < high:
            raise InputError(f"{name} is {value}, it must be at least {low} and below {high:g}")


def one_line_errors(kind, error, traceback):
    """A sys.excepthook: what the user or the machine did is told in one line. Bugs keep their
    traceback."""
    if issubclass(kind, InputError | OSError | KeyboardInterrupt | torch.OutOfMemoryError):
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def in_one_line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())[:500]


@contextmanager
def reading(what, hint: str = ""):
    """Around the reading of a file or dataset: whatever a library raises becomes an InputError of
    one line, which names `what` and ends with the hint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: can't be read: {in_one_line(error)}{hint}") from error


def difference(o, other) -> dict:
    """The options of o that other has otherwise, by name."""
    return {name: value for name, value in vars(o).items() if value != getattr(other, name)}


def spell(options: dict) -> str:
    return " ".join(f"--{name}={value}" for name, value in options.items()) or "none"
