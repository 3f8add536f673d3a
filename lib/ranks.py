"""torchrun's processes, the ranks: which one this is, and how they meet. Alone, a process is rank 0
of one, and everything here works as well."""

import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.device import pick_device
from smollm import InputError


def start(device_name: str) -> torch.device:
    """Join the other ranks, if there are any. Returns this rank's device: with several ranks on a
    machine with GPUs, each has a GPU of its own."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return pick_device(device_name)
    timeout = timedelta(hours=24)  # of preparing data, or evaluating, for which the others wait
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


def share(function, stack: torch.Tensor) -> torch.Tensor:
    """function(stack), for one that treats each of stack (N, ...) by itself: each rank does a part,
    and gets those of the others."""
    if world_size() == 1:
        return function(stack)
    size = math.ceil(len(stack) / world_size())
    missing = size * world_size() - len(stack)
    stack = torch.cat([stack, stack.new_zeros(missing, *stack.shape[1:])])
    part = function(stack[rank() * size:(rank() + 1) * size]).contiguous()
    parts = [torch.empty_like(part) for _ in range(world_size())]
    dist.all_gather(parts, part)
    return torch.cat(parts)[:len(stack) - missing]


def largest(number: int, device: torch.device) -> int:
    """The largest of the ranks' numbers."""
    return int(all_reduce(torch.tensor(number, device=device), dist.ReduceOp.MAX))


def first_of(value, device: torch.device):
    """The value that rank 0 has."""
    values = [value]
    if dist.is_initialized():
        dist.broadcast_object_list(values, src=0, device=device)
    return values[0]


def gather(value) -> list:
    """The values that all ranks have, in their order."""
    values = [value] * world_size()
    if dist.is_initialized():
        dist.all_gather_object(values, value)
    return values


def on_all(function):
    """What function returns, once it has returned on all ranks. What the user did wrong on one of
    them is an InputError on all."""
    if world_size() == 1:
        return function()
    result = None
    problem = ""
    try:
        result = function()
    except (InputError, OSError) as error:
        problem = str(error)
    problems = gather(problem)
    for number, problem in enumerate(problems):
        if problem:
            raise InputError(f"rank {number}: {problem}")
    return result


def first_here_first(function):
    """on_all, but the first rank on each machine calls it before the others there, which then find
    what it has made."""
    is_first_here = int(os.environ.get("LOCAL_RANK", 0)) == 0

    def make():
        if is_first_here:
            return function()

    def find():
        if not is_first_here:
            return function()

    made = on_all(make)
    found = on_all(find)
    return made if is_first_here else found


def compare(what: dict):
    """InputError on all ranks, if on one of them these values are not those of rank 0."""
    for number, other in enumerate(gather(what)):
        if number == 0:
            first = other
        different = [name for name in first if repr(other[name]) != repr(first[name])]
        if different:
            raise InputError(f"rank {number} differs from rank 0 in {', '.join(different)}: give "
                             "all ranks the same files and options")


def barrier(device: torch.device):
    """Wait until every rank is here."""
    largest(0, device)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()
