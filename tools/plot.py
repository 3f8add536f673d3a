"""Draw loss curves: training and validation loss, and the learning rate, over the tokens read.

    python tools/plot.py out/metrics.jsonl other/metrics.jsonl --picture=loss.png

train.py draws its own at each evaluation; by hand, several runs are laid over each other.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lib.early  # noqa: F401 (first: it answers Ctrl-C while the others load)
from tyro.conf import Positional

from lib import cli
from lib.plot import plot, read_curve
from smollm import InputError


@dataclass
class Options:
    metrics: Positional[list[cli.HomePath]]  # metrics.jsonl files of train.py
    picture: cli.HomePath = "loss.png"


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    if Path(o.picture).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"picture is {o.picture}, it must end in .png, .svg or .pdf")
    if not o.metrics:
        raise InputError("there is nothing to draw: name metrics.jsonl files of train.py, as "
                         "out/metrics.jsonl")
    curves = {name: read_curve(Path(name)) for name in o.metrics}
    if not any(curves.values()):
        raise InputError(f"{', '.join(o.metrics)}: there is nothing in it to draw")
    plot(curves, Path(o.picture))
