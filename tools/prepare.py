"""Turn text into the tokens that train.py reads, ahead: on a machine without a GPU, say.

    python tools/prepare.py --dataset=cosmopedia --max_tokens=20_000_000

It writes to data/, where train.py, which else does this by itself, finds it. Whoever needs more
goes on where this has ended.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lib.early  # noqa: F401 (first: it answers Ctrl-C while the others load)
from lib import cli, data
from smollm import load_tokenizer


@dataclass
class Options:
    dataset: cli.HomePath = "cosmopedia"  # as in train.py
    dataset_config: str | None = None
    text_column: str = "text"
    encoding_errors: Literal["replace", "skip", "fail"] = "replace"
    separator: str | None = None
    tokenizer: cli.HomePath | None = None
    vocab_size: int = data.HUB_VOCAB  # of the model
    max_tokens: int = data.WINDOW  # rounded up to whole windows of 2^24


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    cli.check_range(o, 1, 2**63, "vocab_size", "max_tokens")
    tokenizer = None
    if o.tokenizer:
        with cli.reading(o.tokenizer):
            tokenizer = load_tokenizer(o.tokenizer)
    source = data.Source(o.dataset, o.dataset_config, o.text_column, o.encoding_errors, o.separator)
    num_windows = math.ceil(o.max_tokens / data.WINDOW)
    tokens = data.prepare_data(source, tokenizer, o.vocab_size, num_windows)
    counts = tokens.meta["windows"][-1]
    print(f"{tokens.folder}: {counts['train']:,} tokens to train on, {counts['val']:,} held out")
    if tokens.meta["ended"]:
        print("that is all of the dataset")
