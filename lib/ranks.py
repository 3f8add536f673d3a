"""torchrun's processes, the ranks: which one this is, and how they meet. Alone, a process is rank 0
of one, and everything here works as well."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.device import pick_device


def start(device_name: str) -> torch.device:
    """Join the other ranks, if there are any. Returns this rank's device: with several ranks on a
    machine with GPUs, each has a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(device_name)
    timeout = timedelta(hours=2)  # of an evaluation, for which the others wait
    if device_name in ("auto", "cuda") and torch.cuda.is_available():
        device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}")
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout)
    else:
        device = pick_device(device_name)
        dist.init_process_group("gloo", timeout=timeout)
    return device


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce(x: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """x, reduced over the ranks: all of them get the sum, or what operation says."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    return int(all_reduce(torch.tensor(number, device=device), dist.ReduceOp.MAX))


def first_of(value, device: torch.device):
    """The value that rank 0 has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, device=device)
    return values[0]


def barrier(device: torch.device):
    """Wait until every rank is here."""
    largest(0, device)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
