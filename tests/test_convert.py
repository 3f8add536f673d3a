"""Models from any kind of file to any other: lib/models.py, lib/gguf_format.py and
tools/convert.py."""

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from bench.llama_cpp import LlamaCpp
from lib import chat, models
from smollm import Config, InputError, load_tokenizer
from test_smollm import CONFIGS, LLAMA_AND_SMOLLM3, make
from tests.helpers import PROMPTS, TINY_1000, contents, greedy, run, write_model


@LLAMA_AND_SMOLLM3
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_conversion_there_and_back_is_exact(config, dtype, tokenizer, tmp_path):
    config = replace(config, vocab_size=1010, eos_token_id=2)  # more rows than tokens
    model = make(config).to(getattr(torch, dtype))
    there = tmp_path / "hf"
    model.save_pretrained(there, tokenizer)
    (there / "chat_template.jinja").write_text(chat.CHATML)
    stations = ["hf", "a.gguf", "b.pt", "c", "d.gguf", "back"]
    for source, target in itertools.pairwise(stations):
        models.write(tmp_path / target, models.load(tmp_path / source), dtype)
    back = tmp_path / "back"
    for name in ("model.safetensors", "chat_template.jinja"):
        assert (back / name).read_bytes() == (there / name).read_bytes(), name
    check_same_tokenizer(there / "tokenizer.json", back / "tokenizer.json")
    # 16-bit matrices keep float32 norms in GGUF, and all else but the std of initial weights
    found = Config.from_hf(json.loads((back / "config.json").read_text()))
    assert replace(found, initializer_range=config.initializer_range) == config


def check_same_tokenizer(path: Path, other: Path):
    def parts(path: Path):
        contents = json.loads(path.read_text())
        added = [(token["id"], token["content"], token["special"])
                 for token in contents["added_tokens"]]
        return contents["model"]["vocab"], contents["model"]["merges"], added

    assert parts(path) == parts(other)


def test_q8_0_is_close_and_a_quarter_as_large(tokenizer, tmp_path):
    config = replace(CONFIGS["wide heads"], vocab_size=1000, intermediate_size=96)
    model = make(config)
    write_model(tmp_path / "q8.gguf", model, tokenizer, dtype="q8_0")
    back = models.load(tmp_path / "q8.gguf").model.state_dict()
    for name, p in model.state_dict().items():
        assert (back[name] - p).abs().max() <= p.abs().max() / 127, name
    assert (tmp_path / "q8.gguf").stat().st_size < 0.5 * 4 * model.num_parameters()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_model_trained_here_gives_the_same_text_in_llama_cpp(dtype, ckpt, tmp_path):
    result = run(tmp_path, "tools/convert.py", str(ckpt), "nano.gguf", f"--dtype={dtype}")
    assert result.returncode == 0, result.stderr
    tokenizer = load_tokenizer(ckpt)
    llama = LlamaCpp(tmp_path / "nano.gguf")
    model = models.load(tmp_path / "nano.gguf").model  # with the weights that llama.cpp has
    for prompt in PROMPTS[:5]:
        ids = tokenizer.encode(prompt).ids
        assert llama.tokenize(prompt) == ids
        assert llama.generate(ids, 32) == greedy(model, ids, 32, eos_id=0), prompt


# ---- Tokenizers


def test_gguf_keeps_added_tokens(tokenizer, tmp_path):
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    tokenizer.add_tokens(["<think>"])
    write_model(tmp_path / "a.gguf", make(replace(TINY_1000, vocab_size=1001)), tokenizer)
    back = models.load(tmp_path / "a.gguf").tokenizer
    for text in ("a <think> b", "<|im_end|><think>"):
        ids = tokenizer.encode(text).ids
        assert back.encode(text).ids == ids
        assert back.decode(ids) == tokenizer.decode(ids)


def otherwise(contents: dict) -> dict[str, dict]:
    """Tokenizers that split text differently from SmolLM's, whose tokenizer.json it is."""
    digits, byte_level = contents["pre_tokenizer"]["pretokenizers"]

    def steps(*steps):
        return contents | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}

    return {
        "lower case": contents | {"normalizer": {"type": "Lowercase"}},
        "digits together": contents | {"pre_tokenizer": byte_level},
        "no single digits": steps(digits | {"individual_digits": False}, byte_level),
        "digits last": steps(byte_level, digits),
        "prefix": steps(digits, byte_level | {"add_prefix_space": True}),
        "no pattern": steps(digits, byte_level | {"use_regex": False}),
    }


def test_gguf_refuses_tokenizers_that_split_otherwise(tokenizer, tmp_path):
    model = make(TINY_1000)
    for changed in otherwise(json.loads(tokenizer.to_str())).values():
        other = Tokenizer.from_str(json.dumps(changed))
        with pytest.raises(InputError, match="split text differently"):
            write_model(tmp_path / "b.gguf", model, other)
    assert list(tmp_path.iterdir()) == []


# ---- What cannot be converted


@pytest.mark.parametrize(("options", "message"), [
    (["nowhere", "a.gguf"], "nowhere: can't be read"),
    (["out/ckpt.pt", "out"], "out exists: name another target"),
    (["out/ckpt.pt", "q8", "--dtype=q8_0"], "q8 can't be q8_0"),
    (["cut.pt", "new.gguf"], "cut.pt: can't be read"),
    (["big", "new.gguf"], "big: can't be read")], ids=str)
def test_conversion_of_what_cannot_be_converted(options, message, mess):
    before = contents(mess)
    result = run(mess, "tools/convert.py", *options)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert message in result.stderr
    assert contents(mess) == before
