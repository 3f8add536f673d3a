"""Draw loss curves: training and validation loss, and the learning rate, over the tokens read.

    python tools/plot.py out/metrics.jsonl other/metrics.jsonl --picture=loss.png

train.py draws its own at each evaluation; by hand, several runs are laid over each other.
"""

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm import InputError
from tools.script import one_line_errors


def plot(curves: dict[str, list[dict]], picture: Path):
    """Draw the curves, by the names of their runs, each a list of what the lines of a metrics.jsonl say."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for number, (run, curve) in enumerate(curves.items()):
        of_run = f", {run}" if len(curves) > 1 else ""
        for axes, name, label, style in (
                (losses, "loss", f"training{of_run}", {"alpha": 0.5, "linewidth": 1}),
                (losses, "val_loss", f"validation{of_run}", {"marker": "o", "markersize": 4}),
                (rates, "lr", None, {"linewidth": 1.5})):
            points = [(entry["tokens"], entry[name]) for entry in curve if name in entry]
            axes.plot(*zip(*points, strict=True), color=f"C{number}", label=label, **style)
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    rates.set(xlabel="tokens read", ylabel="learning rate", ylim=(0, None))
    rates.xaxis.set_major_formatter(EngFormatter())
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    temporary = picture.with_name(f"{picture.name}.tmp")
    try:
        figure.savefig(temporary, format=picture.suffix[1:], dpi=120)
        os.replace(temporary, picture)
    finally:
        temporary.unlink(missing_ok=True)


def read_curve(path: Path) -> list[dict]:
    try:
        curve = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is no metrics.jsonl of train.py: {error}") from None
    if not all(isinstance(entry, dict) and "tokens" in entry for entry in curve):
        raise InputError(f"{path} is no metrics.jsonl of train.py: a line of it has no tokens")
    return curve


@dataclass
class Options:
    metrics: Positional[list[str]]  # metrics.jsonl files of train.py
    picture: str = "loss.png"


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    o = tyro.cli(Options, description=__doc__, use_underscores=True)
    if Path(o.picture).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"picture is {o.picture}, it must end in .png, .svg or .pdf")
    plot({name: read_curve(Path(name)) for name in o.metrics}, Path(o.picture))
