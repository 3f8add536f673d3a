"""Files that are whole or not there, and locks that one process has at a time."""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from smollm import InputError


@contextmanager
def write_whole(path: Path, keep_as: Path | None = None):
    """Yields a temporary path, at which to write the file or folder that will be `path`.

    When that is done it is synced to the disk and renamed. So whatever dies, and whenever, path is
    whole, or as it was. With keep_as, what was at path gets that name just before.
    """
    temporary = path.with_name(f"{path.name}.unfinished")
    remove(temporary)  # of a process that was killed
    try:
        yield temporary
        sync(temporary)
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    finally:
        remove(temporary)


def sync(path: Path):
    """Return when a file, or each file in a folder, has reached the disk."""
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.is_file()]
    for file in files:
        descriptor = os.open(file, os.O_RDWR)
        os.fsync(descriptor)
        os.close(descriptor)


def remove(path: Path):
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(path: Path, if_taken: str, wait: bool = False):
    """Take the lock at path. It is held until .lock.release(), the end of a `with` on what is
    returned, or the end of the process, however it dies. While another process holds it: with wait,
    if_taken is printed, and it is waited for; without, if_taken is an InputError."""
    file_lock = FileLock(path)
    try:
        return file_lock.acquire(timeout=1 if wait else 0)
    except Timeout:
        if not wait:
            raise InputError(if_taken) from None
    print(if_taken, file=sys.stderr)
    return file_lock.acquire()
