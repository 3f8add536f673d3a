"""What the commands have in common: options on the command line, and errors of one line."""

import os
import signal
import sys
from contextlib import contextmanager
from typing import Annotated, get_args, get_type_hints

import torch
import tyro

from lib import early
from smollm import InputError


# The type of an option that is a path, or may be one: a ~ at its beginning is the home folder
HomePath = Annotated[str, "path"]


def parse(options: type, description: str, default=None):
    """The command line, as an instance of the dataclass `options`, whose comments are the help.
    What is not given has its value in `default`. From now on, errors are told in one line."""
    sys.excepthook = one_line_errors
    if signal.getsignal(signal.SIGINT) == early.leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if sys.stderr is None:  # closed, as by 2>&-
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)
    if sys.stdout is None:
        raise InputError("stdout is closed: send it to a file or to /dev/null")
    sys.stdout.reconfigure(errors="replace")  # names of files may be any bytes
    o = tyro.cli(options, description=description, default=default, use_underscores=True,
                 config=(tyro.conf.FlagConversionOff,))
    for name, kind in get_type_hints(options, include_extras=True).items():
        value = getattr(o, name)
        if is_path(kind) and isinstance(value, list):
            setattr(o, name, [os.path.expanduser(path) for path in value])
        elif is_path(kind) and value is not None:
            setattr(o, name, os.path.expanduser(value))
        elif isinstance(value, str):
            check_is_utf8(name, value)
    return o


def is_path(kind) -> bool:
    """Whether the type of an option is HomePath, in X | None, or in a list, too."""
    if "path" in getattr(kind, "__metadata__", ()):
        return True
    return any(is_path(part) for part in get_args(kind))


def check_is_utf8(name: str, value: str):
    try:
        value.encode()  # other bytes arrive as surrogates
    except UnicodeEncodeError as error:
        raise InputError(f"{name} must be UTF-8 text: {error}") from None


def check_range(o, low, high, *names: str):
    """InputError unless these options are None, or at least low and below high."""
    for name in names:
        value = getattr(o, name)
        if value is not None and not low <= value < high:
            raise InputError(f"{name} is {value}, it must be at least {low} and below {high:g}")


def one_line_errors(kind, error, traceback):
    """A sys.excepthook: what the user or the machine did is told in one line. Bugs keep their
    traceback."""
    lacks_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
    if lacks_memory or "DefaultCPUAllocator" in str(error):  # a RuntimeError, on a CPU
        print(f"error: out of memory: ask for less at once, such as fewer samples or a smaller "
              f"batch_size: {in_one_line(error)}", file=sys.stderr)
    elif isinstance(error, InputError | OSError | KeyboardInterrupt):
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def in_one_line(error: Exception) -> str:
    return " ".join((str(error) or repr(error)).split())[:500]


@contextmanager
def reading(what, hint: str = "", failed: str = "can't be read"):
    """Around the reading of a file or dataset: whatever a library raises becomes an InputError of
    one line, which names `what` and ends with the hint."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what}: {failed}: {in_one_line(error)}{hint}") from error


def difference(o, other) -> dict:
    """The options of o that other has otherwise, by name."""
    return {name: value for name, value in vars(o).items() if value != getattr(other, name)}


def spell(options: dict) -> str:
    return " ".join(f"--{name}={value}" for name, value in options.items()) or "none"
