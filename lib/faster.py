"""A faster training step: what is about one machine's speed, and would only clutter smollm.py.

    fast_model = for_training(model)
    compile_blocks(fast_model)

bench/peers.py measures it, docs/speed.md tells what was tried.
"""

import copy
import math

import torch
from torch.utils.checkpoint import checkpoint

from smollm import Attention, SmolLM

# ---- Attention in pieces


PIECE = 128  # queries: their scores should stay in the cache


def attend_piece(q, k, v, matmul=torch.matmul):
    """softmax(q k^T / sqrt(D)) v for q (..., G, C, D): of G query heads that share a key head, the
    last C of the S queries that k and v (..., S, D) belong to. They are rows of one matmul."""
    num_queries, head_dim = q.shape[-2:]
    scores = matmul((q * head_dim**-0.5).flatten(-3, -2), k.mT)  # (..., G * C, S)
    scores = scores.unflatten(-2, q.shape[-3:-1])  # (..., G, C, S)
    later = torch.ones(num_queries, num_queries, dtype=torch.bool, device=q.device).triu(1)
    scores[..., -num_queries:].masked_fill_(later, -math.inf)  # all see the keys before these
    probs = scores.softmax(-1).to(v.dtype)  # computed in float32
    return matmul(probs.flatten(-3, -2), v).view(q.shape)


def attend_in_pieces(q, k, v):
    """Causal attention, q (B, H, T, D), k and v (B, H_kv, T, D).

    torch's fused kernel is slow on a CPU in bfloat16, most of all backward. Here a piece of the
    queries is two matmuls with the keys up to its end and a softmax between them. The backward pass
    computes the scores again, so no T x T are kept.
    """
    q = q.unflatten(1, (k.size(1), -1))  # (B, H_kv, H / H_kv, T, D)
    pieces = []
    for start in range(0, q.size(3), PIECE):
        end = start + PIECE
        pieces.append(checkpoint(attend_piece, q[:, :, :, start:end], k[:, :, :end], v[:, :, :end],
                                 use_reentrant=False, preserve_rng_state=False))
    return torch.cat(pieces, dim=3).flatten(1, 2)  # (B, H, T, D)


class PiecewiseAttention(Attention):
    def attend(self, q, k, v, mask):
        if mask is not None or q.dtype != torch.bfloat16:
            return super().attend(q, k, v, mask)
        return attend_in_pieces(q, k, v)


def with_classes(model: SmolLM, classes: dict) -> SmolLM:
    """A copy of the modules, with the very parameters of the model. Modules of a class that is a
    key of classes become ones of its value."""
    parameters = {id(p): p for p in model.parameters()}  # which deepcopy takes as copied already
    model = copy.deepcopy(model, parameters)
    for module in model.modules():
        if type(module) in classes:
            module.__class__ = classes[type(module)]
    return model


def for_training(model: SmolLM) -> SmolLM:
    """The model with the attention that is fast to train on its device; the parameters are the
    model's own."""
    if model.model.norm.weight.device.type != "cpu":
        return model
    return with_classes(model, {Attention: PiecewiseAttention})


# ---- torch.compile

def compile_blocks(model: SmolLM):
    """torch.compile each block by itself, and the loss. As the blocks are alike, they share one
    graph, which takes half a minute to compile on two cores. All of them in one graph take more
    than one minute, and give the same speed."""
    for block in model.model.layers:
        block.compile(dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)
