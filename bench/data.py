"""Prepare corpora of three kinds and two sizes: how fast, in how much memory, and whether twice
gives the same.

    python bench/data.py --tokens 20_000_000 100_000_000 --kinds parquet jsonl txt

The text is made of lines of Python's standard library, drawn at random, in parquet or jsonl files
with the columns of cosmopedia-v2, or in plain text, and its tokenizer is trained on it.
tools/prepare.py is timed as a whole process, less what it takes when there is nothing left to do.
Exits with 1 if preparing twice differs.
"""

import hashlib
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli
from lib.data import train_tokenizer
from smollm import InputError

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = 60  # lines, about 700 tokens
SHARD = 20_000  # documents in a file
# Runs a script, and then prints what Linux says of its process
MEASURED = """
import runpy, sys
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
print(open("/proc/self/status").read())
"""


@dataclass
class Options:
    tokens: list[int] = field(default_factory=lambda: [20_000_000, 100_000_000])  # of each corpus
    kinds: list[str] = field(default_factory=lambda: ["parquet", "jsonl", "txt"])


@dataclass
class Preparation:
    """What a run of tools/prepare.py came to."""
    seconds: float
    gigabytes: float  # its peak memory
    num_tokens: int  # to train on, as it says


def write_shard(path: Path, texts: list[str]):
    """parquet and jsonl with the columns of cosmopedia-v2."""
    columns = {"text": texts, "token_length": [0] * len(texts)}
    for name in ("prompt", "audience", "format", "seed_data"):
        columns[name] = ["x"] * len(texts)
    table = pyarrow.table(columns)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=1000)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in table.to_pylist()))
    else:
        path.write_text("".join(texts))


def read_lines() -> list[str]:
    """Lines of Python's standard library."""
    lines = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        lines += file.read_text(errors="ignore").splitlines(keepends=True)
    return lines


def write_corpus(folder: Path, num_tokens: int, kind: str, lines: list[str]):
    """Shards of a kind, with more text than num_tokens takes."""
    rng = random.Random(0)
    folder.mkdir()
    for shard in range(num_tokens // (SHARD * 450) + 1):
        texts = ["".join(rng.choices(lines, k=DOCUMENT)) for _ in range(SHARD)]
        write_shard(folder / f"{shard:05}.{kind}", texts)


def prepare(cwd: Path, corpus: Path, tokenizer: Path, num_tokens: int) -> Preparation:
    """Run tools/prepare.py in cwd."""
    command = [sys.executable, "-c", MEASURED, ROOT / "tools" / "prepare.py",
               f"--dataset={corpus}", f"--tokenizer={tokenizer}", f"--max_tokens={num_tokens}"]
    start = time.perf_counter()
    out = subprocess.check_output(command, cwd=cwd, text=True)
    seconds = time.perf_counter() - start
    kilobytes = int(re.search(r"VmHWM:\s*(\d+) kB", out)[1])
    num_prepared = re.search(r"([\d,]+) tokens to train on", out)[1]
    return Preparation(seconds, kilobytes * 1024 / 1e9, int(num_prepared.replace(",", "")))


def checksums(folder: Path) -> dict[str, str]:
    """Of what was prepared in folder."""
    found = {}
    for path in folder.glob("data/*/*.*"):
        found[path.name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def measure(folder: Path, tokenizer: Path, num_tokens: int, kind: str, lines: list[str]) -> bool:
    """Print what preparing so many tokens takes. Returns whether twice gave the same."""
    corpus = folder / f"{kind}-{num_tokens}"
    write_corpus(corpus, num_tokens, kind, lines)
    first = folder / f"{kind}-{num_tokens}-first"
    second = folder / f"{kind}-{num_tokens}-second"
    first.mkdir()
    second.mkdir()
    made = prepare(first, corpus, tokenizer, num_tokens)
    prepare(second, corpus, tokenizer, num_tokens)
    before = checksums(first)
    idle = prepare(first, corpus, tokenizer, num_tokens)  # finds it done
    is_same = before == checksums(first) == checksums(second)
    rate = made.num_tokens / (made.seconds - idle.seconds)
    memory = made.gigabytes - idle.gigabytes
    print(f"| {kind} | {made.num_tokens:,} | {rate:,.0f} | {memory:.2f} GB | {idle.seconds:.1f} s "
          f"| {'yes' if is_same else 'NO'} |", flush=True)
    return is_same


def main():
    o = cli.parse(Options, __doc__)
    if not set(o.kinds) <= {"parquet", "jsonl", "txt"}:
        raise InputError(f"kinds are {', '.join(o.kinds)}: choose of parquet, jsonl and txt")
    lines = read_lines()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer.json"
        train_tokenizer(lines, 49152).save(str(tokenizer))
        print("| files | tokens | tokens a second | peak memory, over the start | the second time "
              "| twice the same |\n|---|---|---|---|---|---|")
        are_same = []
        for kind in o.kinds:
            for num_tokens in o.tokens:
                are_same.append(measure(folder, tokenizer, num_tokens, kind, lines))
    sys.exit(0 if all(are_same) else 1)


if __name__ == "__main__":
    main()
