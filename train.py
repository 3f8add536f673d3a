"""Train a SmolLM from scratch on real text. A flat script: options, data, model, loop, checkpoint.

    python train.py --batch_size=8 --max_iters=5000    # the 135M model; for a small one see README.md
    python train.py --init_from=resume                 # go on from out/ckpt.pt
    torchrun --nproc_per_node=8 train.py --gradient_accumulation_steps=64    # on eight GPUs
"""

import copy
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
import tyro
from tokenizers import Tokenizer
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from smollm import PRESETS, InputError, SmolLM, check_tokenizer, load_checkpoint, load_tokenizer, local_path
from tools.checkpoint import lock_folder, previous_of, save_checkpoint, use_newest_whole
from tools.muon import Muon
from tools.plot import plot
from tools.prepare import WINDOW, end_of_text, prepare_data
from tools.script import keep_freed_memory, matmul_peak, one_line_errors, pick_device, pick_dtype

# ---- Options: the comments are their help


@dataclass
class Options:
    out_dir: str = "out"  # folder of the checkpoint, ckpt.pt
    overwrite: bool = False  # start over in an out_dir that has a checkpoint
    init_from: str = "scratch"  # scratch, resume (out_dir's ckpt.pt), or a HuggingFace folder, Hub id or *.pt
    model: str = "smollm2-135m"  # from scratch: a preset of smollm.py, nano, smollm-135m, smollm2-360m, ...
    # data
    dataset: str = "stdlib"  # Python's standard library; cosmopedia, fineweb-edu, smollm-corpus or another
    #                          Hub id; or a file or folder of .txt, .md, .py, .jsonl or .parquet files
    dataset_config: str | None = None  # of a Hub id, where it has several
    text_column: str = "text"  # of the Hub's data, and of .jsonl and .parquet files
    max_tokens: int | None = None  # train on so many, again and again; None: as many as max_iters will read
    tokenizer: str | None = None  # file, folder or Hub id; None: cosmo2-tokenizer for Hub data, else trained
    block_size: int = 512  # tokens in a sequence
    batch_size: int = 8  # sequences in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step, those of all processes together
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # muon: of the blocks' matrices; AdamW has the rest
    max_iters: int = 5000  # steps
    learning_rate: float = 2e-3  # the peak, for Muon; AdamW of the 135M does better with 1e-3
    embedding_lr_scale: float = 1.0  # times that for the embedding, which is the head, too; nano likes 6
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"  # after warm-up; wsd: stable, then 1 - sqrt
    warmup_iters: int | None = None  # steps of linear warm-up; None: 2% of max_iters
    decay_iters: int | None = None  # last steps, in which wsd decays; None: 20% of max_iters
    weight_decay: float = 0.01  # of matrices; norms don't decay
    beta1: float = 0.9  # AdamW's
    beta2: float = 0.95
    grad_clip: float = 1.0  # largest norm of the gradient; 0: don't clip
    # what is shown
    eval_interval: int = 250  # steps from evaluation to evaluation; each saves a checkpoint
    eval_iters: int = 10  # batches in an evaluation, at most
    log_interval: int = 10  # steps from log line to log line
    sample_prompt: str = "def __init__(self"  # continued at each evaluation
    # machine
    seed: int = 0  # of the initial weights and of the order of the data
    device: str = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: 16 bits if 1.5x as fast
    compile: bool | None = None  # torch.compile; None: on CUDA only
    # check
    overfit: bool = False  # train on one fixed batch until its loss is near zero; saves nothing


RESUMABLE = {"out_dir", "overwrite", "init_from", "max_iters", "decay_iters", "eval_interval", "eval_iters",
             "log_interval", "sample_prompt", "device", "dtype", "compile"}  # may change when a run resumes
OVERFIT_LOSS = 0.05  # near zero


def parse_options(default: Options | None = None) -> Options:
    """The command line, over default, and the steps of warm-up and decay settled."""
    o = tyro.cli(Options, description=__doc__, default=default, config=(tyro.conf.FlagConversionOff,),
                 use_underscores=True)
    for name, value in vars(o).items():
        least = int(type(value) is int and name not in ("seed", "warmup_iters", "decay_iters"))
        limit = 1 if name in ("beta1", "beta2") else 2**63
        if type(value) in (int, float) and not least <= value < limit:
            raise InputError(f"{name} is {value}, it must be at least {least} and below {limit}")
    warmup = o.max_iters // 50 if o.warmup_iters is None else o.warmup_iters
    decay = o.max_iters // 5 if o.decay_iters is None else o.decay_iters
    if (default or o.init_from != "resume") and warmup + decay * (o.schedule == "wsd") > o.max_iters:
        raise InputError(f"warmup_iters {warmup} and decay_iters {decay} exceed max_iters {o.max_iters}")
    return replace(o, warmup_iters=warmup, decay_iters=decay)


def lr_at(step: int, o: Options) -> float:
    """The learning rate of a step, counted from 0: linear warm-up, whose last step is at the peak; stable,
    and at last peak * (1 - sqrt(share of decay_iters that is over)), as SmolLM (Haegele et al. 2024,
    arXiv:2405.18392); or half a cosine, ending at 0; or constant."""
    warmup, decayed = o.warmup_iters, step - (o.max_iters - o.decay_iters)  # steps
    if step < warmup:
        return o.learning_rate * (step + 1) / warmup
    if o.schedule == "cosine":
        return o.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (o.max_iters - warmup))) / 2
    if o.schedule == "wsd" and decayed >= 0:
        return o.learning_rate * (1 - math.sqrt(decayed / o.decay_iters))
    return o.learning_rate

# ---- Data: tools/prepare.py makes the tokens; here are blocks of them, and batches of blocks


@lru_cache(maxsize=4)
def window_order(seed: int, epoch: int, window: int, size: int):
    return np.random.default_rng((seed, epoch, window)).permutation(size)


def block_at(seed: int, place: int, num_blocks: int, window_size: int) -> int:
    """The block that is sequence number place of all that training reads: every block once an epoch, window
    after window, in an order within each that seed and epoch fix. A pure function, so there is no sampler's
    state to lose; and with more windows, the order in those that are there stays as it is."""
    epoch, place = divmod(place, num_blocks)
    window, place = divmod(place, window_size)
    start = window * window_size
    return start + int(window_order(seed, epoch, window, min(window_size, num_blocks - start))[place])


def get_batch(tokens, blocks, block_size: int, vocab_size: int, device: torch.device):
    """Inputs and targets, each (len(blocks), block_size) int64. Block b starts at token b * block_size."""
    rows = np.stack([tokens[b * block_size:(b + 1) * block_size + 1] for b in blocks]).astype(np.int64)
    if rows.max() >= vocab_size:
        raise InputError(f"the data has a token id {rows.max()}, the model's vocabulary is {vocab_size}: "
                         "delete data/, it will be made again")
    rows = torch.from_numpy(rows)
    rows = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
    return rows[:, :-1], rows[:, 1:]

# ---- The pieces of the loop


def make_optimizers(model: SmolLM, o: Options) -> list[torch.optim.Optimizer]:
    """Who gets what; the learning rates are set at each step."""
    embedding = model.model.embed_tokens.weight  # and output head
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": [embedding], "weight_decay": o.weight_decay, "lr_scale": o.embedding_lr_scale},
              {"params": norms, "weight_decay": 0.0}]
    if o.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": o.weight_decay})
    adamw = torch.optim.AdamW(groups, 0.0, (o.beta1, o.beta2), fused=True)
    muon = [Muon(matrices, 0.0, o.weight_decay, getattr(torch, o.dtype))] if o.optimizer == "muon" else []
    return [adamw, *muon]


def over_ranks(x: torch.Tensor, operation=dist.ReduceOp.SUM) -> torch.Tensor:
    """x, of each of torchrun's processes, reduced to one."""
    if dist.is_initialized():
        dist.all_reduce(x, operation)
    return x


class Loss(torch.nn.Module):
    """A model's loss without its logits, whose memory the backward pass can then use."""
    def __init__(self, model: SmolLM):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model(x, targets=y)[1]


def accumulate(loss_of, batches: list, autocast, scaler) -> torch.Tensor:
    """Add up the gradients of batches [(x, y), ...] to that of one batch: of the mean loss over all targets
    that are not -100, of all ranks, which meet once, after the last. Returns this mean, on the device."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    valid, total = over_ranks(sum((y != -100).sum() for _, y in batches)), 0.0
    for i, (x, y) in enumerate(batches):
        with autocast, nullcontext() if world_size == 1 or i == len(batches) - 1 else loss_of.no_sync():
            loss = loss_of(x, y)
        loss = loss * ((y != -100).sum() / valid)
        scaler.scale(loss * world_size).backward()  # DDP takes the mean over ranks
        total += loss.detach()
    return over_ranks(total)


@torch.no_grad()
def evaluate(loss_of, batches: list, autocast) -> float:
    """Mean loss in nats per token."""
    losses, sizes = [], [y.numel() for _, y in batches]
    for x, y in tqdm(batches, desc="evaluating", leave=False, disable=None):
        with autocast:
            losses.append(loss_of(x, y).item())
    return float(np.average(losses, weights=sizes))


def say(text: str, file=None):
    """A line of the log, above the progress bar. When Ctrl-C ends the `tee` of `| tee log.txt`, too, the line
    is lost, but not the run."""
    file = file or sys.stdout
    try:
        tqdm.write(text, file)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def continue_text(model: SmolLM, tokenizer: Tokenizer, prompt: str, seed: int, device) -> str:
    """The prompt and up to 64 tokens that the model adds. An empty prompt starts from the bos token."""
    limit = model.config.max_position_embeddings
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids[:limit // 2] or [model.config.bos_token_id]
    columns = model.generate(torch.tensor([ids], device=device), min(64, limit - len(ids)), temperature=0.8,
                             top_k=50, generator=torch.Generator(device).manual_seed(seed))
    return tokenizer.decode(ids + [column.item() for column in columns])

# ---- The script


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # a log file has each line at once
    o = parse_options()

    # This process alone, or one of torchrun's, on a GPU each if there are GPUs. Rank 0 speaks and writes.
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    own_gpu = world_size > 1 and o.device in ("auto", "cuda") and torch.cuda.is_available()
    device = pick_device(f"cuda:{os.environ['LOCAL_RANK']}" if own_gpu else o.device)
    if own_gpu:
        torch.cuda.set_device(device)
    if world_size > 1:  # an evaluation, which the others wait for, may take long; torchrun sees to the dead
        dist.init_process_group("nccl" if own_gpu else "gloo", timeout=timedelta(hours=2))
    if rank > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)

    # The folder, which has one run at a time
    ckpt_path = Path(o.out_dir, "ckpt.pt")
    if not o.overfit and rank == 0:
        lock = lock_folder(ckpt_path.parent)
        if o.init_from == "resume":
            use_newest_whole(ckpt_path)
        elif not o.overwrite and (ckpt_path.exists() or previous_of(ckpt_path).exists()):
            raise InputError(f"{o.out_dir} has a checkpoint: go on from it with --init_from=resume, choose "
                             "another --out_dir, or start over with --overwrite=True")
    over_ranks(torch.zeros(1, device=device)).item()  # the others wait for rank 0

    # A run that resumes keeps its options, but for those that don't change what is trained.
    if o.init_from == "resume":
        checkpoint = load_checkpoint(ckpt_path, check=False)  # rank 0 has checked it
        state = {"optimizers", "scaler", "rng", "data", "curve", "options", "step"}
        if not state <= set(checkpoint) or set(checkpoint["options"]) != set(vars(o)):
            raise InputError(f"{ckpt_path} has weights, but not all the state of a run of this train.py: use "
                             f"another --out_dir and --init_from={ckpt_path}")
        saved = Options(**checkpoint["options"])
        o = parse_options(default=replace(saved, out_dir=o.out_dir, init_from="resume", overwrite=False))
        for name, before in vars(saved).items():
            if getattr(o, name) != before and name not in RESUMABLE:
                raise InputError(f"{name} is {before} in {ckpt_path} and can't change: leave it out, or "
                                 "start anew in another --out_dir")
            if getattr(o, name) != before:
                print(f"{name}: {before} -> {getattr(o, name)}")
        if checkpoint["step"] >= o.max_iters:
            raise InputError(f"{ckpt_path} is at step {checkpoint['step']} of {o.max_iters}: raise max_iters")
    if o.gradient_accumulation_steps % world_size:
        raise InputError(f"gradient_accumulation_steps is {o.gradient_accumulation_steps}, it must be a "
                         f"multiple of torchrun's {world_size} processes, which share it")

    # Precision: the fastest that is worth it
    names = ["float32", "bfloat16", "float16"][:3 if device.type == "cuda" else 2]
    names = names if o.dtype == "auto" else [o.dtype]
    peak = {name: matmul_peak(device, getattr(torch, name)) for name in names}
    if o.dtype == "auto":
        o.dtype = pick_dtype(peak)
        o.dtype = names[int(over_ranks(torch.tensor(names.index(o.dtype), device=device), dist.ReduceOp.MIN))]
    autocast = nullcontext() if o.dtype == "float32" else torch.autocast(device.type, getattr(torch, o.dtype))
    scaler = torch.amp.GradScaler(device.type, enabled=o.dtype == "float16")  # else small gradients are zero
    print(f"device: {world_size} x {device.type}, {o.dtype}, matmul peak {peak[o.dtype] / 1e12:.2f} TFLOP/s")

    # Model
    if o.init_from == "scratch":
        if o.model not in PRESETS:
            raise InputError(f"model {o.model!r} is no preset: choose one of {', '.join(PRESETS)}")
        torch.manual_seed(o.seed)
        model = SmolLM(PRESETS[o.model]).to(device)
        tokenizer = load_tokenizer(o.tokenizer) if o.tokenizer else None
    else:
        source = ckpt_path if o.init_from == "resume" else local_path(o.init_from)
        if o.tokenizer and o.init_from != "resume":
            raise InputError(f"tokenizer is {o.tokenizer}, but {source} brings its own: leave it out")
        model, tokenizer = SmolLM.from_pretrained(source, device), load_tokenizer(source)
    config = model.config
    if o.block_size > config.max_position_embeddings:
        raise InputError(f"block_size is {o.block_size}, the model's context has "
                         f"{config.max_position_embeddings} tokens: lower it")
    if tokenizer:
        check_tokenizer(tokenizer, config)

    # Data: the windows that this run reads, be there more or not
    step_size = o.gradient_accumulation_steps * o.batch_size  # sequences
    window_size = WINDOW // o.block_size  # blocks
    windows = math.ceil(o.max_tokens / WINDOW if o.max_tokens else
                        (1 if o.overfit else o.max_iters) * step_size / window_size)
    folder, meta, tokenizer = prepare_data(o.dataset, o.dataset_config, o.text_column, tokenizer,
                                           config.vocab_size, windows)
    read = meta["windows"][:windows]  # counts of tokens up to the end of each window
    train_tokens = np.memmap(folder / "train.bin", meta["dtype"], "r", shape=read[-1]["train"])
    val_tokens = np.memmap(folder / "val.bin", meta["dtype"], "r", shape=read[0]["val"])
    if o.init_from == "resume" and any(a != b for a, b in zip(read, checkpoint["data"], strict=False)):
        raise InputError(f"dataset {o.dataset!r} is not what it was when {ckpt_path} was saved: bring that "
                         f"back, or start anew with --init_from={ckpt_path} in another --out_dir")
    num_blocks = min((len(train_tokens) - 1) // o.block_size, windows * window_size,
                     (o.max_tokens or 2**63) // o.block_size)
    if not num_blocks:
        raise InputError(f"there are {min(len(train_tokens), o.max_tokens or 2**63)} tokens to train on, less"
                         f" than a block of {o.block_size} and one: lower --block_size or give it more text")
    val_size = min(o.block_size, len(val_tokens) - 1)  # of a block
    val_blocks = range((len(val_tokens) - 1) // val_size)[:o.eval_iters * o.batch_size]
    val_batches = [get_batch(val_tokens, val_blocks[i:i + o.batch_size], val_size, config.vocab_size, device)
                   for i in range(0, len(val_blocks), o.batch_size)]
    print(f"data: {folder}, {num_blocks * o.block_size:,} tokens to train on, {len(val_tokens):,} held out")

    # Optimizers
    if o.init_from == "scratch":
        config.bos_token_id = config.eos_token_id = end_of_text(tokenizer)
    optimizers = make_optimizers(model, o)
    keep_freed_memory()
    compiles = o.compile or (o.compile is None and device.type == "cuda")
    torch.use_deterministic_algorithms(compiles and device.type == "cpu")  # it would add up in any order
    loss_of = torch.compile(Loss(model), dynamic=False) if compiles else Loss(model)  # a graph for each shape
    ddp = DistributedDataParallel(loss_of) if world_size > 1 else loss_of
    tokens_per_step = step_size * o.block_size
    print(f"model: {model.num_parameters():,} parameters; a step is {o.gradient_accumulation_steps} x "
          f"{o.batch_size} sequences of {o.block_size}, {tokens_per_step:,} tokens")

    # State: with the weights, all that a run needs to go on as if it had not stopped
    first_step, curve = 0, []  # the curve is what metrics.jsonl has
    if o.init_from == "resume":
        for i, optimizer in enumerate(optimizers):  # a copy, lest it stays mapped to the file
            optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizers"][i]))
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        for where, rng in checkpoint["rng"].items():
            (torch.cuda if where == "cuda" else torch).set_rng_state(rng)
        first_step, curve = checkpoint["step"], checkpoint["curve"]
        del checkpoint

    stopped_by = []  # Ctrl-C or SIGTERM, which end the run after the step in progress; a second one at once

    def finish_step(signum, frame):
        stopped_by.append(signum)
        if world_size == 1:  # torchrun passes on to its processes what the terminal has sent them already
            signal.signal(signum, signal.SIG_DFL)
        if rank == 0:
            say("finishing this step, then saving", sys.stderr)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, finish_step)

    writes = rank == 0 and not o.overfit
    metrics_path = Path(o.out_dir, "metrics.jsonl") if writes else Path(os.devnull)
    metrics_path.write_text("".join(json.dumps(entry) + "\n" for entry in curve))  # not what is done again

    def log(step, **entry):
        entry = {"step": step, "tokens": step * tokens_per_step, **entry}
        curve.append({name: value for name, value in entry.items() if math.isfinite(value)})  # for JSON
        with open(metrics_path, "a") as file:
            file.write(json.dumps(curve[-1]) + "\n")

    # The loop; its clock stops during evaluations
    bar = tqdm(total=o.max_iters, initial=first_step, unit="step", disable=True if rank else None)
    clock, clocked_step = time.perf_counter(), first_step
    stop, keep = 0, o.init_from == "resume"  # keep what is at ckpt_path, for it is of this run, too
    for step in range(first_step, o.max_iters + 1):
        ends = step == o.max_iters or stop
        evaluated = curve and "val_loss" in curve[-1] and curve[-1]["step"] == step  # before it was resumed
        if writes and (step % o.eval_interval == 0 or ends) and not evaluated:
            paused = time.perf_counter()
            if not all(p.isfinite().all() for p in model.parameters()):
                raise InputError(f"after step {step} not all weights are finite: lower the learning_rate; "
                                 "the last checkpoint is as it was")
            if not stop:
                val_loss = evaluate(loss_of, val_batches, autocast)
                perplexity = math.exp(min(val_loss, 99))
                bits_per_byte = val_loss / math.log(2) * read[0]["val"] / read[0]["val_bytes"]
                log(step, val_loss=val_loss, perplexity=perplexity, bits_per_byte=bits_per_byte)
                best = min((entry["val_loss"] for entry in curve if "val_loss" in entry), default=val_loss)
                say(f"step {step} | validation loss {val_loss:.4f}, best {best:.4f} | perplexity "
                    f"{perplexity:.2f} | {bits_per_byte:.4f} bits per byte")
                say(continue_text(model, tokenizer, o.sample_prompt, o.seed, device))
            if step > first_step:
                save_checkpoint(ckpt_path, {
                    "model": model.state_dict(), "config": asdict(config), "tokenizer": tokenizer.to_str(),
                    "options": asdict(o), "step": step, "data": read, "curve": curve,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "scaler": scaler.state_dict(), "rng": {"cpu": torch.get_rng_state()} | (
                        {"cuda": torch.cuda.get_rng_state()} if device.type == "cuda" else {})}, keep)
                keep = True
                say(f"step {step} | saved {ckpt_path}")
                plot({o.out_dir: curve}, Path(o.out_dir, "loss.png"))
            clock += time.perf_counter() - paused
        if ends:
            break

        # --- a single training step
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(step, o) * group.get("lr_scale", 1)
        share = step_size // world_size  # sequences of this rank: first, first + 1, ...
        first = rank * share + (0 if o.overfit else step * step_size)
        blocks = [block_at(o.seed, place, num_blocks, window_size) for place in range(first, first + share)]
        batches = [get_batch(train_tokens, blocks[i:i + o.batch_size], o.block_size, config.vocab_size,
                             device) for i in range(0, share, o.batch_size)]
        loss = accumulate(ddp, batches, autocast, scaler)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
        # In float16 a gradient may overflow: the step is then left out, and the scaler halves its scale.
        if not loss.isfinite() or (not norm.isfinite() and scaler.get_scale() <= 1):  # waits for the device
            raise InputError(f"step {step + 1} has a loss of {loss} and a gradient of norm {norm}: lower the "
                             "learning_rate; the last checkpoint is as it was")
        if norm.isfinite():
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        stop = int(over_ranks(torch.tensor(max(stopped_by, default=0), device=device), dist.ReduceOp.MAX))
        # ---
        bar.update()
        if step == 0 or (step + 1) % o.log_interval == 0 or o.overfit:
            rate = (step + 1 - clocked_step) * tokens_per_step / (time.perf_counter() - clock)
            clock, clocked_step = time.perf_counter(), step + 1
            mfu = rate * model.flops_per_token(o.block_size) / (peak[o.dtype] * world_size)
            log(step + 1, loss=loss.item(), lr=lr_at(step, o), norm=norm.item(), tok_per_s=rate, mfu=mfu)
            say(f"step {step + 1} | loss {loss:.4f} | lr {lr_at(step, o):.2e} | norm {norm:.2f} | "
                f"{rate:,.0f} tok/s | MFU {mfu:.1%}")
        if o.overfit and loss < OVERFIT_LOSS:
            break
    bar.close()
    if o.overfit and not stop:
        print(f"overfit: the loss of the one batch is {loss:.4f} after {min(step + 1, o.max_iters)} steps")
        if loss >= OVERFIT_LOSS:
            raise InputError(f"{OVERFIT_LOSS} was not reached: try more max_iters, or another learning_rate")
    if world_size > 1:
        over_ranks(torch.zeros(1, device=device)).item()  # a rank that ended would take down one that saves
        dist.destroy_process_group()
    sys.exit(128 + stop if stop else 0)
