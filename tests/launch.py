"""Start a script of this repository in a process of its own, without waiting for torch to be
imported again.

The processes are forked from one that has imported what the scripts do, and run the script as
`python` does: as `__main__`, with its own arguments, folder, output and signals. The tests and
tests/stress start many.
"""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import threading
import time
from multiprocessing import forkserver
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
IMPORTED = ["train", "sample", "lib.gguf_format", "tools.convert", "tests.launch",
            "torch._dynamo", "torch._inductor.compile_fx", "matplotlib.backends.backend_agg"]
context = multiprocessing.get_context("forkserver")


def start_server():
    """Start what the scripts are forked from. It finds modules by PYTHONPATH alone (until Python
    3.13)."""
    context.set_forkserver_preload(IMPORTED)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(ROOT)
    forkserver.ensure_running()
    del os.environ["PYTHONPATH"]
    if before is not None:
        os.environ["PYTHONPATH"] = before


class Script:
    """A running script. `out` and `err` are what it has printed so far, `process` is its process.

    `before` is called in the process, before the script. It must be picklable, as a function of a
    module or a functools.partial of one is.
    """
    def __init__(self, cwd, script: str, *options: str, before=None, **environment: str):
        self.folder = tempfile.TemporaryDirectory(prefix="script-")
        self.options = options
        self.paths = [Path(self.folder.name, name) for name in ("out", "err")]
        for path in self.paths:
            path.touch()
        start_server()
        paths = [str(path) for path in self.paths]
        arguments = (str(cwd), script, options, paths, before, environment)
        self.process = context.Process(target=_run, args=arguments)
        self.process.start()

    @property
    def out(self) -> str:
        return self.paths[0].read_text(errors="replace")

    @property
    def err(self) -> str:
        return self.paths[1].read_text(errors="replace")

    def wait_for(self, text: str, seconds: float = 120):
        """Until it has printed text. RuntimeError if it ends, or takes longer, without."""
        deadline = time.monotonic() + seconds
        while True:
            ends_now = not self.process.is_alive() or time.monotonic() > deadline
            if text in self.out or text in self.err:
                return
            if ends_now:
                raise RuntimeError(f"{text!r} did not come: {self.out}{self.err}")
            time.sleep(0.01)

    def wait(self, seconds: float = 300) -> subprocess.CompletedProcess:
        """Until it ends. TimeoutExpired, and its end, if it takes longer."""
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.options, seconds, self.out, self.err)
        code = self.process.exitcode
        result = subprocess.CompletedProcess(self.options, code, self.out, self.err)
        self.folder.cleanup()
        return result


def open_stdin():
    """Let sys.stdin read descriptor 0 as when Python starts: it leaves \\r as it is."""
    sys.stdin = open(0, closefd=False, newline="\n")  # noqa: SIM115 (for the process's life)


def _run(cwd: str, script: str, options, paths: list[str], before, environment: dict):
    for number, path in enumerate((os.devnull, *paths)):
        os.dup2(os.open(path, os.O_RDWR), number)
    open_stdin()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    # tqdm's own lock is a semaphore of the system's, which a kill leaves behind
    tqdm.set_lock(threading.RLock())
    os.chdir(cwd)
    os.environ.update(environment)
    atexit._clear()  # what is there is the forkserver's
    if "OMP_NUM_THREADS" in environment:  # torch has read it when it was imported, before the fork
        torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    sys.argv = [script, *options]
    sys.path.insert(0, str((ROOT / script).parent))
    code = 1
    try:
        if before:
            before()
        runpy.run_path(str(ROOT / script), run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
