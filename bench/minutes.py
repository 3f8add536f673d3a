"""Minutes to a validation loss: README's first command, and transformers' Trainer.

    pip install -r tests/requirements.txt
    python bench/minutes.py                # a quarter of an hour on two cores

Both train the nano model on the same batches in the same order, for as many steps, and evaluate as
often, on the same held-out text, whose tokens are there already. The clock runs from the start of
the process; nothing is compiled yet. The Trainer has AdamW, torch.compile and train.py's precision,
and begins with the weights of the published recipe. The best of its three rates counts.
bench/peers.py has it as a row of its table.
"""

import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import torch
from torch.utils.data import Dataset, SequentialSampler

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from lib import cli
from lib.data import WINDOW, Source, block_at, prepare_data
from lib.device import pick_device, pick_dtype
from smollm import PRESETS

ROOT = Path(__file__).resolve().parent.parent
TARGET = 3.9  # nats per token
RATES = (1.5e-3, 3e-3, 6e-3)  # the sweep's best for AdamW is 3e-3 (docs/learning.md)
OPTIONS = replace(train.Options(), **train.PRESET_OPTIONS["nano"])
NUM_WINDOWS = -(-OPTIONS.max_iters * OPTIONS.batch_size // (WINDOW // OPTIONS.block_size))


@dataclass
class Options:
    iters: int = OPTIONS.max_iters  # steps; fewer only try the command
    device: str = "auto"


# ---- train.py


def train_ours(folder: Path, o: Options) -> list[tuple[float, float]]:
    """(seconds, validation loss) of each evaluation."""
    command = [sys.executable, ROOT / "train.py", "--model=nano", f"--max_iters={o.iters}",
               f"--device={o.device}", "--overwrite=True"]
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(folder / "ours")}
    curve = []
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE,
                          stderr=subprocess.DEVNULL, text=True) as process:
        for line in process.stdout:
            if found := re.search(r"\| validation loss ([\d.]+)", line):
                curve.append((time.perf_counter() - start, float(found[1])))
    if process.returncode != 0:
        raise RuntimeError(f"train.py ended with {process.returncode}")
    return curve


# ---- transformers' Trainer


class Blocks(Dataset):
    """Rows of tokens, as train.py reads them."""
    def __init__(self, tokens, blocks: list[int]):
        self.tokens = tokens
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, i: int) -> dict:
        start = self.blocks[i] * OPTIONS.block_size
        row = torch.from_numpy(self.tokens[start:start + OPTIONS.block_size + 1].astype("int64"))
        return {"input_ids": row[:-1], "labels": row[1:], "shift_labels": row[1:]}


def make_blocks(folder: Path, iters: int) -> tuple[Blocks, Blocks]:
    """What is trained on, in train.py's order, and what is evaluated."""
    os.chdir(folder)  # where train.py has made data/
    data = prepare_data(Source(OPTIONS.dataset), None, PRESETS["nano"].vocab_size, NUM_WINDOWS)
    per_window = WINDOW // OPTIONS.block_size
    tokens = data.read("train", NUM_WINDOWS)
    num_blocks = min((len(tokens) - 1) // OPTIONS.block_size, NUM_WINDOWS * per_window)
    order = [block_at(OPTIONS.seed, i, num_blocks, per_window)
             for i in range(iters * OPTIONS.batch_size)]
    held_out = data.read("val", 1)
    num_held_out = min((len(held_out) - 1) // OPTIONS.block_size,
                       OPTIONS.eval_iters * OPTIONS.batch_size)
    return Blocks(tokens, order), Blocks(held_out, list(range(num_held_out)))


def trainer_arguments(folder: Path, rate: float, o: Options, device: torch.device) -> dict:
    return dict(
        output_dir=str(folder / "theirs"), max_steps=o.iters,
        per_device_train_batch_size=OPTIONS.batch_size,
        per_device_eval_batch_size=OPTIONS.batch_size,
        learning_rate=rate, lr_scheduler_type="linear", warmup_steps=o.iters // 10,
        adam_beta2=0.95, weight_decay=0.01, bf16=pick_dtype(device) == "bfloat16",
        torch_compile=True, use_cpu=device.type == "cpu", dataloader_pin_memory=False,
        eval_strategy="steps", eval_steps=OPTIONS.eval_interval, prediction_loss_only=True,
        logging_steps=OPTIONS.eval_interval, save_strategy="no", report_to=[], disable_tqdm=True)


def train_theirs(folder: Path, rate: float, o: Options, results):
    """Puts (time, validation loss) of each evaluation into the queue; at last, None."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / f"theirs-{rate}")
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        PrinterCallback,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    class InOrder(Trainer):
        def _get_train_sampler(self, *arguments):
            return SequentialSampler(self.train_dataset)

    class Report(TrainerCallback):
        def on_evaluate(self, arguments, state, control, metrics, **others):
            results.put((time.time(), metrics["eval_loss"]))

    device = pick_device(o.device)
    train_blocks, held_out = make_blocks(folder, o.iters)
    torch.manual_seed(OPTIONS.seed)
    model = LlamaForCausalLM(LlamaConfig(**PRESETS["nano"].to_hf()))
    arguments = TrainingArguments(**trainer_arguments(folder, rate, o, device))
    trainer = InOrder(model, arguments, train_dataset=train_blocks, eval_dataset=held_out,
                      callbacks=[Report()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    results.put(None)


def curve_of_theirs(folder: Path, rate: float, o: Options) -> list[tuple[float, float]]:
    """(seconds, validation loss) of each evaluation."""
    spawn = multiprocessing.get_context("spawn")
    results = spawn.Queue()
    start = time.time()
    process = spawn.Process(target=train_theirs, args=(folder, rate, o, results))
    process.start()
    curve = []
    while (result := results.get(timeout=1800)) is not None:
        curve.append((result[0] - start, result[1]))
    process.join()
    return curve


# ---- Both


def minutes_to(target: float, curve: list[tuple[float, float]]) -> float | None:
    """When the loss is at target, in a line between the evaluations; None: never."""
    for (t0, loss0), (t1, loss1) in pairwise(curve):
        if loss1 <= target < loss0:
            return (t0 + (t1 - t0) * (loss0 - target) / (loss0 - loss1)) / 60
    return None


def say(who: str, curve: list[tuple[float, float]]):
    points = ", ".join(f"{seconds:.0f} s {loss:.3f}" for seconds, loss in curve)
    print(f"{who}: {minutes_to(TARGET, curve)} minutes to {TARGET} ({points})", file=sys.stderr)


def measure(o: Options):
    """Minutes of train.py, and those of the Trainer by rate; None: the target was not reached."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # the tokens are there for both, and the Trainer's read them, too
        train_ours(folder, replace(o, iters=1))
        ours = train_ours(folder, o)
        say("train.py", ours)
        theirs = {}
        for rate in RATES:
            curve = curve_of_theirs(folder, rate, o)
            theirs[rate] = minutes_to(TARGET, curve)
            say(f"Trainer, rate {rate}", curve)
    return minutes_to(TARGET, ours), theirs


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    cli.check_range(o, 1, 2**63, "iters")
    measure(o)
