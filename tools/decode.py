"""The step that makes one token, compiled: what `sample.py --compile=True` runs."""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class SumProducts(TorchFunctionMode):
    """Inside, F.linear of a single row is a sum of products: compiled for a CPU, this reads the weight twice
    as fast as a matmul does. The sums, and attention, are taken in float32, which any CPU is good at."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].numel() == args[0].size(-1) and args[2:] in ((), (None,)):
            x, weight = args[:2]  # (1, 1, C), (C_out, C)
            return (x.flatten().float() * weight).sum(-1).view(*x.shape[:-1], -1).to(x.dtype)
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return function(q.float(), k.float(), v.float(), *args[3:], **kwargs or {}).to(q.dtype)
        return function(*args, **kwargs or {})


def compile_decode(model):
    """`model.next_logits` of single tokens, compiled: the `decode` of `model.generate`. On a GPU it is a
    captured graph."""
    def next_logits(input_ids, mask, cache):
        with SumProducts():
            return model.next_logits(input_ids, mask, cache)

    if not model.model.norm.weight.is_cuda:
        return torch.compile(next_logits, fullgraph=True, dynamic=False)
    step = torch.compile(model.next_logits, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def captured(input_ids, mask, cache):
        for tensor in (*cache.keys, *cache.values):  # written in place: the graph must not copy them
            torch._dynamo.mark_static_address(tensor, guard=False)
        return step(input_ids, mask, cache)

    return captured
