"""A run that stops and goes on comes to what a run comes to that did not stop, to the last bit.

That holds under --schedule=constant, which these runs have, or if max_iters stays the same: other
schedules depend on max_iters.
"""

import functools
import json
import os
import shutil
import signal
from pathlib import Path

import pytest
import torch

from lib import data, documents
from lib.run import load_checkpoint
from tests.helpers import (
    SMALL,
    STEADY,
    contents,
    differences,
    finish,
    losses_of,
    outcome,
    run,
    start_training,
    train_here,
)
from tests.launch import Script

VARIANTS = {  # ranks, options
    "plain": (1, "--dtype=float32"),
    "AdamW": (1, "--dtype=float32", "--optimizer=adamw"),
    "AdamW in float16 on two ranks": (
        2, "--dtype=float16", "--optimizer=adamw", "--gradient_accumulation_steps=2"),
    "accumulation": (1, "--dtype=float32", "--gradient_accumulation_steps=4"),
    "two ranks": (2, "--dtype=float32", "--gradient_accumulation_steps=2"),
    "bfloat16": (1, "--dtype=bfloat16"),
    "float16": (1, "--dtype=float16"),
}


def check_exactness(folder, options, steps: tuple[int, int, int], world_size=1):
    """That a run, the same in two parts and the same in three come to the same."""
    first, second, last = steps
    for name in ("straight", "once"):
        (folder / name).mkdir()
    straight, once, twice = folder / "straight", folder / "once", folder / "twice"

    def start(where, until: int, *options: str):
        """With one thread, for two runs are under way at a time."""
        return start_training(where, *options, f"--max_iters={until}", world_size=world_size,
                              OMP_NUM_THREADS="1")

    whole = start(straight, last, *options)
    finish(start(once, first, *options))
    shutil.copytree(once, twice)
    finish(whole)
    in_two_parts = start(once, last, "--init_from=resume")
    finish(start(twice, second, "--init_from=resume"))
    finish(in_two_parts)
    finish(start(twice, last, "--init_from=resume"))
    expected = outcome(straight)
    assert differences(outcome(once), expected) == []
    assert differences(outcome(twice), expected) == []
    assert len([name for name in expected if name[-1] == "loss"]) == last


@pytest.mark.parametrize("variant", VARIANTS)
def test_resuming_is_exact_under_a_constant_schedule(variant, tiny, corpus, tmp_path):
    """30 steps, 10 + 20 and 10 + 10 + 10, whose checkpoints are all at evaluations."""
    world_size, *options = VARIANTS[variant]
    options = (*STEADY, *options, f"--dataset={corpus}", f"--init_from={tiny}")
    check_exactness(tmp_path, options, (10, 20, 30), world_size)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_resuming_is_exact_compiled_under_a_constant_schedule(dtype, tiny, corpus, tmp_path):
    """12 steps, 4 + 8 and 4 + 4 + 4."""
    options = (*STEADY, f"--dtype={dtype}", "--compile=True", "--eval_interval=4",
               f"--dataset={corpus}", f"--init_from={tiny}")
    check_exactness(tmp_path, options, (4, 8, 12))


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_resuming_is_exact_under_any_schedule_if_max_iters_stays(
        schedule, tiny, corpus, tmp_path):
    """A checkpoint amid the run is that of a run that is killed after it."""
    options = (*STEADY, f"--schedule={schedule}", "--dtype=float32", "--max_iters=20",
               "--decay_iters=4", f"--dataset={corpus}", f"--init_from={tiny}")
    train_here(tmp_path, *options)
    expected = outcome(tmp_path)
    out = tmp_path / "out"
    step = {"wsd": 16, "cosine": 10}[schedule]  # the decay of wsd begins with a checkpoint
    assert load_checkpoint(out / "ckpt-previous.pt")["step"] == step
    os.replace(out / "ckpt-previous.pt", out / "ckpt.pt")
    train_here(tmp_path, "--init_from=resume")
    assert differences(outcome(tmp_path), expected) == []


def small_windows():
    """Windows of 8 steps."""
    data.WINDOW = 1024
    documents.ROWS = 2


def test_resuming_is_exact_when_more_windows_or_fewer_are_read(tiny, corpus, tmp_path):
    """10 steps read two windows, 30 read four."""
    for name in ("straight", "parts"):
        (tmp_path / name).mkdir()
    options = [option for option in STEADY if "max_tokens" not in option]
    options += ["--dtype=float32", f"--dataset={corpus}", f"--init_from={tiny}"]

    def train_in(name, *options):
        train_here(tmp_path / name, *options, before=small_windows)

    train_in("straight", *options, "--max_iters=30")
    train_in("parts", *options, "--max_iters=10")
    path = tmp_path / "parts" / "out" / "ckpt.pt"
    assert len(load_checkpoint(path)["data"]) == 2
    train_in("parts", "--init_from=resume", "--max_iters=30")
    assert len(load_checkpoint(path)["data"]) == 4
    assert differences(outcome(tmp_path / "parts"), outcome(tmp_path / "straight")) == []
    # the checkpoint of step 20, which would have read four
    os.replace(path.with_name("ckpt-previous.pt"), path)
    train_in("parts", "--init_from=resume", "--max_iters=21")


def test_resuming_on_other_data_is_refused(tiny, corpus, tmp_path):
    shutil.copytree(corpus, tmp_path / "texts")
    train_here(tmp_path, *STEADY, "--dataset=texts", f"--init_from={tiny}", "--max_iters=4")
    (tmp_path / "texts" / "one_more.txt").write_text("a text")
    result = run(tmp_path, "train.py", "--init_from=resume", "--max_iters=6")
    assert result.returncode == 1
    assert result.stderr.startswith(
        "error: dataset 'texts' is not what it was when out/ckpt.pt was saved")


def test_resuming_keeps_the_options(trained, corpus, tmp_path):
    whole = losses_of((trained / "log.txt").read_text())
    begin = run(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", "--eval_interval=4",
                "--sample_prompt=")
    assert begin.returncode == 0, begin.stderr
    assert losses_of(begin.stdout) == whole  # evaluating and saving more often changes nothing
    refused = run(tmp_path, "train.py", "--init_from=resume", "--learning_rate=1e-3")
    assert refused.returncode == 1
    assert "learning_rate is 0.002" in refused.stderr
    more = run(tmp_path, "train.py", "--init_from=stable", "--max_iters=14")
    assert more.returncode == 0, more.stderr
    assert "max_iters: 12 -> 14" in more.stdout
    assert list(losses_of(more.stdout)) == [11, 12, 13, 14]


def test_a_preset_s_options_do_not_come_back_when_its_run_resumes(trained, tmp_path):
    """The checkpoint's options hold, not those that are best for nano, nor the defaults."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    before = load_checkpoint(tmp_path / "out" / "ckpt.pt")["options"]
    train_here(tmp_path, "--init_from=stable", "--max_iters=13")
    after = load_checkpoint(tmp_path / "out" / "ckpt.pt")["options"]
    assert after == before | {"init_from": "stable", "max_iters": 13}


# ---- Longer than was planned


@pytest.fixture(scope="module")
def decayed(tiny, corpus, tmp_path_factory) -> Path:
    """A folder with a run whose learning rate has decayed, from step 16 to 20."""
    folder = tmp_path_factory.mktemp("decayed")
    train_here(folder, *STEADY, "--schedule=wsd", "--dtype=float32", f"--dataset={corpus}",
               f"--init_from={tiny}", "--max_iters=20", "--decay_iters=4")
    return folder


def test_a_run_that_has_decayed_goes_on_from_before_the_decay(decayed, tiny, corpus, tmp_path):
    """What comes of it is what comes of a run that was as long from the beginning."""
    for name in ("straight", "longer"):
        (tmp_path / name).mkdir()
    shutil.copytree(decayed / "out", tmp_path / "longer" / "out")
    out = tmp_path / "longer" / "out"
    saved = contents(out)
    refused = run(tmp_path / "longer", "train.py", "--init_from=resume", "--max_iters=40")
    assert refused.returncode == 1
    assert refused.stderr == (
        "error: out/ckpt.pt is at step 20, where the learning rate has decayed to 0.0005; with "
        "max_iters 40 it would rise again to 0.002: go on from before the decay, with "
        "--init_from=stable --max_iters=40\n")
    assert contents(out) == saved
    train_here(tmp_path / "longer", "--init_from=stable", "--max_iters=40")
    assert (out / "ckpt-20.pt").read_bytes() == saved[out / "ckpt.pt"]
    train_here(tmp_path / "straight", *STEADY, "--schedule=wsd", "--dtype=float32",
               f"--dataset={corpus}", f"--init_from={tiny}", "--max_iters=40", "--decay_iters=4")
    longer = outcome(tmp_path / "longer")
    straight = outcome(tmp_path / "straight")
    evaluated_once_more = (16, "val_loss")
    assert evaluated_once_more in longer
    del longer[evaluated_once_more]
    assert differences(longer, straight) == []
    assert load_checkpoint(out / "ckpt-stable.pt")["step"] == 36


def test_extending_amid_the_decay_and_of_a_cosine_is_refused(decayed, tiny, corpus, tmp_path):
    for schedule, step in (("wsd", 18), ("cosine", 18)):
        options = (*STEADY, f"--schedule={schedule}", "--dtype=float32", f"--dataset={corpus}",
                   f"--init_from={tiny}", f"--out_dir={schedule}", "--eval_interval=18",
                   "--decay_iters=4")
        train_here(tmp_path, *options, "--max_iters=20")
        out = tmp_path / schedule
        os.replace(out / "ckpt-previous.pt", out / "ckpt.pt")
        assert load_checkpoint(out / "ckpt.pt")["step"] == step
        refused = run(tmp_path, "train.py", "--init_from=resume", f"--out_dir={schedule}",
                      "--max_iters=40")
        assert refused.returncode == 1
        assert f"{schedule}/ckpt.pt is at step 18, where the learning rate has" in refused.stderr
        way_out = "--init_from=stable" if schedule == "wsd" else "leave max_iters"
        assert way_out in refused.stderr


def test_a_kill_while_a_run_goes_back_loses_nothing(decayed, tmp_path):
    """Wherever it stops, the decayed weights are there, and the same command goes on."""
    weights = load_checkpoint(decayed / "out" / "ckpt.pt")["model"]
    for at in range(2):
        shutil.copytree(decayed, tmp_path / str(at))
        script = Script(tmp_path / str(at), "train.py", "--init_from=stable", "--max_iters=24",
                        before=functools.partial(die_at_rename, at))
        assert script.wait().returncode == -signal.SIGKILL
        found = [load_checkpoint(path)["model"] for path in tmp_path.glob(f"{at}/out/ckpt*.pt")]
        assert any(differences(model, weights) == [] for model in found)
        train_here(tmp_path / str(at), "--init_from=stable", "--max_iters=28")
        kept = load_checkpoint(tmp_path / str(at) / "out" / "ckpt-20.pt")["model"]
        assert differences(kept, weights) == []


def die_at_rename(at: int):
    """In a process: kill -9 before the rename of that number, of those in which a run goes back."""
    rename = os.replace
    names = []

    def replace_or_die(source, target):
        if len(names) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        names.append(target)
        rename(source, target)

    os.replace = replace_or_die


def test_the_best_checkpoint_is_that_of_the_lowest_validation_loss(tiny, corpus, tmp_path):
    """With a learning rate at which the loss rises again."""
    train_here(tmp_path, *STEADY, "--dtype=float32", f"--dataset={corpus}", f"--init_from={tiny}",
               "--max_iters=20", "--eval_interval=2", "--learning_rate=0.1")
    out = tmp_path / "out"
    best = load_checkpoint(out / "ckpt-best.pt")
    losses = {entry["step"]: entry["val_loss"] for entry in
              load_checkpoint(out / "ckpt.pt")["curve"] if "val_loss" in entry}
    del losses[0]  # before the first step there is nothing to save
    assert best["step"] == min(losses, key=losses.get) < 20
    sampled = run(tmp_path, "sample.py", "--ckpt=out/ckpt-best.pt", "--max_new_tokens=3")
    assert sampled.returncode == 0, sampled.stderr


def test_a_run_that_starts_over_leaves_none_of_the_other_s_kept_checkpoints(
        decayed, tiny, corpus, tmp_path):
    shutil.copytree(decayed / "out", tmp_path / "out")
    options = (*STEADY, "--dtype=float32", f"--dataset={corpus}", f"--init_from={tiny}",
               "--max_iters=4", "--eval_interval=1")
    for name in ("ckpt.pt", "ckpt-previous.pt", "ckpt-best.pt"):
        (tmp_path / "out" / name).unlink()
    refused = run(tmp_path, "train.py", *options)
    assert refused.returncode == 1
    assert refused.stderr.startswith("error: out has a checkpoint")
    train_here(tmp_path, *options, "--overwrite=True")
    steps = {path.name: load_checkpoint(path)["step"] for path in (tmp_path / "out").glob("*.pt")}
    assert "ckpt-stable.pt" not in steps
    assert max(steps.values()) == 4


def test_a_resumed_run_lets_go_of_its_checkpoint(decayed, tmp_path):
    """Else a save would need room for the old file, too, and fail on Windows."""
    shutil.copytree(decayed, tmp_path, dirs_exist_ok=True)
    script = Script(tmp_path, "train.py", "--init_from=stable", "--max_iters=10000")
    script.wait_for("\nstep 18 |")
    maps = Path(f"/proc/{script.process.pid}/maps").read_text()
    script.process.kill()
    script.wait()
    assert "data/" in maps  # the tokens, which stay mapped
    assert "ckpt" not in maps


def test_a_resume_that_fails_leaves_no_folder(tmp_path):
    for source in ("resume", "stable"):
        result = run(tmp_path, "train.py", f"--init_from={source}", "--out_dir=new")
        assert result.returncode == 1
        assert result.stderr == "error: new/ckpt.pt: can't be read: there is no folder new\n"
    assert list(tmp_path.iterdir()) == []


def test_resuming_on_as_many_tokens_of_other_text_is_refused(tiny, tmp_path):
    """Digits are tokens of their own, so the counts of all tokens are the same."""
    text = tmp_path / "digits.txt"
    text.write_text("0123456789" * 5000)
    train_here(tmp_path, *STEADY, "--dataset=digits.txt", f"--init_from={tiny}", "--max_iters=4")
    text.write_text("0123456798" * 5000)
    result = run(tmp_path, "train.py", "--init_from=resume", "--max_iters=6")
    assert result.returncode == 1
    assert result.stderr.startswith(
        "error: dataset 'digits.txt' is not what it was when out/ckpt.pt was saved")
    counts = [json.loads(path.read_text())["windows"] for path in tmp_path.glob("data/*/meta.json")]
    assert len(counts) == 2
    assert counts[0][0]["train"] == counts[1][0]["train"]


# ---- Each item of the state is needed


def without_moments(checkpoint):
    for state in checkpoint["optimizers"][0]["state"].values():
        state["exp_avg_sq"].zero_()


def without_momentum(checkpoint):
    for state in checkpoint["optimizers"][1]["state"].values():
        state["momentum"].zero_()


def without_steps(checkpoint):
    for state in checkpoint["optimizers"][0]["state"].values():
        state["step"].zero_()


DAMAGES = {
    "AdamW's moments": without_moments,
    "Muon's momentum": without_momentum,
    "AdamW's step": without_steps,
    "RNG": lambda checkpoint: checkpoint["rng"]["cpu"][100:200].zero_(),
    "scaler": lambda checkpoint: checkpoint["scaler"].update(scale=2.0),
    "curve": lambda checkpoint: checkpoint["curve"].pop(0),
    "position": lambda checkpoint: checkpoint.update(step=9),
    "nothing": lambda checkpoint: None,
}


@pytest.mark.parametrize("what", DAMAGES)
def test_no_item_of_state_can_be_left_out(what, steady, tmp_path):
    """The run that goes on ends like the straight one only if its checkpoint had all."""
    shutil.copytree(steady, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    DAMAGES[what](checkpoint)
    torch.save(checkpoint, path)
    train_here(tmp_path, "--init_from=resume", "--max_iters=20")
    expected = outcome(steady / "straight")
    found = outcome(tmp_path)
    is_whole = expected.keys() == found.keys() and differences(found, expected) == []
    assert is_whole == (what == "nothing")
