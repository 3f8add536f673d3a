"""Let a SmolLM write, or chat with one.

    python sample.py                                                  # from out/ckpt.pt
    python sample.py --prompt="def main" --num_samples=4
    python sample.py --ckpt=HuggingFaceTB/SmolLM2-135M --prompt="The capital of France is"
    python sample.py --ckpt=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --temperature=0.2

The text goes to stdout; how long it took, to stderr.
"""

import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
from tokenizers.decoders import DecodeStream

from lib import cli, models
from lib.chat import END, START, SYSTEM, answer_begins, chat_turn
from lib.decode import avoid_onednn, make_cache, make_step
from lib.device import pick_device
from smollm import InputError

# ---- Options: the comments are their help


@dataclass
class Options:
    ckpt: str = "out/ckpt.pt"  # a ckpt.pt of train.py, a HuggingFace directory, or a Hub id
    prompt: str = ""  # the text to continue; empty: start from the bos token
    num_samples: int = 1  # continuations, made together as one batch
    max_new_tokens: int | None = None  # of each, at most; None: 200, in a chat all that fit
    temperature: float = 0.8  # 0 takes the likeliest token, 1 draws from the model's distribution
    top_k: int | None = None  # draw from so many likeliest tokens
    top_p: float | None = None  # draw from the fewest tokens that have this probability together
    seed: int = 0  # the same seed gives the same text
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile a step: slow to begin, then fast; a chat has 2048 tokens
    chat: bool = False  # talk with an instruct model; with a prompt, one answer to it
    system: str = SYSTEM  # what a chat begins with


# ---- Completion


def stream(tokenizer, ids) -> list[int]:
    """Print the text of ids as they come, and return ids.

    Bytes are held back until they make a character. Those that never do are shown at the end as
    U+FFFD, as by decoding all at once.
    """
    decoder = DecodeStream(skip_special_tokens=True)
    seen = []
    shown = ""
    for token in ids:
        seen.append(token)
        piece = decoder.step(tokenizer, token) or ""
        shown += piece
        print(piece, end="", flush=True)
    print(tokenizer.decode(seen).removeprefix(shown))
    return seen


def complete(model, tokenizer, o: Options, sampling: dict):
    """Print o.num_samples continuations of o.prompt: one as it is made, several when all are."""
    device = model.model.norm.weight.device
    max_new_tokens = o.max_new_tokens or 200
    ids = tokenizer.encode(o.prompt, add_special_tokens=False).ids
    if not ids:
        ids = [model.config.bos_token_id]
    input_ids = torch.tensor([ids] * o.num_samples, device=device)
    length = min(len(ids) + max_new_tokens, model.config.max_position_embeddings)
    cache = make_cache(model, o.num_samples, length, o.compile)
    columns = model.generate(input_ids, max_new_tokens, eos_id=model.config.eos_token_id,
                             cache=cache, **sampling)
    times = [time.perf_counter()]

    def rows():
        """The new tokens, num_samples at a time. times has when each came."""
        for column in columns:
            row = column.flatten().tolist()  # waits for the device
            times.append(time.perf_counter())
            yield row

    if o.num_samples == 1:
        print(o.prompt, end="", flush=True)
        stream(tokenizer, (row[0] for row in rows()))
    else:
        for sample in zip(*rows(), strict=True):
            print(o.prompt + tokenizer.decode(sample), "-" * 60, sep="\n")

    milliseconds = 1000 * (times[1] - times[0])
    print(f"prefill: {len(ids)} tokens in {milliseconds:.0f} ms", file=sys.stderr)
    times = times[1:]  # from the first new column on
    if o.compile:
        times = times[1:]  # the second one has waited for the compiler
    if len(times) > 1:
        steps_per_s = (len(times) - 1) / (times[-1] - times[0])
        gigabytes = sum(p.nbytes for p in model.parameters()) / 1e9
        print(f"decode: {o.num_samples * steps_per_s:.1f} tok/s, {gigabytes * steps_per_s:.1f} "
              f"GB/s of weights read ({o.dtype}, {device})", file=sys.stderr)


# ---- Chat


def converse(model, tokenizer, o: Options, sampling: dict):
    """A conversation in ChatML. /reset forgets all, end-of-file leaves.

    The KV cache holds what was said, so a turn processes its new tokens only.
    """
    device = model.model.norm.weight.device
    end = tokenizer.token_to_id(END)
    if end is None or tokenizer.token_to_id(START) is None:
        raise InputError(f"{o.ckpt} has no tokens {START} and {END}: take an instruct "
                         "model")
    limit = min(model.config.max_position_embeddings, 2048 if o.compile else 8192)
    cache = make_cache(model, 1, limit, o.compile)
    unread_ids = []  # what the cache does not hold yet: tokens,
    unread_text = chat_turn("system", o.system)  # and text after them
    while True:
        message = o.prompt
        if not message:
            try:
                message = input("> " if sys.stdin.isatty() else "")
            except EOFError:
                return
            if message.strip() == "/reset":
                cache.length = 0
                unread_ids = []
                unread_text = chat_turn("system", o.system)
                continue

        text = unread_text + chat_turn("user", message) + answer_begins()
        ids = unread_ids + tokenizer.encode(text, add_special_tokens=False).ids
        room = limit - cache.length - len(ids)
        is_full = room < 1
        if not is_full:
            max_new_tokens = min(room, o.max_new_tokens or room)
            columns = model.generate(torch.tensor([ids], device=device), max_new_tokens,
                                     eos_id=end, cache=cache, **sampling)
            answer = stream(tokenizer, (column.item() for column in columns))
            is_full = len(answer) == room and answer[-1] != end
            unread_ids = [answer[-1]]
            if answer[-1] != end:
                unread_ids.append(end)  # it was cut off
            unread_text = "\n"
        if is_full and o.prompt:
            raise InputError(f"the context of {limit} tokens is full: shorten the prompt")
        if is_full:
            print(f"(the context of {limit} tokens is full: /reset starts a new conversation)",
                  file=sys.stderr)
        if o.prompt:
            return


# ---- The script

if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    cli.check_range(o, 1, 2**63, "num_samples", "max_new_tokens")
    cli.check_range(o, 0, 2**63, "seed")
    try:
        (o.prompt + o.system).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt and system must be UTF-8 text: {error}") from None
    sys.stdout.reconfigure(errors="replace")
    if sys.stdin:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # be quiet when `| head` has seen enough

    device = pick_device(o.device)
    if o.dtype == "auto":
        o.dtype = "float32"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            o.dtype = "bfloat16"
    if not o.compile:
        avoid_onednn()
    model, tokenizer = models.load(o.ckpt, device, getattr(torch, o.dtype))
    sampling = {
        "temperature": o.temperature,
        "top_k": o.top_k,
        "top_p": o.top_p,
        "generator": torch.Generator(device).manual_seed(o.seed),
        "step": make_step(model, o.compile),
    }
    if o.chat:
        converse(model, tokenizer, o, sampling)
    else:
        complete(model, tokenizer, o, sampling)
