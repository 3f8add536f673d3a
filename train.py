"""Train a SmolLM from scratch on real text. A flat script: options, model, data, loop, checkpoint.

    python train.py --model=nano                       # 3M parameters, minutes on two cores
    python train.py --batch_size=8 --max_iters=5000    # the 135M model
    python train.py --init_from=resume                 # go on from out/ckpt.pt
    python train.py --init_from=stable --max_iters=20000   # train longer than was planned
    torchrun --nproc_per_node=8 train.py --gradient_accumulation_steps=64    # on eight GPUs
"""

import lib.early  # noqa: F401 (first: it answers Ctrl-C while the others load)
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
from lib.device import (
    NO_COMPILER,
    flops_per_token,
    has_compiler,
    keep_freed_memory,
    matmul_peak,
    pick_dtype,
)
from lib.faster import compile_blocks, for_training
from lib.muon import Muon
from lib.run import Run, StopSignals, say
from smollm import PRESETS, InputError, SmolLM, load_tokenizer

# ---- Options: the comments are their help


@dataclass
class Options:
    out_dir: cli.HomePath = "out"  # folder of the checkpoint, ckpt.pt
    overwrite: bool = False  # start over in an out_dir that has a checkpoint

    # or resume, from out_dir's ckpt.pt; or stable, from its ckpt-stable.pt, before the decay; or
    # the model of a HuggingFace folder, Hub id, GGUF file or other ckpt.pt
    init_from: cli.HomePath = "scratch"
    model: str = "smollm2-135m"  # from scratch: a preset of smollm.py, as nano, micro, smollm2-360m

    # data

    # stdlib, which is Python's standard library; cosmopedia, fineweb-edu, smollm-corpus or another
    # Hub id; a file or folder of .txt, .md, .py; .jsonl, .ndjson, .json, .csv, .tsv, .parquet; any
    # of these as .gz or .zst
    dataset: cli.HomePath = "stdlib"
    dataset_config: str | None = None  # of a Hub id, where it has several
    text_column: str = "text"  # of the Hub's data, and of files that have columns

    # bytes that are not UTF-8: replace them by U+FFFD, skip the line or row they are in, or fail
    encoding_errors: Literal["replace", "skip", "fail"] = "replace"
    separator: str | None = None  # a line that ends a document of .txt files, as '<|endoftext|>'
    max_tokens: int | None = None  # train on only so many, again and again; None: no limit

    # file, folder or Hub id; None: cosmo2-tokenizer for the Hub's data, else one that is trained on
    # the dataset
    tokenizer: cli.HomePath | None = None
    block_size: int = 512  # tokens in a sequence
    batch_size: int = 8  # sequences in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step, split over all GPUs

    # optimizer; docs/recipe.md has the options of the published recipe

    # from scratch: silent: the blocks begin by adding nothing; published: as SmolLM began
    init: Literal["silent", "published"] = "silent"
    optimizer: Literal["muon", "adamw"] = "muon"  # for the blocks' matrices; AdamW has the rest
    max_iters: int = 5000  # steps

    # the peak, for Muon and AdamW; if AdamW has all, 1e-3 is better, after a warm-up of 10%
    learning_rate: float = 3e-3

    # the embedding's learning rate, as a multiple of that; None: (576 / hidden_size)^2, from 1 to 9
    embedding_lr_scale: float | None = None
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"  # after warm-up; wsd: stable, then decay
    decay_shape: Literal["linear", "sqrt"] = "linear"  # of wsd; sqrt: 1 - sqrt, as published
    warmup_iters: int | None = None  # steps of linear warm-up; None: 2% of max_iters
    decay_iters: int | None = None  # last steps, in which wsd decays; None: 70% of max_iters
    weight_decay: float = 0.01  # of matrices; norms don't decay
    momentum: float = 0.85  # of Muon
    beta1: float = 0.8  # of AdamW
    beta2: float = 0.99  # of AdamW
    grad_clip: float = 1.0  # largest norm of the gradient; 0: don't clip

    # what is shown
    eval_interval: int = 250  # steps between evaluations; each saves a checkpoint
    eval_iters: int = 10  # batches in an evaluation, at most
    log_interval: int = 10  # steps between lines of the log
    sample_prompt: str = "def __init__(self"  # continued at each evaluation

    # machine
    seed: int = 0  # of the initial weights and of the order of the data
    device: str = "auto"  # auto: cuda, else mps, else cpu

    # auto: 16 bits where they are 1.5 times as fast
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"

    # torch.compile; None: on CUDA, and on a CPU if steps times parameters are COMPILE_FROM or more
    compile: bool | None = None

    # check
    overfit: bool = False  # train on one batch until its loss is near zero; saves nothing


# What suits the small presets. The defaults of Options suit the 135M.
PRESET_OPTIONS = {
    "nano": dict(block_size=128, batch_size=16, max_iters=600, eval_interval=60, eval_iters=20),
    "micro": dict(block_size=256, batch_size=16, max_iters=2000, eval_interval=100),
}
OVERFIT_LOSS = 0.05  # near zero
COMPILE_FROM = 10**9  # 300 steps of nano, 8 of the 135M: in fewer a CPU loses time to the compiler


def parse_options() -> tuple[Options, str]:
    """The options, and a line that says where they come from. The command line is read twice:
    --model chooses the defaults, which the rest of it overrides."""
    o = cli.parse(Options, __doc__)
    if o.init_from not in ("scratch", "resume", "stable") and o.model != Options.model:
        raise InputError(f"model is {o.model}, but {o.init_from} brings its own: leave it out")
    if o.init_from != "scratch":
        return o, f"options: {cli.spell(cli.difference(o, Options()))}"
    if o.model not in PRESETS:
        raise InputError(f"model {o.model!r} is no preset: choose one of {', '.join(PRESETS)}")
    preset = replace(Options(), model=o.model, **PRESET_OPTIONS.get(o.model, {}))
    o = cli.parse(Options, __doc__, default=preset)
    given = cli.difference(o, preset)
    of_model = {name: value for name, value in cli.difference(preset, Options()).items()
                if name not in given}
    return o, f"options of {o.model}: {cli.spell(of_model)}; given: {cli.spell(given)}"


def check_options(o: Options) -> Options:
    """The options with warmup_iters and decay_iters filled in. InputError if one is out of
    range."""
    cli.check_range(o, 1, 2**63, "block_size", "batch_size", "gradient_accumulation_steps",
                    "max_iters", "max_tokens", "eval_interval", "eval_iters", "log_interval")
    cli.check_range(o, 0, 2**63, "learning_rate", "embedding_lr_scale", "weight_decay",
                    "grad_clip", "seed", "warmup_iters", "decay_iters")
    cli.check_range(o, 0, 1, "momentum", "beta1", "beta2")
    if o.warmup_iters is None:
        o = replace(o, warmup_iters=o.max_iters // 50)
    if o.decay_iters is None:
        after_warmup = max(0, o.max_iters - o.warmup_iters)
        o = replace(o, decay_iters=min(o.max_iters * 7 // 10, after_warmup))
    decay = o.decay_iters if o.schedule == "wsd" else 0
    if o.warmup_iters + decay > o.max_iters:
        raise InputError(f"warmup_iters {o.warmup_iters} and decay_iters {decay} exceed max_iters "
                         f"{o.max_iters}")
    return o


# ---- The recipe


def lr_at(step: int, o: Options) -> float:
    """The learning rate of a step, counted from 0.

    Linear warm-up, whose last step is at the peak. Then wsd: stable, and at last down to 0, in a
    line or by 1 - sqrt(fraction of decay_iters that is done), as SmolLM (Hägele et al. 2024,
    arXiv:2405.18392); or half a cosine, down to 0; or constant.
    """
    if step < o.warmup_iters:
        return o.learning_rate * (step + 1) / o.warmup_iters
    if o.schedule == "cosine":
        progress = (step - o.warmup_iters) / (o.max_iters - o.warmup_iters)
        return o.learning_rate * (1 + math.cos(math.pi * progress)) / 2
    decay_steps_done = step - (o.max_iters - o.decay_iters)
    if o.schedule == "constant" or decay_steps_done <= 0:
        return o.learning_rate
    progress = decay_steps_done / o.decay_iters
    if o.decay_shape == "sqrt":
        progress = math.sqrt(progress)
    return o.learning_rate * (1 - progress)


def check_rate_of_resumed(saved: Options, o: Options, step: int, run: Run):
    """InputError if the learning rate, having decayed, would rise again."""
    before = lr_at(step - 1, saved)
    after = lr_at(step, o)
    if step <= saved.warmup_iters or after <= before:
        return
    way_out = "leave max_iters and decay_iters as they are"
    if run.stable_path.exists():
        way_out = ("go on from before the decay, with --init_from=stable "
                   f"--max_iters={o.max_iters}")
    raise InputError(
        f"{run.resume_path} is at step {step}, where the learning rate has decayed to "
        f"{before:.2g}; with max_iters {o.max_iters} it would rise again to {after:.2g}: {way_out}")


@torch.no_grad()
def begin_silently(model: SmolLM):
    """Let all blocks add nothing at first: o_proj and down_proj, which write to the residual
    stream, are zero.

    Then the head sees the embedding alone, and as it is tied, the current token is the likeliest to
    come next, by a logit of hidden_size * std. Half of the published std, 1/sqrt(hidden_size),
    halves that.
    """
    for block in model.model.layers:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.mul_(0.5)


def embedding_scale(hidden_size: int) -> float:
    """How much faster the embedding learns than the rest: 9 times in models as narrow as nano
    (192), as fast in those as wide as SmolLM-135M (576); found there and at 384
    (docs/learning.md)."""
    return min(max(1.0, (576 / hidden_size)**2), 9.0)


def make_optimizers(model: SmolLM, o: Options) -> list[torch.optim.Optimizer]:
    """Muon for the blocks' matrices, AdamW for the embedding and the norms; or AdamW for all.

    Muon (Jordan et al. 2024) makes the momentum of each matrix orthogonal, so that a step is
    equally large in all directions. Ours is scaled to change weights about as much as AdamW does,
    so both take the same learning rate. The loop sets it: lr_at(step) * group["lr_scale"].
    """
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
    muon = Muon(matrices, lr=0.0, weight_decay=o.weight_decay, momentum=o.momentum,
                dtype=getattr(torch, o.dtype))
    return [adamw, muon]


def restore(checkpoint: dict, optimizers: list, scaler, device):
    """Set all that a run needs, with the weights, to go on as if it had not stopped. What is set is
    a copy, for the checkpoint's tensors are mapped to its file, which will be replaced."""
    for optimizer, state in zip(optimizers, checkpoint["optimizers"], strict=True):
        optimizer.load_state_dict(copy.deepcopy(state))
    if checkpoint["scaler"]:
        scaler.load_state_dict(checkpoint["scaler"])
    # nothing here draws from it any more, but what you add may: dropout, say
    torch.set_rng_state(checkpoint["rng"]["cpu"].clone())
    if device.type == "cuda" and "cuda" in checkpoint["rng"]:
        torch.cuda.set_rng_state(checkpoint["rng"]["cuda"].clone())


def pays_to_compile(device, num_steps: int, num_parameters: int) -> bool:
    """Whether torch.compile saves more time than it takes. It goes by all steps of a run: if by
    those that are left, a resumed run might round in another way than before."""
    is_long = num_steps * num_parameters >= COMPILE_FROM
    return device.type == "cuda" or (device.type == "cpu" and is_long)


class Loss(torch.nn.Module):
    """Gives only the loss, so that the memory of the logits is free in the backward pass."""
    def __init__(self, model: SmolLM):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model(x, targets=y)[1]


def accumulate(loss_model, batches: list, autocast, scaler) -> torch.Tensor:
    """The backward pass through the micro-batches [(x, y), ...] of a step. Afterwards .grad is the
    gradient of the mean loss over all targets of all ranks. Returns this mean, on the device.

    Targets of -100 don't count. get_batch makes none; a fine-tuning script of yours may.
    """
    world_size = ranks.world_size()
    num_targets = ranks.all_reduce(sum((y != -100).sum() for _, y in batches))
    total = 0.0
    for i, (x, y) in enumerate(batches):
        sync = nullcontext()
        if world_size > 1 and i < len(batches) - 1:
            sync = loss_model.no_sync()  # the ranks average their gradients once, after the last
        with sync, autocast:  # no_sync acts in the forward pass
            loss = loss_model(x, y) * ((y != -100).sum() / num_targets)
        scaler.scale(loss * world_size).backward()  # DistributedDataParallel averages over ranks
        total += loss.detach()
    return ranks.all_reduce(total)


def evaluate(loss_model, batches: list, autocast) -> float:
    """Mean loss in nats per token of batches [(x, y), ...], which may differ in size.

    Without torch.no_grad, for which torch.compile would make another graph than that of training.
    """
    total = 0.0
    for x, y in tqdm(batches, desc="evaluating", leave=False, disable=None):
        with autocast:
            total += loss_model(x, y).item() * y.numel()
    return total / sum(y.numel() for _, y in batches)


def continue_text(model: SmolLM, tokenizer, prompt: str, seed: int, device) -> str:
    """The prompt and up to 64 tokens that the model adds. An empty prompt starts a document."""
    context = model.config.max_position_embeddings
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids[:context // 2]
    if not ids:
        ids = [end_of_text(tokenizer)]
    generator = torch.Generator(device).manual_seed(seed)
    new_ids = model.generate(torch.tensor([ids], device=device), min(64, context - len(ids)),
                             temperature=0.8, top_k=50, generator=generator)
    return tokenizer.decode(ids + [new_id.item() for new_id in new_ids])


# ---- The script: o has the options

if __name__ == "__main__":
    o, origin_of_options = parse_options()
    sys.stdout.reconfigure(line_buffering=True)  # in a file, too

    # Ranks: this process alone, or one of torchrun's. Rank 0 speaks and writes.
    device = ranks.start(o.device)
    is_first = ranks.rank() == 0
    ranks.compare({f"--{name}": value for name, value in vars(o).items()})
    if not is_first:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for as long as the process lives)

    # The run's folder. A run that resumes has the options of its checkpoint, and some may change.
    is_resumed = o.init_from in ("resume", "stable")
    run = Run(Path(o.out_dir), writes=is_first and not o.overfit)
    ranks.on_all(lambda: run.claim(is_resumed))  # from now on no other process writes there
    if is_resumed:
        if o.init_from == "stable":
            ranks.on_all(run.use_stable)
        else:
            ranks.on_all(run.use_newest_whole)  # if ckpt.pt is damaged, the one before it
        checkpoint = ranks.on_all(lambda: run.load(option_names=set(vars(o))))
        saved = Options(**checkpoint["options"])
        default = replace(saved, out_dir=o.out_dir, init_from=o.init_from, overwrite=False)
        o = check_options(cli.parse(Options, __doc__, default))
        run.check_options(saved, o, checkpoint["step"])
        check_rate_of_resumed(saved, o, checkpoint["step"], run)
    else:
        o = check_options(o)
        if not o.overwrite:
            run.check_unused()
        print(origin_of_options)
    if o.gradient_accumulation_steps % ranks.world_size() != 0:
        raise InputError(f"gradient_accumulation_steps is {o.gradient_accumulation_steps}, it must "
                         f"be a multiple of torchrun's {ranks.world_size()} processes, which share "
                         "it")

    # Precision
    if o.dtype == "auto":
        o.dtype = ranks.first_of(pick_dtype(device), device)
    dtype = getattr(torch, o.dtype)
    peak = matmul_peak(device, dtype)  # measured here, in FLOP/s
    autocast = nullcontext()
    if o.dtype != "float32":
        autocast = torch.autocast(device.type, dtype)
    # in float16 the loss is scaled up, or small gradients would vanish
    scaler = torch.amp.GradScaler(device.type, enabled=o.dtype == "float16")
    print(f"device: {ranks.world_size()} x {device.type}, {o.dtype}, matmul peak "
          f"{peak / 1e9:,.1f} GFLOP/s")

    # Model
    if o.init_from == "scratch":
        torch.manual_seed(o.seed)
        config = replace(PRESETS[o.model])  # a copy, which gets the tokenizer's bos and eos below
        model = SmolLM(config).to(device)
        if o.init == "silent":
            begin_silently(model)
        files = {}  # what comes with a model, such as its chat template
        tokenizer = None
        if o.tokenizer:
            with cli.reading(o.tokenizer):
                tokenizer = load_tokenizer(o.tokenizer)
            models.check_fit(tokenizer, model.config)
    else:
        source = run.resume_path if is_resumed else o.init_from
        if o.tokenizer and not is_resumed:
            raise InputError(f"tokenizer is {o.tokenizer}, but {source} brings its own: leave it "
                             "out")
        bundle = models.load(source, device)
        model = bundle.model
        tokenizer = bundle.tokenizer
        files = bundle.files
        if not is_resumed:
            files = models.files_for_training(bundle)
    config = model.config
    if o.block_size > config.max_position_embeddings:
        raise InputError(f"block_size is {o.block_size}, the model's context has "
                         f"{config.max_position_embeddings} tokens: lower it")

    # Data: text is made into tokens in windows of WINDOW tokens, so that a short run needs only the
    # first few. A window is cut into blocks of block_size tokens, which are read in random order.
    sequences_per_step = o.gradient_accumulation_steps * o.batch_size
    tokens_per_step = sequences_per_step * o.block_size
    blocks_per_window = WINDOW // o.block_size
    if o.max_tokens:
        num_windows = math.ceil(o.max_tokens / WINDOW)
    else:
        steps = 1 if o.overfit else o.max_iters
        num_windows = math.ceil(steps * sequences_per_step / blocks_per_window)
    text_source = Source(o.dataset, o.dataset_config, o.text_column, o.encoding_errors, o.separator)
    data = ranks.first_here_first(
        lambda: prepare_data(text_source, tokenizer, config.vocab_size, num_windows))
    # a dict for each window: totals up to its end, and hashes of its tokens
    windows = data.meta["windows"][:num_windows]
    ranks.compare({"the tokens of the text": windows, "the tokenizer": data.tokenizer.to_str(),
                   "the model's config": asdict(config), "the checkpoint": run.curve})
    tokenizer = data.tokenizer
    if is_resumed:
        run.check_data(checkpoint["data"], windows, o.dataset)
    elif o.init_from == "scratch":
        config.bos_token_id = end_of_text(tokenizer)  # <|endoftext|> stands between documents,
        config.eos_token_id = end_of_text(tokenizer)  # so it both begins and ends them

    train_tokens = data.read("train", num_windows)
    num_blocks = min((len(train_tokens) - 1) // o.block_size, num_windows * blocks_per_window)
    if o.max_tokens:
        num_blocks = min(num_blocks, o.max_tokens // o.block_size)
    if num_blocks == 0:
        raise InputError(f"there are {len(train_tokens)} tokens to train on (max_tokens is "
                         f"{o.max_tokens}), less than a block of {o.block_size} and one: lower "
                         "--block_size or give it more text")

    val_tokens = data.read("val", 1)  # of the first window: the same for runs of any length
    val_block_size = min(o.block_size, len(val_tokens) - 1)
    num_val_blocks = min((len(val_tokens) - 1) // val_block_size, o.eval_iters * o.batch_size)
    val_batches = []
    for i in range(0, num_val_blocks, o.batch_size):
        blocks = range(i, min(i + o.batch_size, num_val_blocks))
        val_batches.append(get_batch(val_tokens, blocks, val_block_size, config.vocab_size, device))
    print(f"data: {data.folder}, {num_blocks * o.block_size:,} tokens to train on, "
          f"{len(val_tokens):,} held out")

    # Optimizers
    if o.embedding_lr_scale is None:
        o.embedding_lr_scale = embedding_scale(config.hidden_size)
    optimizers = make_optimizers(model, o)

    # Speed
    keep_freed_memory()  # on a CPU: a step takes the memory of the one before it
    fast_model = for_training(model)  # the same parameters
    loss_model = Loss(fast_model)  # what evaluates
    if o.compile is None:
        o.compile = pays_to_compile(device, o.max_iters, model.num_parameters())
    if o.compile and not has_compiler(device):
        print(NO_COMPILER)
    elif o.compile and device.type == "cpu":
        compile_blocks(fast_model)
    elif o.compile:
        loss_model = torch.compile(loss_model, dynamic=False)  # a graph for each shape of batches
    train_model = loss_model  # what trains: with several ranks, it averages their gradients
    if ranks.world_size() > 1:
        train_model = DistributedDataParallel(loss_model)
    print(f"model: {model.num_parameters():,} parameters; a step is "
          f"{o.gradient_accumulation_steps} x {o.batch_size} sequences of {o.block_size}, "
          f"{tokens_per_step:,} tokens")

    first_step = 0
    if is_resumed:
        restore(checkpoint, optimizers, scaler, device)
        first_step = checkpoint["step"]
        del checkpoint
    run.begin()
    signals = StopSignals(is_alone=ranks.world_size() == 1, speaks=is_first)
    stop_signal = 0  # the largest that any rank has received
    seconds = 0.0  # of the steps since the last line of the log
    logged_step = first_step
    hide_bar = None if is_first else True  # None: hide it where there is no terminal
    bar = tqdm(total=o.max_iters, initial=first_step, unit="step", disable=hide_bar)

    # step is the number of steps that are done. The last pass only evaluates and saves.
    for step in range(first_step, o.max_iters + 1):
        is_last = step == o.max_iters or stop_signal != 0

        # Evaluate and save, which rank 0 does; the others wait for it in their next step.
        is_stable = o.schedule == "wsd" and step == o.max_iters - o.decay_iters
        is_due = step % o.eval_interval == 0 or is_stable or is_last
        if run.writes and is_due and not run.was_evaluated_at(step):
            if not all(p.isfinite().all() for p in model.parameters()):
                raise InputError(f"after step {step} not all weights are finite: lower the "
                                 "learning_rate; the last checkpoint is as it was")
            if not stop_signal:  # else save at once
                val_loss = evaluate(loss_model, val_batches, autocast)
                perplexity = math.exp(min(val_loss, 99))  # of a loss above 709, exp overflows
                tokens_per_byte = windows[0]["val"] / windows[0]["val_bytes"]
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
                    "model": model.state_dict(),
                    "config": asdict(config),
                    "tokenizer": tokenizer.to_str(),
                    "files": files,
                    "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                    "scaler": scaler.state_dict(),
                    "rng": rng,
                    "options": asdict(o),
                    "step": step,
                    "data": windows,
                    "curve": run.curve,
                }, is_stable)
                say(f"step {step} | saved {run.path}")
        if is_last:
            break

        # --- a single training step
        started = time.perf_counter()
        lr = lr_at(step, o)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr * group.get("lr_scale", 1)

        # this rank's sequences of all that the run reads: first, first + 1, ...
        sequences_per_rank = sequences_per_step // ranks.world_size()
        first = ranks.rank() * sequences_per_rank
        if not o.overfit:
            first += step * sequences_per_step
        batches = []
        for i in range(first, first + sequences_per_rank, o.batch_size):
            blocks = [block_at(o.seed, sequence, num_blocks, blocks_per_window)
                      for sequence in range(i, i + o.batch_size)]
            batches.append(get_batch(train_tokens, blocks, o.block_size, config.vocab_size, device))

        loss = accumulate(train_model, batches, autocast, scaler)
        for optimizer in optimizers:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
        # In float16 a gradient may overflow. Then both optimizers leave the step out, and the
        # scaler halves its scale. In other dtypes that scale is 1, and it is an error.
        overflows = not norm.isfinite()  # waits for the device, so the time below is real
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
            # model FLOPs utilization: the share of the matmul peak that was used
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
    ranks.barrier(device)  # until rank 0 has saved: torchrun ends all once one exits non-zero
    ranks.stop()
    if stop_signal:
        sys.exit(128 + stop_signal)  # as a shell tells of it
