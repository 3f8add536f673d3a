"""Text to tokens to batches.

prepare_data packs the documents of a dataset end to end into flat files of tokens, in data/. The
text is streamed, and its tokens are written in windows of 2^24. A window is there when it is whole,
whatever stops the program, and whoever needs more goes on where the last one ended. get_batch cuts
batches out of the files, in an order that block_at fixes.
"""

import hashlib
import json
import os
import random
import sys
import sysconfig
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import torch
from datasets import Features, IterableDataset, Value, concatenate_datasets, load_dataset
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from lib.cli import reading
from lib.files import lock, sync, write_whole
from smollm import InputError, load_tokenizer

WINDOW = 2**24  # tokens: what is made whole or not at all, and what training shuffles within
BATCH = 200  # documents that are read and encoded at once; the first of them is held out
CORPUS = "HuggingFaceTB/smollm-corpus"
HUB = {  # name: (share of the tokens, Hub id, config) of each part; the shares of SmolLM's recipe
    "cosmopedia": [(1.0, CORPUS, "cosmopedia-v2")],
    "fineweb-edu": [(1.0, CORPUS, "fineweb-edu-dedup")],
    "smollm-corpus": [(0.70, CORPUS, "fineweb-edu-dedup"), (0.15, CORPUS, "cosmopedia-v2")],
}
HUB_TOKENIZER = "HuggingFaceTB/cosmo2-tokenizer"
HUB_VOCAB = 49152
LOCAL = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "json", ".parquet": "parquet"}
SPECIAL_TOKENS = [  # the first ids of SmolLM's vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>",
    "<filename>", "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>",
    "<jupyter_start>", "<jupyter_text>", "<jupyter_code>", "<jupyter_output>", "<jupyter_script>",
    "<empty_output>"]


@dataclass
class Source:
    """Where the text is: options of train.py."""
    dataset: str
    config: str | None = None
    column: str = "text"

    @property
    def is_on_hub(self) -> bool:
        path = Path(self.dataset)
        is_id = self.dataset.count("/") == 1 and path.suffix not in LOCAL
        return not path.exists() and (self.dataset in HUB or is_id)

    @property
    def hint(self) -> str:
        """What to do when it can't be read."""
        if not self.is_on_hub:
            return ""
        return ("; see --dataset_config and --text_column, or do without the Hub: give a file or "
                "folder of your own, --dataset=PATH")

    def reading(self):
        return reading(f"dataset {self.dataset!r}", self.hint)


# ---- Documents: streams of the library datasets, whose place can be saved and found again


def find_files(dataset: str) -> list[Path]:
    """A dataset's files here, shuffled, so that the first of them stand for all."""
    path = Path(dataset)
    suffixes = set(LOCAL)
    if dataset == "stdlib":
        path = Path(sysconfig.get_path("stdlib"))
        suffixes = {".py"}
    if path.is_file():
        return [path]
    files = []
    for file in sorted(path.rglob("*")):
        folders = set(file.relative_to(path).parts)
        if folders & {"site-packages", "dist-packages"}:
            continue
        if file.suffix in suffixes and file.is_file():
            files.append(file)
    if not files:
        problem = "does not exist"
        if path.exists():
            problem = f"has no {', '.join(sorted(suffixes))} files"
        raise InputError(f"dataset {dataset!r} {problem}: give a file or folder with text, stdlib, "
                         f"or what the Hub has: {', '.join(HUB)} or owner/name")
    random.Random(0).shuffle(files)
    return files


left_out = set()  # names of files that are not UTF-8, of which the rest was not read


def read_texts(files: list[str], column: str, alone: bool):
    """Yields {column: text}: text files, cut at line ends in pieces of 16,000 to 32,000
    characters."""
    for name in files:
        try:
            with open(name, encoding="utf-8") as file:
                while text := file.read(16000) + file.readline(16000):
                    yield {column: text}
        except UnicodeDecodeError as error:
            if alone:
                raise ValueError(f"it is not UTF-8 text: {error.reason}") from None
            left_out.add(name)


def open_streams(source: Source, files: list[Path]) -> list[tuple]:
    """The parts of a dataset: [(share of the tokens, IterableDataset of {column: str})]."""
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what matters is raised
    huggingface_hub.logging.set_verbosity_error()
    with source.reading():
        if files:
            return [(1.0, open_files(source, files))]
        parts = HUB.get(source.dataset, [(1.0, source.dataset, source.config)])
        streams = []
        for share, hub_id, config in parts:
            stream = load_dataset(hub_id, config, split="train", streaming=True)
            streams.append((share, only_text(stream, source.column)))
        return streams


def open_files(source: Source, files: list[Path]) -> IterableDataset:
    """One stream of all files, kind after kind."""
    kinds = {}
    for file in files:
        kinds.setdefault(LOCAL.get(file.suffix, "text"), []).append(str(file))
    streams = []
    for kind, names in kinds.items():
        if kind == "text":
            arguments = {"files": names, "column": source.column, "alone": len(files) == 1}
            features = Features({source.column: Value("string")})
            stream = IterableDataset.from_generator(read_texts, features, gen_kwargs=arguments)
        else:
            stream = load_dataset(kind, data_files=names, split="train", streaming=True)
        streams.append(only_text(stream, source.column))
    return concatenate_datasets(streams)


def only_text(stream: IterableDataset, column: str) -> IterableDataset:
    return stream.select_columns([column]).cast(Features({column: Value("string")}))


def read_batches(source: Source, streams: list[tuple], sizes: list[int]):
    """Yields (i, texts) from the stream i whose size, for the caller to keep, is least for its
    share, until one of them ends: so the parts of a mixture keep their proportion."""
    with ExitStack() as stack:
        batches = [stack.enter_context(closing(stream.iter(BATCH))) for _, stream in streams]
        while True:
            i = min(range(len(streams)), key=lambda i: sizes[i] / streams[i][0])
            with source.reading():
                batch = next(batches[i], None)
            if batch is None:
                return
            texts = [text for text in batch[source.column] if text]
            if texts:
                yield i, texts


# ---- Tokens


def train_tokenizer(texts, vocab_size: int) -> Tokenizer:
    """A byte-level BPE as SmolLM's: its special tokens first, digits one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=sys.stderr.isatty())
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def first_texts(source: Source, streams: list[tuple], characters: int = 50_000_000):
    """Yields the texts that a tokenizer is trained on."""
    sizes = [0] * len(streams)
    for i, texts in read_batches(source, streams, sizes):
        yield from texts
        sizes[i] += sum(len(text) for text in texts)
        if sum(sizes) > characters:
            return


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that separates documents."""
    for token in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        if tokenizer.token_to_id(token) is not None:
            return tokenizer.token_to_id(token)
    raise InputError("the tokenizer has no token <|endoftext|> to separate documents: choose "
                     "another one")


def write_windows(folder: Path, meta: dict, source: Source, streams: list[tuple],
                  tokenizer: Tokenizer, num_windows: int):
    """Append to folder's train.bin and val.bin until there are so many windows, or a stream ends.

    Documents are packed end to end, with eos after each. What they say of special tokens is encoded
    as text. meta, the contents of meta.json, says what is there, and where the streams go on.
    """
    counts = {"train": 0, "val": 0, "val_bytes": 0}  # tokens, and the bytes of the held-out text
    if meta["windows"]:
        counts = dict(meta["windows"][-1])
    eos = end_of_text(tokenizer)
    dtype = np.dtype(meta["dtype"])
    for (_, stream), state in zip(streams, meta["states"], strict=False):
        stream.load_state_dict(state)
    tokenizer.encode_special_tokens = True
    with ExitStack() as stack:
        files = {}
        for split in ("train", "val"):
            files[split] = stack.enter_context(open(folder / f"{split}.bin", "ab"))
            files[split].truncate(counts[split] * dtype.itemsize)  # drops what is no whole window
        batches = stack.enter_context(closing(read_batches(source, streams, meta["sizes"])))
        bar = stack.enter_context(tqdm(desc="tokenizing", unit="tok", unit_scale=True,
                                       total=num_windows * WINDOW, disable=None))
        while len(meta["windows"]) < num_windows and not meta["ended"]:
            i, texts = next(batches, (0, []))
            encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
            for number, encoding in enumerate(encodings):
                split = "val" if number == 0 else "train"
                files[split].write(np.array([*encoding.ids, eos], dtype).tobytes())
                counts[split] += len(encoding) + 1
                meta["sizes"][i] += len(encoding) + 1
            counts["val_bytes"] += sum(len(text.encode()) for text in texts[:1])
            meta["ended"] = not texts
            bar.update(counts["train"] - bar.n)
            if meta["ended"] or counts["train"] > (len(meta["windows"]) + 1) * WINDOW:
                meta["windows"].append(dict(counts))
                meta["states"] = [stream.state_dict() for _, stream in streams]
                for file in files.values():
                    file.flush()
                    sync(Path(file.name))
                write_text(folder / "meta.json", json.dumps(meta))
    tokenizer.encode_special_tokens = False


def say_what_was_left_out(num_files: int):
    if left_out:
        names = ", ".join(sorted(os.path.basename(name) for name in left_out)[:5])
        print(f"{len(left_out)} of {num_files} files are not UTF-8 text, and were left out from "
              f"the first such byte on: {names}")


def write_text(path: Path, text: str):
    with write_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def read_meta(folder: Path) -> dict | None:
    """The contents of meta.json, if there is one."""
    path = folder / "meta.json"
    if not path.exists():
        return None
    with reading(path):
        meta = json.loads(path.read_text("utf-8"))
        counts = meta["windows"][-1]
    for split in ("train", "val"):
        size = counts[split] * np.dtype(meta["dtype"]).itemsize
        tokens = folder / f"{split}.bin"
        if not tokens.exists() or tokens.stat().st_size < size:
            raise InputError(f"{tokens} has less than the {size} bytes that meta.json tells of: "
                             f"delete {folder}, it will be made again")
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


def prepare_data(source: Source, tokenizer: Tokenizer | None, vocab_size: int,
                 num_windows: int) -> Tokens:
    """At least so many windows of a dataset's tokens, or all.

    The tokenizer, if None is given, is cosmo2's for what is on the Hub, else one that is trained on
    the dataset. Tokens and tokenizer are kept in data/, and made again only for other files (by
    name, size and time) or another tokenizer.
    """
    files = []
    identity = source.dataset
    if not source.is_on_hub:
        files = find_files(source.dataset)
        stats = [(str(file), file.stat()) for file in files]
        identity = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
    identity = (identity, source.config, source.column)
    name = Path(source.dataset).resolve().name
    Path("data").mkdir(exist_ok=True)
    if tokenizer is None and source.is_on_hub and vocab_size >= HUB_VOCAB:
        with reading(f"tokenizer {HUB_TOKENIZER}", source.hint):
            tokenizer = load_tokenizer(HUB_TOKENIZER)
    if tokenizer is None:
        path = Path("data", f"{name}-{sha256(repr((identity, vocab_size)))[:12]}.json")
        with lock_data(path):
            if not path.exists():
                texts = first_texts(source, open_streams(source, files))
                write_text(path, train_tokenizer(texts, vocab_size).to_str())
        tokenizer = load_tokenizer(path)

    folder = Path("data", f"{name}-{sha256(repr((identity, tokenizer.to_str())))[:12]}")
    with lock_data(folder):
        folder.mkdir(exist_ok=True)
        meta = read_meta(folder)
        if meta is None:
            num_parts = 1
            if source.is_on_hub and source.dataset in HUB:
                num_parts = len(HUB[source.dataset])
            large = max(tokenizer.get_vocab().values()) >= 2**16
            meta = {"dataset": source.dataset, "dtype": "uint32" if large else "uint16",
                    "ended": False, "windows": [], "sizes": [0] * num_parts, "states": []}
        if len(meta["windows"]) < num_windows and not meta["ended"]:
            left_out.clear()
            streams = open_streams(source, files)
            write_windows(folder, meta, source, streams, tokenizer, num_windows)
            say_what_was_left_out(len(files))
    counts = meta["windows"][-1]
    if counts["train"] == 0 or counts["val"] < 2:
        raise InputError(f"dataset {source.dataset!r} is empty or too short: to train and to "
                         "validate takes two documents, or a text file of more than 32,000 "
                         "characters")
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
