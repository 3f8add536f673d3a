"""Text to tokens to batches.

prepare_data packs the documents of a dataset end to end into flat files of tokens, in data/. The
text is streamed, and its tokens are written in windows of 2^24. A window is there when it is whole,
whatever stops the program, and whoever needs more goes on where the last one ended. get_batch cuts
batches out of the files, in an order that block_at fixes.
"""

import hashlib
import json
import os
import subprocess
import sys
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tqdm import tqdm

from lib.cli import reading
from lib.documents import (
    File,
    Source,
    Tally,
    describe,
    find_files,
    hub_parts,
    open_streams,
    read_batches,
)
from lib.files import lock, remove, sync, write_whole
from smollm import InputError, load_tokenizer

WINDOW = 2**24  # tokens: what is made whole or not at all, and what training shuffles within
HUB_TOKENIZER = "HuggingFaceTB/cosmo2-tokenizer"
HUB_VOCAB = 49152


# ---- Tokens


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """A byte-level BPE as SmolLM's, trained in a process of its own (lib/bpe.py)."""
    command = [sys.executable, "-m", "lib.bpe", str(vocab_size)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent.parent, encoding="utf-8",
                               stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        with suppress(BrokenPipeError):  # if it has died, its exit code says so
            for text in texts:
                process.stdin.write(json.dumps(text) + "\n")
        out, _ = process.communicate()
    except BaseException:
        process.kill()
        raise
    if process.returncode != 0:
        raise InputError(f"the training of a tokenizer of {vocab_size} tokens ended with "
                         f"{process.returncode}: it may have run out of memory")
    return Tokenizer.from_str(out)


def first_texts(streams: list[tuple], characters: int = 50_000_000):
    """Yields the texts that a tokenizer is trained on."""
    sizes = [0] * len(streams)
    for i, documents in read_batches(streams, sizes):
        for document in documents:
            yield document.text
            sizes[i] += len(document.text)
        if sum(sizes) > characters:
            return


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that separates documents."""
    for token in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        if tokenizer.token_to_id(token) is not None:
            return tokenizer.token_to_id(token)
    raise InputError("the tokenizer has no token <|endoftext|> to separate documents: choose "
                     "another one")


def add_windows(folder: Path, meta: dict, streams: list[tuple], tokenizer: Tokenizer,
                num_windows: int):
    """write_windows, after what is there has been checked; and then what was added is."""
    before = len(meta["windows"])
    if before > 0:
        check_windows(folder, meta, 0)
    write_windows(folder, meta, streams, tokenizer, num_windows)
    check_windows(folder, meta, before)


def write_windows(folder: Path, meta: dict, streams: list[tuple], tokenizer: Tokenizer,
                  num_windows: int):
    """Append to folder's train.bin and val.bin until there are so many windows, or a stream ends.

    Documents are packed end to end, with eos after each. What they say of special tokens is encoded
    as text. meta, the contents of meta.json, says what is there, and where the streams go on.
    """
    counts = {"train": 0, "val": 0, "val_bytes": 0}  # tokens, and the bytes of the held-out text
    if meta["windows"]:
        counts = dict(meta["windows"][-1])
    hashes = {"train": hashlib.sha256(), "val": hashlib.sha256()}  # of this window's tokens
    eos = end_of_text(tokenizer)
    dtype = np.dtype(meta["dtype"])
    for (_, stream), state in zip(streams, meta["states"], strict=False):
        stream.load_state(state)
    tokenizer.encode_special_tokens = True
    with ExitStack() as stack:
        files = {}
        for split in ("train", "val"):
            files[split] = stack.enter_context(open(folder / f"{split}.bin", "ab"))
        batches = stack.enter_context(closing(read_batches(streams, meta["sizes"])))
        bar = stack.enter_context(tqdm(desc="tokenizing", unit="tok", unit_scale=True,
                                       total=num_windows * WINDOW, disable=None))
        while len(meta["windows"]) < num_windows and not meta["ended"]:
            i, documents = next(batches, (0, []))
            texts = [document.text for document in documents]
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for document, encoding in zip(documents, encodings, strict=True):
                split = "val" if document.is_held_out else "train"
                tokens = np.array([*encoding.ids, eos], dtype).tobytes()
                files[split].write(tokens)
                hashes[split].update(tokens)
                counts[split] += len(encoding) + 1
                meta["sizes"][i] += len(encoding) + 1
                if document.is_held_out:
                    counts["val_bytes"] += len(document.text.encode())
            meta["ended"] = not documents
            bar.update(counts["train"] - bar.n)
            if meta["ended"] or counts["train"] > (len(meta["windows"]) + 1) * WINDOW:
                for split in hashes:
                    counts[f"{split}_sha256"] = hashes[split].hexdigest()
                    hashes[split] = hashlib.sha256()
                meta["windows"].append(dict(counts))
                meta["states"] = [stream.state() for _, stream in streams]
                for file in files.values():
                    file.flush()
                    sync(Path(file.name))
                write_text(folder / "meta.json", json.dumps(meta))
    tokenizer.encode_special_tokens = False


def check_windows(folder: Path, meta: dict, first: int):
    """InputError unless the tokens on the disk are those that were written, from window `first`
    on. So two processes that wrote at once, where locks don't lock, are found out."""
    dtype = np.dtype(meta["dtype"])
    for split in ("train", "val"):
        with open(folder / f"{split}.bin", "rb") as file:
            end = 0
            if first > 0:
                end = meta["windows"][first - 1][split]
            file.seek(end * dtype.itemsize)
            for window in meta["windows"][first:]:
                tokens = file.read((window[split] - end) * dtype.itemsize)
                end = window[split]
                if hashlib.sha256(tokens).hexdigest() != window[f"{split}_sha256"]:
                    raise InputError(f"{file.name} does not hold the tokens that were written: "
                                     f"delete {folder}, it will be made again")


def write_text(path: Path, text: str):
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_meta(folder: Path) -> dict | None:
    """The contents of meta.json, if there is one, and the files have the sizes that it tells of.

    They are longer after a preparation that was killed. Then what is whole is checked, and the rest
    cut off.
    """
    path = folder / "meta.json"
    if not path.exists():
        for split in ("train", "val"):  # of a preparation that made no window
            (folder / f"{split}.bin").unlink(missing_ok=True)
        return None
    with reading(path, f": delete {folder}, it will be made again"):
        meta = json.loads(path.read_text("utf-8"))
        itemsize = np.dtype(meta["dtype"]).itemsize
        sizes = {split: meta["windows"][-1][split] * itemsize for split in ("train", "val")}
    found = {}
    for split, size in sizes.items():
        tokens = folder / f"{split}.bin"
        found[split] = tokens.stat().st_size if tokens.exists() else 0
        if found[split] < size:
            raise InputError(f"{tokens} has less than the {size} bytes that meta.json tells of: "
                             f"delete {folder}, it will be made again")
    if found != sizes:
        check_windows(folder, meta, 0)
        for split, size in sizes.items():
            os.truncate(folder / f"{split}.bin", size)
    return meta


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def lock_data(path: Path):
    """One process at a time goes on from here, be it of the ranks of a machine or of runs that
    share data/."""
    return lock(Path(f"{path}.lock"), f"waiting for another process, which prepares {path}",
                wait=True)


@dataclass
class Tokens:
    """What prepare_data has made: where it is, what meta.json says of it, and its tokenizer."""
    folder: Path
    meta: dict
    tokenizer: Tokenizer

    def read(self, split: str, num_windows: int):
        """The tokens of so many windows, mapped from the disk. split is train or val."""
        size = self.meta["windows"][:num_windows][-1][split]
        return np.memmap(self.folder / f"{split}.bin", self.meta["dtype"], "r", shape=size)


def identity_of(source: Source, files: list[File]) -> tuple:
    """What a dataset is: the contents of its files, wherever they are, and how they are read."""
    contents = source.dataset
    if files:
        contents = [(file.name, digest) for file, digest in zip(files, digests(files), strict=True)]
    return contents, source.config, source.column, source.encoding_errors, source.separator


def digests(files: list[File]) -> list[str]:
    """The SHA-256 of each file. data/digests keeps them, by path, size and times, so that a
    file is read for it once."""
    path = Path("data", "digests")
    found = []
    with lock_data(path):
        known = {}
        if path.exists():
            with reading(path, ": delete it, it will be made again"):
                known = json.loads(path.read_text("utf-8"))
        before = len(known)
        for file in tqdm(files, desc="reading files", delay=1, leave=False, disable=None):
            stat = file.path.stat()
            key = (f"{os.path.realpath(file.path)} {stat.st_size} {stat.st_mtime_ns} "
                   f"{stat.st_ctime_ns}")
            if key not in known:
                with open(file.path, "rb") as stream:
                    known[key] = hashlib.file_digest(stream, "sha256").hexdigest()
            found.append(known[key])
        if len(known) > before:
            write_text(path, json.dumps(known))
    return found


def prepare_data(source: Source, tokenizer: Tokenizer | None, vocab_size: int,
                 num_windows: int) -> Tokens:
    """At least so many windows of a dataset's tokens, or all.

    The tokenizer, if None is given, is cosmo2's for what is on the Hub, else one that is trained on
    the dataset. Tokens and tokenizer are kept in data/, and made again only for other text or
    another tokenizer.
    """
    files = []
    if source.is_on_hub:
        print(f"dataset {source.dataset}: streamed from the Hub")
    else:
        files, left_out = find_files(source.dataset)
        print(f"dataset {source.dataset}: {describe(files, left_out)}")
    Path("data").mkdir(exist_ok=True)
    name = Path(source.dataset).resolve().name
    identity = identity_of(source, files)
    if tokenizer is None and source.is_on_hub and vocab_size >= HUB_VOCAB:
        with reading(f"tokenizer {HUB_TOKENIZER}", source.hint):
            tokenizer = load_tokenizer(HUB_TOKENIZER)
    if tokenizer is None:
        path = Path("data", f"{name}-{sha256(repr((identity, vocab_size)))[:12]}.json")
        with lock_data(path):
            if not path.exists():
                texts = first_texts(open_streams(source, files))
                write_text(path, train_tokenizer(texts, vocab_size).to_str())
        tokenizer = load_tokenizer(path)

    folder = Path("data", f"{name}-{sha256(repr((identity, tokenizer.to_str())))[:12]}")
    with lock_data(folder):
        folder.mkdir(exist_ok=True)
        meta = read_meta(folder)
        if meta is None:
            num_parts = 1 if files else len(hub_parts(source))
            large = max(tokenizer.get_vocab().values()) >= 2**16
            meta = {"dataset": source.dataset, "dtype": "uint32" if large else "uint16",
                    "ended": False, "windows": [], "sizes": [0] * num_parts, "states": []}
        problem = ""
        reasons = []  # why files were left out
        if len(meta["windows"]) < num_windows and not meta["ended"]:
            streams = open_streams(source, files)
            add_windows(folder, meta, streams, tokenizer, num_windows)
            tally = Tally()
            for _, stream in streams:
                tally.add(stream.tally)
            print("\n".join(tally.lines(source)))
            reasons = tally.reasons()
            if identity_of(source, files) != identity:
                problem = "has changed while it was read: try again"
        counts = meta["windows"][-1]
        if counts["train"] == 0 or counts["val"] < 2:
            problem = ("is empty or too short: to train and to validate takes two documents, or a "
                       "text file of more than 32,000 bytes")
        if problem:
            remove(folder)
            raise InputError("; ".join([f"dataset {source.dataset!r} {problem}", *reasons]))
    return Tokens(folder, meta, tokenizer)


# ---- Batches


@lru_cache(maxsize=4)
def window_order(seed: int, epoch: int, window: int, size: int):
    return np.random.default_rng((seed, epoch, window)).permutation(size)


def block_at(seed: int, sequence: int, num_blocks: int, blocks_per_window: int) -> int:
    """The block of tokens that a run reads as its sequence of that number, counted from 0.

    Every block comes once an epoch: window after window, and within a window in an order that seed
    and epoch fix. It is a pure function, so there is no sampler's state to lose; and where more
    windows are there, the order in the first ones stays as it is.
    """
    epoch, block = divmod(sequence, num_blocks)
    window, place = divmod(block, blocks_per_window)
    start = window * blocks_per_window
    size = min(blocks_per_window, num_blocks - start)
    return start + int(window_order(seed, epoch, window, size)[place])


def get_batch(tokens, blocks, block_size: int, vocab_size: int, device: torch.device):
    """Inputs and targets, each (len(blocks), block_size) int64. Block b begins at token
    b * block_size."""
    rows = np.stack([tokens[b * block_size:(b + 1) * block_size + 1] for b in blocks])
    rows = torch.from_numpy(rows.astype(np.int64))
    if rows.max() >= vocab_size:
        raise InputError(f"the data has a token id {rows.max()}, the model's vocabulary is "
                         f"{vocab_size}: delete data/, it will be made again")
    if device.type == "cuda":
        rows = rows.pin_memory().to(device, non_blocking=True)
    else:
        rows = rows.to(device)
    return rows[:, :-1], rows[:, 1:]
