"""Draw loss curves: training and validation loss, and the learning rate, over the tokens read.

    python tools/plot.py out/metrics.jsonl other/metrics.jsonl --picture=loss.png

train.py draws its own at each evaluation; by hand, several runs are laid over each other.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli
from lib.plot import plot, read_curve
from smollm import InputError


@dataclass
class Options:
    metrics: Positional[list[str]]  # metrics.jsonl files of train.py
    picture: cli.HomePath = "loss.png"


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    if Path(o.picture).suffix not in (".png", ".svg", ".pdf"):
        raise InputError(f"picture is {o.picture}, it must end in .png, .svg or .pdf")
    plot({name: read_curve(Path(name)) for name in o.metrics}, Path(o.picture))
