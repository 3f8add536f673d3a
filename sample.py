"""Let a SmolLM write, or chat with one.

    python sample.py                                              # from out/ckpt.pt
    python sample.py --prompt="def main" --num_samples=4
    python sample.py --ckpt=HuggingFaceTB/SmolLM2-135M --prompt="The capital of France is" --temperature=0
    python sample.py --ckpt=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --temperature=0.2 --top_p=0.9

The text goes to stdout; how long it took, to stderr.
"""

import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from tokenizers.decoders import DecodeStream

from smollm import InputError, KVCache, SmolLM, check_tokenizer, load_tokenizer, local_path
from tools.decode import compile_decode
from tools.script import one_line_errors, pick_device


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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a CUDA device that has it
    compile: bool = False  # torch.compile a step: slow to begin, then fast; a chat has 2048 tokens then
    chat: bool = False  # talk with an instruct model, /reset forgets all; with a prompt, one answer to it
    system: str = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # heads a chat


def stream(tokenizer, ids) -> list[int]:
    """Print the text of ids as they come, and return ids. Bytes are held back until they make a character;
    those that never do are shown at the end as U+FFFD, as by decoding all at once."""
    decoder, seen, shown = DecodeStream(skip_special_tokens=True), [], ""
    for token in ids:
        seen.append(token)
        piece = decoder.step(tokenizer, token) or ""
        shown += piece
        print(piece, end="", flush=True)
    print(tokenizer.decode(seen).removeprefix(shown))
    return seen


def complete(model, tokenizer, o: Options, device, sampling: dict):
    """Print o.num_samples continuations of o.prompt, one as it is made, several when they are done."""
    ids = tokenizer.encode(o.prompt, add_special_tokens=False).ids or [model.config.bos_token_id]
    columns = model.generate(torch.tensor([ids] * o.num_samples, device=device), o.max_new_tokens or 200,
                             eos_id=model.config.eos_token_id, **sampling)
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
    size = sum(p.numel() * p.element_size() for p in model.parameters()) / 1e9
    print(f"prefill: {len(ids)} tokens in {1e3 * (times[1] - times[0]):.0f} ms", file=sys.stderr)
    times = times[1 + o.compile:]  # from the prompt's own column on, or from the one that compiled
    if len(times) > 1:
        rate = (len(times) - 1) / (times[-1] - times[0])
        print(f"decode: {o.num_samples * rate:.1f} tok/s, {size * rate:.1f} GB/s of weights read ({o.dtype}, "
              f"{device})", file=sys.stderr)


def chat_turn(role: str, content: str) -> str:
    """ChatML."""
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


def chat(model, tokenizer, o: Options, device, sampling: dict):
    """A conversation in ChatML. The KV cache holds what was said: a turn costs its new tokens only."""
    end = tokenizer.token_to_id("<|im_end|>")
    if end is None or tokenizer.token_to_id("<|im_start|>") is None:
        raise InputError(f"{o.ckpt} has no tokens <|im_start|> and <|im_end|>: take an instruct model")
    limit = min(model.config.max_position_embeddings, 2048 if o.compile else 8192)  # slots
    cache = KVCache(model.config, 1, limit, device, model.model.norm.weight.dtype, static=o.compile)
    unread, text = [], chat_turn("system", o.system)  # tokens, then text, that the cache does not hold yet
    while True:
        try:
            message = o.prompt or input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if message.strip() == "/reset" and not o.prompt:
            cache.length, unread, text = 0, [], chat_turn("system", o.system)
            continue
        message = text + chat_turn("user", message) + "<|im_start|>assistant\n"
        ids = unread + tokenizer.encode(message, add_special_tokens=False).ids
        room = limit - cache.length - len(ids)
        if room > 0:
            columns = model.generate(torch.tensor([ids], device=device), min(room, o.max_new_tokens or room),
                                     eos_id=end, cache=cache, **sampling)
            answer = stream(tokenizer, (column.item() for column in columns))
            unread, text = answer[-1:] + [end] * (answer[-1] != end), "\n"
        if room < 1 or (len(answer) == room and answer[-1] != end):
            full = f"the context of {limit} tokens is full"
            if o.prompt:
                raise InputError(f"{full}: shorten the prompt")
            print(f"({full}: /reset starts a new conversation)", file=sys.stderr)
        if o.prompt:
            return


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    sys.stdout.reconfigure(errors="replace")
    if sys.stdin:
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # be quiet when `| head` has seen enough
    o = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    for name, least in (("num_samples", 1), ("max_new_tokens", 1), ("seed", 0)):
        if getattr(o, name) is not None and not least <= getattr(o, name) < 2**63:
            raise InputError(f"{name} is {getattr(o, name)}, it must be at least {least} and below 2^63")
    try:
        (o.prompt + o.system).encode()
    except UnicodeEncodeError as error:
        raise InputError(f"prompt and system must be UTF-8 text: {error}") from None
    device = pick_device(o.device)
    if o.dtype == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        o.dtype = "bfloat16" if fast else "float32"
    source = local_path(o.ckpt)
    tokenizer = load_tokenizer(source)
    model = SmolLM.from_pretrained(source, device, getattr(torch, o.dtype))
    check_tokenizer(tokenizer, model.config)
    sampling = {"temperature": o.temperature, "top_k": o.top_k, "top_p": o.top_p,
                "decode": compile_decode(model) if o.compile else None,
                "generator": torch.Generator(device).manual_seed(o.seed)}
    (chat if o.chat else complete)(model, tokenizer, o, device, sampling)
