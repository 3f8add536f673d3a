"""Damage valid model files at random and load them: every file must load right or be refused in one line.

    python bench/fuzz.py --cases=1000

Each case damages one file of a small model (a HuggingFace directory, whole or in shards, a GGUF file, a
ckpt.pt) and loads it in a process of its own, so that a crash by a signal, a hang or a traceback is seen and
counted. What loads from safetensors or GGUF is compared with an independent reading of the damaged bytes.
Exits with 1 if any case is bad.
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
import tyro
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import smollm
from smollm import SHARD_INDEX, Config, InputError, SmolLM, load_tokenizer
from tools import convert
from tools.prepare import train_tokenizer

SECONDS = 30  # a case that takes longer hangs
CONFIG = Config(320, 48, 64, 2, 6, 2, 128, initializer_range=0.1)


@dataclass
class Options:
    cases: int = 1000  # files to damage
    seed: int = 0  # the same seed damages the same bytes


def make_sources(folder: Path):
    """A small model in every form: the folder's subfolders hf, sharded, gguf and ckpt."""
    torch.manual_seed(0)
    model = SmolLM(CONFIG)
    tokenizer = train_tokenizer([Path(smollm.__file__).read_text()], 320)
    model.save_pretrained(folder / "hf", tokenizer)
    model.save_pretrained(folder / "sharded", tokenizer)
    (folder / "sharded" / "model.safetensors").unlink()
    names = sorted(model.state_dict())
    shards = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for shard, keys in shards.items():
        save_file({key: model.state_dict()[key] for key in keys}, folder / "sharded" / shard)
    weight_map = {key: shard for shard, keys in shards.items() for key in keys}
    (folder / "sharded" / SHARD_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for kind, name in (("gguf", "model.gguf"), ("ckpt", "ckpt.pt")):
        (folder / kind).mkdir()
        convert.write(folder / kind / name, model, tokenizer, None, "float32")


def damage(data: bytes, rng: random.Random) -> bytes:
    """Flip, overwrite, cut, insert or repeat some bytes, often near the start, where the headers are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 8))):
        at = rng.randrange(min(len(data), rng.choice((64, 2048, len(data), len(data)))) or 1)
        size = rng.choice((1, 4, 8, rng.randrange(1, 200)))
        how = rng.choice((0, 0, 0, 1, 1, 2, 3, 4, 5, 6))
        if how == 0:
            data[at:at + 1] = bytes([data[at] ^ 1 << rng.randrange(8)]) if data else b"x"
        elif how == 1:
            data[at:at + size] = rng.randbytes(len(data[at:at + size]))
        elif how == 2:
            data[at:at + size] = b""
        elif how == 3:
            data[at:at] = rng.randbytes(size)
        elif how == 4:
            data[at:at + size] = rng.choice((b"\xff", b"\x00", b"9", b'"', b"{", b"-")) * size
        elif how == 5:
            data[at:at] = data[at:at + size]
        else:
            del data[rng.randrange(len(data) + 1):]
    return bytes(data)


def read_safetensors(folder: Path) -> dict[str, np.ndarray]:
    """An independent reading of a folder's float32 tensors: 8 bytes of length, a JSON header, the data."""
    tensors = {}
    for path in folder.glob("*.safetensors"):
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        for name, entry in json.loads(data[8:start]).items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                assert entry["dtype"] == "F32", entry
                tensors[name] = np.frombuffer(data[start + begin:start + end], "<f4").reshape(entry["shape"])
    return tensors


def read_gguf(path: Path, start: int) -> dict[str, np.ndarray]:
    """An independent reading of the float32 tensors of the GGUF file, whose data begin at start: in order of
    the state dict, each at a multiple of 32 bytes, the rows of q and k reordered."""
    tensors, data = {}, path.read_bytes()
    for name, tensor in SmolLM(CONFIG).state_dict().items():
        array = np.frombuffer(data[start:start + 4 * tensor.numel()], "<f4").reshape(tensor.shape)
        if heads := convert.heads_to_reorder(name, CONFIG):
            half = CONFIG.head_dim // 2
            rows = [2 * (i % half) + i // half for i in range(2 * half)]
            array = array[[2 * half * head + row for head in range(heads) for row in rows]]
        tensors[name] = array
        start += -(-4 * tensor.numel() // 32) * 32
    return tensors


def load(folder: Path, gguf_start: int):
    """Load what lies in folder as the scripts do. Raises InputError, or AssertionError if it loads wrong."""
    if (folder / "model.gguf").exists():
        model, tokenizer, _ = convert.read(str(folder / "model.gguf"))
        for name, array in read_gguf(folder / "model.gguf", gguf_start).items():
            assert np.array_equal(model.state_dict()[name].numpy(), array, equal_nan=True), name
    else:
        source = folder / "ckpt.pt" if (folder / "ckpt.pt").exists() else folder
        tokenizer, model = load_tokenizer(source), SmolLM.from_pretrained(source)
        for name, array in read_safetensors(folder).items():
            assert np.array_equal(model.state_dict()[name].numpy(), array, equal_nan=True), name
    tokenizer.encode("def main(): return 12345")
    with torch.no_grad():
        model(torch.zeros(1, 4, dtype=torch.int64))


def outcome(folder: Path, gguf_start: int) -> str:
    """Load in a child process; how it ended."""
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
    status = os.waitpid(child, 0)[1]
    if os.WIFSIGNALED(status):
        return "hang" if os.WTERMSIG(status) == signal.SIGALRM else f"signal {os.WTERMSIG(status)}"
    return {0: "loaded", 3: "refused", 4: "several lines"}.get(os.WEXITSTATUS(status), "traceback")


if __name__ == "__main__":
    o = tyro.cli(Options, description=__doc__, use_underscores=True)
    torch.set_num_threads(1)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    rng, counts, bad = random.Random(o.seed), Counter(), 0
    with tempfile.TemporaryDirectory() as folder:
        make_sources(Path(folder))
        files = sorted(path for path in Path(folder).rglob("*.*") if path.name != "tokenizer_config.json")
        gguf_start = convert.Reader(Path(folder, "gguf", "model.gguf")).data_offset
        for path in files:
            assert outcome(path.parent, gguf_start) == "loaded", (path, (path.parent / "stderr").read_text())
        for case in range(o.cases):
            path = rng.choice(files)
            whole = path.read_bytes()
            path.write_bytes(damage(whole, rng))
            how = outcome(path.parent, gguf_start)
            counts[how] += 1
            if how not in ("loaded", "refused"):
                bad += 1
                print(f"case {case}, {path.relative_to(folder)}: {how}", (path.parent / "stderr").read_text())
            path.write_bytes(whole)
    print(f"{o.cases} damaged files: " + ", ".join(f"{count} {how}" for how, count in sorted(counts.items())))
    sys.exit(bool(bad))
