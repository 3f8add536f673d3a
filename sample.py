"""Let a SmolLM write.

    python sample.py                                              # from out/ckpt.pt
    python sample.py --prompt="def main" --num_samples=4
    python sample.py --ckpt=SmolLM2-135M --temperature=0          # from a HuggingFace directory

The text goes to stdout; how long it took, to stderr.
"""

import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from tokenizers.decoders import DecodeStream

from smollm import InputError, SmolLM, check_sampling, load_tokenizer, one_line_errors, pick_device


@dataclass
class Options:
    ckpt: str = "out/ckpt.pt"  # a ckpt.pt of train.py, or a HuggingFace directory
    prompt: str = ""  # the text to continue; empty: start from the bos token
    num_samples: int = 1  # continuations, made together as one batch
    max_new_tokens: int = 200  # tokens of each, at most
    temperature: float = 0.8  # 0 takes the likeliest token, 1 draws from the model's distribution
    top_k: int | None = None  # draw from so many likeliest tokens
    top_p: float | None = None  # draw from the fewest tokens that have this probability together
    seed: int = 0  # the same seed gives the same text
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a CUDA device that has it


def stream(tokenizer, ids):
    """Print the text of ids as they come. Bytes are held back until they make a character; those that never
    do are shown at the end as U+FFFD, as by decoding all at once."""
    decoder, seen, shown = DecodeStream(skip_special_tokens=True), [], ""
    for token in ids:
        seen.append(token)
        piece = decoder.step(tokenizer, token) or ""
        shown += piece
        print(piece, end="", flush=True)
    print(tokenizer.decode(seen).removeprefix(shown))


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    o = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    check_sampling(o.temperature, o.top_k, o.top_p)
    for name in ("num_samples", "max_new_tokens"):
        if getattr(o, name) < 1:
            raise InputError(f"{name} is {getattr(o, name)}, it must be at least 1")
    device = pick_device(o.device)
    if o.dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        o.dtype = "bfloat16" if fast else "float32"
    tokenizer = load_tokenizer(o.ckpt)
    model = SmolLM.from_pretrained(o.ckpt, device, getattr(torch, o.dtype))

    ids = tokenizer.encode(o.prompt, add_special_tokens=False).ids or [model.config.bos_token_id]
    if max(ids) >= model.config.vocab_size:
        raise InputError(f"the prompt has a token id {max(ids)}, the model's vocabulary is "
                         f"{model.config.vocab_size}: its tokenizer belongs to another model")
    columns = model.generate(
        torch.tensor([ids] * o.num_samples, device=device), o.max_new_tokens, o.temperature, o.top_k, o.top_p,
        eos_id=model.config.eos_token_id, generator=torch.Generator(device).manual_seed(o.seed))
    times = [time.perf_counter()]

    def rows():
        """The new tokens, num_samples at a time, with a note of when each came."""
        for column in columns:
            row = column.flatten().tolist()  # waits for the device
            times.append(time.perf_counter())
            yield row

    if o.num_samples == 1:
        print(o.prompt, end="", flush=True)
        stream(tokenizer, (token for token, in rows()))
    else:
        for sample in zip(*rows(), strict=True):
            print(o.prompt + tokenizer.decode(sample), "-" * 60, sep="\n")

    steps, seconds = len(times) - 2, times[-1] - times[1]
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    print(f"prefill: {len(ids)} tokens in {1e3 * (times[1] - times[0]):.0f} ms", file=sys.stderr)
    if steps:
        print(f"decode: {o.num_samples * steps / seconds:.1f} tok/s, "
              f"{size * steps / seconds:.1f} GB/s of weights read ({o.dtype}, {device})", file=sys.stderr)
