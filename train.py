"""Train a SmolLM from scratch on real text. A flat script: options, data, model, loop, checkpoint.

    python train.py --batch_size=8 --max_iters=5000    # the 135M model; for a small one see README.md
    python train.py --init_from=resume                 # go on from out/ckpt.pt
"""

import copy
import hashlib
import itertools
import json
import math
import os
import signal
import sys
import sysconfig
import tempfile
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from smollm import (PRESETS, InputError, SmolLM, check_tokenizer, load_checkpoint, load_tokenizer,
                    one_line_errors, pick_device)

# ---- Options: the comments are their help


@dataclass
class Options:
    out_dir: str = "out"  # folder of the checkpoint, ckpt.pt
    overwrite: bool = False  # start over in an out_dir that has a checkpoint
    init_from: str = "scratch"  # scratch, resume (out_dir's ckpt.pt), or a HuggingFace folder, Hub id or *.pt
    model: str = "smollm2-135m"  # from scratch: a preset of smollm.py, nano, smollm-135m, smollm2-360m, ...
    # data
    dataset: str = "stdlib"  # Python's own standard library, a text file, or a folder of .txt, .md, .py files
    tokenizer: str | None = None  # a tokenizer.json, or a folder with one; None: train a BPE on the dataset
    block_size: int = 512  # tokens in a sequence
    batch_size: int = 8  # sequences in a micro-batch
    gradient_accumulation_steps: int = 1  # micro-batches in a step
    # AdamW
    max_iters: int = 5000  # steps
    learning_rate: float = 5e-4  # the peak
    schedule: Literal["wsd", "cosine", "constant"] = "wsd"  # after warm-up; wsd: stable, then 1 - sqrt
    warmup_iters: int | None = None  # steps of linear warm-up; None: 2% of max_iters
    decay_iters: int | None = None  # last steps, in which wsd decays; None: 20% of max_iters
    weight_decay: float = 0.01  # of matrices; norms don't decay
    beta1: float = 0.9
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
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # auto: bfloat16 where its matmul is 1.5x faster
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

# ---- Data: files -> documents -> tokens, packed in two flat files -> blocks -> batches


SPECIAL_TOKENS = [  # the first ids of SmolLM's vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]


def find_files(dataset: str) -> list[Path]:
    path = Path(sysconfig.get_path("stdlib")) if dataset == "stdlib" else Path(dataset)
    if path.is_file():
        return [path]
    suffixes = {".py"} if dataset == "stdlib" else {".txt", ".md", ".py"}
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file()
                   and not {"site-packages", "dist-packages"} & set(file.relative_to(path).parts))
    if not files:
        what = f"has no {', '.join(sorted(suffixes))} files" if path.exists() else "does not exist"
        raise InputError(f"dataset {dataset!r} {what}: name a text file, a folder of some, or 'stdlib'")
    return files


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def read_documents(files: list[Path], doing: str):
    """Yields texts: the files of a folder whole, a single file in pieces of 16,000 to 32,000 characters."""
    for file in tqdm(files, desc=doing, unit="file", disable=None):
        try:
            text, start = file.read_text(encoding="utf-8"), 0
        except UnicodeDecodeError as error:
            if len(files) == 1:
                raise InputError(f"{file} is not UTF-8 text: {error.reason} at byte {error.start}") from None
            tqdm.write(f"{doing}: left out {file.name}, it is not UTF-8 text")
            continue
        while len(files) == 1 and len(text) - start > 32000:
            end = text.find("\n", start + 16000, start + 32000) + 1 or start + 32000
            yield text[start:end]
            start = end
        if start < len(text):
            yield text[start:]


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """A byte-level BPE as SmolLM's: its special tokens first, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS, show_progress=sys.stderr.isatty(),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    return tokenizer


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that separates documents."""
    for token in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        if tokenizer.token_to_id(token) is not None:
            return tokenizer.token_to_id(token)
    raise InputError("the tokenizer has no token <|endoftext|> to separate documents: choose another one")


def write_tokens(documents, tokenizer: Tokenizer, folder: Path, dataset: str):
    """Pack documents end to end, eos after each, in train.bin and, of documents 0, 200, 400, ..., val.bin;
    meta.json says what they are."""
    eos, largest = end_of_text(tokenizer), max(tokenizer.get_vocab().values())
    dtype = "uint16" if largest < 2**16 else "uint32"
    meta = {split: {"documents": 0, "tokens": 0, "bytes": 0} for split in ("train", "val")}
    meta |= {"dataset": dataset, "tokenizer": sha256(tokenizer.to_str()), "dtype": dtype}
    numbers, tokenizer.encode_special_tokens = itertools.count(), True  # a text may speak of <|endoftext|>
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        while texts := list(itertools.islice(documents, 100)):  # encoded on all cores
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for text, encoding in zip(texts, encodings, strict=True):
                counts = {"documents": 1, "tokens": len(encoding) + 1, "bytes": len(text.encode())}
                split, file = ("train", train) if next(numbers) % 200 else ("val", val)
                file.write(np.array([*encoding.ids, eos], dtype=dtype).tobytes())
                meta[split] = {name: meta[split][name] + count for name, count in counts.items()}
    tokenizer.encode_special_tokens = False
    if not meta["train"]["documents"] or meta["val"]["tokens"] < 2:
        raise InputError(f"dataset {dataset!r} is empty or too short: to train and to validate takes two "
                         "documents, or a file of more than 32,000 characters")
    (folder / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def prepare_data(dataset: str, tokenizer: Tokenizer | None, vocab_size: int) -> tuple[Path, Tokenizer]:
    """The folder with the tokens of dataset, and the tokenizer, trained if it is None. Both are kept in data/
    and made again only for other files (by name, size and time) or another tokenizer. What is being written
    has a temporary name until it is whole."""
    files, name = find_files(dataset), Path(dataset).resolve().name
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    Path("data").mkdir(exist_ok=True)
    if tokenizer is None:
        path = Path("data", f"{name}-{sha256(repr((stats, vocab_size)))[:12]}.json")
        if not path.exists():
            train_tokenizer(read_documents(files, "training the tokenizer"), vocab_size).save(f"{path}.tmp")
            os.replace(f"{path}.tmp", path)
        tokenizer = load_tokenizer(path)
    folder = Path("data", f"{name}-{sha256(repr((stats, tokenizer.to_str())))[:12]}")
    if not folder.exists():
        with tempfile.TemporaryDirectory(dir="data", prefix="unfinished-") as unfinished:
            write_tokens(read_documents(files, "tokenizing"), tokenizer, Path(unfinished), dataset)
            if not folder.exists():  # another run may have been faster
                os.rename(unfinished, folder)
    return folder, tokenizer


@lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, num_blocks: int):
    return np.random.default_rng((seed, epoch)).permutation(num_blocks)


def blocks_at(seed: int, first: int, count: int, num_blocks: int) -> list[int]:
    """The blocks that are sequences first, first + 1, ... of all that training reads: every block once an
    epoch, in an order that seed and epoch fix. A pure function: there is no sampler's state to lose."""
    places = (divmod(i, num_blocks) for i in range(first, first + count))
    return [int(epoch_order(seed, epoch, num_blocks)[i]) for epoch, i in places]


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


def matmul_peak(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large matmul on this device, the best of those that half a second allows."""
    n, times = 8192 if device.type == "cuda" else 1024, []
    a = torch.ones(n, n, device=device, dtype=dtype)
    while sum(times[1:]) < 0.5:  # the first one warms up
        start = time.perf_counter()
        (a @ a.T)[0, 0].item()  # waits for the device
        times.append(time.perf_counter() - start)
    return 2 * n**3 / min(times)


def accumulate(model, batches: list, autocast) -> torch.Tensor:
    """Add up the gradients of batches [(x, y), ...] to that of one batch: the gradient of the mean loss over
    all targets that are not -100. Returns this mean, still on the device."""
    valid, total = sum((y != -100).sum() for _, y in batches), 0.0
    for x, y in batches:
        with autocast:
            _, loss = model(x, targets=y)
        loss = loss * ((y != -100).sum() / valid)
        loss.backward()
        total += loss.detach()
    return total


@torch.no_grad()
def evaluate(model, batches: list, autocast) -> float:
    """Mean loss in nats per token."""
    losses, sizes = [], [y.numel() for _, y in batches]
    for x, y in tqdm(batches, desc="evaluating", leave=False, disable=None):
        with autocast:
            losses.append(model(x, targets=y)[1].item())
    return float(np.average(losses, weights=sizes))


def continue_text(model: SmolLM, tokenizer: Tokenizer, prompt: str, seed: int, device) -> str:
    """The prompt and 64 tokens that the model adds. An empty prompt starts from the bos token."""
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids or [model.config.bos_token_id]
    columns = model.generate(torch.tensor([ids], device=device), 64, temperature=0.8, top_k=50,
                             generator=torch.Generator(device).manual_seed(seed))
    return tokenizer.decode(ids + [column.item() for column in columns])


def save_checkpoint(path: Path, checkpoint: dict):
    """Write beside path, sync, rename: path is the old file or the whole new one, whenever the power goes."""
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # RuntimeError: how torch tells of a full disk
        raise InputError(f"{path} can't be written, it is as it was before: {error}") from error
    finally:
        temporary.unlink(missing_ok=True)

# ---- The script


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    sys.stdout.reconfigure(line_buffering=True)  # a log file has each line at once
    o = parse_options()
    ckpt_path = Path(o.out_dir, "ckpt.pt")

    # A run that resumes keeps its options, but for those that don't change what is trained.
    if o.init_from == "resume":
        checkpoint = load_checkpoint(ckpt_path)
        if "optimizer" not in checkpoint:
            raise InputError(f"{ckpt_path} has weights only: use another --out_dir, --init_from={ckpt_path}")
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
    elif ckpt_path.exists() and not o.overwrite and not o.overfit:
        raise InputError(f"{ckpt_path} exists: go on from it with --init_from=resume, choose another "
                         "--out_dir, or start over with --overwrite=True")
    if not o.overfit:
        Path(o.out_dir).mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=o.out_dir).close()  # a folder that is read-only fails now, not later

    # Device and precision
    device = pick_device(o.device)
    peak = {dtype: matmul_peak(device, getattr(torch, dtype)) for dtype in ("float32", "bfloat16")
            if o.dtype in ("auto", dtype)}
    if o.dtype == "auto":
        o.dtype = "bfloat16" if peak["bfloat16"] > 1.5 * peak["float32"] else "float32"
    autocast = torch.autocast(device.type, torch.bfloat16) if o.dtype == "bfloat16" else nullcontext()
    print(f"device: {device}, {o.dtype}, matmul peak {peak[o.dtype] / 1e12:.2f} TFLOP/s")

    # Model
    if o.init_from == "scratch":
        if o.model not in PRESETS:
            raise InputError(f"model {o.model!r} is no preset: choose one of {', '.join(PRESETS)}")
        torch.manual_seed(o.seed)
        model = SmolLM(PRESETS[o.model]).to(device)
        tokenizer = load_tokenizer(o.tokenizer) if o.tokenizer else None
    else:
        source = ckpt_path if o.init_from == "resume" else o.init_from
        if o.tokenizer and o.init_from != "resume":
            raise InputError(f"tokenizer is {o.tokenizer}, but {source} brings its own: leave it out")
        model, tokenizer = SmolLM.from_pretrained(source, device), load_tokenizer(source)
    config = model.config
    if o.block_size > config.max_position_embeddings:
        raise InputError(f"block_size is {o.block_size}, the model's context has "
                         f"{config.max_position_embeddings} tokens: lower it")
    if tokenizer:
        check_tokenizer(tokenizer, config)

    # Data
    folder, tokenizer = prepare_data(o.dataset, tokenizer, config.vocab_size)
    meta = json.loads((folder / "meta.json").read_text())
    train_tokens, val_tokens = (np.memmap(folder / f"{split}.bin", dtype=meta["dtype"], mode="r")
                                for split in ("train", "val"))
    num_blocks = (len(train_tokens) - 1) // o.block_size
    if not num_blocks:
        raise InputError(f"dataset {o.dataset!r} has {len(train_tokens)} tokens to train on, less than a "
                         f"block of {o.block_size} and one: lower --block_size or give it more text")
    val_size = min(o.block_size, len(val_tokens) - 1)  # of a block
    val_blocks = range((len(val_tokens) - 1) // val_size)[:o.eval_iters * o.batch_size]
    val_batches = [get_batch(val_tokens, val_blocks[i:i + o.batch_size], val_size, config.vocab_size, device)
                   for i in range(0, len(val_blocks), o.batch_size)]
    bytes_per_token = meta["val"]["bytes"] / meta["val"]["tokens"]
    print(f"data: {folder}, {len(train_tokens):,} tokens to train on, {len(val_tokens):,} to validate")

    # Optimizer
    if o.init_from == "scratch":
        config.bos_token_id = config.eos_token_id = end_of_text(tokenizer)
    optimizer = torch.optim.AdamW(model.parameter_groups(o.weight_decay), 0.0, (o.beta1, o.beta2), fused=True)
    first_step = 0
    if o.init_from == "resume":
        optimizer.load_state_dict(copy.deepcopy(checkpoint["optimizer"]))  # lest it stays mapped to the file
        first_step = checkpoint["step"]
        del checkpoint
    forward = torch.compile(model) if o.compile or (o.compile is None and device.type == "cuda") else model
    tokens_per_step = o.gradient_accumulation_steps * o.batch_size * o.block_size
    flops_per_token = model.flops_per_token(o.block_size)
    print(f"model: {model.num_parameters():,} parameters; a step is {o.gradient_accumulation_steps} x "
          f"{o.batch_size} sequences of {o.block_size}, {tokens_per_step:,} tokens")

    stopped_by = []  # Ctrl-C or SIGTERM, which end the run after the step in progress; a second one at once

    def finish_step(signum, frame):
        stopped_by.append(signum)
        signal.signal(signum, signal.SIG_DFL)
        tqdm.write("finishing this step, then saving; once more leaves at once", file=sys.stderr)

    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, finish_step)

    # The loop; its clock stops during evaluations
    bar = tqdm(total=o.max_iters, initial=first_step, unit="step", disable=None)
    clock, clocked_step = time.perf_counter(), first_step
    for step in range(first_step, o.max_iters + 1):
        ends = step == o.max_iters or stopped_by
        if not o.overfit and (step % o.eval_interval == 0 or ends):
            paused = time.perf_counter()
            if not stopped_by:
                val_loss = evaluate(forward, val_batches, autocast)
                bits_per_byte = val_loss / math.log(2) / bytes_per_token
                bar.write(f"step {step} | validation loss {val_loss:.4f} | perplexity "
                          f"{math.exp(min(val_loss, 99)):.2f} | {bits_per_byte:.4f} bits per byte")
                bar.write(continue_text(model, tokenizer, o.sample_prompt, o.seed, device))
            if step > first_step:
                save_checkpoint(ckpt_path, {
                    "model": model.state_dict(), "optimizer": optimizer.state_dict(), "options": asdict(o),
                    "config": asdict(config), "tokenizer": tokenizer.to_str(), "step": step})
                bar.write(f"step {step} | saved {ckpt_path}")
            clock += time.perf_counter() - paused
        if ends:
            break

        # --- a single training step
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, o)
        first = 0 if o.overfit else step * o.gradient_accumulation_steps
        blocks = [blocks_at(o.seed, (first + i) * o.batch_size, o.batch_size, num_blocks)
                  for i in range(o.gradient_accumulation_steps)]
        batches = [get_batch(train_tokens, b, o.block_size, config.vocab_size, device) for b in blocks]
        loss = accumulate(forward, batches, autocast)
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.grad_clip or math.inf)
        if not norm.isfinite():  # waits for the device
            raise InputError(f"step {step + 1} has a loss of {loss} and a gradient of norm {norm}: lower the "
                             "learning_rate; the last checkpoint is as it was")
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        # ---
        bar.update()
        if step == first_step or (step + 1) % o.log_interval == 0 or o.overfit:
            loss = loss.item()
            rate = (step + 1 - clocked_step) * tokens_per_step / (time.perf_counter() - clock)
            clock, clocked_step = time.perf_counter(), step + 1
            bar.write(f"step {step + 1} | loss {loss:.4f} | lr {lr_at(step, o):.2e} | norm {norm:.2f} | "
                      f"{rate:,.0f} tok/s | MFU {rate * flops_per_token / peak[o.dtype]:.1%}")
        if o.overfit and loss < OVERFIT_LOSS:
            break
    bar.close()

    if o.overfit:
        print(f"overfit: the loss of the one batch is {loss:.4f} after {min(step + 1, o.max_iters)} steps")
        if loss >= OVERFIT_LOSS:
            raise InputError(f"{OVERFIT_LOSS} was not reached: if neither more max_iters nor another "
                             "learning_rate helps, something is broken")
    sys.exit(128 + stopped_by[0] if stopped_by else 0)
