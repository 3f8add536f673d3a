"""Loss curves: what metrics.jsonl holds, and its picture."""

import json
import math
import sys
from pathlib import Path

from lib.files import write_whole
from smollm import InputError


def read_curve(path: Path) -> list[dict]:
    """The entries of a metrics.jsonl, one for each line. InputError if it is none. A last line that
    is cut, since the run was killed while it wrote, is told of and left out."""
    text = path.read_bytes().decode("utf-8", "replace")
    lines = text.split("\n")
    curve = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if is_entry(entry):
            curve.append(entry)
        elif number == len(lines):  # no \n has come after it
            print(f"{path}, line {number}: it is cut, and left out", file=sys.stderr)
        else:
            raise InputError(f"{path}, line {number}: it is no line of train.py's metrics.jsonl, a "
                             "JSON object of numbers with tokens: take it out, or name another "
                             "file")
    return curve


def is_entry(entry) -> bool:
    """Whether it is an object of finite numbers, tokens among them."""
    if not isinstance(entry, dict) or "tokens" not in entry:
        return False
    return all(isinstance(value, int | float) and math.isfinite(value) for value in entry.values())


def plot(curves: dict[str, list[dict]], picture: Path):
    """Draw training loss, validation loss and learning rate over the tokens read, by run: the
    name of each, and the entries of its metrics.jsonl."""
    from matplotlib.figure import Figure  # which takes a while
    from matplotlib.ticker import EngFormatter
    figure = Figure(figsize=(8, 5))
    # margins of our own: to let matplotlib find them takes longer than all else
    figure.subplots_adjust(left=0.1, right=0.98, top=0.98, bottom=0.1, hspace=0.08)
    losses, rates = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    for number, (name, curve) in enumerate(curves.items()):
        color = f"C{number}"
        name = name.replace("$", r"\$")  # it would begin a formula
        of_run = f", {name}" if len(curves) > 1 else ""
        losses.plot(*points(curve, "loss"), color=color, alpha=0.5, linewidth=1,
                    label=f"training{of_run}")
        losses.plot(*points(curve, "val_loss"), color=color, marker="o", markersize=4,
                    label=f"validation{of_run}")
        rates.plot(*points(curve, "lr"), color=color, linewidth=1.5)
    losses.set_ylabel("loss (nats per token)")
    losses.legend()
    rates.set(xlabel="tokens read", ylabel="learning rate", ylim=(0, None))
    rates.xaxis.set_major_formatter(EngFormatter())
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    with write_whole(picture) as temporary:
        figure.savefig(temporary, format=picture.suffix[1:], dpi=120)


def points(curve: list[dict], name: str) -> tuple[list, list]:
    """Tokens, and the values of that name, of all entries that have it."""
    entries = [entry for entry in curve if name in entry]
    return [entry["tokens"] for entry in entries], [entry[name] for entry in entries]
