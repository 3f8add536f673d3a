"""Attention of SmolLM-135M, one layer, forward and backward.

    python bench/attention.py

On a GPU: memory and time at 8 x 2048, when grouped keys and values go to torch as they are, and
with what smollm.py chooses. A newer GPU stands for a T4 when torch's flash kernels, which a T4
can't run, are switched off. Without a GPU: time of torch's fused kernel and of lib/faster.py's
pieces, eager and compiled, in turn.
"""

import sys
import time
from pathlib import Path
from statistics import median

import torch
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib.device import keep_freed_memory
from lib.faster import attend_in_pieces, mask_of_later_keys
from smollm import Attention, Config

B, H, H_KV, T, D = 8, 9, 3, 2048, 64
REPEATS = 20
CASES = [  # dtype, whether there is a mask, whether the GPU stands for a T4
    (torch.bfloat16, False, False),
    (torch.bfloat16, True, False),
    (torch.float32, False, False),
    (torch.float32, True, False),
    (torch.float16, False, True),
    (torch.float16, True, True),
]

CPU_SHAPES = [(4, 512), (8, 512), (1, 2048), (16, 128)]  # sequences, tokens of each


def as_they_are(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True)


def measure(attend, dtype: torch.dtype, mask) -> tuple[float, float]:
    """Peak memory in MB over that of q, k and v; and milliseconds."""
    q = torch.randn(B, H, T, D, device="cuda", dtype=dtype, requires_grad=True)
    k = torch.randn(B, H_KV, T, D, device="cuda", dtype=dtype, requires_grad=True)
    v = torch.randn(B, H_KV, T, D, device="cuda", dtype=dtype, requires_grad=True)

    def run():
        torch.autograd.grad(attend(q, k, v, mask).sum(), (q, k, v))

    run()  # warms up
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    start = time.perf_counter()
    for _ in range(REPEATS):
        run()
    torch.cuda.synchronize()
    milliseconds = (time.perf_counter() - start) / REPEATS * 1000
    return (torch.cuda.max_memory_allocated() - before) / 1e6, milliseconds


def measure_on_cpu():
    keep_freed_memory()  # as train.py does
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    print("| | fused | pieces, eager | pieces, compiled |\n|---|---|---|---|")
    for dtype in (torch.bfloat16, torch.float32):
        for batch, length in CPU_SHAPES:
            compiled = torch.compile(attend_in_pieces, dynamic=False)
            masks = {as_they_are: None, attend_in_pieces: mask_of_later_keys(length)}
            masks[compiled] = masks[attend_in_pieces]
            inputs = [torch.randn(batch, length, heads, D, dtype=dtype).transpose(1, 2)
                      for heads in (H, H_KV, H_KV)]
            for x in inputs:
                x.requires_grad_()
            times = {attend: [] for attend in masks}
            for turn in range(REPEATS + 2):
                for attend, mask in masks.items():
                    start = time.perf_counter()
                    torch.autograd.grad(attend(*inputs, mask).sum(), inputs)
                    if turn >= 2:
                        times[attend].append(time.perf_counter() - start)
            cells = [f"{median(values) * 1000:.1f} ms" for values in times.values()]
            print(f"| {str(dtype)[6:]}, {batch} x {length} | {' | '.join(cells)} |", flush=True)


def measure_on_gpu():
    real_capability = torch.cuda.get_device_capability
    name = torch.cuda.get_device_name()
    print(f"{name}, torch {torch.__version__}: {B} sequences of {T}, {H} query heads, {H_KV} "
          f"key/value heads of {D}\n")
    print("| | as they are | | smollm.py | |\n|---|---|---|---|---|")
    attention = Attention(Config(), layer=0)
    for dtype, masked, is_t4 in CASES:
        torch.backends.cuda.enable_flash_sdp(not is_t4)
        torch.backends.cuda.enable_cudnn_sdp(not is_t4)
        torch.cuda.get_device_capability = real_capability
        if is_t4:
            torch.cuda.get_device_capability = lambda device: (7, 5)
        mask = None
        if masked:
            mask = torch.ones(T, T, dtype=torch.bool, device="cuda").tril()
        cells = []
        for attend in (as_they_are, attention.attend):
            megabytes, milliseconds = measure(attend, dtype, mask)
            cells += [f"{megabytes:,.0f} MB", f"{milliseconds:.2f} ms"]
        case = f"{str(dtype)[6:]}, {'a mask' if masked else 'causal'}{', as a T4' * is_t4}"
        print(f"| {case} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if torch.cuda.is_available():
        measure_on_gpu()
    else:
        measure_on_cpu()
