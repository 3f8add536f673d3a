"""The step that makes one token, compiled: what `sample.py --compile=True` runs."""

import torch
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode


class FewRows(TorchFunctionMode):
    """Inside, F.linear is fast for few rows on a CPU. For one row it is a sum of products: compiled, it reads
    the weight twice as fast as a matmul does. For several, the weight is the left factor, which is faster
    than the right one. The sums, and attention, are taken in float32, which any CPU is good at."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[2:] in ((), (None,)):
            x, weight = args[0].flatten(0, -2), args[1]  # (B, C), (C_out, C); next_logits has them reversed
            if 1 in (len(x), len(weight)):
                y = (x.float() * weight).sum(-1).to(x.dtype)
            else:
                y = function(weight, x).T if len(x) < len(weight) else function(x, weight)
            return y.view(*args[0].shape[:-1], -1)
        if function is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            return function(q.float(), k.float(), v.float(), *args[3:], **kwargs or {}).to(q.dtype)
        return function(*args, **kwargs or {})


def compile_decode(model):
    """`model.next_logits` of single tokens, compiled: the `decode` of `model.generate`. On a GPU it is a
    captured graph."""
    def next_logits(input_ids, mask, cache):
        with FewRows():
            return model.next_logits(input_ids, mask, cache)

    if not model.model.norm.weight.is_cuda:
        return torch.compile(next_logits, fullgraph=True, dynamic=False)
    step = torch.compile(model.next_logits, fullgraph=True, dynamic=False, mode="reduce-overhead")

    def captured(input_ids, mask, cache):
        for tensor in (*cache.keys, *cache.values):  # written in place: the graph must not copy them
            torch._dynamo.mark_static_address(tensor, guard=False)
        return step(input_ids, mask, cache)

    return captured
