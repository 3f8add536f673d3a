"""Try to lose a training run: kill it, fill its disk, flip bits of what it has saved.

    python tests/stress/faults.py --kills=100 --terms=20 --disks=10 --flips=1000

Each run is train.py in a process of its own, training a small model. What it leaves is compared
with what an undisturbed run has come to. Prints how often each property held, a line for each
campaign, and exits with 1 if one did not.
"""

import builtins
import io
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from lib import cli, models
from lib.data import train_tokenizer
from lib.plot import read_curve
from lib.run import load_checkpoint
from smollm import Config, InputError, SmolLM
from tests.launch import Script
from tests.stress.campaigns import Tally, run_campaigns

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 40  # of a run
EVAL_INTERVAL = 5  # steps from checkpoint to checkpoint
SAME_LOSSES = "ended with the straight run's losses"
NOTHING_LOST = "nothing saved is lost"


@dataclass
class Options:
    kills: int = 100  # kill -9 at random moments of runs
    moments: int = 100  # kill -9 before, amid and after the steps of a save, at most so many
    terms: int = 20  # SIGTERM at random moments of runs
    disks: int = 10  # saves that meet a full disk
    flips: int = 1000  # single bits of a checkpoint turned over
    seed: int = 0


# ---- Runs, and what they leave


def prepare_run(folder: Path) -> list[str]:
    """Write a small model and a text. Returns train.py's options to train the one on the other."""
    text = (ROOT / "train.py").read_text()
    torch.manual_seed(0)
    config = Config(vocab_size=400, hidden_size=48, intermediate_size=64, num_hidden_layers=2,
                    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=64)
    bundle = models.Bundle(SmolLM(config), train_tokenizer([text], 400), files={})
    models.write(folder / "begin.pt", bundle, "float32")
    (folder / "text.txt").write_text(text * 3)
    return [f"--init_from={folder / 'begin.pt'}", f"--dataset={folder / 'text.txt'}",
            "--block_size=32", "--batch_size=4", "--gradient_accumulation_steps=2",
            f"--max_iters={STEPS}", "--learning_rate=3e-3", f"--eval_interval={EVAL_INTERVAL}",
            "--eval_iters=1", "--log_interval=1", "--sample_prompt=", "--device=cpu",
            "--dtype=float32"]


def start(folder: Path, options: list[str], before=None) -> Script:
    """Start the run in folder, or go on with it from its checkpoint. `before` is called first, in
    its process."""
    if newest_step(folder) > 0:
        options = ["--init_from=resume"]
    return Script(folder, "train.py", *options, before=before, OMP_NUM_THREADS="1")


def losses(folder: Path) -> dict:
    """The losses that the run in folder has logged, exact: {(step, name): loss}."""
    found = {}
    for entry in read_curve(folder / "out" / "metrics.jsonl"):
        for name in ("loss", "val_loss"):
            if name in entry:
                found[entry["step"], name] = entry[name].hex()
    return found


def last_saved(out: str) -> int:
    """The last step that a run has said to be saved; 0: none."""
    steps = [int(line.split()[1]) for line in out.splitlines() if "| saved " in line]
    return max(steps, default=0)


def newest_step(folder: Path) -> int:
    """The step of the checkpoint that a run would go on from; 0: there is none."""
    for name in ("ckpt.pt", "ckpt-previous.pt"):
        try:
            return load_checkpoint(folder / "out" / name)["step"]
        except InputError:
            pass
    return 0


# ---- Signals at random moments


def stop_at_random(folder: Path, options: list[str], count: int, signum: int, rng,
                   expected: dict) -> Tally:
    """Stop runs by a signal and let them go on, until count have been stopped and have ended."""
    tally = Tally()
    code = -signum if signum == signal.SIGKILL else 128 + signum
    folder = folder / signal.Signals(signum).name
    seconds = 2.0  # how long a run takes that is not stopped, as far as is known
    stops = 0
    while stops < count:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        saved = 0
        while newest_step(folder) < STEPS:
            begun = time.monotonic()
            script = start(folder, options)
            if signum == signal.SIGTERM:
                script.wait_for("\nstep ")  # earlier, it would end as any program does
            if stops < count:
                script.process.join(rng.uniform(0, seconds))
                if script.process.is_alive():
                    os.kill(script.process.pid, signum)
            result = script.wait()
            saved = max(saved, last_saved(result.stdout))
            tally.check(NOTHING_LOST, newest_step(folder) >= saved)
            if result.returncode == 0:  # it was faster than the signal
                seconds = max(1.0, time.monotonic() - begun)
                break
            stops += 1
            tally.check(f"exit code {code}", result.returncode == code)
            if result.returncode != code:
                return tally  # it can't go on
            if signum == signal.SIGTERM:
                last = max(step for step, _ in losses(folder))
                tally.check("the last step is saved", newest_step(folder) == last)
        tally.check(SAME_LOSSES, losses(folder) == expected)
    return tally


# ---- Trials: a run goes on from its checkpoints, meets with a fault, and goes on again


def half_way(folder: Path, options: list[str]) -> Path:
    """A folder with a run that has been killed, and has two checkpoints."""
    base = folder / "half-way"
    base.mkdir()
    script = start(base, options)
    script.wait_for(f"step {2 * EVAL_INTERVAL} | saved")
    script.process.kill()
    script.wait()
    return base


def go_on_after(folder: Path, base: Path, fault, exitcode: int, tally: Tally,
                expected: dict) -> str:
    """Let the run of a copy of base meet with what `fault` prepares, which ends it with exitcode,
    and then go on in peace. Returns what it said to stderr when it met with it."""
    trial = folder / "trial"
    shutil.rmtree(trial, ignore_errors=True)
    shutil.copytree(base, trial)
    result = start(trial, [], before=fault).wait()
    tally.check(f"exit code {exitcode}", result.returncode == exitcode)
    saved = max(newest_step(base), last_saved(result.stdout))
    tally.check(NOTHING_LOST, newest_step(trial) >= saved)
    if exitcode > 0:  # it had the time to clean up
        tally.check("no temporary file left", not list(trial.rglob("*.unfinished")))
    code = start(trial, []).wait().returncode
    tally.check(SAME_LOSSES, code == 0 and losses(trial) == expected)
    return result.stderr


class Steps:
    """In the process of a run: log each file-system step of its saves, and die by kill -9 at one of
    them, before or after it. A write also dies amid, with half of its bytes written."""
    def __init__(self, log: Path, at: int, moment: str):
        self.open = builtins.open
        self.log = log
        self.at = at  # the number of the step at which to die, from 0
        self.moment = moment
        self.count = 0

    def dying(self, name: str, function):
        """The function, as a step of that name."""
        def step(*args, **kwargs):
            moment = self.moment if self.count == self.at else None
            self.count += 1
            target = f" {Path(args[1]).name}" if name == "replace" else ""
            with self.open(self.log, "a") as file:
                file.write(f"{name}{target}\n")
            if moment == "before":
                os.kill(os.getpid(), signal.SIGKILL)
            if moment == "amid":
                args = (bytes(args[0])[:len(args[0]) // 2],)
            result = function(*args, **kwargs)
            if moment is not None:
                os.kill(os.getpid(), signal.SIGKILL)
            return result
        return step

    def create(self, path):
        """The file of a checkpoint, opened to be written."""
        file = io.FileIO(path, "w")
        return io.BufferedWriter(DyingFile(self, file))

    def install(self):
        create = self.dying("create", self.create)

        def open_file(path, *args, **kwargs):
            if str(path).endswith("ckpt.pt.unfinished"):
                return create(path)
            return self.open(path, *args, **kwargs)

        builtins.open = open_file
        os.fsync = self.dying("fsync", os.fsync)
        os.link = self.dying("link", os.link)
        os.replace = self.dying("replace", os.replace)


class DyingFile(io.RawIOBase):
    """A file each of whose writes is a step."""
    def __init__(self, steps: Steps, file: io.FileIO):
        self.file = file
        self.write = steps.dying("write", file.write)

    def writable(self):
        return True

    def close(self):
        self.file.close()
        super().close()


def arm(log: Path, at: int, moment: str):
    Steps(log, at, moment).install()


def steps_of_a_save(folder: Path, base: Path) -> list[str]:
    """The file-system steps of the first save, when the run of a copy of base goes on."""
    log = folder / "steps.txt"
    shutil.copytree(base, folder / "dry")
    start(folder / "dry", [], before=partial(arm, log, -1, "")).wait()
    names = log.read_text().splitlines()
    return names[:names.index("replace ckpt.pt") + 2]  # and the folder is synced


def die_while_saving(folder: Path, base: Path, most: int, rng, expected: dict) -> Tally:
    """kill -9 at the steps of a save, of the writes the first, the last and some between, at so
    many moments at most."""
    tally = Tally()
    names = steps_of_a_save(folder, base)
    writes = [i for i, name in enumerate(names) if name == "write"]
    last = ["fsync", "replace ckpt-previous.pt", "replace ckpt.pt", "fsync"]
    tally.check("written, synced, renamed, the folder synced",
                names[0] == "create" and names[-4:] == last)
    for i, name in enumerate(names):
        if name in ("replace ckpt-best.pt", "replace ckpt-stable.pt"):
            tally.check("so are the checkpoints that are kept",
                        names[i - 2:i + 2] == ["fsync", "link", name, "fsync"])
    chosen = {writes[0], writes[-1], *rng.sample(writes, min(8, len(writes)))}
    moments = []
    for i, name in enumerate(names):
        if name != "write":
            moments += [(i, "before"), (i, "after")]
        elif i in chosen:
            moments += [(i, "before"), (i, "amid"), (i, "after")]
    for at, moment in rng.sample(moments, min(most, len(moments))):
        fault = partial(arm, folder / "steps.txt", at, moment)
        go_on_after(folder, base, fault, -signal.SIGKILL, tally, expected)
    return tally


def limit_files(size: int):
    """In the process of a run: no file can grow beyond size bytes, as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def mount(folder: Path, *options: str) -> bool:
    """Mount a file system in memory at folder; with remount among the options, change it. Returns
    whether that is allowed here."""
    command = ["mount", "-t", "tmpfs", "-o", ",".join(options), "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def fill_the_disk(folder: Path, base: Path, is_mounted: bool, count: int, rng,
                  expected: dict) -> Tally:
    """Saves that find less room than they need: on a small file system, or, where none may be
    mounted, in files that must not grow."""
    tally = Tally()
    size = (base / "out" / "ckpt.pt").stat().st_size
    for _ in range(count):
        room = rng.randrange(20_000, size)
        if is_mounted:
            stderr = go_on_after_a_full_disk(folder, base, room, tally, expected)
        else:
            fault = partial(limit_files, room)
            stderr = go_on_after(folder, base, fault, 1, tally, expected)
        says_so = stderr.startswith("error: out/ckpt.pt can't be written, the last checkpoint is")
        tally.check("told in one line", says_so and len(stderr.splitlines()) == 1)
    return tally


def go_on_after_a_full_disk(folder: Path, base: Path, room: int, tally: Tally,
                            expected: dict) -> str:
    """As go_on_after, on a file system with so much room, and then with more."""
    trial = folder / "disk"
    trial.mkdir(exist_ok=True)
    mount(trial, "size=1g")
    try:
        shutil.copytree(base, trial, dirs_exist_ok=True)
        used = shutil.disk_usage(trial).used
        mount(trial, "remount", f"size={used + room}")
        result = start(trial, []).wait()
        tally.check("exit code 1", result.returncode == 1)
        saved = max(newest_step(base), last_saved(result.stdout))
        tally.check(NOTHING_LOST, newest_step(trial) >= saved)
        tally.check("no temporary file left", not list(trial.rglob("*.unfinished")))
        mount(trial, "remount", "size=1g")
        code = start(trial, []).wait().returncode
        tally.check(SAME_LOSSES, code == 0 and losses(trial) == expected)
    finally:
        subprocess.run(["umount", str(trial)], check=True)
    return result.stderr


# ---- Damage


def same(a, b) -> bool:
    """Equal to the last bit, whatever is nested in it."""
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[name], b[name]) for name in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def flip_bits(checkpoint: Path, count: int, rng) -> Tally:
    """Each flipped bit must be found by the checksums, or change nothing of what is loaded."""
    tally = Tally()
    good = load_checkpoint(checkpoint)
    data = bytearray(checkpoint.read_bytes())
    path = checkpoint.with_name("flipped.pt")
    for _ in range(count):
        at = rng.randrange(len(data))
        bit = 1 << rng.randrange(8)
        data[at] ^= bit
        path.write_bytes(data)
        data[at] ^= bit
        try:
            loaded = load_checkpoint(path)
        except InputError:
            tally.check("found by a checksum", True)
        else:
            tally.check("harmless", same(loaded, good))
    return tally


def main():
    o = cli.parse(Options, __doc__)
    rng = random.Random(o.seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        options = prepare_run(folder)
        straight = folder / "straight"
        straight.mkdir()
        result = start(straight, options).wait()
        if result.returncode != 0:
            sys.exit(result.stderr)
        expected = losses(straight)
        base = half_way(folder, options)
        checkpoint = straight / "out" / "ckpt.pt"
        (folder / "disk").mkdir()
        is_mounted = mount(folder / "disk", "size=1m")
        if is_mounted:
            subprocess.run(["umount", str(folder / "disk")], check=True)
        disks = "full disks" if is_mounted else "limited files, for no file system may be mounted"
        stop_by = partial(stop_at_random, folder, options, rng=rng, expected=expected)
        trials = {"folder": folder, "base": base, "rng": rng, "expected": expected}
        campaigns = {
            "kill -9 at random moments": partial(stop_by, o.kills, signal.SIGKILL),
            "kill -9 while saving": partial(die_while_saving, most=o.moments, **trials),
            "SIGTERM at random moments": partial(stop_by, o.terms, signal.SIGTERM),
            disks: partial(fill_the_disk, is_mounted=is_mounted, count=o.disks, **trials),
            "flipped bits": partial(flip_bits, checkpoint, o.flips, rng),
        }
        all_held = run_campaigns(campaigns)
    sys.exit(0 if all_held else 1)


if __name__ == "__main__":
    main()
