"""lib/faster.py: the faster training step computes what the model does."""

import pytest
import torch
from torch.nn import functional as F

from lib.decode import ONEDNN_BFLOAT16, attend_prompt
from lib.faster import (
    PIECE,
    attend_in_pieces,
    compile_blocks,
    for_training,
    mask_of_later_keys,
    with_classes,
)
from smollm import Attention
from test_smollm import CONFIGS, TINY, ids_of, make
from train import Loss, evaluate

# one piece, whole pieces, a last one that is shorter
LENGTHS = pytest.mark.parametrize("T", [2, PIECE, 2 * PIECE, 2 * PIECE + 50])


def heads(B: int, H: int, T: int, dtype) -> torch.Tensor:
    """(B, H, T, D), as Attention makes them."""
    return torch.randn(B, T, H, 16, dtype=dtype).transpose(1, 2).requires_grad_()


@LENGTHS
@pytest.mark.parametrize("num_kv_heads", [6, 2, 1])
def test_attention_in_pieces_and_its_gradients_are_those_of_torch(T, num_kv_heads):
    torch.manual_seed(0)
    inputs = [heads(2, H, T, torch.float64) for H in (6, num_kv_heads, num_kv_heads)]
    weights = torch.randn(2, 6, T, 16, dtype=torch.float64)
    expected = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    given = attend_in_pieces(*inputs, mask_of_later_keys(3 * PIECE))
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad((given * weights).sum(), inputs)
    torch.testing.assert_close(gradients, torch.autograd.grad((expected * weights).sum(), inputs),
                               rtol=0, atol=1e-12)


@LENGTHS
@pytest.mark.skipif(not ONEDNN_BFLOAT16, reason="oneDNN has no bfloat16 on this processor")
@pytest.mark.parametrize("avoided", [True, False])
def test_attention_of_a_prompt_is_that_of_torch_up_to_rounding(T, avoided, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", not avoided)
    torch.manual_seed(0)
    inputs = [heads(2, H, T, torch.bfloat16).detach() for H in (6, 2, 2)]
    q, k, v = [x.double() for x in inputs]
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    given = attend_prompt(*inputs)
    assert given.dtype == torch.bfloat16
    assert (given - expected).norm() < 0.01 * expected.norm()


def test_no_scores_are_kept_for_the_backward_pass():
    """What is kept grows as T, not as T x T."""
    sizes = []

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    T = 4 * PIECE
    inputs = [heads(1, H, T, torch.float32) for H in (6, 2, 2)]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        attend_in_pieces(*inputs, mask_of_later_keys(T))
    assert max(sizes, default=0) <= T * max(6 * 16, PIECE)


def test_a_model_for_training_has_the_very_parameters():
    model = make(TINY)
    fast = for_training(model)
    assert [id(p) for p in fast.parameters()] == [id(p) for p in model.parameters()]
    assert type(model.model.layers[0].self_attn) is Attention
    assert type(fast.model.layers[0].self_attn) is not Attention


def losses_and_gradients(model, loss_model, T: int = 2 * PIECE + 10):
    ids = ids_of(2, T + 1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = loss_model(ids[:, :-1], ids[:, 1:])
    loss.backward()
    gradients = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return loss.item(), gradients


@pytest.mark.parametrize("config", [TINY, CONFIGS["smollm3, every 2nd"]], ids=["llama", "smollm3"])
def test_a_compiled_model_for_training_has_the_losses_and_gradients_of_the_model(config):
    model = make(config)
    loss, gradients = losses_and_gradients(model, Loss(model))
    torch._dynamo.reset()
    fast = for_training(model)
    eager_loss, eager_gradients = losses_and_gradients(model, Loss(fast))
    compile_blocks(fast)
    compiled_loss, compiled_gradients = losses_and_gradients(model, Loss(fast))
    for other in (eager_loss, compiled_loss):
        assert other == pytest.approx(loss, abs=0.005)
    for other in (eager_gradients, compiled_gradients):
        assert (other - gradients).norm() < 0.05 * gradients.norm()


def test_blocks_and_evaluation_share_the_graphs_of_training():
    """Whatever the number of layers; only layers without RoPE have another."""
    model = make(TINY)
    assert TINY.num_hidden_layers > 1
    torch._dynamo.reset()
    fast = for_training(model)
    compile_blocks(fast)
    losses_and_gradients(model, Loss(fast))
    ids = ids_of(2, 2 * PIECE + 11)
    batch = (ids[:, :-1], ids[:, 1:])
    autocast = torch.autocast("cpu", torch.bfloat16)
    with torch._dynamo.config.patch(error_on_recompile=True):
        losses_and_gradients(model, Loss(fast))
        evaluate(Loss(fast), [batch, batch], autocast)
    assert all(p.grad is None for p in model.parameters())


def test_classes_are_replaced_in_the_copy_alone():
    class Other(Attention):
        pass

    model = make(TINY)
    copy = with_classes(model, {Attention: Other})
    assert all(type(block.self_attn) is Other for block in copy.model.layers)
    assert not any(isinstance(module, Other) for module in model.modules())
