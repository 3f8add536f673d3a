"""Prepare corpora of two sizes: how fast, in how much memory, and whether twice gives the same.

    python bench/data.py --tokens 20_000_000 100_000_000

The text is made of lines of Python's standard library, drawn at random, in parquet files with the columns of
cosmopedia-v2, and its tokenizer is trained on it. tools/prepare.py is timed as a whole process, less what it
takes when there is nothing left to do. Exits with 1 if preparing twice differs.
"""

import hashlib
import random
import subprocess
import sys
import sysconfig
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow
import pyarrow.parquet
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tools.prepare import train_tokenizer

SCRIPT = Path(__file__).resolve().parent.parent / "tools" / "prepare.py"
DOCUMENT, SHARD = 60, 20_000  # lines, about 700 tokens; documents


@dataclass
class Options:
    tokens: list[int] = field(default_factory=lambda: [20_000_000, 100_000_000])  # prepared, of each corpus


def write_parquet(path: Path, texts: list[str], row_group_size: int, column: str = "text"):
    """With the columns of cosmopedia-v2."""
    columns = {name: ["x"] * len(texts) for name in ("prompt", "audience", "format", "seed_data")}
    table = pyarrow.table({column: texts, "token_length": [0] * len(texts)} | columns)
    pyarrow.parquet.write_table(table, path, row_group_size=row_group_size)


def write_corpus(folder: Path, tokens: int, lines: list[str]):
    """Shards of parquet, with more text than tokens takes."""
    rng = random.Random(0)
    folder.mkdir()
    for shard in range(tokens // (SHARD * 450) + 1):
        texts = ["".join(rng.choices(lines, k=DOCUMENT)) for _ in range(SHARD)]
        write_parquet(folder / f"{shard:05}.parquet", texts, row_group_size=1000)


def prepare(cwd: Path, corpus: Path, tokenizer: Path, tokens: int) -> tuple[float, float, str]:
    """Seconds, peak memory in GB and the last line printed of tools/prepare.py, run in cwd."""
    code = ("import re, runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__'); "
            "print(re.search(r'VmHWM:\\s*(\\d+) kB', open('/proc/self/status').read())[1])")
    command = [sys.executable, "-c", code, SCRIPT, f"--dataset={corpus}", f"--tokenizer={tokenizer}",
               f"--max_tokens={tokens}"]
    start = time.perf_counter()
    *_, said, memory = subprocess.check_output(command, cwd=cwd, text=True).splitlines()
    return time.perf_counter() - start, int(memory) * 1024 / 1e9, said


def contents(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("data/*/*")}


def main():
    o, same = tyro.cli(Options, description=__doc__, use_underscores=True), True
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    lines = [line for file in files for line in file.read_text(errors="ignore").splitlines(keepends=True)]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer = folder / "tokenizer.json"
        train_tokenizer(lines, 49152).save(str(tokenizer))
        for tokens in o.tokens:
            write_corpus(folder / f"{tokens}", tokens, lines)
            runs, results = [folder / f"{tokens}-{run}" for run in "ab"], []
            for run in runs:
                run.mkdir()
                results.append(prepare(run, folder / f"{tokens}", tokenizer, tokens))
            seconds, memory, said = results[0]
            made = contents(runs[0])
            idle, start, _ = prepare(runs[0], folder / f"{tokens}", tokenizer, tokens)
            same = same and made == contents(runs[0]) == contents(runs[1])
            count = int(said.split()[1].replace(",", ""))
            rate = count / (seconds - idle)
            print(f"{said}\n{rate:,.0f} tokens/s; peak memory {memory - start:.2f} GB over the start; again "
                  f"in {idle:.1f} s; the same bytes when made anew: {same}", flush=True)
    sys.exit(not same)


if __name__ == "__main__":
    main()
