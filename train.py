"""Train a SmolLM from scratch on real text. A flat script: options, model, data, loop, checkpoint.

    python train.py --model=nano                       # 3M parameters, minutes on two cores
    python train.py --batch_size=8 --max_iters=5000    # the 135M model
    python train.py --init_from=resume                 # go on from out/ckpt.pt
    torchrun --nproc_per_node=8 train.py --gradient_accumulation_steps=64    # on eight GPUs
"""

import copy
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from lib import cli, models, ranks
from lib.data import WINDOW, Source, block_at, end_of_text, get_batch, prepare_data
from lib.device import flops_per_token, keep_freed_memory, matmul_peak, pick_dtype
from lib.muon import Muon
from lib.run import Run, StopSignals, say
from smollm import PRESETS, InputError, SmolLM, load_tokenizer

# ---- Options: the comments are their help


@dataclass
class Options:
    out_dir: str = "out"  # folder of the checkpoint, ckpt.pt
    overwrite: bool = False  # start over in an out_dir that has a checkpoint
    init_from: str = "scratch"  # or resume, from out_dir's ckpt.pt; or from the model in a
    #                             HuggingFace folder, Hub id or other ckpt.pt
    model: str = "smollm2-135m"  # from scratch: a preset of smollm.py, as nano, micro, smollm2-360m
    # data
    dataset: str = "stdlib"  # Python's standard library; cosmopedia, fineweb-edu, smollm-corpus or
    #                          another Hub id; a file or folder of .txt, .md, .py, .jsonl, .parquet
    dataset_config: str | None = None  # of a Hub id, where it has several
    text_column: str = "text"  # of the Hub's data, and of .jsonl and .parquet files
    max_tokens: int | None = None  # train on so many, again and again; None: all that is read
    tokenizer: str | None = None  # file, folder or Hub id; None: cosmo2-tokenizer for the Hub's
    #                               data, else one that is trained on the dataset
    block_size: int = 512  # tokens in a sequence
    batch_size: int = 8  # sequences in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step, of all ranks together
    # optimizer
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; AdamW has the rest
    max_iters: int = 5000  # steps
    learning_rate: float = 2e-3  # the peak, for Muon; AdamW of the 135M does better with 1e-3
    embedding_lr_scale: float = 1.0  # times that for the embedding, which is the head, too
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"  # after warm-up; wsd: stable, then decay
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
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: of 16 bits where that
    #                                                                    is 1.5 times as fast
    compile: bool | None = None  # torch.compile; None: on CUDA only
    # check
    overfit: bool = False  # train on one fixed batch until its loss is near zero; saves nothing


# What a model trains best with, from scratch, where that is not the default, which is the 135M's.
# The rates are those of bench/learning.py.
BEST_OPTIONS = {
    "nano": dict(block_size=256, batch_size=16, max_iters=350, learning_rate=3e-3,
                 embedding_lr_scale=6.0, eval_interval=35),
    "micro": dict(block_size=256, batch_size=16, max_iters=2000, learning_rate=3e-3,
                  eval_interval=100),
}
OVERFIT_LOSS = 0.05  # near zero


def parse_options() -> tuple[Options, str]:
    """The options, and a line that says where they come from. What the command line says goes
    before what is best for the model."""
    o = cli.parse(Options, __doc__)
    if o.init_from != "scratch":
        return o, f"options: {cli.spell(cli.difference(o, Options()))}"
    if o.model not in PRESETS:
        raise InputError(f"model {o.model!r} is no preset: choose one of {', '.join(PRESETS)}")
    best = replace(Options(), model=o.model, **BEST_OPTIONS.get(o.model, {}))
    o = cli.parse(Options, __doc__, default=best)
    given = cli.difference(o, best)
    of_model = {name: value for name, value in cli.difference(best, Options()).items()
                if name not in given}
    return o, f"options of {o.model}: {cli.spell(of_model)}; given: {cli.spell(given)}"


def settle(o: Options) -> Options:
    """The same, with the steps of warm-up and decay settled. InputError if a value is out of
    range."""
    cli.check_range(o, 1, 2**63, "block_size", "batch_size", "gradient_accumulation_steps",
                    "max_iters", "max_tokens", "eval_interval", "eval_iters", "log_interval")
    cli.check_range(o, 0, 2**63, "learning_rate", "embedding_lr_scale", "weight_decay",
                    "grad_clip", "seed", "warmup_iters", "decay_iters")
    cli.check_range(o, 0, 1, "beta1", "beta2")
    if o.warmup_iters is None:
        o = replace(o, warmup_iters=o.max_iters // 50)
    if o.decay_iters is None:
        o = replace(o, decay_iters=o.max_iters // 5)
    decay = o.decay_iters if o.schedule == "wsd" else 0
    if o.warmup_iters + decay > o.max_iters:
        raise InputError(f"warmup_iters {o.warmup_iters} and decay_iters {decay} exceed max_iters "
                         f"{o.max_iters}")
    return o


# ---- The recipe


def lr_at(step: int, o: Options) -> float:
    """The learning rate of a step, counted from 0.

    Linear warm-up, whose last step is at the peak. Then wsd: stable, and at last
    peak * (1 - sqrt(share of decay_iters that is over)), as SmolLM (Haegele et al. 2024,
    arXiv:2405.18392); or half a cosine, ending at 0; or constant.
    """
    if step < o.warmup_iters:
        return o.learning_rate * (step + 1) / o.warmup_iters
    if o.schedule == "cosine":
        progress = (step - o.warmup_iters) / (o.max_iters - o.warmup_iters)
        return o.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    decayed = step - (o.max_iters - o.decay_iters)  # steps of decay that are over
    if o.schedule == "wsd" and decayed > 0:
        return o.learning_rate * (1 - math.sqrt(decayed / o.decay_iters))
    return o.learning_rate


def make_optimizers(model: SmolLM, o: Options) -> list[torch.optim.Optimizer]:
    """Who gets what. The learning rates are set at each step: lr_at, times a group's lr_scale."""
    embedding = model.model.embed_tokens.weight  # and output head
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups = [
        {"params": [embedding], "weight_decay": o.weight_decay, "lr_scale": o.embedding_lr_scale},
        {"params": norms, "weight_decay": 0.0},
    ]
    if o.optimizer == "adamw":
        groups.append({"params": matrices, "weight_decay": o.weight_decay})
    adamw = torch.optim.AdamW(groups, lr=0.0, betas=(o.beta1, o.beta2), fused=True)
    if o.optimizer == "adamw":
        return [adamw]
    return [adamw, Muon(matrices, 0.0, o.weight_decay, getattr(torch, o.dtype))]


class Loss(torch.nn.Module):
    """A model's loss without its logits, whose memory the backward pass can then use."""
    def __init__(self, model: SmolLM):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model(x, targets=y)[1]


def accumulate(loss_model, batches: list, autocast, scaler) -> torch.Tensor:
    """Add up the gradients of micro-batches [(x, y), ...] to that of one batch of all ranks: of the
    mean loss over its targets that are not -100. Returns this mean, on the device."""
    world_size = ranks.world_size()
    num_targets = ranks.all_reduce(sum((y != -100).sum() for _, y in batches))
    total = 0.0
    for i, (x, y) in enumerate(batches):
        sync = nullcontext()
        if world_size > 1 and i < len(batches) - 1:
            sync = loss_model.no_sync()  # the ranks add up their gradients once, after the last
        with sync, autocast:
            loss = loss_model(x, y) * ((y != -100).sum() / num_targets)
        scaler.scale(loss * world_size).backward()  # DistributedDataParallel takes the mean
        total += loss.detach()
    return ranks.all_reduce(total)


@torch.no_grad()
def evaluate(loss_model, batches: list, autocast) -> float:
    """Mean loss in nats per token of batches [(x, y), ...], which may differ in size."""
    total = 0.0
    for x, y in tqdm(batches, desc="evaluating", leave=False, disable=None):
        with autocast:
            total += loss_model(x, y).item() * y.numel()
    return total / sum(y.numel() for _, y in batches)


def continue_text(model: SmolLM, tokenizer, prompt: str, seed: int, device) -> str:
    """The prompt and up to 64 tokens that the model adds. An empty prompt starts from bos."""
    context = model.config.max_position_embeddings
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids[:context // 2]
    if not ids:
        ids = [model.config.bos_token_id]
    generator = torch.Generator(device).manual_seed(seed)
    columns = model.generate(torch.tensor([ids], device=device), min(64, context - len(ids)),
                             temperature=0.8, top_k=50, generator=generator)
    return tokenizer.decode(ids + [column.item() for column in columns])


# ---- The script

if __name__ == "__main__":
    o, where_from = parse_options()
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # a log has each line at once

    # Ranks: this process alone, or one of torchrun's. Rank 0 speaks and writes.
    device = ranks.start(o.device)
    is_first = ranks.rank() == 0
    if not is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)

    # The run's folder. A run that resumes has the options of its checkpoint.
    run = Run(Path(o.out_dir), writes=is_first and not o.overfit)
    run.claim()
    if o.init_from == "resume":
        run.use_newest_whole()
        ranks.barrier(device)  # the others wait for rank 0
        checkpoint = run.load(set(vars(o)))
        saved = Options(**checkpoint["options"])
        default = replace(saved, out_dir=o.out_dir, init_from="resume", overwrite=False)
        o = settle(cli.parse(Options, __doc__, default))
        run.check_options(saved, o, checkpoint["step"])
    else:
        o = settle(o)
        if not o.overwrite:
            run.check_unused()
        print(where_from)
    if o.gradient_accumulation_steps % ranks.world_size() != 0:
        raise InputError(f"gradient_accumulation_steps is {o.gradient_accumulation_steps}, it must "
                         f"be a multiple of torchrun's {ranks.world_size()} processes, which share "
                         "it")

    # Precision
    if o.dtype == "auto":
        o.dtype = ranks.first_of(pick_dtype(device), device)
    dtype = getattr(torch, o.dtype)
    peak = matmul_peak(device, dtype)  # FLOP/s
    autocast = nullcontext()
    if o.dtype != "float32":
        autocast = torch.autocast(device.type, dtype)
    # in float16 small gradients would be zero
    scaler = torch.amp.GradScaler(device.type, enabled=o.dtype == "float16")
    print(f"device: {ranks.world_size()} x {device.type}, {o.dtype}, matmul peak "
          f"{peak / 1e9:,.1f} GFLOP/s")

    # Model
    if o.init_from == "scratch":
        torch.manual_seed(o.seed)
        model = SmolLM(PRESETS[o.model]).to(device)
        tokenizer = None
        if o.tokenizer:
            with cli.reading(o.tokenizer):
                tokenizer = load_tokenizer(o.tokenizer)
            models.check_fit(tokenizer, model.config)
    else:
        source = run.path if o.init_from == "resume" else o.init_from
        if o.tokenizer and o.init_from != "resume":
            raise InputError(f"tokenizer is {o.tokenizer}, but {source} brings its own: leave it "
                             "out")
        model, tokenizer = models.load(source, device)
    config = model.config
    if o.block_size > config.max_position_embeddings:
        raise InputError(f"block_size is {o.block_size}, the model's context has "
                         f"{config.max_position_embeddings} tokens: lower it")

    # Data: as many windows of tokens as this run will read, or all that there are
    step_size = o.gradient_accumulation_steps * o.batch_size  # sequences
    tokens_per_step = step_size * o.block_size
    window_size = WINDOW // o.block_size  # blocks
    if o.max_tokens:
        num_windows = math.ceil(o.max_tokens / WINDOW)
    else:
        steps = 1 if o.overfit else o.max_iters
        num_windows = math.ceil(steps * step_size / window_size)
    text = Source(o.dataset, o.dataset_config, o.text_column)
    data = prepare_data(text, tokenizer, config.vocab_size, num_windows)
    tokenizer = data.tokenizer
    counts = data.meta["windows"][:num_windows]
    if o.init_from == "resume":
        run.check_data(checkpoint["data"], counts, o.dataset)
    elif o.init_from == "scratch":
        config.bos_token_id = end_of_text(tokenizer)
        config.eos_token_id = end_of_text(tokenizer)

    train_tokens = data.read("train", num_windows)
    num_blocks = min((len(train_tokens) - 1) // o.block_size, num_windows * window_size)
    if o.max_tokens:
        num_blocks = min(num_blocks, o.max_tokens // o.block_size)
    if num_blocks == 0:
        raise InputError(f"there are {len(train_tokens)} tokens to train on (max_tokens is "
                         f"{o.max_tokens}), less than a block of {o.block_size} and one: lower "
                         "--block_size or give it more text")

    val_tokens = data.read("val", 1)
    val_block_size = min(o.block_size, len(val_tokens) - 1)
    num_val_blocks = min((len(val_tokens) - 1) // val_block_size, o.eval_iters * o.batch_size)
    val_batches = []
    for i in range(0, num_val_blocks, o.batch_size):
        blocks = range(i, min(i + o.batch_size, num_val_blocks))
        val_batches.append(get_batch(val_tokens, blocks, val_block_size, config.vocab_size, device))
    print(f"data: {data.folder}, {num_blocks * o.block_size:,} tokens to train on, "
          f"{len(val_tokens):,} held out")

    # Optimizers
    optimizers = make_optimizers(model, o)
    keep_freed_memory()
    loss_model = Loss(model)
    if o.compile or (o.compile is None and device.type == "cuda"):
        loss_model = torch.compile(loss_model, dynamic=False)  # a graph for each shape
        if device.type == "cpu":
            torch.use_deterministic_algorithms(True)  # compiled, it would add up in any order
    distributed = loss_model
    if ranks.world_size() > 1:
        distributed = DistributedDataParallel(loss_model)
    print(f"model: {model.num_parameters():,} parameters; a step is "
          f"{o.gradient_accumulation_steps} x {o.batch_size} sequences of {o.block_size}, "
          f"{tokens_per_step:,} tokens")

    # Resume: with the weights, all that a run needs to go on as if it had not stopped
    first_step = 0
    if o.init_from == "resume":
        for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
            optimizer.load_state_dict(copy.deepcopy(state))  # a copy is not mapped to the file
        if checkpoint["scaler"]:
            scaler.load_state_dict(checkpoint["scaler"])
        torch.set_rng_state(checkpoint["rng"]["cpu"])
        if device.type == "cuda" and "cuda" in checkpoint["rng"]:
            torch.cuda.set_rng_state(checkpoint["rng"]["cuda"])
        first_step = checkpoint["step"]
        del checkpoint
    run.begin_log()
    signals = StopSignals(is_alone=ranks.world_size() == 1, speaks=is_first)
    stop_signal = 0  # what one of the ranks has received
    seconds = 0.0  # of the steps since the last line of the log
    logged_step = first_step
    hide_bar = None if is_first else True  # None: hide it where there is no terminal
    bar = tqdm(total=o.max_iters, initial=first_step, unit="step", disable=hide_bar)

    for step in range(first_step, o.max_iters + 1):
        is_last = step == o.max_iters or stop_signal != 0

        # Evaluate and save
        is_due = step % o.eval_interval == 0 or is_last
        if run.writes and is_due and not run.was_evaluated_at(step):
            if not all(p.isfinite().all() for p in model.parameters()):
                raise InputError(f"after step {step} not all weights are finite: lower the "
                                 "learning_rate; the last checkpoint is as it was")
            if not stop_signal:
                val_loss = evaluate(loss_model, val_batches, autocast)
                perplexity = math.exp(min(val_loss, 99))
                tokens_per_byte = counts[0]["val"] / counts[0]["val_bytes"]
                bits_per_byte = val_loss / math.log(2) * tokens_per_byte
                run.log(step=step, tokens=step * tokens_per_step, val_loss=val_loss,
                        perplexity=perplexity, bits_per_byte=bits_per_byte)
                say(f"step {step} | validation loss {val_loss:.4f}, best {run.best_val_loss():.4f} "
                    f"| perplexity {perplexity:.2f} | {bits_per_byte:.4f} bits per byte")
                say(continue_text(model, tokenizer, o.sample_prompt, o.seed, device))
            if step > first_step:
                rng = {"cpu": torch.get_rng_state()}
                if device.type == "cuda":
                    rng["cuda"] = torch.cuda.get_rng_state()
                run.save({
                    "model": model.state_dict(), "config": asdict(config),
                    "tokenizer": tokenizer.to_str(), "options": asdict(o), "step": step,
                    "data": counts, "curve": run.curve, "rng": rng, "scaler": scaler.state_dict(),
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers]})
                say(f"step {step} | saved {run.path}")
        if is_last:
            break

        # --- a single training step
        started = time.perf_counter()
        lr = lr_at(step, o)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)

        share = step_size // ranks.world_size()  # sequences of this rank
        first = ranks.rank() * share
        if not o.overfit:
            first += step * step_size
        batches = []
        for i in range(first, first + share, o.batch_size):
            blocks = [block_at(o.seed, number, num_blocks, window_size)
                      for number in range(i, i + o.batch_size)]
            batches.append(get_batch(train_tokens, blocks, o.block_size, config.vocab_size, device))

        loss = accumulate(distributed, batches, autocast, scaler)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
        # A gradient that overflows in float16 leaves the step out, and the scaler halves its scale.
        overflows = not norm.isfinite()  # waits for the device
        if not loss.isfinite() or (overflows and scaler.get_scale() <= 1):
            raise InputError(f"step {step + 1} has a loss of {loss} and a gradient of norm {norm}: "
                             "lower the learning_rate; the last checkpoint is as it was")
        if not overflows:
            for optimizer in optimizers:
                scaler.step(optimizer)
        scaler.update()
        model.zero_grad(set_to_none=True)
        stop_signal = ranks.largest(signals.received, device)
        seconds += time.perf_counter() - started
        # ---

        # Log
        bar.update()
        if step == 0 or (step + 1) % o.log_interval == 0 or o.overfit:
            tok_per_s = (step + 1 - logged_step) * tokens_per_step / seconds
            mfu = tok_per_s * flops_per_token(model, o.block_size) / (peak * ranks.world_size())
            run.log(step=step + 1, tokens=(step + 1) * tokens_per_step, loss=loss.item(), lr=lr,
                    norm=norm.item(), tok_per_s=tok_per_s, mfu=mfu)
            say(f"step {step + 1} | loss {loss:.4f} | lr {lr:.2e} | norm {norm:.2f} | "
                f"{tok_per_s:,.0f} tok/s | MFU {mfu:.1%}")
            seconds = 0.0
            logged_step = step + 1
        if o.overfit and loss < OVERFIT_LOSS:
            break

    bar.close()
    if o.overfit and not stop_signal:
        steps = min(step + 1, o.max_iters)
        print(f"overfit: the loss of the one batch is {loss:.4f} after {steps} steps")
        if loss >= OVERFIT_LOSS:
            raise InputError(f"{OVERFIT_LOSS} was not reached: try more max_iters, or another "
                             "learning_rate")
    ranks.barrier(device)  # a rank that ended would take down one that saves
    ranks.stop()
    sys.exit(128 + stop_signal if stop_signal else 0)
