"""What the scripts have in common."""

import ctypes
import platform
import sys
import time

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


def matmul_peak(device: torch.device, dtype: torch.dtype, n: int | None = None) -> float:
    """FLOP/s of a matmul of n x n (None: large) on this device, the best that a fifth of a second allows."""
    n, times = n or (8192 if device.type == "cuda" else 1024), []
    a = torch.ones(n, n, device=device, dtype=dtype)
    while sum(times[1:]) < 0.2:  # the first one warms up
        start = time.perf_counter()
        (a @ a.T)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def keep_freed_memory():
    """From now on this process keeps what it frees, under glibc, which else gives large tensors back to the
    kernel at once: to get them anew, page by page, slows down training on a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing is mapped by itself,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap never shrinks


def pick_dtype(peak: dict[str, float]) -> str:
    """The first of these types, by their matmul_peak, that is 1.5 times as fast as float32; else float32."""
    return next((name for name in peak if peak[name] > 1.5 * peak["float32"]), "float32")
