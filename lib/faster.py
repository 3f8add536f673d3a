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
AMX_LENGTH = 1024  # with AMX, Intel's matrix unit, torch's kernel is as fast from here on
HAS_AMX = torch.cpu._is_amx_tile_supported()


def mask_of_later_keys(length: int) -> torch.Tensor:
    """(PIECE, length), to add to the scores of the last PIECE of so many queries: -inf for a key
    that comes later, else 0. It is made once, for a compiled sum with it is twice as fast as
    choosing by comparisons."""
    mask = torch.full((PIECE, length), -math.inf, dtype=torch.bfloat16)
    return mask.triu(length - PIECE + 1)


def attend_piece(q, k, v, mask, matmul=torch.matmul):
    """softmax(q k^T) v for q (..., G, C, D): of G query heads that share a key head, the last C of
    the S queries that k and v (..., S, D) belong to. They are rows of one matmul. The mask (C, n)
    is added to the scores of the last n keys; all see the keys before those."""
    scores = matmul(q.flatten(-3, -2), k.mT)  # (..., G * C, S)
    scores = scores.unflatten(-2, q.shape[-3:-1])  # (..., G, C, S)
    scores[..., -mask.size(1):].add_(mask)
    probs = scores.softmax(-1).to(v.dtype)  # computed in float32
    return matmul(probs.flatten(-3, -2), v).view(q.shape)


def attend_in_pieces(q, k, v, mask):
    """Causal attention, q (B, H, T, D), k and v (B, H_kv, T, D); mask_of_later_keys(T or more).

    torch's fused kernel is slow on a CPU in bfloat16, most of all backward. Here a piece of the
    queries is two matmuls with the keys up to its end and a softmax between them. The backward pass
    computes the scores again, so no T x T are kept.
    """
    T = q.size(2)
    q = (q * q.size(-1)**-0.5).unflatten(1, (k.size(1), -1))  # (B, H_kv, H / H_kv, T, D)
    k, v = k.contiguous(), v.contiguous()  # once, and not for each piece
    pieces = []
    for start in range(0, T, PIECE):
        end = min(start + PIECE, T)
        mask_of_piece = mask[start - end:, -end:]
        pieces.append(checkpoint(attend_piece, q[:, :, :, start:end], k[:, :, :end], v[:, :, :end],
                                 mask_of_piece, use_reentrant=False, preserve_rng_state=False))
    return torch.cat(pieces, dim=3).flatten(1, 2)  # (B, H, T, D)


class PiecewiseAttention(Attention):
    mask_of_later_keys: torch.Tensor

    def attend(self, q, k, v, mask):
        torch_is_faster = HAS_AMX and q.size(2) >= AMX_LENGTH
        if mask is not None or q.dtype != torch.bfloat16 or torch_is_faster:
            return super().attend(q, k, v, mask)
        return attend_in_pieces(q, k, v, self.mask_of_later_keys)


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
    model = with_classes(model, {Attention: PiecewiseAttention})
    mask = mask_of_later_keys(max(PIECE, model.config.max_position_embeddings))
    for block in model.model.layers:
        block.self_attn.mask_of_later_keys = mask
    return model


# ---- torch.compile

def compile_blocks(model: SmolLM):
    """torch.compile each block by itself, and the loss. As the blocks are alike, they share one
    graph, which takes half a minute to compile on two cores. All of them in one graph take more
    than one minute, and give the same speed."""
    for block in model.model.layers:
        block.compile(dynamic=False)
    model.loss = torch.compile(model.loss, dynamic=False)
