"""The proofs: what README claims of smollm.py, train.py and sample.py, as properties.

    python -m pytest
"""

import ast
import dataclasses
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
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
)

import sample
import train
from smollm import PRESETS, Config, InputError, KVCache, SmolLM, load_tokenizer, rope_table, sample_token

ROOT = Path(__file__).parent
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
    with pytest.raises(InputError, match="rope_type"):
        Config.from_hf(hf | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}})
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
    loss = train.accumulate(whole, [(x, y)], nullcontext())
    pieces = [(x[i:i + 2], y[i:i + 2]) for i in (0, 2, 4)]
    torch.testing.assert_close(train.accumulate(parts, pieces, nullcontext()), loss, rtol=1e-6, atol=0)
    expected = torch.nn.functional.cross_entropy(make(TINY)(x)[0].flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_only_matrices_decay():
    model = make(TINY)
    decayed, kept = model.parameter_groups(0.1)
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    assert all("norm" in name for name, p in model.named_parameters() if any(p is q for q in kept["params"]))
    assert len(decayed["params"]) + len(kept["params"]) == len(list(model.parameters()))
    assert all(p.dim() == 2 for p in decayed["params"])


def test_flops_are_those_of_the_matmuls():
    model, T = make(TINY), 64
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids_of(1, T))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 6 * TINY.num_hidden_layers * TINY.hidden_size * T
    assert model.flops_per_token(T) - attention == 3 * counted / T


@pytest.mark.parametrize(("schedule", "expected"), [  # step: share of the peak
    ("wsd", {0: 0.1, 9: 1, 10: 1, 79: 1, 80: 1, 85: 0.5, 99: 1 - math.sqrt(19 / 20)}),
    ("cosine", {0: 0.1, 9: 1, 10: 1, 55: 0.5, 99: (1 + math.cos(math.pi * 89 / 90)) / 2}),
    ("constant", {0: 0.1, 9: 1, 50: 1, 99: 1})])
def test_learning_rate(schedule, expected):
    o = train.Options(max_iters=100, warmup_iters=10, decay_iters=20, learning_rate=0.3, schedule=schedule)
    for step, share in expected.items():
        assert train.lr_at(step, o) == pytest.approx(0.3 * share, rel=1e-12), step

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
    return train.train_tokenizer((file.read_text() for file in sorted(corpus.iterdir())), 1000)


def test_tokenizer_has_special_tokens_first_and_digits_one_by_one(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(17)] == train.SPECIAL_TOKENS
    assert tokenizer.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    text = "".join(map(chr, range(0x20, 0x3000, 7))) + "🙂\x00\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_documents_are_packed_with_eos_and_the_first_of_200_is_held_out(corpus, tokenizer, tmp_path):
    texts = [f"document {i}: {'x' * (i % 7)}" for i in range(401)]
    train.write_tokens(iter(texts), tokenizer, tmp_path, "test")
    meta = json.loads((tmp_path / "meta.json").read_text())
    for split, expected in (("val", texts[::200]), ("train", [t for i, t in enumerate(texts) if i % 200])):
        tokens = np.fromfile(tmp_path / f"{split}.bin", dtype=meta["dtype"])
        assert tokens.dtype == np.uint16
        assert tokens[-1] == 0
        assert tokenizer.decode(tokens, skip_special_tokens=False).split("<|endoftext|>") == [*expected, ""]
        size = sum(len(text) for text in expected)
        assert meta[split] == {"documents": len(expected), "tokens": len(tokens), "bytes": size}


def test_a_large_vocabulary_is_stored_as_uint32(tmp_path):
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70000)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w1"))
    train.write_tokens(iter(["w3", "w69999"]), tokenizer, tmp_path, "test")
    assert json.loads((tmp_path / "meta.json").read_text())["dtype"] == "uint32"
    assert np.fromfile(tmp_path / "train.bin", dtype=np.uint32).tolist() == [69999, 0]


def test_data_is_prepared_once_and_again_only_when_it_changed(corpus, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder, tokenizer = train.prepare_data(str(corpus), None, 500)
    made = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("data").rglob("*.*")}
    assert sorted(path.name for path in folder.iterdir()) == ["meta.json", "train.bin", "val.bin"]
    assert train.prepare_data(str(corpus), None, 500)[0] == folder
    assert train.prepare_data(str(corpus), tokenizer, 500)[0] == folder  # as a run that resumes asks for it
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("data").rglob("*.*")} == made
    assert train.prepare_data(str(corpus), None, 501)[0] != folder
    (tmp_path / "book.txt").write_text("a line of a book\n" * 3000)
    book, _ = train.prepare_data("book.txt", None, 300)
    (tmp_path / "book.txt").write_text("another line of it\n" * 3000)
    assert train.prepare_data("book.txt", None, 300)[0] != book
    assert json.loads((book / "meta.json").read_text())["val"]["documents"] == 1
    assert not list(Path("data").glob("unfinished-*"))
    assert not list(Path("data").glob("*.tmp"))


def test_a_file_that_is_cut_into_documents_loses_nothing(tmp_path):
    text = "".join(f"line {i} of the bóok\n" for i in range(9000)) + "no end of line"
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    documents = list(train.read_documents([tmp_path / "book.txt"], "reading"))
    assert "".join(documents) == text
    assert all(2**14 < len(d) < 2**14 + 100 and d.endswith("\n") for d in documents[:-1])
    assert len(documents) > 5


def test_batches_are_a_pure_function_of_seed_step_and_position():
    stream = train.blocks_at(7, 0, 300, 100)  # three epochs
    for epoch in range(3):
        assert sorted(stream[100 * epoch:100 * (epoch + 1)]) == list(range(100))
    assert stream[:100] != stream[100:200]
    assert train.blocks_at(8, 0, 100, 100) != stream[:100]
    for first, count in ((0, 1), (95, 10), (250, 50), (13, 0)):
        assert train.blocks_at(7, first, count, 100) == stream[first:first + count]


def test_targets_are_the_next_tokens():
    tokens = np.arange(101, dtype=np.uint16)
    x, y = train.get_batch(tokens, [0, 9, 3], 10, 101, torch.device("cpu"))
    assert x.tolist() == [list(range(0, 10)), list(range(90, 100)), list(range(30, 40))]
    assert torch.equal(y, x + 1)
    with pytest.raises(InputError, match="token id 100"):
        train.get_batch(tokens, [9], 10, 100, torch.device("cpu"))


def test_a_failed_save_leaves_the_old_checkpoint_and_nothing_else(tmp_path):
    train.save_checkpoint(tmp_path / "out" / "ckpt.pt", {"step": 1})
    with pytest.raises(Exception, match="pickle"):
        train.save_checkpoint(tmp_path / "out" / "ckpt.pt", {"step": 2, "no pickle": lambda: None})
    assert os.listdir(tmp_path / "out") == ["ckpt.pt"]
    assert torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True) == {"step": 1}

# -----------------------------------------------------------------------------
# The scripts, as a user runs them


def run(cwd, script, *options, **environment):
    return subprocess.run([sys.executable, ROOT / script, *options], cwd=cwd, capture_output=True, text=True,
                          timeout=300, stdin=subprocess.DEVNULL, env=os.environ | environment)


SMALL = ("--model=nano", "--block_size=32", "--batch_size=4", "--log_interval=1", "--eval_iters=2",
         "--device=cpu", "--dtype=float32")


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
    validation = [float(line.split("validation loss ")[1].split()[0]) for line in log.splitlines()
                  if "validation loss" in line]
    assert len(validation) == 3  # at steps 0, 6 and 12
    assert validation[0] == pytest.approx(math.log(4096) + 0.5, abs=0.2)
    assert validation[2] < validation[1] < validation[0] - 0.5
    assert list(losses_of(log)) == list(range(1, 13))
    for word in ("lr ", "norm ", "tok/s", "MFU", "perplexity", "bits per byte", "\ndef __init__(self"):
        assert word in log, word
    assert os.listdir(trained / "out") == ["ckpt.pt"]


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


def test_checkpoint_and_hf_directory_write_the_same_text(trained, tmp_path):
    ckpt = trained / "out" / "ckpt.pt"
    SmolLM.from_pretrained(ckpt).save_pretrained(tmp_path / "hf", load_tokenizer(ckpt))
    texts = [run(tmp_path, "sample.py", f"--ckpt={source}", "--prompt=class", "--temperature=0",
                 "--max_new_tokens=30").stdout for source in (ckpt, tmp_path / "hf")]
    assert texts[0] == texts[1] != ""


def test_resuming_goes_on_where_the_run_was(trained, corpus, tmp_path):
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


def test_ctrl_c_finishes_the_step_and_saves(trained, corpus, tmp_path):
    whole = losses_of((trained / "log.txt").read_text())
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=12",
               "--learning_rate=2e-3", "--eval_interval=1000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    log = ""
    while "step 3 |" not in log:
        line = process.stdout.readline()
        assert line, process.stderr.read()
        log += line
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert "Traceback" not in errors
    done = losses_of(log + rest)
    assert done == {step: whole[step] for step in done}
    assert f"step {max(done)} | saved" in rest
    resumed = run(tmp_path, "train.py", "--init_from=resume")
    assert resumed.returncode == 0, resumed.stderr
    assert done | losses_of(resumed.stdout) == whole


def test_overfit_says_whether_it_got_there(corpus, tmp_path):
    options = (*SMALL, "--overfit=True", f"--dataset={corpus}", "--schedule=constant")
    good = run(tmp_path, "train.py", *options, "--max_iters=300", "--learning_rate=3e-3")
    assert good.returncode == 0, good.stderr
    assert "\noverfit: the loss of the one batch is 0.0" in good.stdout
    bad = run(tmp_path, "train.py", *options, "--max_iters=5", "--learning_rate=1e-5")
    assert bad.returncode == 1
    assert "not overfit" in bad.stderr
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
    "has no .md, .py, .txt files": "train.py --out_dir=new --model=nano --dataset=empty_folder",
    "is empty or too short": "train.py --out_dir=new --model=nano --dataset=empty.txt",
    "is not UTF-8 text": "train.py --out_dir=new --model=nano --dataset=binary.txt",
    "less than a block of 99": "train.py --out_dir=new --model=nano --block_size=99 --dataset=short_folder",
    "block_size is 4096": "train.py --out_dir=new --model=nano --block_size=4096",
    "the tokenizer has 70000 tokens": "train.py --out_dir=new --model=nano --tokenizer=big",
    "nowhere.json: can't be read": "train.py --out_dir=new --model=nano --tokenizer=nowhere.json",
    "device 'abacus' can't be used": "train.py --out_dir=new --device=abacus",
    "out/ckpt.pt exists: go on from it with --init_from=resume": "train.py --model=nano",
    "other/ckpt.pt: can't be read": "train.py --init_from=resume --out_dir=other",
    "out/ckpt.txt: can't be read": "sample.py --ckpt=out/ckpt.txt",
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
    files = (path for path in folder.rglob("*") if path.is_file() and "data" not in path.parts)
    return {path: path.read_bytes() for path in files}


@pytest.mark.parametrize("message", BAD, ids=BAD.values())
def test_bad_input_gets_one_line_and_loses_nothing(message, mess):
    before = contents(mess)
    script, *options = BAD[message].split()
    result = run(mess, script, *options, COLUMNS="200")
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if message in line]
    assert lines, result.stderr
    if result.returncode == 1:  # else the command-line library has told what is wrong
        assert result.stderr.splitlines()[-1] == lines[0]
        assert lines[0].startswith("error: ")
    assert contents(mess) == before


def test_bugs_keep_their_traceback():
    code = "import sys, smollm; sys.excepthook = smollm.one_line_errors; 1 / 0"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_files_stay_short():
    for name, limit in (("smollm.py", 500), ("train.py", 450), ("sample.py", 150)):
        source = (ROOT / name).read_text()
        assert len(source.splitlines()) < limit, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 40, f"{name}: {node.name}"
