"""The folder of a run: its lock, its checkpoints, signals, and what it says in figures."""

import errno
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from fcntl import ioctl
from pathlib import Path
from stat import S_ISDIR
from termios import TIOCSCTTY

import matplotlib.image
import pytest
import torch

from lib.plot import plot, read_curve
from lib.run import Run, load_checkpoint
from smollm import InputError
from test_smollm import make
from tests.helpers import (
    ROOT,
    SMALL,
    STEADY,
    TINY_1000,
    contents,
    differences,
    full_disk,
    losses_of,
    outcome,
    prepare,
    run,
    write_model,
)
from tests.launch import Script


@pytest.fixture
def writer(tmp_path) -> Run:
    """A run in an empty folder, which has logged a step."""
    run = Run(tmp_path / "out", writes=True)
    run.claim()
    run.log(step=1, tokens=128, loss=2.0, lr=1e-3)
    return run


def checkpoints(folder: Path) -> dict[str, dict]:
    """The contents of all that look like one."""
    found = {}
    for path in folder.iterdir():
        if path.name.startswith("ckpt"):
            found[path.name] = torch.load(path, weights_only=True)
    return found


# ---- Checkpoints


def test_a_failed_save_leaves_the_old_checkpoints_and_nothing_else(writer):
    for step in (1, 2):
        writer.save({"step": step})
    before = contents(writer.folder)
    with pytest.raises(Exception, match="pickle"):
        writer.save({"step": 3, "no pickle": lambda: None})
    failing = pytest.raises(Exception, match=r"ckpt\.pt can't be written, the last .* File too")
    with failing, full_disk():
        writer.save({"step": 3, "weights": torch.zeros(10**6)})
    assert contents(writer.folder) == before
    assert checkpoints(writer.folder) == {"ckpt.pt": {"step": 2}, "ckpt-previous.pt": {"step": 1}}


def test_a_run_that_starts_over_leaves_no_checkpoint_of_the_other(writer):
    for step in (1, 2):
        writer.save({"step": step})
    other = Run(writer.folder, writes=True)
    other.log(step=1, tokens=128, loss=2.0, lr=1e-3)
    other.save({"step": 7})
    assert checkpoints(writer.folder) == {"ckpt.pt": {"step": 7}}
    other.save({"step": 8})
    assert checkpoints(writer.folder) == {"ckpt.pt": {"step": 8}, "ckpt-previous.pt": {"step": 7}}


class Syncs:
    """Watches os.fsync and os.replace, and knows of each file that gets its name by os.replace
    whether all that was written to it had been synced; and of each folder, whether it was synced
    after its last os.replace."""
    def __init__(self, monkeypatch):
        self.unsynced_folders = set()  # where a file got a name since
        self.synced = {}  # what a file had in it when it was synced, by its number
        self.unsynced = {}  # the files that had more in them, or other, by the name that they got
        fsync = os.fsync
        rename = os.replace

        def watched_fsync(descriptor):
            fsync(descriptor)
            stat = os.fstat(descriptor)
            if S_ISDIR(stat.st_mode):
                self.unsynced_folders.discard(stat.st_ino)
                return
            self.synced[stat.st_ino] = os.pread(descriptor, stat.st_size, 0)

        def watched_replace(source, target):
            self.unsynced[Path(target).name] = self.not_synced(Path(source), Path(target))
            rename(source, target)
            self.unsynced_folders.add(Path(target).parent.stat().st_ino)

        monkeypatch.setattr(os, "fsync", watched_fsync)
        monkeypatch.setattr(os, "replace", watched_replace)

    def not_synced(self, source: Path, target: Path) -> list[Path]:
        files = [source]
        if source.is_dir():
            files = [path for path in source.rglob("*") if path.is_file()]
        if target.name == "meta.json":  # it tells of tokens that must be there
            files += [target.with_name("train.bin"), target.with_name("val.bin")]
        assert files
        return [path for path in files
                if self.synced.get(path.stat().st_ino) != path.read_bytes()]


@pytest.fixture
def syncs(monkeypatch) -> Syncs:
    return Syncs(monkeypatch)


def test_checkpoint_and_picture_are_synced_before_they_get_their_names(writer, syncs):
    for step in (1, 2):
        writer.save({"step": step, "weights": torch.ones(1000)})
    assert syncs.unsynced == {"ckpt.pt": [], "ckpt-previous.pt": [], "loss.png": []}
    assert syncs.unsynced_folders == set()


@pytest.mark.parametrize("has_links", [True, False], ids=["links", "copies"])
def test_the_best_and_the_stable_checkpoint_are_synced_before_they_get_their_names(
        has_links, writer, syncs, monkeypatch):
    """They are other names of ckpt.pt, or, on a file system without these, copies."""
    if not has_links:
        monkeypatch.setattr(os, "link", no_links)
    writer.log(step=1, tokens=128, val_loss=2.0)
    writer.save({"step": 1, "weights": torch.ones(1000)}, is_stable=True)
    assert syncs.unsynced == {"ckpt.pt": [], "ckpt-best.pt": [], "ckpt-stable.pt": [],
                              "loss.png": []}
    assert syncs.unsynced_folders == set()
    numbers = {path.stat().st_ino for path in writer.folder.glob("*.pt")}
    assert len(numbers) == (1 if has_links else 3)


def no_links(source, target):
    raise OSError(errno.EPERM, "Operation not permitted")


def test_tokens_and_tokenizer_are_synced_before_they_are_told_of(
        corpus, here, syncs, monkeypatch):
    monkeypatch.setattr("lib.data.WINDOW", 50_000)
    folder = prepare(corpus, None, num_windows=3, vocab_size=400).folder
    [tokenizer] = here.glob("data/*.json")
    assert syncs.unsynced == {tokenizer.name: [], "meta.json": [], "digests": []}
    assert syncs.unsynced_folders == set()
    assert (folder / "train.bin").stat().st_size > 2 * 3 * 50_000


@pytest.mark.parametrize("name", ["model.pt", "model.gguf", "model"])
def test_a_converted_model_is_synced_before_it_gets_its_name(
        name, tokenizer, tmp_path, syncs):
    write_model(tmp_path / name, make(TINY_1000), tokenizer,
                {"chat_template.jinja": "{{ messages }}"})
    assert syncs.unsynced == {name: []}
    assert syncs.unsynced_folders == set()


def test_a_picture_is_synced_before_it_gets_its_name(tmp_path, syncs):
    plot({"a": [{"tokens": 1, "loss": 2.0}]}, tmp_path / "a.svg")
    assert syncs.unsynced == {"a.svg": []}
    assert syncs.unsynced_folders == set()


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(steady, tmp_path):
    shutil.copytree(steady / "straight", tmp_path, dirs_exist_ok=True)
    out = tmp_path / "out"
    path = out / "ckpt.pt"
    previous = (out / "ckpt-previous.pt").read_bytes()
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    sampled = run(tmp_path, "sample.py", "--device=cpu")
    assert sampled.returncode == 1
    assert "checksums" in sampled.stderr
    resumed = run(tmp_path, "train.py", "--init_from=resume")
    assert resumed.returncode == 0, resumed.stderr
    assert "out/ckpt.pt: can't be read: its checksums don't fit" in resumed.stdout
    assert "going on from the one before it" in resumed.stdout
    assert (out / "ckpt-damaged.pt").read_bytes() == data
    assert (out / "ckpt-previous.pt").read_bytes() == previous
    assert differences(outcome(tmp_path), outcome(steady / "straight")) == []


def test_two_damaged_checkpoints_are_refused_and_kept(steady, tmp_path):
    shutil.copytree(steady / "straight", tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / "ckpt.pt"
    data = path.read_bytes()[:-1000]
    for damaged in (path, path.with_name("ckpt-previous.pt")):
        damaged.write_bytes(data)
    refused = run(tmp_path, "train.py", "--init_from=resume")
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: out/ckpt-previous.pt: can't be read")
    assert path.read_bytes() == data


def test_a_run_that_diverges_stops_and_keeps_the_checkpoint(ckpt, corpus, tmp_path):
    (tmp_path / "out").mkdir()
    shutil.copy(ckpt, tmp_path / "out")
    result = run(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--overwrite=True",
                 "--max_iters=1000", "--eval_interval=1000", "--learning_rate=1e18",
                 "--warmup_iters=0", "--grad_clip=0")
    assert result.returncode == 1
    assert "lower the learning_rate" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert (tmp_path / "out" / "ckpt.pt").read_bytes() == ckpt.read_bytes()
    assert set(os.listdir(tmp_path / "out")) == {".lock", "ckpt.pt", "metrics.jsonl"}


def test_weights_that_are_ruined_never_replace_a_checkpoint(tokenizer, trained, corpus, tmp_path):
    """The gradient is finite, but what weight decay makes of large weights is not."""
    shutil.copytree(trained / "out", tmp_path / "out")
    before = contents(tmp_path / "out")
    model = make(TINY_1000)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight *= 10_000
    write_model(tmp_path / "large.pt", model, tokenizer)
    result = run(tmp_path, "train.py", *STEADY, f"--dataset={corpus}", "--overwrite=True",
                 "--max_iters=1", "--warmup_iters=0", "--dtype=float32",
                 f"--init_from={tmp_path / 'large.pt'}", "--learning_rate=9e18",
                 "--weight_decay=9e18")
    assert result.returncode == 1
    last = result.stderr.splitlines()[-1]
    assert last.startswith("error: after step 1 not all weights are finite")
    after = contents(tmp_path / "out")
    for path in before:
        if path.suffix == ".pt":
            assert after[path] == before[path], path


def test_checkpoints_that_lack_state_are_refused_with_the_way_out(steady, tmp_path):
    """Such as those of a train.py that had other options."""
    shutil.copytree(steady / "out", tmp_path / "out")
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["options"]["beta2"]
    torch.save(checkpoint, path)
    refused = run(tmp_path, "train.py", "--init_from=resume")
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: out/ckpt.pt has weights, but not all the state of a run of this train.py: use "
        "another --out_dir and --init_from=out/ckpt.pt\n")


# ---- Signals, and the others


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_sigterm_finish_the_step_and_save(signum, trained, corpus, tmp_path):
    whole = losses_of((trained / "log.txt").read_text())
    script = Script(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--eval_interval=1000")
    script.wait_for("step 3 |")
    os.kill(script.process.pid, signum)
    result = script.wait()
    assert result.returncode == 128 + signum, result.stderr
    assert "Traceback" not in result.stderr
    done = losses_of(result.stdout)
    assert max(done) < 12
    assert done == {step: whole[step] for step in done}
    assert f"step {max(done)} | saved" in result.stdout
    resumed = run(tmp_path, "train.py", "--init_from=resume")
    assert resumed.returncode == 0, resumed.stderr
    assert done | losses_of(resumed.stdout) == whole


def test_a_run_whose_terminal_is_closed_finishes_the_step_and_saves(trained, corpus, tmp_path):
    """As when a window is closed, or a connection breaks: SIGHUP, and nothing can be printed."""
    whole = losses_of((trained / "log.txt").read_text())
    master, terminal = pty.openpty()
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--dataset={corpus}",
               "--eval_interval=1000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdin=terminal, stdout=terminal,
                               stderr=terminal, start_new_session=True,
                               preexec_fn=lambda: ioctl(0, TIOCSCTTY, 0))
    os.close(terminal)
    printed = b""
    while b"step 3 |" not in printed:
        printed += os.read(master, 4096)
    os.close(master)
    assert process.wait(60) == 128 + signal.SIGHUP
    checkpoint = load_checkpoint(tmp_path / "out" / "ckpt.pt")
    assert 3 <= checkpoint["step"] < 12
    losses = [entry["loss"] for entry in checkpoint["curve"] if "loss" in entry]
    expected = [float(loss.removeprefix("loss ")) for loss in whole.values()]
    assert losses == pytest.approx(expected[:checkpoint["step"]], abs=1e-4)


def under_nohup():
    """In a process: as that command starts it."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)


def test_a_run_under_nohup_outlives_its_terminal(corpus, tmp_path):
    script = Script(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--max_iters=6",
                    before=under_nohup)
    script.wait_for("step 3 |")
    os.kill(script.process.pid, signal.SIGHUP)
    result = script.wait()
    assert result.returncode == 0, result.stderr
    assert max(losses_of(result.stdout)) == 6


def test_a_second_signal_leaves_at_once(corpus, tmp_path):
    script = Script(tmp_path, "train.py", *SMALL, f"--dataset={corpus}",
                    "--gradient_accumulation_steps=1000")
    script.wait_for("def __init__(")  # it has evaluated, and begins a step of many seconds
    time.sleep(1)
    os.kill(script.process.pid, signal.SIGINT)
    script.wait_for("finishing this step")
    os.kill(script.process.pid, signal.SIGINT)
    result = script.wait()
    assert result.returncode == -signal.SIGINT
    assert losses_of(result.stdout) == {}


def test_a_run_outlives_the_reader_of_its_log(corpus, tmp_path):
    """Ctrl-C ends both programs of `python train.py | tee log.txt`."""
    command = [sys.executable, ROOT / "train.py", *SMALL, f"--dataset={corpus}",
               "--max_iters=1000"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    line = b""
    while b"step 3 |" not in line:
        line = process.stdout.readline()
        assert line
    process.stdout.close()
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] >= 3


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_goes_on(
        tiny, corpus, tmp_path):
    options = (*STEADY, "--dtype=float32", f"--dataset={corpus}", f"--init_from={tiny}")
    first = Script(tmp_path, "train.py", *options, "--max_iters=100000")
    first.wait_for("\nstep 2 |")
    second = run(tmp_path, "train.py", *options, "--overwrite=True", "--max_iters=4")
    assert second.returncode == 1
    assert second.stderr.startswith("error: out is in use by another run")
    first.process.kill()
    first.wait()
    third = run(tmp_path, "train.py", *options, "--overwrite=True", "--max_iters=4")
    assert third.returncode == 0, third.stderr  # the lock died with the first


# ---- Figures


def test_metrics_and_picture_tell_the_run(steady):
    out = steady / "straight" / "out"
    curve = read_curve(out / "metrics.jsonl")
    logged = [entry for entry in curve if "val_loss" not in entry]
    evaluated = [entry for entry in curve if "val_loss" in entry]
    assert [entry["step"] for entry in logged] == list(range(1, 21))
    assert [entry["step"] for entry in evaluated] == [0, 10, 20]
    for entry in logged:
        assert entry["tokens"] == entry["step"] * 4 * 32
        assert {"loss", "lr", "tok_per_s", "mfu"} < set(entry)
    for entry in evaluated:
        assert entry["perplexity"] == pytest.approx(math.exp(entry["val_loss"]))
        assert 0 < entry["bits_per_byte"] < entry["val_loss"] / math.log(2)
    picture = matplotlib.image.imread(out / "loss.png")
    assert picture.shape == (600, 960, 4)
    first_colour = (picture[..., :3] * 255).round() == (31, 119, 180)
    for part in (first_colour[:400], first_colour[400:]):  # the losses, the learning rate
        assert part.all(-1).sum() > 200


def test_curves_of_several_runs_are_laid_over_each_other(steady, tmp_path):
    for name in ("a", "b"):
        shutil.copy(steady / "straight" / "out" / "metrics.jsonl", tmp_path / f"{name}.jsonl")
    result = run(tmp_path, "tools/plot.py", "a.jsonl", "b.jsonl", "--picture=both.png")
    assert result.returncode == 0, result.stderr
    picture = matplotlib.image.imread(tmp_path / "both.png")
    second_colour = (picture[..., :3] * 255).round() == (255, 127, 14)
    assert second_colour.all(-1).sum() > 200


LINE = '{"step": 2, "tokens": 4, "loss": 2.5}\n'
REFUSED = {  # what is no metrics.jsonl, and where
    "no tokens": (LINE + '{"step": 1}\n', "line 2"),
    "cut amid the file": (LINE + '{"st\n' + LINE, "line 2"),
    "NaN": ('\n{"tokens": 1, "loss": NaN}\n', "line 2"),
    "a string": ('{"tokens": "1"}\n', "line 1"),
    "an array": ("[1]\n", "line 1"),
    "not UTF-8": (LINE + "\udcff\n", "line 2"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_no_metrics_jsonl_is_refused_by_line(what, tmp_path):
    text, place = REFUSED[what]
    (tmp_path / "a.jsonl").write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(InputError, match=f"a.jsonl, {place}: it is no line of"):
        read_curve(tmp_path / "a.jsonl")


def test_blank_lines_and_a_cut_last_one_are_left_out_of_a_curve(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text(LINE + "\n \n" + LINE + '{"step": 3, "tok')
    assert read_curve(tmp_path / "a.jsonl") == [json.loads(LINE)] * 2
    assert capsys.readouterr().err.endswith("a.jsonl, line 5: it is cut, and left out\n")


@pytest.mark.parametrize("arguments", [[], ["empty.jsonl"]], ids=["no file", "an empty one"])
def test_a_picture_of_nothing_is_refused(arguments, tmp_path):
    (tmp_path / "loss.png").write_bytes(b"of before")
    (tmp_path / "empty.jsonl").write_text("\n")
    refused = run(tmp_path, "tools/plot.py", *arguments)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: ")
    assert "to draw" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    assert (tmp_path / "loss.png").read_bytes() == b"of before"


def test_dollars_in_the_name_of_a_run_are_drawn_as_they_are(tmp_path):
    curve = [json.loads(LINE)]
    plot({"a$b$": curve, "x$\\frac$": curve}, tmp_path / "a.svg")  # as a formula, no frac is whole
    picture = (tmp_path / "a.svg").read_text()
    for name in ("training, a$b$", "training, x$\\frac$"):
        assert f"<!-- {name} -->" in picture.replace("\\$", "$")


def test_a_home_folder_is_found_in_each_path_of_a_list(tmp_path):
    (tmp_path / "a.jsonl").write_text(LINE)
    result = run(tmp_path, "tools/plot.py", "~/a.jsonl", "--picture=~/a.png", HOME=str(tmp_path))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "a.png").exists()
