"""A training run's folder: what makes a run safe to stop, at any moment and by any accident.

    ckpt.pt            the newest checkpoint, whole or not there
    ckpt-previous.pt   the one before it, used when checksums say that the newest is damaged
    ckpt-best.pt       that of the lowest validation loss
    ckpt-stable.pt     that at which the learning rate begins to decay, to train longer from
    metrics.jsonl      a line for each line of the log
    loss.png           the same as a picture
    .lock              held by the one run that may write here
"""

import errno
import json
import math
import os
import signal
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from tqdm import tqdm

from lib.cli import reading
from lib.files import keep_copy, lock, sync, write_whole
from lib.plot import plot
from smollm import InputError, read_checkpoint

# Options that may change when a run resumes; all others would change what is trained
RESUMABLE = {"out_dir", "overwrite", "init_from", "max_iters", "decay_iters", "eval_interval",
             "eval_iters", "log_interval", "sample_prompt", "device", "dtype", "compile"}
# What a checkpoint of a run has beside the model, its config and the tokenizer
STATE = {"options", "step", "data", "curve", "optimizers", "scaler", "rng"}


def load_checkpoint(path: Path, check: bool = True) -> dict:
    """The contents of a ckpt.pt, checked by its checksums. InputError says what is wrong."""
    with reading(path):
        if check:
            with zipfile.ZipFile(path) as archive:
                # tensors that are compressed can't be mapped, and may be larger than the memory
                if any(entry.compress_type != zipfile.ZIP_STORED for entry in archive.infolist()):
                    raise ValueError("it is compressed: save it anew with torch.save")
                damaged = archive.testzip()
            if damaged:
                raise ValueError(f"its checksums don't fit: {damaged} is damaged")
        return read_checkpoint(path)


class Run:
    """The folder of a run. Where writes is false nothing is written: on ranks but the first, and
    for a run that keeps nothing."""
    def __init__(self, folder: Path, writes: bool):
        self.folder = folder
        self.writes = writes
        self.path = folder / "ckpt.pt"
        self.previous_path = folder / "ckpt-previous.pt"
        self.damaged_path = folder / "ckpt-damaged.pt"
        self.best_path = folder / "ckpt-best.pt"
        self.stable_path = folder / "ckpt-stable.pt"
        self.resume_path = self.path  # what the run goes on from, if it does
        self.curve = []  # the entries of metrics.jsonl
        self.path_is_ours = False  # whether what is at path is of this run

    # ---- Before the run

    def claim(self, is_resumed: bool = False):
        """Make the folder, and lock it for as long as this process lives. InputError if a run is to
        go on there, and there is none."""
        if not self.writes:
            return
        if is_resumed and not self.folder.is_dir():
            raise InputError(f"{self.path}: can't be read: there is no folder {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = lock(self.folder / ".lock", f"{self.folder} is in use by another run: wait "
                         "until it has ended, or choose another --out_dir")
        tempfile.TemporaryFile(dir=self.folder).close()  # a read-only folder fails now, not later

    def check_unused(self):
        """InputError if the folder has a checkpoint."""
        checkpoints = (self.path, self.previous_path, self.best_path, self.stable_path)
        if self.writes and any(path.exists() for path in checkpoints):
            raise InputError(f"{self.folder} has a checkpoint: go on from it with "
                             "--init_from=resume, choose another --out_dir, or start over with "
                             "--overwrite=True")

    def use_newest_whole(self):
        """If ckpt.pt is gone or damaged, put the checkpoint before it in its place."""
        if not self.writes:
            return
        try:
            load_checkpoint(self.path)
        except InputError as error:
            if not self.previous_path.exists():
                raise
            print(f"{error}; going on from the one before it")
            load_checkpoint(self.previous_path)
            if self.path.exists():
                os.replace(self.path, self.damaged_path)
            os.replace(self.previous_path, self.path)

    def use_stable(self):
        """Go on from the checkpoint at which the learning rate began to decay."""
        self.resume_path = self.stable_path
        if not self.stable_path.exists():
            raise InputError(f"{self.stable_path} does not exist: a run keeps it from the step on "
                             "at which its learning rate begins to decay, under --schedule=wsd")
        if self.writes:
            load_checkpoint(self.stable_path)

    def load(self, option_names: set[str]) -> dict:
        """The checkpoint, with all that a run needs to go on as if it had not stopped."""
        checkpoint = load_checkpoint(self.resume_path, check=False)  # that was done already
        if not set(checkpoint) >= STATE or set(checkpoint["options"]) != option_names:
            raise InputError(f"{self.resume_path} has weights, but not all the state of a run of "
                             "this train.py: use another --out_dir and "
                             f"--init_from={self.resume_path}")
        self.curve = checkpoint["curve"]
        self.path_is_ours = True
        return checkpoint

    def check_options(self, saved, now, step: int):
        """Print which options have changed since the checkpoint. InputError if one of them may
        not, or if the run is over."""
        for name, before in vars(saved).items():
            value = getattr(now, name)
            if value == before:
                continue
            if name not in RESUMABLE:
                raise InputError(f"{name} is {before} in {self.resume_path} and can't change: "
                                 "leave it out, or start anew in another --out_dir")
            print(f"{name}: {before} -> {value}")
        if step >= now.max_iters:
            raise InputError(f"{self.resume_path} is at step {step} of {now.max_iters}: raise "
                             "max_iters")

    def check_data(self, saved: list[dict], now: list[dict], dataset: str):
        """InputError if the windows of data, as far as both have them, are not what they were."""
        for before, after in zip(saved, now, strict=False):
            if before != after:
                raise InputError(f"dataset {dataset!r} is not what it was when {self.resume_path} "
                                 "was saved: bring that back, or start anew with "
                                 f"--init_from={self.resume_path} in another --out_dir")

    # ---- While it goes on

    def begin(self):
        """Let ckpt.pt be what the run goes on from, and metrics.jsonl end there, too."""
        if not self.writes:
            return
        if self.resume_path != self.path:
            self.keep_newest()
            keep_copy(self.resume_path, self.path)
        lines = [json.dumps(entry) + "\n" for entry in self.curve]
        (self.folder / "metrics.jsonl").write_text("".join(lines))

    def keep_newest(self):
        """Give ckpt.pt another name, with its step, unless that is where the run goes on."""
        if not self.path.exists():
            return
        try:
            step = load_checkpoint(self.path)["step"]
        except InputError:
            name = "ckpt-damaged"
        else:
            if step == load_checkpoint(self.resume_path, check=False)["step"]:
                return
            name = f"ckpt-{step}"
        copy = self.folder / f"{name}.pt"
        number = 1
        while copy.exists():
            number += 1
            copy = self.folder / f"{name}-{number}.pt"
        keep_copy(self.path, copy)

    def log(self, **entry):
        """A line of metrics.jsonl: step, tokens, and what is known of them. JSON has no NaN."""
        entry = {name: value for name, value in entry.items() if math.isfinite(value)}
        self.curve.append(entry)
        if self.writes:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")

    def was_evaluated_at(self, step: int) -> bool:
        """Whether that is the last thing that the run did, before it was resumed."""
        return bool(self.curve) and "val_loss" in self.curve[-1] and self.curve[-1]["step"] == step

    def val_losses(self) -> dict[int, float]:
        """By step."""
        return {entry["step"]: entry["val_loss"] for entry in self.curve if "val_loss" in entry}

    def best_val_loss(self) -> float:
        return min(self.val_losses().values())

    def save(self, checkpoint: dict, is_stable: bool = False):
        """Make this the newest checkpoint; also the best one, if it is, and the stable one, if
        is_stable says so. The one before it is kept; those of another run, which this one
        overwrites, are gone once this one is there."""
        keep_as = self.previous_path if self.path_is_ours else None
        copies = []  # which are there before it is, so that a kill between leaves none out
        val_losses = self.val_losses()
        step = checkpoint["step"]
        if step in val_losses and val_losses[step] == self.best_val_loss():
            copies.append(self.best_path)
        if is_stable:
            copies.append(self.stable_path)
        try:
            with write_whole(self.path, keep_as) as temporary:
                with open(temporary, "wb") as file:
                    torch.save(checkpoint, file)
                if copies:
                    sync(temporary)
                for copy in copies:
                    keep_copy(temporary, copy)
        except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
            reason = error
            if isinstance(error.__context__, OSError):
                reason = error.__context__
            raise InputError(f"{self.path} can't be written, the last checkpoint is as it was: "
                             f"{reason}") from error
        if not self.path_is_ours:
            for path in {self.previous_path, self.best_path, self.stable_path} - set(copies):
                path.unlink(missing_ok=True)
        self.path_is_ours = True
        plot({str(self.folder): self.curve}, self.folder / "loss.png")


def say(text: str, file=None):
    """A line of the log, above the progress bar. When Ctrl-C ends the `tee` of `| tee log.txt`,
    too, or the terminal is gone, the line is lost, but not the run."""
    file = file or sys.stdout
    try:
        tqdm.write(text, file)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


class StopSignals:
    """Ctrl-C, SIGTERM and SIGHUP (the terminal was closed), which end a run after the step in
    progress. A second one ends it at once, but not under torchrun, which passes on what the
    terminal has sent to all. Under nohup SIGHUP stays ignored."""
    def __init__(self, is_alone: bool, speaks: bool):
        self.is_alone = is_alone
        self.speaks = speaks
        self.received = 0  # the signal's number; 0: none
        numbers = [signal.SIGINT, signal.SIGTERM]
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)  # which Windows has not
        for number in numbers:
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.received = number
        if self.is_alone:
            signal.signal(number, signal.SIG_DFL)
        if self.speaks:
            say("finishing this step, then saving", sys.stderr)
