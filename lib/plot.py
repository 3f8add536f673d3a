"""Loss curves: what metrics.jsonl holds, and its picture."""

import json
from pathlib import Path

from lib.files import write_whole
from smollm import InputError


def read_curve(path: Path) -> list[dict]:
    """The entries of a metrics.jsonl, one for each line. InputError if it is none."""
    try:
        curve = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    except ValueError as error:
        raise InputError(f"{path} is no metrics.jsonl of train.py: {error}") from None
    for entry in curve:
        if not isinstance(entry, dict) or "tokens" not in entry:
            raise InputError(f"{path} is no metrics.jsonl of train.py: a line has no tokens")
    return curve


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
