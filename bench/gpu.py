"""On one GPU, in ten minutes, with nothing from a network: what README marks as not measured.

    pip install -r tests/requirements.txt
    python bench/gpu.py                             # writes bench/GPU.md and assets/gpu.png
    python bench/gpu.py --device=cpu --tiny=True    # tries the command: a small model, few steps
    python bench/gpu.py --rows resume float16       # some of the rows, printed only

training: a step of 8 x 2048, eager, each block compiled by itself, compiled whole as train.py does
it there, and transformers' model; with AdamW. optimizers: the same with Muon. sampling: prefill and
decoding, eager and captured as a graph. resume: 10 + 10 steps beside 20. float16: its losses beside
those of float32. card: `train.py --batch_size=8 --max_iters=5000`, its curve and a sample. Weights
are random. Where contenders take turns, rates are medians.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Literal, get_args

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from bench.peers import Machine, TheirLoss, seconds_of, table_row, wait_for_device
from lib import cli
from lib.decode import make_cache, make_step
from lib.device import flops_per_token, keep_freed_memory, pick_device
from lib.faster import compile_blocks, for_training
from lib.plot import plot, read_curve
from smollm import PRESETS, Config, SmolLM

ROOT = Path(__file__).resolve().parent.parent
Row = Literal["training", "optimizers", "sampling", "resume", "float16", "card"]
HEADER = "| work | how | figure | more |\n|---|---|---|---|"


@dataclass
class Options:
    rows: list[Row] = field(default_factory=lambda: list(get_args(Row)))
    turns: int = 5  # times that each contender runs
    device: str = "auto"
    tiny: bool = False  # nano in place of the 135M, and few steps


class Bench:
    def __init__(self, o: Options, folder: Path):
        self.o = o
        self.folder = folder  # of runs of train.py, which share their data
        self.device = pick_device(o.device)
        self.machine = Machine(self.device)
        self.config = PRESETS["nano"] if o.tiny else Config()
        self.batch = (2, 64) if o.tiny else (8, 2048)

    def autocast(self):
        if self.machine.dtype == "float32":
            return nullcontext()
        return torch.autocast(self.device.type, getattr(torch, self.machine.dtype))

    def model(self) -> SmolLM:
        torch.manual_seed(0)
        return SmolLM(replace(self.config)).to(self.device)

    def ids(self, *shape: int) -> torch.Tensor:
        return torch.randint(self.config.vocab_size, shape, device=self.device)

    def race(self, contenders: dict) -> dict[str, list[float]]:
        """Seconds of each, in turn."""
        times = {name: [] for name in contenders}
        for _ in range(self.o.turns):
            for name, work in contenders.items():
                times[name].append(seconds_of(work, self.device))
        return times


# ---- Training


class Trainee:
    """A step of train.py: forward, backward, clipping, optimizers."""
    def __init__(self, bench: Bench, loss_model, optimizers: list):
        self.loss_model = loss_model
        self.optimizers = optimizers
        self.bench = bench
        self.scaler = torch.amp.GradScaler(bench.device.type, enabled=False)
        self.rows = [(bench.ids(*bench.batch), bench.ids(*bench.batch))]

    def step(self):
        train.accumulate(self.loss_model, self.rows, self.bench.autocast(), self.scaler)
        torch.nn.utils.clip_grad_norm_(self.loss_model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    def memory(self) -> str:
        """What a step takes beyond weights and moments."""
        if self.bench.device.type != "cuda":
            return ""
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        self.step()
        wait_for_device(self.bench.device)
        return f"; {(torch.cuda.max_memory_allocated() - before) / 1e9:.2f} GB for activations"


def adamw(model) -> list:
    return [torch.optim.AdamW(model.parameters(), 1e-5, fused=True)]


def our_trainee(bench: Bench, how: str, optimizer: str = "adamw") -> Trainee:
    model = for_training(bench.model())
    loss_model = train.Loss(model)
    if how == "blocks":
        compile_blocks(model)
    elif how == "whole":
        loss_model = torch.compile(loss_model, dynamic=False)
    o = train.Options(optimizer=optimizer, embedding_lr_scale=1.0, dtype=bench.machine.dtype)
    return Trainee(bench, loss_model, train.make_optimizers(model, o))


def their_trainee(bench: Bench, compiled: bool) -> Trainee:
    from transformers import LlamaConfig, LlamaForCausalLM
    model = LlamaForCausalLM(LlamaConfig(**bench.config.to_hf())).to(bench.device)
    loss_model = TheirLoss(model)
    optimizers = adamw(model)
    if compiled:
        loss_model = torch.compile(loss_model, dynamic=False)
    return Trainee(bench, loss_model, optimizers)


def race_trainees(bench: Bench, trainees: dict[str, Trainee]) -> Iterator[str]:
    first = {name: seconds_of(trainee.step, bench.device) for name, trainee in trainees.items()}
    times = bench.race({name: trainee.step for name, trainee in trainees.items()})
    B, T = bench.batch
    flops = flops_per_token(bench.model(), T)
    for name, trainee in trainees.items():
        rate = B * T / median(times[name])
        mfu = rate * flops / bench.machine.peak[bench.machine.dtype]
        yield table_row(f"training step, {B} x {T}", name, f"{rate:,.0f} tok/s",
                        f"MFU {mfu:.0%}; first step {first[name]:.0f} s{trainee.memory()}")


def training(bench: Bench) -> Iterator[str]:
    yield from race_trainees(bench, {
        "eager": our_trainee(bench, "eager"),
        "blocks compiled": our_trainee(bench, "blocks"),
        "compiled whole": our_trainee(bench, "whole"),
        "transformers": their_trainee(bench, compiled=False),
        "transformers, compiled": their_trainee(bench, compiled=True),
    })


def optimizers(bench: Bench) -> Iterator[str]:
    yield from race_trainees(bench, {
        "compiled whole, AdamW": our_trainee(bench, "whole", "adamw"),
        "compiled whole, Muon": our_trainee(bench, "whole", "muon"),
    })


# ---- Sampling


@torch.no_grad()
def sampling(bench: Bench) -> Iterator[str]:
    model = bench.model().to(getattr(torch, bench.machine.dtype))
    length = 16 if bench.o.tiny else 128
    num_bytes = sum(p.nbytes for p in model.parameters())
    for streams in (1, 8):
        ids = bench.ids(streams, length)
        for compiled in (False, True):
            step = make_step(model, compiled)

            def decode(ids=ids, compiled=compiled, step=step):
                cache = make_cache(model, ids.size(0), 2 * length, compiled)
                columns = model.generate(ids, length, temperature=0, cache=cache, step=step)
                times = []
                for column in columns:
                    column.tolist()  # as it is when it is printed
                    times.append(time.perf_counter())
                return times[-1] - times[0]

            decode()  # compiles
            steps_per_s = (length - 1) / median(decode() for _ in range(bench.o.turns))
            share = num_bytes * steps_per_s / bench.machine.bandwidth
            yield table_row(f"decode {length} after {length}, streams: {streams}",
                            "captured" if compiled else "eager",
                            f"{streams * steps_per_s:,.0f} tok/s", f"{share:.0%} of the bandwidth")
    prompt = bench.ids(1, 8 * length)
    step = make_step(model, compiled=False)

    def prefill():
        step(prompt, make_cache(model, 1, 8 * length, compiled=False))

    prefill()
    seconds = median(bench.race({"prefill": prefill})["prefill"])
    yield table_row(f"prefill of {8 * length:,}", "eager", f"{8 * length / seconds:,.0f} tok/s", "")


# ---- Runs of train.py


def run_script(bench: Bench, script: str, *options: str) -> str:
    """What it prints. It has to end well."""
    command = [sys.executable, ROOT / script, f"--device={bench.device}", *options]
    return subprocess.run(command, cwd=bench.folder, check=True, text=True,
                          stdout=subprocess.PIPE).stdout


def train_nano(bench: Bench, name: str, *options: str):
    run_script(bench, "train.py", f"--out_dir={name}", "--log_interval=1", *options)


def losses_of(bench: Bench, name: str) -> list[float]:
    return [entry["loss"] for entry in read_curve(bench.folder / name / "metrics.jsonl")
            if "loss" in entry]


def resume(bench: Bench) -> Iterator[str]:
    steady = ("--model=nano", "--schedule=constant", "--warmup_iters=2", "--eval_interval=10")
    train_nano(bench, "straight", *steady, "--max_iters=20")
    train_nano(bench, "resumed", *steady, "--max_iters=10")
    train_nano(bench, "resumed", "--init_from=resume", "--max_iters=20")
    weights = [torch.load(bench.folder / name / "ckpt.pt", weights_only=True)["model"]
               for name in ("straight", "resumed")]
    largest = max((a.float() - b.float()).abs().max().item()
                  for a, b in zip(weights[0].values(), weights[1].values(), strict=True))
    figure = "the same, bit for bit" if largest == 0 else f"differ by up to {largest:.2g}"
    yield table_row("weights of nano after 20 steps", "10 + 10 beside 20", figure, "")


def float16(bench: Bench) -> Iterator[str]:
    iters = 20 if bench.o.tiny else 200
    options = ("--model=nano", f"--max_iters={iters}", "--eval_interval=1000")
    for dtype in ("float32", "float16"):
        train_nano(bench, dtype, *options, f"--dtype={dtype}")
        last = losses_of(bench, dtype)[-10:]
        yield table_row(f"nano, {iters} steps", dtype, f"loss {sum(last) / len(last):.3f}",
                        "mean of the last 10 steps")


def card(bench: Bench) -> Iterator[str]:
    """The 135M by the card's own command."""
    options = ["--batch_size=8", "--max_iters=5000"]
    if bench.o.tiny:
        options = ["--model=nano", "--max_iters=30", "--eval_interval=10"]
    start = time.perf_counter()
    run_script(bench, "train.py", "--out_dir=card", *options)
    minutes = (time.perf_counter() - start) / 60
    curve = read_curve(bench.folder / "card" / "metrics.jsonl")
    val_loss = [entry["val_loss"] for entry in curve if "val_loss" in entry][-1]
    rate = median(entry["tok_per_s"] for entry in curve if "tok_per_s" in entry)
    yield table_row(f"train.py {' '.join(options)}", "default", f"validation loss {val_loss:.3f}",
                    f"{minutes:.1f} minutes in all, {rate:,.0f} tok/s")
    text = run_script(bench, "sample.py", "--ckpt=card/ckpt.pt", "--prompt=def __init__(self")
    (bench.folder / "sample.txt").write_text(text)
    print(text, file=sys.stderr)


ROWS = {row.__name__: row
        for row in (training, optimizers, sampling, resume, float16, card)}


def write(bench: Bench, where: str, lines: list[str]):
    """bench/GPU.md and its picture."""
    table = "\n".join([HEADER, *lines])
    sample = (bench.folder / "sample.txt").read_text().rstrip()
    (ROOT / "bench" / "GPU.md").write_text(
        f"# On one GPU\n\nWritten by `python bench/gpu.py` on {where}\n\n{table}\n\n"
        f"What the 135M wrote then:\n\n```\n{sample}\n```\n")
    curve = read_curve(bench.folder / "card" / "metrics.jsonl")
    plot({"135M": curve}, ROOT / "assets" / "gpu.png")


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    cli.check_range(o, 1, 2**63, "turns")
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(o, Path(folder))
        where = bench.machine.describe()
        print(where, HEADER, sep="\n\n", flush=True)
        lines = []
        for name in o.rows:
            for line in ROWS[name](bench):
                print(line, flush=True)
                lines.append(line)
            torch._dynamo.reset()
        if bench.device.type == "cuda" and not o.tiny and o.rows == list(ROWS):
            write(bench, where, lines)
