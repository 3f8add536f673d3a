"""A run's folder, which has one run at a time, and its checkpoints, which no accident can lose.

ckpt.pt is the newest, and ckpt-previous.pt the one before it, kept in case the newest is damaged.
"""

import os
import tempfile
from pathlib import Path

import torch
from filelock import FileLock, Timeout

from smollm import InputError, load_checkpoint


def previous_of(path: Path) -> Path:
    return path.with_name("ckpt-previous.pt")


def lock_folder(folder: Path) -> FileLock:
    """Make the folder this process's own, for as long as the result lives. InputError: another has it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")  # the system lets go of it when the process dies
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise InputError(f"{folder} is in use by another run: wait until it has ended, or choose another "
                         "--out_dir") from None
    tempfile.TemporaryFile(dir=folder).close()  # a folder that is read-only fails now, not later
    return lock


def save_checkpoint(path: Path, checkpoint: dict, keep: bool):
    """Write beside path, sync, rename: whatever dies, and whenever, path or the one before it is whole. With
    keep, what was at path becomes the one before it; without, both are gone once the new one is there."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, previous_of(path))
        os.replace(temporary, path)
        if not keep:
            previous_of(path).unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a full disk
        reason = error.__context__ if isinstance(error.__context__, OSError) else error
        raise InputError(f"{path} can't be written, the last checkpoint is as it was: {reason}") from error
    finally:
        temporary.unlink(missing_ok=True)


def use_newest_whole(path: Path):
    """If the checkpoint at path is gone or damaged, by its checksums, put the one before it in its place."""
    try:
        load_checkpoint(path)
    except InputError as error:
        if not previous_of(path).exists():
            raise
        print(f"{error}; going on from the one before it")
        load_checkpoint(previous_of(path))
        if path.exists():
            os.replace(path, path.with_name("ckpt-damaged.pt"))
        os.replace(previous_of(path), path)
