"""A faster step for sampling: what is about one machine's speed, and would only clutter smollm.py.

    step = make_step(model, compiled=False)
    cache = make_cache(model, batch_size, length, compiled=False)
    model.generate(input_ids, count, cache=cache, step=step)

On a CPU a step runs a copy of the model's modules, with the same parameters, whose matmuls and
attention are quick for few rows: a token in a few streams, which takes as long as reading the
weights does. bench/peers.py measures it, docs/speed.md tells what was tried.
"""

import itertools
import platform

import torch
from torch.nn import functional as F

from lib.faster import HAS_AMX, PIECE, attend_piece, mask_of_later_keys, with_classes
from smollm import Attention, KVCache, Linear, SmolLM

FEW_ROWS = 16
# Whether F.linear has oneDNN multiply in bfloat16, on a processor of the kind that this is about
ONEDNN_BFLOAT16 = (platform.machine() in ("x86_64", "AMD64")
                   and torch.backends.mkldnn.is_available()
                   and torch.ops.mkldnn._is_mkldnn_bf16_supported())
# Whether torch is faster without it for one row. AMX, Intel's matrix unit, is used through oneDNN
# only: there torch's attention needs it, and torch.mv with it is as fast as without.
ONEDNN_IS_SLOW = ONEDNN_BFLOAT16 and not HAS_AMX


def avoid_onednn():
    """For this process, from now on: torch calls oneDNN only where it is told to, as few_rows does.
    For a single row in bfloat16, torch's own kernel takes half as long (AMD's Zen 4 and Zen 5).
    Not for a compiled step, which can't call oneDNN by name for several rows."""
    if ONEDNN_IS_SLOW:
        torch.backends.mkldnn.enabled = False


def few_rows(x, weight):
    """x (..., C) @ weight.T, weight (C_out, C), in the way that is fast on a CPU."""
    rows = x.numel() // x.size(-1)
    if rows == 1 and torch.compiler.is_compiling():
        # compiled, a sum of products reads the weight twice as fast as a matmul does
        y = (x.flatten(0, -2).float() * weight).sum(-1).to(x.dtype)
        return y.view(*x.shape[:-1], -1)
    if weight.dtype == torch.bfloat16 and ONEDNN_BFLOAT16:
        if torch.compiler.is_compiling():
            return F.linear(x, weight)
        if rows == 1:
            return torch.mv(weight, x.flatten()).view(*x.shape[:-1], -1)
        return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")
    if rows <= FEW_ROWS:
        # the weight as the left factor is faster than as the right one
        y = F.linear(weight, x.flatten(0, -2)).T.contiguous()
        return y.view(*x.shape[:-1], -1)
    return F.linear(x, weight)


class FewRowsLinear(Linear):
    def forward(self, x):
        return few_rows(x, self.weight)


def onednn_matmul(x, y):
    """x (R, C) @ y (C, S) in bfloat16, by oneDNN, which torch calls it in spite of avoid_onednn."""
    return torch.ops.mkldnn._linear_pointwise(x, y.mT.contiguous(), None, "none", [], "")


def attend_prompt(q, k, v):
    """Causal attention, q (B, H, T, D), k and v (B, H_kv, T, D), in bfloat16, as
    faster.attend_in_pieces, but for each key head by itself: oneDNN is called by name for that."""
    mask = mask_of_later_keys(PIECE)  # a piece's own square; all see the keys before it
    q = q * q.size(-1)**-0.5
    grouped = q.unflatten(1, (k.size(1), -1))  # (B, H_kv, H / H_kv, T, D)
    y = torch.empty_like(grouped)
    for b, head in itertools.product(range(k.size(0)), range(k.size(1))):
        for start in range(0, q.size(2), PIECE):
            end = min(start + PIECE, q.size(2))
            size = end - start
            y[b, head, :, start:end] = attend_piece(
                grouped[b, head, :, start:end], k[b, head, :end], v[b, head, :end],
                mask[-size:, -size:], onednn_matmul)
    return y.flatten(1, 2)  # (B, H, T, D)


class FewRowsAttention(Attention):
    def attend(self, q, k, v, mask):
        """For a single token, the query heads that share a key head go as so many queries of it:
        then each cached key is read once, not once for each of them."""
        if q.size(2) > 1:
            if mask is None and q.dtype == torch.bfloat16 and ONEDNN_IS_SLOW:
                return attend_prompt(q, k, v)
            return super().attend(q, k, v, mask)
        grouped = q.view(q.size(0), k.size(1), -1, q.size(3))  # (B, H_kv, H / H_kv, D)
        if torch.compiler.is_compiling():
            # any CPU is good at float32; a product with bfloat16 may be far slower
            y = F.scaled_dot_product_attention(grouped.float(), k.float(), v.float(), mask)
        else:
            y = F.scaled_dot_product_attention(grouped, k, v, mask)
        return y.to(q.dtype).reshape(q.shape)


class FewRowsSmolLM(SmolLM):
    def head(self, x):
        return few_rows(x, self.model.embed_tokens.weight)


FEW_ROWS_CLASSES = {Linear: FewRowsLinear, Attention: FewRowsAttention, SmolLM: FewRowsSmolLM}


class StaticKVCache(KVCache):
    """Every step after the first reads the whole cache, under a mask. So no shape changes from
    step to step, and one compiled graph serves all."""
    def advance(self, T: int):
        self.reads_all = self.length > 0
        mask = super().advance(T)
        if self.reads_all:
            mask = self.positions <= self.position[:, None]  # (T, max_length)
        return mask

    def update(self, layer: int, k, v):
        if not self.reads_all:
            return super().update(layer, k, v)
        keys = self.keys[layer].index_copy_(2, self.position, k.to(self.dtype))
        values = self.values[layer].index_copy_(2, self.position, v.to(self.dtype))
        return keys, values


def make_cache(model: SmolLM, batch_size: int, length: int, compiled: bool) -> KVCache:
    """A cache for a step of make_step. Compiled, it has one of few sizes, for few graphs."""
    weight = model.model.embed_tokens.weight
    if not compiled:
        return KVCache(model.config, batch_size, length, weight.device, weight.dtype)
    length = 2**max(8, (length - 1).bit_length())
    return StaticKVCache(model.config, batch_size, length, weight.device, weight.dtype)


def make_step(model: SmolLM, compiled: bool):
    """From (input_ids, cache) to logits (B, 1, V), as the model's own forward pass, but faster.
    Compiled, single tokens after the first are one graph, which a GPU captures."""
    is_cuda = model.model.embed_tokens.weight.is_cuda
    if model.model.embed_tokens.weight.device.type == "cpu":
        model = with_classes(model, FEW_ROWS_CLASSES)

    def step(input_ids, cache):
        return model(input_ids, cache=cache)[0]

    if not compiled:
        return step

    def one_token(input_ids, mask, cache):
        x = model.model(input_ids, cache.position, mask, cache)  # (B, 1, C)
        return model.head(x)

    if is_cuda:
        settings = {"mode": "reduce-overhead"}
    else:
        # The modules never change, so there is no need to look at them before each token. As other
        # models have others, this graph must not be taken for theirs: it has code of its own.
        one_token.__code__ = one_token.__code__.replace()
        skip = torch.compiler.skip_guard_on_all_nn_modules_unsafe
        settings = {"options": {"guard_filter_fn": skip}}
    graph = torch.compile(one_token, fullgraph=True, dynamic=False, **settings)

    def compiled_step(input_ids, cache):
        if cache.length == 0 or input_ids.size(1) > 1:
            return step(input_ids, cache)
        mask = cache.advance(1)
        if is_cuda:
            for tensor in (*cache.keys, *cache.values):  # are written in place, not copied
                torch._dynamo.mark_static_address(tensor, guard=False)
        return graph(input_ids, mask, cache)

    return compiled_step
