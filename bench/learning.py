"""What a token teaches: the same models on the same batches, trained by the recipe and otherwise.

    python bench/learning.py                   # all sizes, hours
    python bench/learning.py --sizes nano      # one of them

The blocks' matrices get AdamW, as in the published recipe, or Muon, and the embedding the learning
rate of all the others, or a higher one. Each run is train.py's own, in bfloat16. With the first
seed, each way tries three learning rates, and more where the best is at an end of them; with the
best it trains from the other seeds. (The 135M model has one seed, and no more rates.) Nano trains
in its best way once more, in two thirds of the steps. At last all run in turn, each alone on the
machine, for the time of a step. Writes bench/LEARNING.md and assets/learning.png. What is in --runs
is not run again, so the command can be stopped, and goes on.
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
from matplotlib.ticker import EngFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli
from lib.plot import read_curve

ROOT = Path(__file__).resolve().parent.parent

# ---- What is compared


@dataclass
class Way:
    """How the parameters are updated."""
    optimizer: str
    embedding_lr_scale: float
    warmup: float  # share of the steps; for nano, the other optimizer's is worse (try --warmup)

    def __str__(self):
        return f"{self.optimizer}-embedding{self.embedding_lr_scale:g}"


WAYS = {
    "AdamW": Way("adamw", embedding_lr_scale=1, warmup=0.1),
    "AdamW, embedding x 6": Way("adamw", embedding_lr_scale=6, warmup=0.1),
    "Muon": Way("muon", embedding_lr_scale=1, warmup=0.02),
    "Muon, embedding x 6": Way("muon", embedding_lr_scale=6, warmup=0.02),
}
RECIPE = "AdamW"  # the published one
DEFAULT = "Muon"  # train.py's
BEST_OF_NANO = "Muon, embedding x 6"


@dataclass
class Size:
    """How a model is trained."""
    max_iters: int
    rates: tuple[float, ...]  # the learning rates to begin with
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 16
    block_size: int = 128
    evaluations: int = 10
    ways: tuple[str, ...] = (RECIPE, DEFAULT)
    muon_rates: tuple[float, ...] | None = None  # of Muon, and no more are tried
    timed_steps: int = 8  # of a run for the time of a step


SIZES = {
    "nano": Size(600, (1.5e-3, 3e-3, 6e-3), evaluations=20, ways=tuple(WAYS), timed_steps=40),
    "micro": Size(160, (1.5e-3, 3e-3, 6e-3), ways=(RECIPE, DEFAULT, BEST_OF_NANO), timed_steps=20),
    "smollm2-135m": Size(200, (5e-4, 1e-3, 2e-3), seeds=(0,), batch_size=4, muon_rates=(2e-3,)),
}


@dataclass
class Options:
    sizes: list[Literal["nano", "micro", "smollm2-135m"]] = field(
        default_factory=lambda: list(SIZES))
    warmup: float | None = None  # share of the steps, for all; None: for each what is best for it
    runs: Path = Path("runs/learning")  # folder of the runs
    jobs: int = 2  # runs at a time, which share the cores
    pairs: int = 3  # times that all are timed


@dataclass
class Result:
    """What came of one way at one size. A curve is (2, evaluations): tokens, validation loss."""
    tried: dict[float, float]  # learning rate: final loss with the first seed
    rate: float  # the best
    curves: np.ndarray  # (seeds, 2, evaluations), with that rate
    shorter: np.ndarray | None = None  # the same, in two thirds of the steps
    seconds: list[float] = field(default_factory=list)  # of a step

    @property
    def final(self) -> np.ndarray:
        return self.curves[:, 1, -1]


# ---- Runs


def train(o: Options, model: str, name: str, rate: float, seed: int, steps: int, folder: str,
          threads: int, eval_iters: int = 10, log_interval: int = 10) -> list[dict]:
    """The curve of a run of train.py. One that diverges has a loss of infinity at its end."""
    size = SIZES[model]
    way = WAYS[name]
    out_dir = o.runs.resolve() / model / folder
    warmup = way.warmup if o.warmup is None else o.warmup
    options = [
        f"--model={model}", f"--seed={seed}", "--dtype=bfloat16", "--compile=True",
        f"--optimizer={way.optimizer}", f"--learning_rate={rate:g}",
        f"--embedding_lr_scale={way.embedding_lr_scale:g}",
        f"--max_iters={steps}", f"--warmup_iters={round(steps * warmup)}",
        f"--batch_size={size.batch_size}", f"--block_size={size.block_size}",
        f"--eval_interval={size.max_iters // size.evaluations}", f"--eval_iters={eval_iters}",
        f"--log_interval={log_interval}",
    ]
    done = out_dir / "done"  # its contents say what was run
    if not done.exists() or done.read_text() != " ".join(options):
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
        done.write_text(" ".join(options))
    return read_curve(out_dir / "metrics.jsonl")


def train_share(o: Options, model: str, name: str, rate: float, seed: int,
                share: float = 1) -> np.ndarray:
    """The validation curve of a run of that share of the steps."""
    steps = round(SIZES[model].max_iters * share)
    folder = f"{WAYS[name]}-{rate:g}-{steps}-seed{seed}"
    if o.warmup is not None:
        folder += f"-warmup{o.warmup:g}"
    threads = max(1, os.cpu_count() // o.jobs)
    entries = train(o, model, name, rate, seed, steps, folder, threads)
    points = [(entry["tokens"], entry["val_loss"]) for entry in entries if "val_loss" in entry]
    curve = np.array(points).T
    print(f"{model}, {folder}: {curve[1, -1]:.4f}", flush=True)
    return curve


def learn(o: Options, model: str, name: str) -> Result:
    """Find the best learning rate with the first seed, and train with it from all."""
    size = SIZES[model]
    rates = list(size.rates)
    if WAYS[name].optimizer == "muon" and size.muon_rates is not None:
        rates = list(size.muon_rates)
    tried = {}
    while len(tried) < len(rates):
        for rate in rates[len(tried):]:
            tried[rate] = train_share(o, model, name, rate, size.seeds[0])[1, -1]
        best = min(tried, key=tried.get)
        if size.muon_rates is not None:
            break
        if best == min(rates):
            rates.append(best / 2)
        elif best == max(rates):
            rates.append(best * 2)
    curves = [train_share(o, model, name, best, seed) for seed in size.seeds]
    result = Result(tried, best, np.array(curves))
    if model == "nano" and name == BEST_OF_NANO:
        shorter = [train_share(o, model, name, best, seed, share=2 / 3) for seed in size.seeds]
        result.shorter = np.array(shorter)
    return result


def measure_steps(o: Options, model: str, results: dict[str, Result]):
    """Seconds of a step, in turn, with all threads."""
    size = SIZES[model]
    for turn in range(o.pairs):
        for name, result in results.items():
            entries = train(o, model, name, result.rate, size.seeds[0], size.timed_steps,
                            f"{WAYS[name]}-timed{turn}", threads=os.cpu_count(),
                            eval_iters=1, log_interval=2)
            speeds = [entry["tok_per_s"] for entry in entries if "tok_per_s" in entry]
            speed = median(speeds[2:])  # in the first two it compiles
            result.seconds.append(size.batch_size * size.block_size / speed)


# ---- What they say

HEADER = ["model", "way", "best rate", "validation loss", "tokens", "time of a step", "time",
          "rate: loss, with the first seed"]


def tokens_to(curve: np.ndarray, loss: float) -> float:
    """When a curve first comes to that loss, on a straight line between evaluations; nan if it
    does not."""
    tokens, losses = curve
    if losses.min() > loss:
        return math.nan
    i = int(np.argmax(losses <= loss))
    return float(np.interp(-loss, -losses[i - 1:i + 1], tokens[i - 1:i + 1]))


def spread(values) -> str:
    text = f"{np.mean(values):.3f}"
    if len(values) > 1:
        text += f" ± {np.std(values, ddof=1):.3f}"
    return text


def rows(model: str, results: dict[str, Result]) -> list[list[str]]:
    """The table's lines for one size."""
    recipe = results[RECIPE]
    lines = []
    for name, result in results.items():
        shares = []
        for curve, loss in zip(result.curves, recipe.final, strict=True):
            shares.append(tokens_to(curve, loss) / curve[0, -1])
        slower = [a / b for a, b in zip(result.seconds, recipe.seconds, strict=True)]
        step = f"{median(slower):.2f} ({min(slower):.2f} to {max(slower):.2f})"
        tried = ", ".join(f"{rate:g}: {loss:.3f}" for rate, loss in sorted(result.tried.items()))
        lines.append([f"`{model}`", name, f"{result.rate:g}", spread(result.final), spread(shares),
                      step, f"{np.mean(shares) * median(slower):.2f}", tried])
        if result.shorter is not None:
            final = spread(result.shorter[:, 1, -1])
            lines.append([f"`{model}`", f"{name}, 2/3 of the steps", f"{result.rate:g}", final,
                          "", "", "", ""])
    return lines


def report(everything: dict[str, dict[str, Result]]) -> str:
    """The contents of LEARNING.md."""
    sizes = []
    lines = [HEADER, ["---"] * len(HEADER)]
    for model, results in everything.items():
        size = SIZES[model]
        sizes.append(f"{size.max_iters} steps of {size.batch_size} x {size.block_size} tokens for "
                     f"`{model}`")
        lines += rows(model, results)
    table = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return (
        "# What a token teaches\n\n"
        f"Written by `python {' '.join(sys.argv)}` on {os.cpu_count()} cores "
        f"({platform.machine()}), torch {torch.__version__}, bfloat16: {', '.join(sizes)}. Tokens "
        "and time are those to the loss that AdamW ends with as in the recipe, in shares of its "
        "own, seed by seed; time is that of so many steps. ± is the standard deviation over "
        f"seeds.\n\n{table}\n")


def draw(everything: dict[str, dict[str, Result]], picture: Path):
    """Validation loss over tokens, a panel for each size."""
    figure = Figure(figsize=(4.5 * len(everything), 4), layout="constrained")
    panels = figure.subplots(1, len(everything), squeeze=False)[0]
    for axes, (model, results) in zip(panels, everything.items(), strict=True):
        for name, result in results.items():
            color = f"C{list(WAYS).index(name)}"
            draw_seeds(axes, result.curves, "-", color, name)
            if result.shorter is not None:
                draw_seeds(axes, result.shorter, "--", color, f"{name}, 2/3 of the steps")
        loss = results[RECIPE].final.mean()
        axes.axhline(loss, color="gray", linewidth=0.8, linestyle=":")
        axes.set(title=model, xlabel="tokens read", ylim=(None, loss + 1.5))
        axes.xaxis.set_major_formatter(EngFormatter())
        axes.grid(alpha=0.3)
        axes.legend()
    figure.supylabel("validation loss (nats per token)")
    figure.savefig(picture, dpi=120)


def draw_seeds(axes, curves: np.ndarray, style: str, color: str, label: str):
    """The mean of the seeds' curves, and a band from the lowest to the highest of them."""
    tokens = curves[0, 0]
    losses = curves[:, 1]
    axes.plot(tokens, losses.mean(0), style, color=color, label=label)
    axes.fill_between(tokens, losses.min(0), losses.max(0), color=color, alpha=0.2, linewidth=0)


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    tasks = []
    for model in o.sizes:
        tasks += [(model, name) for name in reversed(SIZES[model].ways)]  # the longest first
    with ThreadPoolExecutor(o.jobs) as pool:
        found = list(pool.map(lambda task: learn(o, *task), tasks))
    result_of = dict(zip(tasks, found, strict=True))
    everything = {}
    for model in o.sizes:
        everything[model] = {name: result_of[model, name] for name in SIZES[model].ways}
        measure_steps(o, model, everything[model])
    text = report(everything)
    print(text)
    (ROOT / "bench" / "LEARNING.md").write_text(text)
    (ROOT / "assets").mkdir(exist_ok=True)
    draw(everything, ROOT / "assets" / "learning.png")
