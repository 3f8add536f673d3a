"""Damage valid model files at random and load them: each must load right or be refused in one line.

    python tests/stress/fuzz.py --cases=1000

Each case damages one file of a small model (a HuggingFace directory, whole or in shards, a GGUF
file, a ckpt.pt) and loads it in a process of its own, so that a crash, a hang or a traceback is
seen and counted. What loads from safetensors or GGUF is compared with an independent reading of the
damaged bytes; what loads from a ckpt.pt, which has checksums, with what was saved. Exits with 1 if
any case is bad.
"""

import json
import os
import random
import signal
import sys
import tempfile
import traceback
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from lib import cli, models
from lib.data import train_tokenizer
from lib.gguf_format import Reader
from smollm import SHARD_INDEX, Config, InputError, SmolLM

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 30  # a case that takes longer hangs
CONFIG = Config(vocab_size=320, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128)
# How a child process tells how loading has ended: its exit codes
OUTCOMES = {0: "loaded", 1: "traceback", 3: "refused", 4: "several lines"}


@dataclass
class Options:
    cases: int = 1000  # files to damage
    seed: int = 0  # the same seed damages the same bytes


# ---- Files, whole and damaged


def make_model() -> SmolLM:
    torch.manual_seed(0)
    return SmolLM(CONFIG)


def write_sources(folder: Path):
    """A small model in every form: the folder's subfolders hf, sharded, gguf and ckpt."""
    model = make_model()
    tokenizer = train_tokenizer([(ROOT / "smollm.py").read_text()], 320)
    bundle = models.Bundle(model, tokenizer, files={})
    models.write(folder / "hf", bundle, "float32")
    models.write(folder / "gguf" / "model.gguf", bundle, "float32")
    models.write(folder / "ckpt" / "ckpt.pt", bundle, "float32")

    sharded = folder / "sharded"
    models.write(sharded, bundle, "float32")
    (sharded / "model.safetensors").unlink()
    tensors = model.state_dict()
    names = sorted(tensors)
    weight_map = {}
    for shard, keys in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({key: tensors[key] for key in keys}, sharded / shard)
        weight_map |= dict.fromkeys(keys, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (sharded / SHARD_INDEX).write_text(json.dumps(index))


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, insert or repeat some bytes, often near the start, where the headers
    are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        region = rng.choice((64, 2048, len(data), len(data)))
        at = rng.randrange(max(1, min(len(data), region)))
        size = rng.choice((1, 4, 8, rng.randrange(1, 200)))
        match rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5, 6)):
            case 0:
                for i in range(at, min(at + 1, len(data))):
                    data[i] ^= 1 << rng.randrange(8)
            case 1:
                data[at:at + size] = rng.randbytes(len(data[at:at + size]))
            case 2:
                del data[at:at + size]
            case 3:
                data[at:at] = rng.randbytes(size)
            case 4:
                byte = rng.choice((b"\xff", b"\x00", b"9", b'"', b"{", b"-"))
                data[at:at + size] = byte * size
            case 5:
                data[at:at] = data[at:at + size]
            case 6:
                del data[rng.randrange(len(data) + 1):]
    return bytes(data)


# ---- Independent readers


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """A folder's float32 tensors. A file is 8 bytes of length, a JSON header, the data."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name == "__metadata__":
                continue
            assert entry["dtype"] == "F32", entry
            begin, end = entry["data_offsets"]
            values = np.frombuffer(data[start + begin:start + end], "<f4")
            tensors[name] = values.reshape(entry["shape"])
    return tensors


def read_gguf(path: Path, start: int) -> dict[str, np.ndarray]:
    """The float32 tensors of the GGUF file, whose data begin at start: in order of the state dict,
    each at a multiple of 32 bytes. Of a head of q and k, row 2i is HuggingFace's row i, and row
    2i + 1 its row i + D/2."""
    data = path.read_bytes()
    num_heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
    tensors = {}
    for name, tensor in make_model().state_dict().items():
        size = 4 * tensor.numel()
        array = np.frombuffer(data[start:start + size], "<f4").reshape(tensor.shape)
        start += -(-size // 32) * 32
        for module, heads in num_heads.items():
            if module in name:
                rows = np.arange(len(array)).reshape(heads, CONFIG.head_dim)
                order = np.concatenate((rows[:, 0::2], rows[:, 1::2]), axis=1)
                array = array[order.flatten()]
        tensors[name] = array
    return tensors


# ---- Cases


def load(folder: Path, gguf_start: int):
    """Load what lies in folder as the scripts do. AssertionError if it loads wrong."""
    if (folder / "model.gguf").exists():
        bundle = models.load(folder / "model.gguf")
        expected = read_gguf(folder / "model.gguf", gguf_start)
    elif (folder / "ckpt.pt").exists():
        bundle = models.load(folder / "ckpt.pt")
        expected = {name: tensor.numpy() for name, tensor in make_model().state_dict().items()}
    else:
        bundle = models.load(folder)
        expected = read_safetensors(folder)
    tensors = bundle.model.state_dict()
    assert expected.keys() == tensors.keys()
    for name, array in expected.items():
        assert np.array_equal(tensors[name].numpy(), array, equal_nan=True), name
    bundle.tokenizer.encode("def main(): return 12345")
    with torch.no_grad():
        bundle.model(torch.zeros(1, 4, dtype=torch.int64))


def outcome(folder: Path, gguf_start: int) -> str:
    """How loading in a child process ends: loaded and refused are right, all else is bad."""
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)  # kills the child
        code = 0
        with open(folder / "stderr", "w") as errors:
            os.dup2(errors.fileno(), 2)  # what libraries print, too
            try:
                load(folder, gguf_start)
            except InputError as error:
                code = 4 if "\n" in str(error) else 3
            except BaseException:
                traceback.print_exc(file=errors)
                code = 1
        os._exit(code)
    _, status = os.waitpid(child, 0)
    if not os.WIFSIGNALED(status):
        return OUTCOMES[os.WEXITSTATUS(status)]
    if os.WTERMSIG(status) == signal.SIGALRM:
        return "hang"
    return f"signal {os.WTERMSIG(status)}"


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng = random.Random(o.seed)
    counts = Counter()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sources(folder)
        files = sorted(folder.rglob("*.*"))
        gguf_start = Reader(folder / "gguf" / "model.gguf").data_offset
        for path in files:
            if outcome(path.parent, gguf_start) != "loaded":
                sys.exit(f"{path}: {(path.parent / 'stderr').read_text()}")
        for case in range(o.cases):
            path = rng.choice(files)
            whole = path.read_bytes()
            path.write_bytes(damage(whole, rng))
            how = outcome(path.parent, gguf_start)
            counts[how] += 1
            if how not in ("loaded", "refused"):
                print(f"case {case}, {path.relative_to(folder)}: {how}")
                print((path.parent / "stderr").read_text())
            path.write_bytes(whole)
    parts = ", ".join(f"{count} {how}" for how, count in sorted(counts.items()))
    print(f"{o.cases} damaged files: {parts}")
    sys.exit(0 if counts["loaded"] + counts["refused"] == o.cases else 1)
