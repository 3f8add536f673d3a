"""The proofs of smollm.py: what it claims, as properties. They need pytest and transformers.

    python -m pytest test_smollm.py
"""

import json
import math
import os
import pickle
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

import smollm
from smollm import (
    PRESETS,
    SHARD_INDEX,
    Attention,
    Config,
    InputError,
    KVCache,
    SmolLM,
    load_tokenizer,
    rope_table,
    rotate,
    sample_token,
)

TINY = Config(vocab_size=211, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
              num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128,
              rope_theta=1e4, initializer_range=48**-0.5)
CONFIGS = {
    "grouped": TINY,
    "multi-head": replace(TINY, num_key_value_heads=6, rope_theta=1e5),
    "one kv head": replace(TINY, num_key_value_heads=1, rope_theta=5e6, rms_norm_eps=1e-6),
    "wide heads": replace(TINY, hidden_size=128, num_attention_heads=2, rope_theta=1.3e5),
    "smollm3": replace(TINY, num_hidden_layers=5, no_rope_layer_interval=4, rope_theta=5e6),
    "smollm3, every 2nd": replace(TINY, num_hidden_layers=4, no_rope_layer_interval=2),
}
torch.set_num_threads(1)  # for models this small, more are slower

LLAMA_AND_SMOLLM3 = pytest.mark.parametrize("config", [TINY, CONFIGS["smollm3"]],
                                            ids=["llama", "smollm3"])


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
    hf_config = model.config.to_hf()
    if model.config.no_rope_layer_interval:
        hf = SmolLM3ForCausalLM(SmolLM3Config(**hf_config))
    else:
        hf = LlamaForCausalLM(LlamaConfig(**hf_config))
    weights = {name.removeprefix("model."): p for name, p in model.state_dict().items()}
    hf.model.load_state_dict(weights)
    return hf.eval()


def ids_of(*shape: int, vocab_size=TINY.vocab_size, seed=0):
    """Random token ids."""
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """A byte-level BPE as SmolLM's, of 400 tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator([Path(smollm.__file__).read_text()], trainer)
    return tokenizer


# ---- The same model as transformers


def test_full_model_has_the_published_tensors(tmp_path):
    with torch.device("meta"):
        ours = SmolLM(Config())
    LlamaForCausalLM(LlamaConfig(**Config().to_hf())).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        theirs = {name: tuple(file.get_slice(name).get_shape()) for name in file.offset_keys()}
    assert {name: tuple(p.shape) for name, p in ours.state_dict().items()} == theirs
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
    x = ids[:, :-1]
    y = ids[:, 1:].contiguous()
    logits, loss = model(x, targets=y)
    expected = hf(x).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    expected_loss = F.cross_entropy(expected.flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
    loss.backward()
    expected_loss.backward()
    gradients = {name: q.grad for name, q in hf.named_parameters()}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, p in model.named_parameters():
        difference = (p.grad - gradients[name]).norm().item()
        assert difference <= 1e-4 * gradients[name].norm().item(), name


def test_bfloat16_model_equals_transformers_and_keeps_its_rope_table(tmp_path):
    model = make(replace(TINY, max_position_embeddings=4096)).bfloat16()
    model.save_pretrained(tmp_path)
    hf = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    # bfloat16 has 8 bits: positions this far would be rounded to multiples of 16
    ids = ids_of(1, 3000)
    with torch.no_grad():
        torch.testing.assert_close(model(ids)[0], hf(ids).logits, rtol=0, atol=0.05)
    cos, sin = rope_table(torch.arange(3000), 64, 1e5)
    exponent = torch.arange(0, 64, 2, dtype=torch.float64) / 64
    angle = torch.arange(3000, dtype=torch.float64)[:, None] * 1e5**-exponent
    torch.testing.assert_close(cos[:, :32].double(), angle.cos(), rtol=0, atol=2e-4)
    torch.testing.assert_close(sin[:, 32:].double(), angle.sin(), rtol=0, atol=2e-4)


def gradients_of_q_and_k(model, loss) -> torch.Tensor:
    """Those of the loss, a function, in one vector."""
    model.zero_grad()
    loss().backward()
    parameters = sorted(model.named_parameters())
    return torch.cat([p.grad.flatten() for name, p in parameters
                      if "q_proj" in name or "k_proj" in name])


def test_gradients_under_autocast_are_as_near_to_float32_as_those_of_transformers():
    """With q and k rotated in bfloat16, theirs would be a tenth farther off."""
    config = replace(TINY, hidden_size=96, intermediate_size=192, num_hidden_layers=6,
                     num_attention_heads=3, num_key_value_heads=1, max_position_embeddings=1024,
                     initializer_range=None)
    ours_off = 0.0
    theirs_off = 0.0
    for seed in range(3):
        torch.manual_seed(seed)
        model = SmolLM(config)
        for block in model.model.layers:  # sharper attention, as that of a trained model
            block.self_attn.q_proj.weight.data *= 2
            block.self_attn.k_proj.weight.data *= 2
        hf = make_hf(model)
        ids = ids_of(1, 1025, seed=seed)
        x = ids[:, :-1]
        y = ids[:, 1:].contiguous()

        def our_loss(model=model, x=x, y=y):
            return model(x, targets=y)[1]

        def their_loss(hf=hf, x=x, y=y):
            return F.cross_entropy(hf(x).logits.float().flatten(0, 1), y.flatten())

        exact = gradients_of_q_and_k(model, our_loss)
        with torch.autocast("cpu", torch.bfloat16):
            ours = gradients_of_q_and_k(model, our_loss)
            theirs = gradients_of_q_and_k(hf, their_loss)
        ours_off += ((ours - exact).norm() / exact.norm()).item()
        theirs_off += ((theirs - exact).norm() / exact.norm()).item()
    assert 0 < ours_off < 1.03 * theirs_off


def test_16_bits_are_rotated_in_float32():
    cos, sin = rope_table(torch.arange(100), 8, 1e4)
    x = torch.randn(2, 3, 100, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    turned = rotate(x, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned, rotate(x.float(), cos, sin).bfloat16())


def test_smollm_py_prints_its_modules(tmp_path):
    text = subprocess.check_output([sys.executable, smollm.__file__], cwd=tmp_path, text=True)
    assert "(input_layernorm): RMSNorm((576,), eps=1e-05)" in text
    assert text.endswith("\n134,515,008 parameters in 272 tensors\n")


# ---- Config


def test_both_spellings_of_theta_are_read_and_smollm3_is_understood():
    hf = Config().to_hf()
    v4 = without(hf, "rope_parameters")
    v5 = without(hf, "rope_theta")
    assert Config.from_hf(v4) == Config.from_hf(v5) == Config.from_hf(hf) == Config()
    smollm3 = PRESETS["smollm3-3b"]
    assert smollm3.to_hf()["no_rope_layers"] == SmolLM3Config().no_rope_layers
    silent = without(smollm3.to_hf(), "bos_token_id", "eos_token_id")
    for given in (smollm3.to_hf(), silent):
        assert Config.from_hf(given) == smollm3


@pytest.mark.parametrize(("name", "value"), [
    ("rope_scaling", {"type": "linear"}), ("attention_bias", True), ("mlp_bias", True),
    ("tie_word_embeddings", False), ("hidden_act", "gelu"), ("model_type", "mistral"),
    ("head_dim", 32), ("rope_theta", math.nan), ("hidden_size", 577), ("vocab_size", -1),
    ("num_key_value_heads", 4), ("num_hidden_layers", 1.5), ("intermediate_size", None),
    ("bos_token_id", 49152), ("eos_token_id", 49152), ("no_rope_layers", [1] * 29 + [0])])
def test_what_is_not_implemented_is_refused_by_name(name, value):
    hf = without(Config().to_hf(), "rope_parameters")
    with pytest.raises(InputError, match=name):
        Config.from_hf(hf | {name: value})


@pytest.mark.parametrize(("name", "value"), [
    ("rope_type", "yarn"), ("type", "linear"), ("factor", 2.0), ("partial_rotary_factor", 0.5)])
def test_other_kinds_of_rope_are_refused_by_name(name, value):
    rope = {"rope_theta": 1e4, name: value}
    with pytest.raises(InputError, match=name):
        Config.from_hf(Config().to_hf() | {"rope_parameters": rope})


def test_settings_that_are_left_out_mean_what_transformers_takes_them_for():
    with pytest.raises(InputError, match="no_rope_layers"):
        Config.from_hf(PRESETS["smollm3-3b"].to_hf() | {"no_rope_layers": [1] * 36})
    with pytest.raises(InputError, match="tie_word_embeddings"):  # a Llama is untied by default
        Config.from_hf(without(Config().to_hf(), "tie_word_embeddings"))


# ---- Weights and tokenizer, there and back


@LLAMA_AND_SMOLLM3
def test_weights_travel_to_transformers_and_back(config, tmp_path, tokenizer):
    model = make(replace(config, vocab_size=400))
    model.save_pretrained(tmp_path / "ours", tokenizer)
    hf, info = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    assert isinstance(hf, SmolLM3ForCausalLM) == (config.no_rope_layer_interval > 0)
    hf.save_pretrained(tmp_path / "theirs")
    back = SmolLM.from_pretrained(tmp_path / "theirs")
    assert back.config == model.config
    assert back.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, hf.state_dict()[name]), name
        assert torch.equal(tensor, back.state_dict()[name]), name


def test_tokenizer_travels_to_transformers(tmp_path, tokenizer):
    make(replace(TINY, vocab_size=400)).save_pretrained(tmp_path, tokenizer)
    hf = AutoTokenizer.from_pretrained(tmp_path)
    ours = load_tokenizer(tmp_path)
    assert (hf.bos_token_id, hf.eos_token_id) == (0, 0)
    for text in ("", "def f(argv):\n    return 12345\n", "naïve 漢字 🙂\x00",
                 "a<|endoftext|>b<|im_start|>"):
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


@pytest.mark.parametrize(("change", "name"), [
    ({"intermediate_size": 81}, "mlp"), ({"num_hidden_layers": 4}, "layers.3"),
    ({"num_hidden_layers": 2}, "layers.2")])
def test_tensors_that_do_not_fit_are_named(change, name, tmp_path):
    make(TINY).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(TINY.to_hf() | change))
    with pytest.raises(RuntimeError, match=name):
        SmolLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("tensor", [torch.ones(48).int(), torch.ones(48).cfloat(),
                                    torch.ones(48).to_sparse()], ids=["int", "complex", "sparse"])
def test_tensors_that_are_no_dense_floats_are_named(tensor, tmp_path):
    state = make(TINY).state_dict() | {"model.norm.weight": tensor}
    checkpoint = {"model": state, "config": vars(TINY), "tokenizer": ""}
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises((InputError, RuntimeError), match=r"model\.norm\.weight"):
        SmolLM.from_pretrained(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/passwd"])
def test_an_index_never_leads_out_of_its_folder(shard, tmp_path):
    make(TINY).save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").rename(tmp_path / "model.safetensors")
    index = {"weight_map": {"model.norm.weight": shard}}
    (tmp_path / "hf" / SHARD_INDEX).write_text(json.dumps(index))
    with pytest.raises(InputError, match="no file in this folder"):
        SmolLM.from_pretrained(tmp_path / "hf")


class Payload:
    """A pickle that makes a folder when it is loaded."""
    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_no_code_in_a_checkpoint_is_run(tmp_path):
    payload = Payload(tmp_path / "payload ran")
    torch.save({"model": payload, "config": {}, "tokenizer": ""}, tmp_path / "ckpt.pt")
    for load in (SmolLM.from_pretrained, load_tokenizer):
        with pytest.raises(pickle.UnpicklingError):
            load(tmp_path / "ckpt.pt")
    assert not (tmp_path / "payload ran").exists()
    torch.load(tmp_path / "ckpt.pt", weights_only=False)  # it would have
    assert (tmp_path / "payload ran").exists()


ALONE = """
import sys
import torch
known = set(sys.modules)
sys.path.insert(0, sys.argv[1])
import smollm
new = {name.split(".")[0] for name in set(sys.modules) - known}
assert new - sys.stdlib_module_names == {"smollm"}, new
for name in ("safetensors", "tokenizers", "huggingface_hub"):
    assert name not in sys.modules, name
for path in ("lib", "train.py", "test_smollm.py"):
    assert not any(smollm.Path(folder, path).exists() for folder in sys.path
                   if "site-packages" not in folder), path
model = smollm.SmolLM.from_pretrained("hf")
tokenizer = smollm.load_tokenizer("hf")
ids = tokenizer.encode("def f(x):").ids
print([int(column) for column in model.generate(torch.tensor([ids]), 20, temperature=0)])
"""


def test_smollm_py_alone_loads_a_model_and_generates(tmp_path, tokenizer):
    """Copied into an empty folder. It imports torch at its top, others once it needs them."""
    shutil.copy(smollm.__file__, tmp_path)
    model = make(replace(TINY, vocab_size=400))
    model.save_pretrained(tmp_path / "hf", tokenizer)
    command = [sys.executable, "-I", "-c", ALONE, str(tmp_path)]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    ids = torch.tensor([tokenizer.encode("def f(x):").ids])
    expected = [column.item() for column in model.generate(ids, 20, temperature=0)]
    assert result.stdout == f"{expected}\n"


# ---- Causal, with a cache and without


PIECES = [[41], [1] * 41, [7, 1, 20, 1, 12], [1, 40]]  # in which 41 tokens are fed


def check_cache(cache_class, config, pieces):
    """Fed in pieces, a prompt has the logits that it has without a cache."""
    model = make(config)
    ids = ids_of(2, 41)
    cache = cache_class(config, 2, 50)
    with torch.no_grad():
        expected = model(ids)[0]
        end = 0
        for piece in pieces:
            end += piece
            logits, _ = model(ids[:, end - piece:end], cache=cache)
            assert cache.length == end
            torch.testing.assert_close(logits, expected[:, end - 1:end], rtol=0, atol=1e-4)
        with pytest.raises(InputError, match="room for 50 tokens"):
            model(ids[:, :10], cache=cache)


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_cached_logits_equal_uncached(config, pieces):
    check_cache(KVCache, config, pieces)


def test_a_cache_forgets_what_came_after_its_length():
    model = make(TINY)
    ids = ids_of(2, 30)
    cache = KVCache(TINY, 2, 30)
    with torch.no_grad():
        model(ids_of(2, 25, seed=1), cache=cache)
        cache.length = 0
        model(ids[:, :20], cache=cache)
        model(ids_of(2, 5, seed=2), cache=cache)
        cache.length = 20
        logits, _ = model(ids[:, 20:], cache=cache)
        torch.testing.assert_close(logits, model(ids)[0][:, -1:], rtol=0, atol=1e-4)


def test_later_tokens_never_change_earlier_logits():
    model = make(TINY)
    ids = ids_of(1, 40)
    changed = ids.clone()
    changed[:, 25:] = (changed[:, 25:] + 1) % TINY.vocab_size
    with torch.no_grad():
        before = model(ids)[0]
        after = model(changed)[0]
    assert torch.equal(before[:, :25], after[:, :25])
    assert not torch.allclose(before[:, 25:], after[:, 25:], atol=1e-2)


# ---- Attention in memory that does not grow with T x T


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)], ids=["T4", "H100"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "masked"])
@pytest.mark.parametrize("device", ["cpu"] + ["cuda"] * torch.cuda.is_available())
def test_attention_takes_kernels_alone_that_never_store_all_scores(
        device, masked, dtype, capability, monkeypatch):
    """With these alone, forward and backward, it gives softmax(q k^T / sqrt(D)) v. A GPU newer than
    a T4 can stand for one, for it has all of its kernels."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    torch.manual_seed(0)
    attention = Attention(TINY, layer=0)
    q = torch.randn(2, 6, 40, 8, device=device, dtype=dtype, requires_grad=True)
    k = torch.randn(2, 2, 40, 8, device=device, dtype=dtype, requires_grad=True)
    v = torch.randn(2, 2, 40, 8, device=device, dtype=dtype, requires_grad=True)
    causal = torch.ones(40, 40, dtype=torch.bool, device=device).tril()
    kernels = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION]
    with sdpa_kernel(kernels):
        y = attention.attend(q, k, v, causal if masked else None)
        y.sum().backward()
    scores = q.double() @ k.double().repeat_interleave(3, dim=1).mT / math.sqrt(8)
    weights = scores.masked_fill(~causal, -math.inf).softmax(-1)
    expected = weights @ v.double().repeat_interleave(3, dim=1)
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(y.double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("capability", "dtype", "masked", "as_they_are"), [
    ((9, 0), torch.bfloat16, False, True),
    ((8, 0), torch.float16, False, True),
    ((8, 0), torch.float32, False, False),
    ((8, 0), torch.float16, True, False),
    ((7, 5), torch.float16, False, False),
    ((7, 5), torch.float32, True, False),
])
def test_keys_are_repeated_on_gpus_where_flash_attention_would_refuse(
        capability, dtype, masked, as_they_are, monkeypatch):
    class OnGPU:
        device = torch.device("cuda")

    q = OnGPU()
    q.dtype = dtype
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    mask = torch.ones(1, 1) if masked else None
    assert smollm.fast_kernel_takes_groups(q, mask) == as_they_are


# ---- Initialization and loss


def test_initial_weights_and_loss_follow_the_recipe():
    config = replace(Config(), num_hidden_layers=4)
    torch.manual_seed(0)
    model = SmolLM(config)
    for name, p in model.named_parameters():
        if p.dim() == 1:
            assert torch.all(p == 1), name
            continue
        std = 576**-0.5
        if "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * 4)
        assert p.std().item() == pytest.approx(std, rel=0.01), name
        assert abs(p.mean().item()) < 0.01 * std, name
    ids = ids_of(4, 257, vocab_size=config.vocab_size)
    with torch.no_grad():
        _, loss = model(ids[:, :-1], targets=ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(49152) + 0.5, abs=0.1)  # 11.30


def test_the_initial_std_is_that_of_the_width():
    for size in (576, 960, 2048):
        config = Config(hidden_size=size, num_attention_heads=size // 64, num_key_value_heads=1)
        assert config.initializer_range == 1 / math.sqrt(size)
    assert PRESETS["smollm2-360m"].initializer_range == 1 / math.sqrt(960)
    assert Config(initializer_range=0.02).initializer_range == 0.02
    silent = without(Config().to_hf(), "initializer_range")
    assert Config.from_hf(silent).initializer_range == LlamaConfig().initializer_range


def test_the_loss_is_the_mean_over_the_targets_that_count():
    model = make(TINY)
    ids = ids_of(2, 11)
    y = ids[:, 1:].clone()
    y[0, 3:] = -100
    with torch.no_grad():
        logits, loss = model(ids[:, :-1], targets=y)
        log_probs = logits.double().log_softmax(-1)
        chosen = [log_probs[b, t, y[b, t]] for b in range(2) for t in range(10) if y[b, t] >= 0]
        assert len(chosen) == 13
        assert loss.item() == pytest.approx(-np.mean(chosen), rel=1e-5)
        _, loss = model(ids[:, :-1], targets=torch.full_like(y, -100))
    assert loss == 0


# ---- Sampling


def made_by(model, ids, count: int, **how) -> torch.Tensor:
    """The new tokens, (B, T)."""
    return torch.cat(list(model.generate(ids, count, **how)), dim=1)


@LLAMA_AND_SMOLLM3
def test_greedy_generation_equals_that_of_transformers(config):
    model = make(config)
    ids = ids_of(3, 9)
    hf = make_hf(model)
    expected = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=25,
                           do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(made_by(model, ids, 25, temperature=0), expected[:, 9:])


def test_greedy_generation_takes_the_likeliest_token_of_the_full_forward():
    model = make(TINY)
    ids = ids_of(3, 9)
    made = made_by(model, ids, 25, temperature=0)
    for _ in range(25):
        with torch.no_grad():
            ids = torch.cat([ids, model(ids)[0][:, -1:].argmax(-1)], dim=1)
    assert torch.equal(made, ids[:, 9:])


def test_generation_is_reproducible_and_narrow_sampling_is_greedy():
    model = make(TINY)
    ids = ids_of(2, 5)

    def run(seed, **how):
        generator = torch.Generator().manual_seed(seed)
        return made_by(model, ids, 20, generator=generator, **how).tolist()

    assert run(1) == run(1) != run(2)
    greedy = run(1, temperature=0)
    assert run(1, top_k=1) == run(2, top_p=1e-9) == run(3, temperature=1e-30) == greedy


def test_rows_that_ended_stay_ended():
    model = make(TINY)
    ids = ids_of(2, 5)
    greedy = made_by(model, ids, 20, temperature=0)
    eos = greedy[0, 3].item()
    rows = made_by(model, ids, 20, temperature=0, eos_id=eos).tolist()
    for row, free in zip(rows, greedy.tolist(), strict=True):
        end = [*free, eos].index(eos)
        assert row == (free[:end] + [eos] * 20)[:len(row)]
    one = made_by(model, ids[:1], 20, temperature=0, eos_id=eos)
    assert one.size(1) == greedy[0].tolist().index(eos) + 1


@pytest.mark.parametrize(("how", "allowed"), [
    ({}, [0, 1, 2, 3, 4]), ({"top_k": 3}, [0, 2, 3]), ({"top_p": 0.71}, [0, 2, 3]),
    ({"top_p": 0.69}, [0, 2]), ({"top_p": 0.5, "top_k": 1}, [0])], ids=str)
def test_samples_follow_the_distribution_within_top_k_and_top_p(how, allowed):
    probs = torch.tensor([0.4, 0.05, 0.3, 0.2, 0.05])
    logits = probs.log().expand(40000, -1)
    drawn = sample_token(logits, generator=torch.Generator().manual_seed(0), **how).flatten()
    shares = torch.bincount(drawn, minlength=5) / len(drawn)
    expected = torch.zeros(5)
    expected[allowed] = probs[allowed]
    torch.testing.assert_close(shares, expected / expected.sum(), rtol=0, atol=0.01)


@pytest.mark.parametrize("temperature", [0.5, 2.0])
def test_temperature_divides_the_logits(temperature):
    logits = torch.tensor([2.0, 0.0, 1.0])
    generator = torch.Generator().manual_seed(0)
    drawn = sample_token(logits.expand(40000, -1), temperature, generator=generator).flatten()
    expected = (logits / temperature).softmax(-1)
    torch.testing.assert_close(torch.bincount(drawn) / len(drawn), expected, rtol=0, atol=0.01)


@pytest.mark.parametrize(("length", "how", "match"), [
    (100, {}, "128"), (0, {}, "at least 1"), (3, {"temperature": -1}, "temperature"),
    (3, {"temperature": math.nan}, "temperature"), (3, {"top_k": 0}, "top_k"),
    (3, {"top_p": 1.1}, "top_p"), (3, {"top_p": 0.0}, "top_p")])
def test_generation_refuses_what_does_not_fit(length, how, match):
    with pytest.raises(InputError, match=match):
        next(make(TINY).generate(ids_of(1, length), 29, **how))


def test_generation_goes_to_the_very_end_of_the_context():
    assert made_by(make(TINY), ids_of(1, 99), 29).size(1) == 29


def test_generation_goes_on_from_a_cache_and_takes_another_step():
    model = make(TINY)
    ids = ids_of(2, 12)
    expected = made_by(model, ids, 20, temperature=0)
    cache = KVCache(TINY, 2, 40)
    fed = []

    def step(input_ids, cache):
        fed.append(input_ids)
        return model(input_ids, cache=cache)[0]

    first = made_by(model, ids, 8, temperature=0, cache=cache)
    assert cache.length == 12 + 7  # all but the last column
    rest = made_by(model, first[:, -1:], 12, temperature=0, cache=cache, step=step)
    assert torch.equal(torch.cat((first, rest), 1), expected)
    assert [x.size(1) for x in fed] == [1] * 12
