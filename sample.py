"""Let a SmolLM write, or chat with one.

    python sample.py                                                  # from out/ckpt.pt
    python sample.py --prompt="def main" --num_samples=4
    python sample.py --ckpt=HuggingFaceTB/SmolLM2-135M --prompt="The capital of France is"
    python sample.py --ckpt=HuggingFaceTB/SmolLM2-135M-Instruct --chat=True --temperature=0.2

The text goes to stdout; how long it took, to stderr.
"""

import lib.early  # noqa: F401 (first: it answers Ctrl-C while the others load)
import importlib.util
import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from lib import cli, hf_files, models
from lib.decode import avoid_onednn, make_cache, make_step
from lib.device import NO_COMPILER, has_compiler, keep_freed_memory, pick_device
from smollm import InputError, id_list, sample_token

# ---- Options: the comments are their help


@dataclass
class Options:
    ckpt: cli.HomePath = "out/ckpt.pt"  # ckpt.pt of train.py, HuggingFace folder, GGUF file, Hub id
    prompt: str = ""  # the text to continue; empty: start from the bos token; -: read it from stdin
    num_samples: int = 1  # continuations, made together as one batch
    max_new_tokens: int | None = None  # of each, at most; None: 200 or what fits, in a chat all
    temperature: float = 0.8  # 0 takes the likeliest token, 1 draws from the model's distribution
    top_k: int | None = None  # draw from so many likeliest tokens
    top_p: float | None = None  # draw from the fewest tokens that have this probability together
    seed: int = 0  # the same seed gives the same text
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 on a GPU that has it
    compile: bool = False  # torch.compile a step: slow to begin, then fast; a chat has 2048 tokens
    chat: bool = False  # talk with an instruct model; with a prompt, one answer to it
    system: str | None = None  # what a chat begins with; None: what its template has


# ---- Completion


def stream(tokenizer, ids, before=()) -> list[int]:
    """Print the text of ids as they come, and return them. before: the ids that they continue.

    Bytes are held back until they make a character. Those that never do are shown at the end as
    U+FFFD. A token's text may depend on the one before, as Llama's spaces do. So decoding begins
    with tokens that are shown already.
    """
    seen = []
    window = list(before)
    shown = tokenizer.decode(window)
    num_shown = len(window)
    for token in ids:
        seen.append(token)
        window.append(token)
        text = tokenizer.decode(window)
        if len(text) > len(shown) and not text.endswith("\ufffd"):
            print(text[len(shown):], end="", flush=True)
            window = window[num_shown:]
            shown = tokenizer.decode(window)
            num_shown = len(window)
    print(tokenizer.decode(window)[len(shown):])
    return seen


def until(ends: list[int], ids):
    """The ids up to the first that is one of the ends."""
    for token in ids:
        if token in ends:
            return
        yield token


def complete(bundle: models.Bundle, o: Options, sampling: dict):
    """Print o.num_samples continuations of o.prompt: one as it is made, several when all are."""
    model = bundle.model
    tokenizer = bundle.tokenizer
    config = model.config
    device = model.model.norm.weight.device
    ids = tokenizer.encode(o.prompt).ids  # with bos, if the tokenizer adds it
    if not ids:
        ids = id_list(config.bos_token_id)
    if not ids:
        raise InputError(f"{o.ckpt} has no bos token to begin with: give a --prompt")
    room = config.max_position_embeddings - len(ids)
    max_new_tokens = o.max_new_tokens or max(1, min(200, room))
    input_ids = torch.tensor([ids] * o.num_samples, device=device)
    # generate refuses more: allocate nothing for it
    length = min(len(ids) + max_new_tokens, config.max_position_embeddings)
    cache = make_cache(model, o.num_samples, length, o.compile)
    ends = id_list(config.eos_token_id)
    columns = model.generate(input_ids, max_new_tokens, eos_id=ends, cache=cache, **sampling)
    times = [time.perf_counter()]

    def rows():
        """The new tokens, num_samples at a time. times has when each came."""
        for column in columns:
            row = column.flatten().tolist()  # waits for the device
            times.append(time.perf_counter())
            yield row

    if o.num_samples == 1:
        print(o.prompt, end="", flush=True)
        stream(tokenizer, until(ends, (row[0] for row in rows())), before=ids)
    else:
        prompt_length = len(tokenizer.decode(ids))
        for sample in zip(*rows(), strict=True):
            text = tokenizer.decode(ids + list(until(ends, sample)))
            print(o.prompt + text[prompt_length:], "-" * 60, sep="\n")

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


class Conversation:
    """What was said, as messages, and a KV cache of it.

    It is written anew at each turn, as the model's chat template says. The cache keeps what is as
    before, so a turn processes its new tokens only.
    """
    def __init__(self, bundle: models.Bundle, o: Options, sampling: dict):
        from lib import chat  # with jinja, which only a chat needs
        self.model = bundle.model
        self.tokenizer = bundle.tokenizer
        self.max_new_tokens = o.max_new_tokens
        self.sampling = sampling
        config = bundle.model.config
        self.template, self.ends = chat.load(bundle.tokenizer, config, bundle.files, o.ckpt)
        self.opening = self.template.opening(o.system)
        # the cache should not take all memory
        self.limit = min(config.max_position_embeddings, 2048 if o.compile else 8192)
        self.cache = make_cache(bundle.model, 1, self.limit, o.compile)
        self.cached_ids = []  # the tokens that it holds
        self.reset()

    def reset(self):
        self.messages = list(self.opening)

    def say(self, text: str) -> bool:
        """Print the model's answer to text, which Ctrl-C ends. False if the context is full."""
        messages = [*self.messages, {"role": "user", "content": text}]
        ids = self.tokenizer.encode(self.template.render(messages), add_special_tokens=False).ids
        room = self.limit - len(ids)
        if room < 1:
            return False
        # keep what is as before, but leave a token to be processed
        self.cached_ids = ids[:num_equal(self.cached_ids, ids[:-1])]
        self.cache.length = len(self.cached_ids)
        new_ids = torch.tensor([ids[self.cache.length:]], device=self.cache.positions.device)
        columns = self.model.generate(new_ids, min(room, self.max_new_tokens or room),
                                      eos_id=self.ends, cache=self.cache, **self.sampling)
        answer = []
        try:
            stream(self.tokenizer, until(self.ends, recorded(columns, answer)))
        except KeyboardInterrupt:
            print()
        if not answer:
            return True  # it was ended before it began: as if nothing was said
        self.cached_ids = ids + answer[:-1]
        answer_text = self.tokenizer.decode(list(until(self.ends, answer)))
        self.messages = [*messages, {"role": "assistant", "content": answer_text}]
        return len(answer) < room or answer[-1] in self.ends


def num_equal(a: list[int], b: list[int]) -> int:
    """How many ids both begin with."""
    for i, (one, other) in enumerate(zip(a, b, strict=False)):
        if one != other:
            return i
    return min(len(a), len(b))


def recorded(columns, ids: list[int]):
    """The id in each column (1, 1). It is appended to ids, too: Ctrl-C does not lose what came."""
    for column in columns:
        ids.append(column.item())
        yield ids[-1]


def read_line() -> str | None:
    """What the user says next; None: nothing more. A terminal can edit it, and has a history."""
    if sys.stdin is None:
        return None
    if sys.stdin.isatty() and importlib.util.find_spec("readline"):  # Windows has none
        import readline  # noqa: F401 (input then uses it)
    try:
        return input("> " if sys.stdin.isatty() else "")
    except (EOFError, KeyboardInterrupt):
        return None


def converse(bundle: models.Bundle, o: Options, sampling: dict):
    """A conversation; with a prompt, one answer to it. /reset forgets all, end-of-file leaves."""
    conversation = Conversation(bundle, o, sampling)
    is_full = f"the context of {conversation.limit} tokens is full"
    if o.prompt:
        if not conversation.say(o.prompt):
            raise InputError(f"{is_full}: shorten the prompt")
        return
    while (text := read_line()) is not None:
        if text.strip() == "/reset":
            conversation.reset()
        elif text.strip() and not conversation.say(text):
            print(f"({is_full}: /reset starts a new conversation)", file=sys.stderr)


# ---- What sample.py does not do

# Settings of generation_config.json that change the text, with what leaves it as it is
NOT_HERE = {"repetition_penalty": 1, "no_repeat_ngram_size": 0, "num_beams": 1, "min_length": 0,
            "min_new_tokens": 0, "guidance_scale": 1, "encoder_repetition_penalty": 1,
            "suppress_tokens": [], "begin_suppress_tokens": [], "bad_words_ids": [],
            "forced_bos_token_id": None, "forced_eos_token_id": None, "stop_strings": []}


def say_what_is_not_done(bundle: models.Bundle):
    """A line for settings that transformers heeds and sample.py does not."""
    generation = hf_files.contents(bundle.files, "generation_config.json")
    names = [name for name, neutral in NOT_HERE.items()
             if generation.get(name) not in (None, neutral)]
    if names:
        print(f"its generation_config.json also asks for {', '.join(names)}, which sample.py does "
              "not do", file=sys.stderr)


# ---- The script

if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    cli.check_range(o, 1, 2**63, "num_samples", "max_new_tokens")
    cli.check_range(o, 0, 2**63, "seed")
    sample_token(torch.zeros(1, 1), o.temperature, o.top_k, o.top_p)  # if out of range, says so
    if sys.stdin is not None:
        # newline=None: a line may end with \r\n; -sig: a file may begin with a mark
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="replace", newline=None)
    if o.prompt == "-":
        if sys.stdin is None:
            raise InputError("prompt is -, but stdin is closed")
        o.prompt = sys.stdin.read()
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # be quiet when `| head` has seen enough

    device = pick_device(o.device)
    if o.dtype == "auto":
        o.dtype = "float32"
        if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            o.dtype = "bfloat16"
    if o.compile and not has_compiler(device):
        print(NO_COMPILER, file=sys.stderr)
        o.compile = False
    if not o.compile:
        avoid_onednn()
    bundle = models.load(o.ckpt, device, getattr(torch, o.dtype))
    say_what_is_not_done(bundle)
    keep_freed_memory()  # on a CPU: a layer takes the memory of the one before it
    sampling = {
        "temperature": o.temperature,
        "top_k": o.top_k,
        "top_p": o.top_p,
        "generator": torch.Generator(device).manual_seed(o.seed),
        "step": make_step(bundle.model, o.compile),
    }
    if o.chat:
        converse(bundle, o, sampling)
    else:
        complete(bundle, o, sampling)
