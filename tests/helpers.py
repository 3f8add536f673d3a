"""What several files of tests need: runs of the scripts, and what is read from what they leave."""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import torch

from lib import data, models
from lib.plot import read_curve
from smollm import SmolLM
from test_smollm import TINY, make
from tests.launch import Script

ROOT = Path(__file__).resolve().parent.parent
TINY_1000 = replace(TINY, vocab_size=1000)  # for the tokenizer of the tests

# A nano model in steps of 4 micro-batches, every one logged
SMALL = ("--model=nano", "--block_size=32", "--batch_size=4", "--gradient_accumulation_steps=4",
         "--max_iters=12", "--decay_iters=2", "--eval_interval=250", "--eval_iters=2",
         "--embedding_lr_scale=1", "--learning_rate=2e-3", "--log_interval=1", "--device=cpu",
         "--dtype=float32")
# A constant learning rate, so that a run may end anywhere and go on; with less text than is read,
# for several epochs
STEADY = ("--schedule=constant", "--warmup_iters=3", "--learning_rate=2e-3",
          "--embedding_lr_scale=1", "--block_size=32", "--batch_size=4", "--max_tokens=3000",
          "--sample_prompt=", "--log_interval=1", "--eval_iters=1", "--eval_interval=10",
          "--device=cpu")


# Each is 5 tokens long for SmolLM's tokenizer, so that they make a batch
PROMPTS = ["The capital of France is", "Once upon a time,", "import numpy as np\n",
           "for i in range(", "Gravity is a force", "2 + 2 =", "Why is the sky blue",
           "Dear Sir or Madam", "def f(x):", "To be or not to"]


# ---- Scripts


def run(cwd, script: str, *options: str, **environment: str) -> subprocess.CompletedProcess:
    """What a script ended with. With an environment it has an interpreter of its own, for
    libraries read it when they are imported."""
    if not environment:
        return Script(cwd, script, *options).wait()
    return subprocess.run([sys.executable, ROOT / script, *options], cwd=cwd, timeout=300,
                          capture_output=True, text=True, stdin=subprocess.DEVNULL,
                          env=os.environ | environment)


def free_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return str(server.getsockname()[1])


def start_training(cwd, *options: str, world_size=1, before=None,
                   **environment: str) -> list[Script]:
    """Runs of train.py; several ranks as torchrun starts them."""
    if world_size == 1:
        return [Script(cwd, "train.py", *options, before=before, **environment)]
    return start_ranks([cwd] * world_size, [options] * world_size, before)


def start_ranks(folders: list, options: list, before=None) -> list[Script]:
    """A rank of train.py in each folder, with its options, all on one machine."""
    where = {"WORLD_SIZE": str(len(folders)), "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": free_port(), "OMP_NUM_THREADS": "1"}
    scripts = []
    for rank, folder in enumerate(folders):
        scripts.append(Script(folder, "train.py", *options[rank], before=before, **where,
                              RANK=str(rank), LOCAL_RANK=str(rank)))
    return scripts


def finish(scripts: list[Script]) -> subprocess.CompletedProcess:
    """What the first of them ended with; all have ended well."""
    results = [script.wait() for script in scripts]
    assert [result.returncode for result in results] == [0] * len(results), results
    return results[0]


def train_here(cwd, *options: str, world_size=1, before=None) -> subprocess.CompletedProcess:
    """What train.py ended with, well; with several ranks, the first."""
    return finish(start_training(cwd, *options, world_size=world_size, before=before))


# ---- What a run leaves


def losses_of(log: str) -> dict[int, str]:
    """Training losses by step, as printed."""
    losses = {}
    for line in log.splitlines():
        if line.startswith("step ") and "| loss" in line:
            step, loss, *_ = line.split(" | ")
            losses[int(step.split()[1])] = loss
    return losses


def losses_in(folder: Path) -> list[float]:
    """Training losses of the metrics.jsonl of a run in folder."""
    curve = read_curve(folder / "out" / "metrics.jsonl")
    return [entry["loss"] for entry in curve if "loss" in entry]


def outcome(folder: Path) -> dict:
    """All that a run has come to, exactly: its state, and what metrics.jsonl says of losses."""
    checkpoint = torch.load(folder / "out" / "ckpt.pt", weights_only=True)
    curve = read_curve(folder / "out" / "metrics.jsonl")
    assert curve == checkpoint["curve"]
    result = checkpoint["model"] | checkpoint["rng"]
    result["step"] = checkpoint["step"]
    result["scaler"] = checkpoint["scaler"]
    for number, optimizer in enumerate(checkpoint["optimizers"]):
        for i, state in optimizer["state"].items():
            for name, value in state.items():
                result[number, i, name] = value
    for entry in curve:
        for name in {"loss", "val_loss", "lr", "norm"} & set(entry):
            result[entry["step"], name] = entry[name].hex()
    return result


def differences(a: dict, b: dict) -> list:
    """The names of what is not equal to the last bit."""
    assert a.keys() == b.keys()
    unequal = []
    for name, value in a.items():
        if torch.is_tensor(value):
            is_equal = torch.equal(value, b[name])
        else:
            is_equal = value == b[name]
        if not is_equal:
            unequal.append(name)
    return unequal


def contents(folder: Path) -> dict[Path, bytes]:
    """Of all files but the tokens of data/ and locks."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path: path.read_bytes() for path in files
            if "data" not in path.parts and path.name != ".lock"}


def last_validation(log: str) -> str:
    return [line for line in log.splitlines() if "validation" in line][-1]


# ---- Texts and tokens


def write_parquet(path: Path, texts: list[str], column: str = "text"):
    """With the columns of cosmopedia-v2."""
    columns = {column: texts, "token_length": [0] * len(texts)}
    for name in ("prompt", "audience", "format", "seed_data"):
        columns[name] = ["x"] * len(texts)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=100)


def write_jsonl(path: Path, texts: list[str]):
    lines = [json.dumps({"text": text, "n": i}) + "\n" for i, text in enumerate(texts)]
    path.write_text("".join(lines))


def prepare(dataset, tokenizer, num_windows=1, column="text", vocab_size=1000) -> data.Tokens:
    return data.prepare_data(data.Source(str(dataset), None, column), tokenizer, vocab_size,
                             num_windows)


def tokens_in(folder: Path, split: str) -> np.ndarray:
    """All tokens of train.bin or val.bin."""
    meta = json.loads((folder / "meta.json").read_text())
    return np.fromfile(folder / f"{split}.bin", meta["dtype"])


def data_folder(cwd: Path) -> Path:
    """Where the one dataset that was prepared in cwd is."""
    [meta] = cwd.glob("data/*/meta.json")
    return meta.parent


@contextmanager
def full_disk():
    """No file may have more than 100,000 bytes, as if the disk were full."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)


# ---- Models


def write_model(path: Path, model: SmolLM, tokenizer, files=None, dtype="float32"):
    models.write(path, models.Bundle(model, tokenizer, files or {}), dtype)


def write_tiny(path: Path, tokenizer, **changes):
    """A checkpoint to begin with, of a model that trains in no time."""
    write_model(path, make(replace(TINY_1000, **changes)), tokenizer)


def greedy(model: SmolLM, ids: Iterable[int], count: int, eos_id=None) -> list[int]:
    columns = model.generate(torch.tensor([list(ids)]), count, temperature=0, eos_id=eos_id)
    return [column.item() for column in columns]
