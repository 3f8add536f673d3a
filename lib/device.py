"""What depends on the machine: the device, its speed, the precision that suits it, memory."""

import ctypes
import os
import platform
import shlex
import shutil
import sys
import time

import torch

from lib.cli import in_one_line
from smollm import InputError, SmolLM


def pick_device(name: str) -> torch.device:
    """The device of that name; 'auto' is CUDA, else Apple's MPS, else the CPU."""
    if name == "auto":
        name = "cpu"
        if torch.backends.mps.is_available():
            name = "mps"
        if torch.cuda.is_available():
            name = "cuda"
    try:
        torch.zeros(1, device=name).item()  # a device may exist and have no values, as 'meta'
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise InputError(f"device {name!r} can't be used here: {in_one_line(error)}") from None


NO_COMPILER = ("torch.compile finds no compiler: install g++ (on a Mac, Xcode's clang++), or name "
               "yours in CXX and CC; going on more slowly, without torch.compile")


def has_compiler(device: torch.device) -> bool:
    """Whether torch.compile finds the compiler that it needs: on a CPU of C++, and on CUDA of C."""
    if device.type == "cpu":
        default = {"darwin": "clang++", "win32": "cl"}.get(sys.platform, "g++")
        names = shlex.split(os.environ.get("CXX") or default)[:1]
    elif device.type == "cuda":
        names = shlex.split(os.environ.get("CC", ""))[:1] or ["gcc", "clang", "cl"]
    else:
        return True
    return any(shutil.which(name) for name in names)


def matmul_peak(device: torch.device, dtype: torch.dtype, size: int | None = None) -> float:
    """FLOP/s of a matmul of size x size (None: large), the best that a tenth of a second allows."""
    if size is None:
        size = 8192 if device.type == "cuda" else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    (a @ a.T)[0, 0].item()  # warms up
    times = []
    while sum(times) < 0.1:
        start = time.perf_counter()
        (a @ a.T)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)


def pick_dtype(device: torch.device) -> str:
    """The precision to train in: one of 16 bits where its matmul is 1.5 times as fast as that of
    float32, bfloat16 before float16, which only CUDA may get."""
    names = ["float32", "bfloat16"]
    if device.type == "cuda":
        names.append("float16")
    return fastest({name: matmul_peak(device, getattr(torch, name)) for name in names})


def fastest(peaks: dict[str, float]) -> str:
    """The first dtype whose matmul_peak is 1.5 times that of float32; else float32."""
    for name, peak in peaks.items():
        if peak > 1.5 * peaks["float32"]:
            return name
    return "float32"


def flops_per_token(model: SmolLM, T: int) -> int:
    """FLOPs of training, forward and backward, for each token of a sequence of T.

    6 for each weight of a matrix (the embedding counts, as the head), and 6 * layers * C * T for
    attention, which sees T/2 keys on average. PaLM (Chowdhery et al. 2022, appendix B) has 12
    there, for it counts the masked half as work.
    """
    matrices = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    return 6 * matrices + 6 * model.config.num_hidden_layers * model.config.hidden_size * T


def keep_freed_memory():
    """From now on this process keeps the memory that it frees. Under glibc, large tensors are else
    given back to the kernel at once; to get them anew, page by page, slows a CPU."""
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no piece of memory is mapped by itself,
        libc.mallopt(-1, -1)  # M_TRIM_THRESHOLD: and the heap never shrinks
