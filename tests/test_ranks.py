"""Several processes train together, as torchrun starts them."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from lib import data
from lib.data import train_tokenizer
from lib.run import load_checkpoint
from smollm import load_tokenizer
from test_smollm import TINY, ids_of, make
from tests.helpers import (
    ROOT,
    STEADY,
    finish,
    free_port,
    losses_in,
    start_ranks,
    start_training,
    train_here,
    write_tiny,
)


def test_two_ranks_give_the_losses_of_one(tiny, corpus, tmp_path):
    """The same batches are shared out; the sums are of other order, so float32 rounds
    otherwise."""
    options = (*STEADY, "--dtype=float32", "--gradient_accumulation_steps=4", "--max_iters=20",
               f"--dataset={corpus}", f"--init_from={tiny}")
    losses = {}
    for world_size in (1, 2):
        folder = tmp_path / str(world_size)
        folder.mkdir()
        train_here(folder, *options, world_size=world_size)
        losses[world_size] = losses_in(folder)
    assert len(losses[1]) == 20
    assert losses[2] == pytest.approx(losses[1], rel=1e-5)
    begun_alone = tmp_path / "begun alone"
    shutil.copytree(tmp_path / "1", begun_alone)
    out = begun_alone / "out"
    os.replace(out / "ckpt-previous.pt", out / "ckpt.pt")  # of step 10
    train_here(begun_alone, "--init_from=resume", world_size=2)
    assert losses_in(begun_alone) == pytest.approx(losses[1], rel=1e-5)


# ---- All hold the same, or none trains


def write_place(folder: Path, tokenizer, text: str, **changes):
    """A folder as one of several machines might have it: a text, a tokenizer and a model."""
    folder.mkdir()
    (folder / "text.txt").write_text(text)
    tokenizer.save(str(folder / "tokenizer.json"))
    write_tiny(folder / "model.pt", tokenizer, **changes)


SCRATCH = (*STEADY, "--dtype=float32", "--dataset=text.txt", "--max_iters=4", "--warmup_iters=0",
           "--gradient_accumulation_steps=2", "--model=nano")
FROM_MODEL = (*SCRATCH[:-1], "--init_from=model.pt")
TEXT = "a line of the text\n" * 3000
OTHER_TEXT = "a line of the next\n" * 3000  # as long


def without(place: Path):
    (place / "text.txt").unlink()


def with_other_text(place: Path):
    (place / "text.txt").write_text(OTHER_TEXT)


def with_other_tokenizer(place: Path):
    train_tokenizer([TEXT], 500).save(str(place / "tokenizer.json"))


def with_other_model(place: Path):
    write_tiny(place / "model.pt", load_tokenizer(place / "tokenizer.json"), rms_norm_eps=1e-3)


# what rank 1 has otherwise: its change, the options of both and those of rank 1, what is said
DIFFERENT = {
    "text": (with_other_text, FROM_MODEL, [], "rank 1 differs from rank 0 in the tokens of the"),
    "text and so its tokenizer": (
        with_other_text, SCRATCH, [], "in the tokens of the text, the tokenizer: give all ranks"),
    "no text": (without, FROM_MODEL, [], "rank 1: dataset 'text.txt' does not exist"),
    "tokenizer": (with_other_tokenizer, (*SCRATCH, "--tokenizer=tokenizer.json"), [],
                  "rank 1 differs from rank 0 in the tokens of the text, the tokenizer"),
    "config": (with_other_model, FROM_MODEL, [], "rank 1 differs from rank 0 in the model's conf"),
    "batch": (None, FROM_MODEL, ["--batch_size=2"], "rank 1 differs from rank 0 in --batch_size"),
    "steps": (None, FROM_MODEL, ["--max_iters=5"], "rank 1 differs from rank 0 in --max_iters"),
    "nothing": (None, FROM_MODEL, [], None),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_ranks_that_hold_different_things_do_not_train(what, tokenizer, tmp_path):
    """Each has a folder of its own, as where data/ is not shared."""
    change, options, more_options, said = DIFFERENT[what]
    places = [tmp_path / "0", tmp_path / "1"]
    for place in places:
        write_place(place, tokenizer, TEXT)
    if change:
        change(places[1])
    scripts = start_ranks(places, [options, (*options, *more_options)])
    results = [script.wait(60) for script in scripts]
    if said is None:
        assert [result.returncode for result in results] == [0, 0], results
        assert len(losses_in(places[0])) == 4
        return
    for rank, result in enumerate(results):
        assert result.returncode == 1
        assert len(result.stderr.splitlines()) == 1
        assert result.stderr.startswith(f"[rank{rank}]: error: rank 1")  # torch names the rank
        assert said in result.stderr
    assert not (places[0] / "out" / "ckpt.pt").exists()


def pause_before_data():
    """In a process: the first rank waits before it prepares, the others say that they do."""
    prepare = data.prepare_data

    def paused(*arguments):
        print(f"rank {os.environ['RANK']} prepares", file=sys.stderr, flush=True)
        while os.environ["RANK"] == "0" and not Path("go on").exists():
            time.sleep(0.01)
        return prepare(*arguments)

    data.prepare_data = paused


def test_the_first_rank_of_a_machine_prepares_and_the_others_wait(tiny, corpus, tmp_path):
    options = (*STEADY, "--dtype=float32", "--gradient_accumulation_steps=2", "--max_iters=4",
               f"--dataset={corpus}", f"--init_from={tiny}")
    first, second = start_training(tmp_path, *options, world_size=2, before=pause_before_data)
    first.wait_for("rank 0 prepares")
    time.sleep(1)
    assert "prepares" not in second.err
    (tmp_path / "go on").touch()
    second.wait_for("rank 1 prepares")
    finish([first, second])


RANK = """
import torch, train
from contextlib import nullcontext
from torch import distributed
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from smollm import Config, SmolLM

calls = []

def counted(group, bucket):
    calls.append(bucket)
    return allreduce_hook(group, bucket)

distributed.init_process_group("gloo")
x, y, config, weights = torch.load("given.pt")
rank = distributed.get_rank()
model = SmolLM(Config(**config))
model.load_state_dict(weights)
batches = [(x[i:i + 2], y[i:i + 2]) for i in (4 * rank, 4 * rank + 2)]
ddp = torch.nn.parallel.DistributedDataParallel(train.Loss(model))
scaler = torch.amp.GradScaler("cpu", enabled=False)
ddp.register_comm_hook(None, counted)
loss = train.accumulate(ddp, batches, nullcontext(), scaler)
assert len(calls) == 1  # the ranks meet once, after the last micro-batch
torch.save((loss, [p.grad for p in model.parameters()]), f"{rank}.pt")
del ddp  # which holds on to the group, whose threads must end before the process does
distributed.destroy_process_group()
"""


def run_on_two_ranks(script: str, folder: Path):
    (folder / "rank.py").write_text(script)
    where = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
             "PYTHONPATH": str(ROOT)}
    processes = []
    for rank in "01":
        processes.append(subprocess.Popen([sys.executable, "rank.py"], cwd=folder,
                                          env=os.environ | where | {"RANK": rank}))
    assert [process.wait(100) for process in processes] == [0, 0]


def test_distributed_loss_and_gradient_are_the_mean_over_all_valid_tokens(tmp_path):
    """Four micro-batches of 2 sequences, unevenly masked, on two ranks and on one."""
    ids = ids_of(8, 21)
    x = ids[:, :-1]
    y = ids[:, 1:].clone()
    y[0, 3:] = -100
    y[2:5] = -100
    torch.save((x, y, asdict(TINY), make(TINY).state_dict()), tmp_path / "given.pt")
    run_on_two_ranks(RANK, tmp_path)
    model = make(TINY)
    _, loss = model(x, targets=y)
    loss.backward()
    for rank in "01":
        found, gradients = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found, loss.detach(), rtol=1e-6, atol=0)
        for p, gradient in zip(model.parameters(), gradients, strict=True):
            torch.testing.assert_close(gradient, p.grad, rtol=1e-4, atol=1e-6)


SHAPES = [(48, 80), (48, 80), (48, 80), (16, 48), (80, 48), (80, 48)]
MUON_STEPS = """
import torch
from torch import distributed
from lib import muon

def take_steps(shapes) -> tuple[list, int]:
    generator = torch.Generator().manual_seed(0)
    matrices = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    optimizer = muon.Muon(matrices, 0.1, 0.1, torch.float32)
    done = []
    orthogonalize = muon.orthogonalize

    def counted(stack, dtype):
        done.extend(stack[..., 0, 0].flatten())  # a number of each matrix
        return orthogonalize(stack, dtype)

    muon.orthogonalize = counted
    for _ in range(3):
        for p in matrices:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    muon.orthogonalize = orthogonalize
    return [p.detach() for p in matrices], len(done)
"""
SHARED_MUON = MUON_STEPS + f"""
distributed.init_process_group("gloo")
torch.save(take_steps({SHAPES}), f"{{distributed.get_rank()}}.pt")
distributed.destroy_process_group()
"""


def test_ranks_share_the_work_of_muon_and_come_to_what_one_does(tmp_path):
    """Of one shape there are more matrices than ranks, of another fewer."""
    alone = {}
    exec(MUON_STEPS, alone)
    expected, count = alone["take_steps"](SHAPES)
    assert count == 3 * len(SHAPES)
    run_on_two_ranks(SHARED_MUON, tmp_path)
    for rank in "01":
        found, shared_count = torch.load(tmp_path / f"{rank}.pt")
        assert shared_count == 3 * (2 + 1 + 1)
        for p, q in zip(found, expected, strict=True):
            assert torch.equal(p, q)


# ---- torchrun itself


def torchrun(cwd, *options) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2",
               f"--master_port={free_port()}", ROOT / "train.py", *options]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True)


def begin_torchrun(cwd, *options) -> tuple[subprocess.Popen, list[int]]:
    """torchrun after the first steps of training, and the numbers of its processes."""
    process = torchrun(cwd, *options)
    line = ""
    while not line.startswith("step 3 |"):
        line = process.stdout.readline()
        assert line, process.stderr.read()
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    return process, [int(pid) for pid in children]


@pytest.fixture
def long_run(tiny, corpus) -> tuple[str, ...]:
    """Options of a run on two ranks that goes on until it is stopped."""
    return (*STEADY, "--dtype=float32", "--gradient_accumulation_steps=2",
            "--max_iters=100000", "--eval_interval=100000", f"--dataset={corpus}",
            f"--init_from={tiny}")


def test_torchrun_saves_on_sigterm(long_run, tmp_path):
    process, _ = begin_torchrun(tmp_path, *long_run)
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    saved = int(re.search(r"step (\d+) \| saved", out)[1])
    assert load_checkpoint(tmp_path / "out" / "ckpt.pt")["step"] == saved >= 3


def test_torchrun_ends_with_a_dead_rank(long_run, tmp_path):
    process, pids = begin_torchrun(tmp_path, *long_run)
    assert len(pids) == 2
    os.kill(pids[1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    assert not Path(f"/proc/{pids[0]}").exists()


def test_ranks_share_the_micro_batches_evenly_or_say_why_not(long_run, tmp_path):
    process = torchrun(tmp_path, *long_run, "--gradient_accumulation_steps=3")
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert ("error: gradient_accumulation_steps is 3, it must be a multiple of torchrun's 2 "
            "processes") in errors
