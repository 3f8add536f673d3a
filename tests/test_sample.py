"""sample.py: continuations and chat, with a model trained here."""

import io
import itertools
import random
import subprocess
import sys
from contextlib import redirect_stdout

import pytest

import sample
from lib import models
from smollm import SmolLM, load_tokenizer
from test_smollm import make
from tests.helpers import ROOT, TINY_1000, greedy, run


def test_streaming_never_splits_a_character(tokenizer):
    rng = random.Random(0)
    whole = tokenizer.encode("naïve 漢字 🙂 ok").ids
    texts = [whole, tokenizer.encode("🙂").ids[:-1], []]
    for _ in range(50):
        texts.append([rng.randrange(tokenizer.get_vocab_size()) for _ in range(40)])
    for ids in texts:
        with redirect_stdout(io.StringIO()) as out:
            assert sample.stream(tokenizer, iter(ids)) == ids
        assert out.getvalue() == tokenizer.decode(ids) + "\n"
    pieces = []
    with redirect_stdout(io.StringIO()) as out:
        out.write = pieces.append
        sample.stream(tokenizer, whole)
    assert len(pieces) > 8
    assert not any("\ufffd" in piece for piece in pieces)


def test_sample_needs_nothing_but_the_checkpoint(ckpt, tmp_path):
    command = ("sample.py", f"--ckpt={ckpt}", "--prompt=import os\n", "--max_new_tokens=20",
               "--device=cpu")
    one = run(tmp_path, *command)
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("import os\n")
    assert "prefill" in one.stderr
    assert "GB/s" in one.stderr
    assert run(tmp_path, *command).stdout == one.stdout
    assert run(tmp_path, *command, "--seed=1").stdout != one.stdout


def test_an_empty_prompt_starts_from_bos_and_makes_several_samples(ckpt, tmp_path):
    result = run(tmp_path, "sample.py", f"--ckpt={ckpt}", "--num_samples=3", "--max_new_tokens=8",
                 "--top_p=0.9", "--dtype=bfloat16")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("-" * 60) == 3


def test_the_text_is_that_of_the_model_itself(ckpt, tmp_path):
    """Though sample.py runs a faster step."""
    tokenizer = load_tokenizer(ckpt)
    model = SmolLM.from_pretrained(ckpt)
    result = run(tmp_path, "sample.py", f"--ckpt={ckpt}", "--prompt=def f(", "--temperature=0",
                 "--max_new_tokens=20", "--device=cpu", "--dtype=float32")
    made = greedy(model, tokenizer.encode("def f(").ids, 20, model.config.eos_token_id)
    assert result.stdout == "def f(" + tokenizer.decode(made) + "\n"


def test_sample_compiled_writes_the_same_text(ckpt, tmp_path):
    command = ("sample.py", f"--ckpt={ckpt}", "--prompt=def f(", "--temperature=0",
               "--max_new_tokens=20", "--device=cpu")
    eager = run(tmp_path, *command)
    compiled = run(tmp_path, *command, "--compile=True")
    assert compiled.returncode == 0, compiled.stderr
    assert compiled.stdout == eager.stdout != ""


def test_checkpoint_and_hf_directory_write_the_same_text(ckpt, tmp_path):
    model = SmolLM.from_pretrained(ckpt)
    model.save_pretrained(tmp_path / "hf", load_tokenizer(ckpt))
    texts = []
    for source in (ckpt, tmp_path / "hf"):
        result = run(tmp_path, "sample.py", f"--ckpt={source}", "--prompt=class",
                     "--temperature=0", "--max_new_tokens=30")
        texts.append(result.stdout)
    assert texts[0] == texts[1] != ""


# ---- Chat


@pytest.mark.parametrize("prompt", ["/reset", ""])
def test_chat_ends_whatever_it_is_told(prompt, ckpt, tmp_path):
    command = [sys.executable, ROOT / "sample.py", f"--ckpt={ckpt}", "--chat=True",
               "--max_new_tokens=3", f"--prompt={prompt}"]
    result = subprocess.run(command, cwd=tmp_path, input=b"hi\xff\n", capture_output=True,
                            timeout=60)
    assert result.returncode == 0, result.stderr


def converse(bundle: models.Bundle, o: sample.Options, lines: list[str], monkeypatch) -> str:
    """What a greedy chat prints, when it is told these lines."""
    lines = iter(lines)

    def read(prompt):
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    with redirect_stdout(io.StringIO()) as out:
        sample.converse(bundle, o, {"temperature": 0})
    return out.getvalue()


def test_chat_turns_process_their_new_tokens_only_and_add_up_to_the_conversation(
        ckpt, monkeypatch):
    bundle = models.load(ckpt)
    tokenizer = bundle.tokenizer
    fed = []
    bundle.model.model.register_forward_pre_hook(
        lambda module, arguments: fed.append(arguments[0].flatten().tolist()))
    o = sample.Options(chat=True, max_new_tokens=5, system="Be brief.")
    converse(bundle, o, ["Hello", "And again"], monkeypatch)
    ids = list(itertools.chain(*fed))
    text = tokenizer.decode(ids, skip_special_tokens=False)
    _, first, _ = text.split("<|im_start|>assistant\n")
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>\n"
                           "<|im_start|>user\nHello<|im_end|>\n")
    assert first.endswith("<|im_end|>\n<|im_start|>user\nAnd again<|im_end|>\n")
    # of each answer of 5 tokens, the last is fed with the next turn
    assert [len(ids) for ids in fed].count(1) == 8


def test_chat_stops_when_its_context_is_full_and_goes_on_after_a_reset(
        tokenizer, monkeypatch, capsys):
    bundle = models.Bundle(make(TINY_1000), tokenizer, files={})
    o = sample.Options(chat=True, system="")
    told = converse(bundle, o, ["One", "Two", "/reset", "One"], monkeypatch)
    full = "(the context of 128 tokens is full: /reset starts a new conversation)\n"
    assert capsys.readouterr().err == 3 * full
    first, again = told.splitlines()[0], told.splitlines()[-1]
    assert first == again
