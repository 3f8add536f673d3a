"""Try to get other tokens than those of the text: two preparations at once where locks don't lock,
kill -9 in the preparation of a mixture, ranks that have different texts.

    python tests/stress/data.py --pairs=30 --kills=60 --ranks=10

What each leaves is compared with what one undisturbed preparation makes. Prints how often each
property held, a line for each campaign, and exits with 1 if one did not.
"""

import fcntl
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from lib import cli, data, documents
from tests.helpers import losses_in, start_ranks, write_parquet, write_tiny
from tests.launch import Script
from tests.stress.campaigns import Tally, run_campaigns

WINDOW = 10_000  # tokens
SHARES = (0.70, 0.15)  # of the parts of the mixture
SAME_TOKENS = "the tokens of an undisturbed preparation"


@dataclass
class Options:
    pairs: int = 10  # of preparations at once
    kills: int = 20  # at random moments
    ranks: int = 4  # pairs of them, with texts of the same length that differ in a letter
    seed: int = 0


def text_of(rng, count: int) -> list[str]:
    words = ["lorem", "ipsum", "dolor", "sit", "amet", "1", "22", "天地"]
    return [f"document {i} " + " ".join(rng.choices(words, k=rng.randrange(1, 90)))
            for i in range(count)]


def prepare(folder: Path, tokenizer: Path, parts: Path, before) -> Script:
    """Start tools/prepare.py on the mixture in parts."""
    return Script(folder, "tools/prepare.py", "--dataset=mixture", f"--tokenizer={tokenizer}",
                  "--max_tokens=100_000_000", before=partial(before, parts))


def use_mixture(parts: Path):
    """In a process: small windows, and a dataset of two parts, which the library that streams those
    of the Hub reads from a folder here."""
    data.WINDOW = WINDOW
    documents.HUB["mixture"] = [(share, str(parts / str(i)), None)
                                for i, share in enumerate(SHARES)]


def without_flock(parts: Path):
    """In a process: a lock of the system's may be had by all, as on Lustre and GPFS."""
    use_mixture(parts)
    fcntl.flock = lambda descriptor, operation: None


def tokens_in(folder: Path) -> dict[str, bytes]:
    """What was prepared in folder."""
    return {path.name: path.read_bytes() for path in folder.glob("data/*/*.bin")}


def fresh(folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    return folder


def prepare_in_pairs(folder: Path, start, count: int, expected: dict, rng) -> Tally:
    tally = Tally()
    for _ in range(count):
        place = fresh(folder / "pair")
        first = start(place, before=without_flock)
        time.sleep(rng.uniform(0, 1))
        scripts = [first, start(place, before=without_flock)]
        for script in scripts:
            result = script.wait()
            tally.check("exit code 0", result.returncode == 0)
        tally.check(SAME_TOKENS, tokens_in(place) == expected)
        tally.check("no claim is left", not list(place.rglob("*.claim")))
    return tally


def kill_preparations(folder: Path, start, count: int, expected: dict, rng) -> Tally:
    """Each is killed, and goes on, until it is whole."""
    tally = Tally()
    kills = 0
    seconds = 3.0  # how long one takes, at least
    while kills < count:
        place = fresh(folder / "kill")
        code = -signal.SIGKILL
        while code != 0:
            begun = time.monotonic()
            script = start(place, before=use_mixture)
            if kills < count:
                script.process.join(rng.uniform(0, seconds))
                if script.process.is_alive():
                    os.kill(script.process.pid, signal.SIGKILL)
                    kills += 1
            code = script.wait().returncode
            tally.check("killed, or done", code in (0, -signal.SIGKILL))
            if code == 0:
                seconds = max(seconds, time.monotonic() - begun)
        tally.check(SAME_TOKENS, tokens_in(place) == expected)
    return tally


def train_on_different_texts(folder: Path, tokenizer, count: int, rng) -> Tally:
    """Pairs of ranks, each in a folder of its own. Every second pair has the same text."""
    tally = Tally()
    options = ("--dataset=text.txt", "--init_from=model.pt", "--block_size=32", "--batch_size=2",
               "--gradient_accumulation_steps=2", "--max_iters=2", "--sample_prompt=",
               "--log_interval=1", "--eval_iters=1", "--device=cpu", "--dtype=float32")
    for number in range(count):
        is_same = number % 2 == 1
        place = fresh(folder / "ranks")
        places = [place / "0", place / "1"]
        text = "\n".join(text_of(rng, 200))
        other = list(text)
        at = rng.randrange(len(text))
        other[at] = "x"
        for path, own in zip(places, (text, text if is_same else "".join(other)), strict=True):
            path.mkdir()
            (path / "text.txt").write_text(own)
            write_tiny(path / "model.pt", tokenizer)
        results = [script.wait(100) for script in start_ranks(places, [options] * 2)]
        codes = [result.returncode for result in results]
        if is_same:
            tally.check("the same text trains", codes == [0, 0] and len(losses_in(places[0])) == 2)
        else:
            tally.check("different texts don't train", codes == [1, 1])
            said = [result.stderr.splitlines() for result in results]
            tally.check("each says so in one line", all(
                len(lines) == 1 and "the tokens of the text" in lines[0] for lines in said))
    return tally


def main():
    o = cli.parse(Options, __doc__)
    rng = random.Random(o.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = folder / "parts"
        for i in range(len(SHARES)):
            (parts / str(i)).mkdir(parents=True)
            for shard in "ab":
                write_parquet(parts / str(i) / f"{shard}.parquet", text_of(rng, 2000))
        tokenizer = data.train_tokenizer(text_of(rng, 500), 400)
        tokenizer.save(str(folder / "tokenizer.json"))
        start = partial(prepare, tokenizer=folder / "tokenizer.json", parts=parts)
        straight = fresh(folder / "straight")
        result = start(straight, before=use_mixture).wait()
        if result.returncode != 0:
            sys.exit(result.stderr)
        expected = tokens_in(straight)
        campaigns = {
            "two at once, where flock does nothing":
                partial(prepare_in_pairs, folder, start, o.pairs, expected, rng),
            "kill -9 in the preparation of a mixture":
                partial(kill_preparations, folder, start, o.kills, expected, rng),
            "ranks": partial(train_on_different_texts, folder, tokenizer, o.ranks, rng),
        }
        all_held = run_campaigns(campaigns)
    sys.exit(0 if all_held else 1)


if __name__ == "__main__":
    main()
