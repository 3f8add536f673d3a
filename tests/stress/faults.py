"""Try to lose a training run: kill it, fill its disk, flip bits of what it has saved.

    python bench/faults.py --kills=100 --terms=20 --disks=10 --flips=1000

Each run is train.py in a process of its own, training a small model, and what it leaves is compared with what
a run that nothing happened to has come to. Prints the counts, and exits with 1 if any of them is not whole.
"""

import builtins
import io
import itertools
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from bench.launch import Script
from smollm import Config, InputError, SmolLM, load_checkpoint
from tools import convert, prepare
from tools.checkpoint import previous_of
from tools.plot import read_curve

STEPS, SAVES = 40, 5  # steps of a run, and from checkpoint to checkpoint


@dataclass
class Options:
    kills: int = 100  # kill -9 at random moments of runs
    moments: int = 100  # kill -9 before, amid and after file-system steps of a save, at most so many
    terms: int = 20  # SIGTERM at random moments of runs
    disks: int = 10  # saves that meet a full disk
    flips: int = 1000  # single bits of a checkpoint turned over
    seed: int = 0


class Tally:
    """How often each property was tested, and held."""
    def __init__(self):
        self.tested, self.held = Counter(), Counter()

    def check(self, name: str, holds: bool):
        self.tested[name] += 1
        self.held[name] += holds

    def __str__(self):
        return ", ".join(f"{name} {self.held[name]} of {count}" for name, count in self.tested.items())


def options_of_run(folder: Path) -> list[str]:
    """A small model to begin with and a text, and the options of the run that trains the one on the other."""
    text = Path(train.__file__).read_text()
    tokenizer = prepare.train_tokenizer([text], 400)
    torch.manual_seed(0)
    convert.write(folder / "begin.pt", SmolLM(Config(400, 48, 64, 2, 6, 2, 64)), tokenizer, None, "float32")
    (folder / "text.txt").write_text(text * 3)
    return [f"--init_from={folder / 'begin.pt'}", f"--dataset={folder / 'text.txt'}", "--block_size=32",
            "--batch_size=4", "--gradient_accumulation_steps=2", f"--max_iters={STEPS}", "--eval_iters=1",
            f"--eval_interval={SAVES}", "--log_interval=1", "--sample_prompt=", "--device=cpu",
            "--dtype=float32", "--learning_rate=3e-3"]


def losses(folder: Path) -> dict:
    """Losses by step, exact, of the metrics.jsonl of a run in folder."""
    curve = read_curve(folder / "out" / "metrics.jsonl")
    return {(entry["step"], name): entry[name].hex() for entry in curve for name in entry
            if name in ("loss", "val_loss")}


def start(folder: Path, options: list[str], **how) -> Script:
    """The run in folder, from its checkpoint if it has one."""
    return Script(folder, "train.py", *(["--init_from=resume"] if newest_step(folder) else options), **how)


def last_saved(out: str) -> int:
    """The last step that a run has said to be saved."""
    return max([int(line.split()[1]) for line in out.splitlines() if "| saved " in line], default=0)


def newest_step(folder: Path) -> int:
    """The step of the checkpoint that a run would go on from; 0: there is none."""
    path = folder / "out" / "ckpt.pt"
    for candidate in (path, previous_of(path)):
        try:
            return load_checkpoint(candidate)["step"]
        except InputError:
            pass
    return 0


def stop_at_random(folder: Path, options: list[str], count: int, signum: int, rng, expected: dict) -> Tally:
    """Stop runs by a signal at a random moment, and let them go on, until count have been."""
    tally, folder, seconds, stops = Tally(), folder / signal.Signals(signum).name, 2.0, 0
    while stops < count:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        saved = 0
        while newest_step(folder) < STEPS:
            script, begun = start(folder, options), time.monotonic()
            if signum == signal.SIGTERM:
                script.wait_for("\nstep ")
            script.process.join(rng.uniform(0, seconds))
            if script.process.is_alive() and stops < count:
                os.kill(script.process.pid, signum)
            result = script.wait()
            saved = max(saved, last_saved(result.stdout))
            if result.returncode and stops == count:
                tally.check("goes on undisturbed", False)
                return tally
            if result.returncode:  # else it was faster than the signal
                stops += 1
                code = -signum if signum == signal.SIGKILL else 128 + signum
                tally.check(f"exit code {code}", result.returncode == code)
                tally.check("nothing saved is lost", newest_step(folder) >= saved)
                if signum == signal.SIGTERM:
                    last = max(step for step, _ in losses(folder))
                    tally.check("the last step is saved", newest_step(folder) == last)
        seconds = max(1.0, time.monotonic() - begun)
        tally.check("ended with the straight run's losses", losses(folder) == expected)
    return tally


def arm(at: int, moment: str, log: Path):
    """In the process of a run: log each file-system step of its saves, and die at one, before or after it; a
    write also dies amid, with half of its bytes written."""
    calls = itertools.count(1)

    def dying(name, function):
        def step(*args, **kwargs):
            call = next(calls)
            with real_open(log, "a") as file:
                file.write(f"{name}\n")
            if call == at and moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if call == at and moment == "amid":
                args = (bytes(args[0])[:len(args[0]) // 2],)
            try:
                return function(*args, **kwargs)
            finally:
                if call == at:
                    os.kill(os.getpid(), signal.SIGKILL)
        return step

    class DyingFile(io.FileIO):
        def __init__(self, path):
            super().__init__(path, "w")
            self.write = dying("write", super().write)

    def dying_open(path, *args, **kwargs):
        return create(path) if str(path).endswith("ckpt.tmp") else real_open(path, *args, **kwargs)

    real_open, create = builtins.open, dying("create", DyingFile)
    builtins.open = dying_open
    os.fsync, os.replace, os.unlink = (dying(f.__name__, f) for f in (os.fsync, os.replace, os.unlink))


def half_way(folder: Path, options: list[str]) -> Path:
    """A folder with checkpoints at steps SAVES and 2 * SAVES."""
    (folder / "half-way").mkdir()
    script = start(folder / "half-way", options)
    script.wait_for(f"step {2 * SAVES} | saved")
    script.process.kill()
    script.wait()
    return folder / "half-way"


def go_on_after(folder: Path, base: Path, before, exitcode: int, tally: Tally, expected: dict) -> str:
    """Let a run that goes on from a copy of base meet with what `before` prepares, and then go on in peace.
    Returns what it said when it met with it."""
    trial = folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(base, trial)
    result = start(trial, [], before=before).wait()
    tally.check(f"exit code {exitcode}", result.returncode == exitcode)
    saved = max(newest_step(base), last_saved(result.stdout))
    tally.check("nothing saved is lost", newest_step(trial) >= saved)
    if exitcode > 0:
        tally.check("no temporary file left", not list(trial.rglob("*.tmp")))
    code = start(trial, []).wait().returncode
    tally.check("ended with the straight run's losses", code == 0 and losses(trial) == expected)
    return result.stderr


def die_while_saving(folder: Path, base: Path, most: int, rng, expected: dict) -> Tally:
    """kill -9 at the file-system steps of a save, of the writes the first, the last and some between, at so
    many moments at most."""
    log, tally, dry = folder / "steps.txt", Tally(), folder / "dry"
    shutil.copytree(base, dry)
    start(dry, [], before=partial(arm, 0, "never", log)).wait()
    names = log.read_text().split()
    names = names[:names.index("unlink") + 1]  # of the first save
    writes = [i for i, name in enumerate(names) if name == "write"]
    chosen = {writes[0], writes[-1], *rng.sample(writes, min(8, len(writes)))}
    moments = [(i + 1, moment) for i, name in enumerate(names) if name != "write" or i in chosen
               for moment in ("before", "amid", "after") if moment != "amid" or name == "write"]
    for at, moment in rng.sample(moments, min(most, len(moments))):
        go_on_after(folder, base, partial(arm, at, moment, log), -signal.SIGKILL, tally, expected)
    return tally


def limit_files(size: int):
    """In the process of a run: no file can grow beyond size bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def fill_the_disk(folder: Path, base: Path, count: int, rng, expected: dict) -> Tally:
    tally, size = Tally(), (base / "out" / "ckpt.pt").stat().st_size
    for _ in range(count):
        before = partial(limit_files, rng.randrange(20_000, size))
        said = go_on_after(folder, base, before, 1, tally, expected)
        tally.check("one line", said.startswith("error: ") and len(said.splitlines()) == 1)
    return tally


def same(a, b) -> bool:
    """Equal to the last bit, whatever is nested in it."""
    if torch.is_tensor(a):
        return torch.is_tensor(b) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return isinstance(b, list) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


def flip_bits(checkpoint: Path, count: int, rng) -> Tally:
    """Each flipped bit must be found by the checksums, or change nothing of what is loaded."""
    tally, good, data = Tally(), load_checkpoint(checkpoint), bytearray(checkpoint.read_bytes())
    path = checkpoint.with_name("flipped.pt")
    for _ in range(count):
        at, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        data[at] ^= bit
        try:
            found, harmless = False, same(load_checkpoint(path), good)
        except InputError:
            found, harmless = True, False
        tally.check("found by a checksum" if found else "harmless", found or harmless)
    return tally


def main():
    o = tyro.cli(Options, description=__doc__, use_underscores=True)
    rng, whole = random.Random(o.seed), True
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = options_of_run(folder)
        (folder / "straight").mkdir()
        result = start(folder / "straight", options).wait()
        assert result.returncode == 0, result.stderr
        expected, base = losses(folder / "straight"), half_way(folder, options)
        for what, campaign in {
            "kill -9 at random moments": lambda: stop_at_random(
                folder, options, o.kills, signal.SIGKILL, rng, expected),
            "kill -9 while saving": lambda: die_while_saving(folder, base, o.moments, rng, expected),
            "SIGTERM at random moments": lambda: stop_at_random(
                folder, options, o.terms, signal.SIGTERM, rng, expected),
            "full disks": lambda: fill_the_disk(folder, base, o.disks, rng, expected),
            "flipped bits": lambda: flip_bits(folder / "straight" / "out" / "ckpt.pt", o.flips, rng),
        }.items():
            tally = campaign()
            whole = whole and tally.held == tally.tested
            print(f"{what}: {tally}", flush=True)
    sys.exit(not whole)


if __name__ == "__main__":
    main()
