"""What the scripts have in common."""

import sys

import torch

from smollm import InputError, first_line


def one_line_errors(kind, error, traceback):
    """A `sys.excepthook` for scripts: what user or machine did is told in one line, bugs keep a traceback."""
    if issubclass(kind, InputError | OSError | KeyboardInterrupt | torch.OutOfMemoryError):
        print(f"error: {str(error) or 'interrupted'}", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, traceback)


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # which 'meta' has not
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} can't be used here: {first_line(error)}") from None
