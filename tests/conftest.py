"""What several files of tests begin with."""

import ast
import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lib import data
from tests.helpers import SMALL, STEADY, TINY_1000, run, train_here, write_tiny
from test_smollm import make

# What is tested hears Ctrl-C, which a background job of a shell, as this may be, does not
signal.signal(signal.SIGINT, signal.default_int_handler)
# and the closing of its terminal, which what nohup starts does not; this process still outlives it,
# for a handler, unlike SIG_IGN, is not handed on
if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, lambda number, frame: None)
os.environ["COLUMNS"] = "200"  # for the messages of the command-line library


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Path:
    """A folder of 30 text files, some Python of the standard library."""
    folder = tmp_path_factory.mktemp("corpus")
    for file in sorted(Path(ast.__file__).parent.glob("[a-d]*.py"))[:30]:
        (folder / file.name).write_text(file.read_text())
    return folder


@pytest.fixture(scope="session")
def tokenizer(corpus) -> Tokenizer:
    texts = [file.read_text() for file in sorted(corpus.iterdir())]
    return data.train_tokenizer(texts, 1000)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty folder, which is the current one."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def trained(corpus, tmp_path_factory) -> Path:
    """A folder in which train.py has trained a nano model for 12 steps."""
    folder = tmp_path_factory.mktemp("trained")
    result = run(folder, "train.py", *SMALL, f"--dataset={corpus}", "--eval_interval=6")
    assert result.returncode == 0, result.stderr
    (folder / "log.txt").write_text(result.stdout)
    return folder


@pytest.fixture(scope="session")
def ckpt(trained) -> Path:
    """The checkpoint of the trained nano model."""
    return trained / "out" / "ckpt.pt"


@pytest.fixture(scope="session")
def tiny(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint to begin with, of a model that trains in no time."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.pt"
    write_tiny(path, tokenizer)
    return path


@pytest.fixture(scope="session")
def steady(tiny, corpus, tmp_path_factory) -> Path:
    """A folder whose out stands at step 10, and whose straight/out went on to step 20."""
    folder = tmp_path_factory.mktemp("steady")
    (folder / "straight").mkdir()
    options = (*STEADY, "--dtype=float16", f"--dataset={corpus}", f"--init_from={tiny}")
    train_here(folder, *options, "--max_iters=10")
    train_here(folder / "straight", *options, "--max_iters=20")
    return folder


@pytest.fixture
def valid(tokenizer, tmp_path) -> Path:
    """A HuggingFace directory that is as it should be."""
    make(TINY_1000).save_pretrained(tmp_path / "hf", tokenizer)
    return tmp_path / "hf"


@pytest.fixture(scope="session")
def mess(trained, ckpt, tmp_path_factory) -> Path:
    """A folder with a checkpoint and a number of things that can't be used."""
    folder = tmp_path_factory.mktemp("mess")
    for name in ("out", "weights", "empty_folder", "short_folder", "big"):
        (folder / name).mkdir()
    checkpoint = ckpt.read_bytes()
    (folder / "out" / "ckpt.pt").write_bytes(checkpoint)
    (folder / "cut.pt").write_bytes(checkpoint[:100_000])
    weights = torch.load(ckpt, weights_only=True)
    del weights["optimizers"]
    torch.save(weights, folder / "weights" / "ckpt.pt")
    (folder / "empty.txt").write_text("")
    (folder / "binary.txt").write_bytes(bytes(range(256)) * 100)
    for name in "ab":
        (folder / "short_folder" / f"{name}.txt").write_text("a short text")
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70000)}
    big = Tokenizer(WordLevel(words, unk_token="w1"))
    big.save(str(folder / "big" / "tokenizer.json"))
    return folder
