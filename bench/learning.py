"""What a token teaches: how long train.py's way of training takes to end at AdamW's loss.

    python bench/learning.py                  # all sizes, two hours on two cores
    python bench/learning.py --sizes nano     # one of them

Every run is one of train.py, in bfloat16, that ends: its learning rate falls to 0, and its loss is
that of the whole held-out text. AdamW trains as published, and with all that is ours but Muon
(AdamW+). Both have the best of rates in steps of sqrt 2, tried with the first seed until the best
is inside; nano's as published is from bench/sweep.py. Our defaults, untuned, have a share of the
steps. At last all train in turn, each alone on the machine, for the time of a step. Writes
bench/LEARNING.md and assets/learning.png. What is in --runs is not run again, so the command can be
stopped, and goes on.
"""

import json
import math
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Literal

import numpy as np
import torch
from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from lib import cli
from lib.plot import read_curve

ROOT = Path(__file__).resolve().parent.parent

# ---- What is compared

SHARES = (0.4, 0.5, 0.6)  # of AdamW's steps, for our way
SEEDS = (0, 1, 2)


@dataclass
class Way:
    """Options of train.py; warmup and decay are shares of the steps."""
    options: tuple[str, ...]
    warmup: float
    decay: float


ADAMW = "AdamW"
ADAMW_PLUS = "AdamW+"
OURS = "ours"
WAYS = {
    ADAMW: Way(("--optimizer=adamw", "--init=published", "--decay_shape=sqrt", "--beta1=0.9",
                "--beta2=0.95", "--embedding_lr_scale=1"), warmup=0.1, decay=0.2),
    ADAMW_PLUS: Way(("--optimizer=adamw", "--weight_decay=0.1"), warmup=0.1, decay=0.7),
    OURS: Way((), warmup=0.02, decay=0.7),
}


@dataclass
class Size:
    """How a model is trained."""
    steps: int  # of AdamW
    rates: dict[str, tuple[float, ...]]  # the learning rates that a way begins with, or the best
    batch_size: int = 16
    block_size: int = 128
    timed_steps: int = 8  # of a run for the time of a step


ROOT_2 = math.sqrt(2)
SIZES = {
    "nano": Size(600, {ADAMW: (3e-3,), ADAMW_PLUS: (1.5e-3, 3e-3 / ROOT_2, 3e-3)},
                 timed_steps=40),
    "micro": Size(160, {ADAMW: (1.5e-3 / ROOT_2, 1.5e-3, 1.5e-3 * ROOT_2),
                        ADAMW_PLUS: (1.5e-3 / ROOT_2, 1.5e-3, 1.5e-3 * ROOT_2)}, timed_steps=20),
}


@dataclass
class Options:
    sizes: list[Literal["nano", "micro"]] = field(default_factory=lambda: list(SIZES))
    runs: Path = Path("runs/learning")  # folder of the runs
    jobs: int = 2  # runs at a time, which share the cores
    pairs: int = 3  # times that all are timed


# ---- Runs


def run(o: Options, model: str, name: str, rate: float | None, seed: int, steps: int,
        threads: int, folder: str, log_interval: int = 1000) -> list[dict]:
    """The log of a run of train.py. One that diverges has a loss of infinity at its end."""
    size = SIZES[model]
    way = WAYS[name]
    out_dir = o.runs.resolve() / model / folder
    options = [
        f"--model={model}", f"--seed={seed}", "--dtype=bfloat16", "--compile=True",
        *way.options, f"--max_iters={steps}", f"--warmup_iters={round(steps * way.warmup)}",
        f"--decay_iters={round(steps * way.decay)}",
        f"--batch_size={size.batch_size}", f"--block_size={size.block_size}",
        "--eval_interval=100000", "--eval_iters=1000", f"--log_interval={log_interval}",
    ]
    if rate is not None:
        options.append(f"--learning_rate={rate:.3g}")
    # what was run: its options, and the defaults of those that it leaves to train.py
    what = " ".join(options) + f"\n{train.Options()}\n"
    done = out_dir / "done"
    if not done.exists() or done.read_text() != what:
        command = [sys.executable, ROOT / "train.py", *options, f"--out_dir={out_dir}",
                   "--overwrite=True"]
        environment = os.environ | {"OMP_NUM_THREADS": str(threads)}
        result = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL,
                                stderr=subprocess.PIPE, text=True)
        has_diverged = result.returncode != 0 and "lower the learning_rate" in result.stderr
        if result.returncode != 0 and not has_diverged:
            sys.exit(result.stderr)
        for path in out_dir.glob("ckpt*.pt"):
            path.unlink()
        if has_diverged:
            with open(out_dir / "metrics.jsonl", "a") as file:
                file.write(json.dumps({"tokens": 0, "val_loss": math.inf}) + "\n")
        done.write_text(what)
    return read_curve(out_dir / "metrics.jsonl")


def final_loss(o: Options, model: str, name: str, rate: float | None, seed: int,
               share: float = 1) -> float:
    """Of a run of that share of the steps."""
    steps = round(SIZES[model].steps * share)
    folder = f"{name}-{steps}-seed{seed}"
    if rate is not None:
        folder += f"-{rate:.3g}"
    entries = run(o, model, name, rate, seed, steps, max(1, os.cpu_count() // o.jobs), folder)
    loss = [entry["val_loss"] for entry in entries if "val_loss" in entry][-1]
    print(f"{model}, {folder}: {loss:.4f}", flush=True)
    return loss


@dataclass
class Reference:
    """What came of AdamW at one size."""
    tried: dict[float, float]  # learning rate: final loss with the first seed
    rate: float  # the best
    losses: list[float]  # of each seed, with that rate


def tune(o: Options, model: str, name: str) -> Reference:
    """Find the best of several learning rates with the first seed, and train with it from all."""
    rates = list(SIZES[model].rates[name])
    is_known = len(rates) == 1
    tried = {}
    while len(tried) < len(rates):
        for rate in rates[len(tried):]:
            tried[rate] = final_loss(o, model, name, rate, SEEDS[0])
        best = min(tried, key=tried.get)
        if is_known:
            break
        if best == min(rates):
            rates.append(best / ROOT_2)
        elif best == max(rates):
            rates.append(best * ROOT_2)
    return Reference(tried, best, [final_loss(o, model, name, best, seed) for seed in SEEDS])


def seconds_of_steps(o: Options, model: str, rates: dict[str, float | None]) -> dict:
    """For each way, seconds of a step in each turn, with all threads."""
    size = SIZES[model]
    seconds = {name: [] for name in WAYS}
    for turn in range(o.pairs):
        for name, rate in rates.items():
            entries = run(o, model, name, rate, SEEDS[0], size.timed_steps, os.cpu_count(),
                            f"{name}-timed{turn}", log_interval=2)
            speeds = [entry["tok_per_s"] for entry in entries if "tok_per_s" in entry]
            speed = median(speeds[2:])  # in the first two it compiles
            seconds[name].append(size.batch_size * size.block_size / speed)
    return seconds


# ---- What they say


@dataclass
class Result:
    """Of one size."""
    references: dict[str, Reference]
    ours: dict[float, list[float]]  # share of the steps: final loss of each seed
    seconds: dict[str, list[float]]  # of a step


def share_to(loss: float, ours: dict[float, float]) -> float:
    """The share of the steps at which our runs end at that loss, on straight lines between them in
    log steps; beyond the last and before the first, on the nearest line."""
    logs = np.log(sorted(ours))
    losses = [ours[share] for share in sorted(ours)]
    i = 0
    while i < len(losses) - 2 and losses[i + 1] > loss:
        i += 1
    slope = (losses[i + 1] - losses[i]) / (logs[i + 1] - logs[i])
    return float(np.exp(logs[i] + (loss - losses[i]) / slope))


def spread(values) -> str:
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}"


def rows(model: str, result: Result) -> list[list[str]]:
    lines = []
    for name, reference in result.references.items():
        shares = []
        for i, loss in enumerate(reference.losses):
            shares.append(share_to(loss, {s: losses[i] for s, losses in result.ours.items()}))
        slower = [a / b for a, b in zip(result.seconds[OURS], result.seconds[name], strict=True)]
        tried = ", ".join(f"{rate:.3g}: {loss:.3f}"
                          for rate, loss in sorted(reference.tried.items()))
        lines.append([f"`{model}`", name, spread(reference.losses), spread(shares),
                      f"{median(slower):.2f} ({min(slower):.2f} to {max(slower):.2f})",
                      f"{np.mean(shares) * median(slower):.2f}", tried])
    for share, losses in result.ours.items():
        lines.append([f"`{model}`", f"ours, {share:g} of the steps", spread(losses), *[""] * 4])
    return lines


def report(results: dict[str, Result]) -> str:
    """The contents of LEARNING.md."""
    header = ["model", "way", "final loss", "our share of its tokens", "time of our step, in its",
              "our share of its time", "rate: loss, with the first seed"]
    lines = [header, ["---"] * len(header)]
    sizes = []
    for model, result in results.items():
        size = SIZES[model]
        sizes.append(f"{size.steps} steps of {size.batch_size} x {size.block_size} tokens for "
                     f"`{model}`")
        lines += rows(model, result)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "# What a token teaches\n\n"
        f"Written by `python {' '.join(sys.argv)}` on {os.cpu_count()} cores "
        f"({platform.machine()}), torch {torch.__version__}, bfloat16: {', '.join(sizes)}. All "
        "runs end, and losses are of the whole held-out text. Our share is where our runs meet a "
        "way's loss, seed by seed, on straight lines in the logarithm of the steps. ± is the "
        f"standard deviation over {len(SEEDS)} seeds.\n\n{table}\n")


def draw(results: dict[str, Result], picture: Path):
    """Final loss over the share of AdamW's tokens, a panel for each size."""
    figure = Figure(figsize=(4.5 * len(results), 4), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False)[0]
    for axes, (model, result) in zip(panels, results.items(), strict=True):
        for i, (name, reference) in enumerate(result.references.items()):
            losses = reference.losses
            axes.axhline(np.mean(losses), color=f"C{i}", linestyle="--", label=f"{name}, all steps")
            axes.axhspan(min(losses), max(losses), color=f"C{i}", alpha=0.2, linewidth=0)
        shares = list(result.ours)
        losses = np.array(list(result.ours.values()))
        axes.plot(shares, losses.mean(1), "o-", color="C2", label="ours")
        axes.fill_between(shares, losses.min(1), losses.max(1), color="C2", alpha=0.2, linewidth=0)
        axes.set(title=model, xlabel="share of AdamW's tokens", xticks=shares)
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    figure.supylabel("final validation loss (nats per token)")
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    references = {}
    ours = {}
    with ThreadPoolExecutor(o.jobs) as pool:
        for model in o.sizes:  # all are begun here, the longest first
            for name in (ADAMW, ADAMW_PLUS):
                references[model, name] = pool.submit(tune, o, model, name)
            for share in reversed(SHARES):
                for seed in SEEDS:
                    ours[model, share, seed] = pool.submit(final_loss, o, model, OURS, None, seed,
                                                           share)
    results = {}
    for model in o.sizes:
        of_size = {name: references[model, name].result() for name in (ADAMW, ADAMW_PLUS)}
        losses = {}
        for share in SHARES:
            losses[share] = [ours[model, share, seed].result() for seed in SEEDS]
        rates = {name: reference.rate for name, reference in of_size.items()} | {OURS: None}
        results[model] = Result(of_size, losses, seconds_of_steps(o, model, rates))
    text = report(results)
    print(text)
    (ROOT / "bench" / "LEARNING.md").write_text(text)
    draw(results, ROOT / "assets" / "learning.png")
