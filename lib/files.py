"""Files that are whole or not there, and locks that one process has at a time."""

import atexit
import errno
import os
import shutil
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path

from filelock import FileLock, SoftFileLease, Timeout

from smollm import InputError

CLAIM_SECONDS = 30  # for which a claim holds that its process does not renew


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
        sync_folder(path.parent)
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


def sync_folder(path: Path):
    """Return when the names in a folder have reached the disk: without it, a power cut may undo
    what was renamed there. Windows has no such call."""
    if os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def keep_copy(path: Path, copy: Path):
    """Let `copy` be what path is now, whatever will be written at path: a second name of the same
    file, where the file system has these."""
    temporary = copy.with_name(f"{copy.name}.unfinished")
    remove(temporary)
    try:
        os.link(path, temporary)
    except OSError:
        shutil.copyfile(path, temporary)
        sync(temporary)
    os.replace(temporary, copy)
    sync_folder(copy.parent)


def remove(path: Path):
    """Remove a file or folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def lock(path: Path, if_taken: str, wait: bool = False) -> ExitStack:
    """Take the lock at path. It is held until the end of a `with` on what is returned, or of the
    process, however it dies. While another process holds it: with wait, if_taken is printed, and
    it is waited for; without, if_taken is an InputError.

    There are file systems, such as Lustre and GPFS, on which a lock of the system's may be had by
    all at once. So there is a claim beside it: a file that names host and process, which can be
    created once, and which its process renews. It ends with a process that is known to be dead, or
    has not renewed it for CLAIM_SECONDS.
    """
    stack = ExitStack()
    atexit.register(stack.close)
    claim = SoftFileLease(f"{path}.claim", lease_duration=CLAIM_SECONDS)
    try:
        if not acquire(FileLock(path), stack, 1 if wait else 0):
            if not wait:
                raise InputError(if_taken)
            print(if_taken, file=sys.stderr)
            acquire(FileLock(path), stack)
        if not acquire(claim, stack, 0):
            print(f"{if_taken}: {path}.claim says so, which ends {CLAIM_SECONDS} s after the last "
                  "sign of life", file=sys.stderr)
            if not acquire(claim, stack, None if wait else 1.5 * CLAIM_SECONDS):
                raise InputError(if_taken)
    except BaseException:
        stack.close()
        raise
    return stack


def acquire(file_lock, stack: ExitStack, seconds: float | None = None) -> bool:
    """Whether the lock could be had in so many seconds, or, with None, however long it takes. The
    stack lets go of it."""
    try:
        stack.enter_context(file_lock.acquire(timeout=-1 if seconds is None else seconds))
        return True
    except Timeout:
        return False
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP):
            raise
        raise InputError(f"{file_lock.lock_file} can't be locked, which keeps other processes from "
                         f"writing there ({error.strerror}): choose a folder on another file "
                         "system") from error
