"""Text to tokens: the documents of a dataset, packed end to end in the flat files that train.py reads.

    python tools/prepare.py --dataset=cosmopedia --max_tokens=20_000_000

train.py calls this for what a run will read; by hand it prepares ahead, on a machine without a GPU, say. Text
is streamed, and its tokens are written in windows of 2^24. A window is there when it is whole, whatever stops
the program, and whoever needs more goes on where the last one ended.
"""

import hashlib
import json
import math
import os
import random
import sys
import sysconfig
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import datasets
import huggingface_hub
import numpy as np
import tyro
from datasets import Features, IterableDataset, Value, concatenate_datasets, load_dataset
from filelock import FileLock, Timeout
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm import InputError, load_tokenizer, read_json
from tools.script import one_line_errors

WINDOW = 2**24  # tokens: what is made whole or not at all, and what train.py shuffles within
BATCH = 200  # documents that are read and encoded at once; the first is held out, for validation
CORPUS = "HuggingFaceTB/smollm-corpus"
HUB = {  # name: (share of the tokens, Hub id, config) of each part; the shares are those of SmolLM's recipe
    "cosmopedia": [(1.0, CORPUS, "cosmopedia-v2")],
    "fineweb-edu": [(1.0, CORPUS, "fineweb-edu-dedup")],
    "smollm-corpus": [(0.70, CORPUS, "fineweb-edu-dedup"), (0.15, CORPUS, "cosmopedia-v2")],
}
HUB_TOKENIZER, HUB_VOCAB = "HuggingFaceTB/cosmo2-tokenizer", 49152
LOCAL = {".txt": "text", ".md": "text", ".py": "text", ".jsonl": "json", ".parquet": "parquet"}
SPECIAL_TOKENS = [  # the first ids of SmolLM's vocabulary
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<reponame>", "<file_sep>", "<filename>",
    "<gh_stars>", "<issue_start>", "<issue_comment>", "<issue_closed>", "<jupyter_start>", "<jupyter_text>",
    "<jupyter_code>", "<jupyter_output>", "<jupyter_script>", "<empty_output>"]

# ---- Documents: streams of the library datasets, whose place can be saved and found again


@contextmanager
def reading(dataset: str):
    """Says in one line that a dataset can't be read, whatever its library raises."""
    try:
        yield
    except Exception as error:
        said = " ".join(str(error).split())[:500] or repr(error)
        hint = ("; see --dataset_config and --text_column, or do without the Hub: give a file or folder of "
                "your own, --dataset=PATH" if is_on_hub(dataset) else "")
        raise InputError(f"dataset {dataset!r} can't be read ({said}){hint}") from error


def is_on_hub(dataset: str) -> bool:
    path = Path(dataset)
    return not path.exists() and (dataset in HUB or (dataset.count("/") == 1 and path.suffix not in LOCAL))


def find_files(dataset: str) -> list[Path]:
    """A dataset's files here, shuffled, so that the first of them stand for all."""
    path = Path(sysconfig.get_path("stdlib")) if dataset == "stdlib" else Path(dataset)
    if path.is_file():
        return [path]
    suffixes = {".py"} if dataset == "stdlib" else set(LOCAL)
    files = sorted(file for file in path.rglob("*") if file.suffix in suffixes and file.is_file()
                   and not {"site-packages", "dist-packages"} & set(file.relative_to(path).parts))
    if not files:
        what = f"has no {', '.join(sorted(suffixes))} files" if path.exists() else "does not exist"
        raise InputError(f"dataset {dataset!r} {what}: give a file or folder with text, stdlib, or what the "
                         f"Hub has: {', '.join(HUB)} or owner/name")
    random.Random(0).shuffle(files)
    return files


def read_texts(files: list[str], column: str, alone: bool):
    """Yields {column: text}: text files, cut at line ends in pieces of 16,000 to 32,000 characters."""
    for name in files:
        try:
            with open(name, encoding="utf-8") as file:
                while text := file.read(16000) + file.readline(16000):
                    yield {column: text}
        except UnicodeDecodeError as error:
            if alone:
                raise ValueError(f"it is not UTF-8 text: {error.reason}") from None
            tqdm.write(f"left out {name}, or the rest of it: it is not UTF-8 text", file=sys.stderr)


def open_streams(dataset: str, config: str | None, column: str, files: list[Path]) -> list[tuple]:
    """The parts of a dataset: [(share of the tokens, IterableDataset of {column: str})]."""
    features, shares, streams, kinds = Features({column: Value("string")}), [1.0], [], {}
    for file in files:
        kinds.setdefault(LOCAL.get(file.suffix, "text"), []).append(str(file))
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what matters is raised
    huggingface_hub.logging.set_verbosity_error()
    with reading(dataset):
        for kind, names in kinds.items():
            if kind == "text":
                where = {"files": names, "column": column, "alone": len(files) == 1}
                streams.append(IterableDataset.from_generator(read_texts, features, gen_kwargs=where))
            else:
                streams.append(load_dataset(kind, data_files=names, split="train", streaming=True))
        if not files:
            shares, ids, configs = zip(*HUB.get(dataset, [(1.0, dataset, config)]), strict=True)
            streams = [load_dataset(*where, split="train", streaming=True)
                       for where in zip(ids, configs, strict=True)]
        streams = [stream.select_columns([column]).cast(features) for stream in streams]
        streams = [concatenate_datasets(streams)] if files else streams
    return list(zip(shares, streams, strict=True))


def read_batches(dataset: str, streams: list[tuple], sizes: list[int]):
    """Yields (i, texts) from the stream i whose size, for the caller to keep, is least for its share, until
    one of them ends: so the parts of a mixture keep their proportion."""
    with ExitStack() as stack:
        batches = [stack.enter_context(closing(stream.iter(BATCH))) for _, stream in streams]
        while True:
            i = min(range(len(streams)), key=lambda i: sizes[i] / streams[i][0])
            with reading(dataset):
                batch = next(batches[i], None)
            if batch is None:
                return
            if texts := [text for column in batch.values() for text in column if text]:
                yield i, texts

# ---- Tokens


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


def first_texts(dataset: str, streams: list[tuple], characters: int = 50_000_000):
    """Yields the texts that a tokenizer is trained on."""
    sizes = [0] * len(streams)
    for i, texts in read_batches(dataset, streams, sizes):
        yield from texts
        sizes[i] += sum(map(len, texts))
        if sum(sizes) > characters:
            return


def end_of_text(tokenizer: Tokenizer) -> int:
    """The id of the token that separates documents."""
    for token in ("<|endoftext|>", "<|end_of_text|>", "</s>"):
        if tokenizer.token_to_id(token) is not None:
            return tokenizer.token_to_id(token)
    raise InputError("the tokenizer has no token <|endoftext|> to separate documents: choose another one")


def write_windows(folder: Path, meta: dict, streams: list[tuple], tokenizer: Tokenizer, windows: int):
    """Append to folder's train.bin and val.bin until there are so many windows, or a stream ends. Documents
    are packed end to end, eos after each; what they say of special tokens is encoded as text."""
    counts = dict(meta["windows"][-1]) if meta["windows"] else {"train": 0, "val": 0, "val_bytes": 0}
    eos, dtype = end_of_text(tokenizer), np.dtype(meta["dtype"])
    tokenizer.encode_special_tokens = True
    for (_, stream), state in zip(streams, meta["states"], strict=False):
        stream.load_state_dict(state)
    with (open(folder / "train.bin", "ab") as train, open(folder / "val.bin", "ab") as val,
          tqdm(desc="tokenizing", unit="tok", unit_scale=True, total=windows * WINDOW, disable=None) as bar,
          closing(read_batches(meta["dataset"], streams, meta["sizes"])) as batches):
        train.truncate(counts["train"] * dtype.itemsize)  # drops what came after the last whole window
        val.truncate(counts["val"] * dtype.itemsize)
        while len(meta["windows"]) < windows and not meta["ended"]:
            i, texts = next(batches, (0, []))
            for number, encoding in enumerate(tokenizer.encode_batch_fast(texts, add_special_tokens=False)):
                split, file = ("train", train) if number else ("val", val)
                file.write(np.array([*encoding.ids, eos], dtype).tobytes())
                counts[split] += len(encoding) + 1
                meta["sizes"][i] += len(encoding) + 1
            counts["val_bytes"] += sum(len(text.encode()) for text in texts[:1])
            meta["ended"] = not texts
            bar.update(counts["train"] - bar.n)
            if meta["ended"] or counts["train"] > (len(meta["windows"]) + 1) * WINDOW:
                meta["windows"].append(dict(counts))
                meta["states"] = [stream.state_dict() for _, stream in streams]
                write_whole(folder / "meta.json", json.dumps(meta), train, val)
    tokenizer.encode_special_tokens = False


def write_whole(path: Path, text: str, *files):
    """Write a file that is there only when it, and the files written before it, have reached the disk."""
    with open(f"{path}.tmp", "w", encoding="utf-8") as file:
        file.write(text)
        for written in (*files, file):
            written.flush()
            os.fsync(written.fileno())
    os.replace(f"{path}.tmp", path)


@contextmanager
def locked(path: Path):
    """One process at a time goes on from here, be they the ranks of a machine or runs that share data/."""
    lock = FileLock(f"{path}.lock")  # the system lets go of it when the process dies
    try:
        lock.acquire(timeout=1)
    except Timeout:
        print(f"waiting for another process, which prepares {path}", file=sys.stderr)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def prepare_data(dataset: str, config: str | None, column: str, tokenizer: Tokenizer | None, vocab_size: int,
                 windows: int) -> tuple[Path, dict, Tokenizer]:
    """The folder with a dataset's tokens, at least so many windows of them, or all; its meta.json; and the
    tokenizer: if None is given, cosmo2's for what is on the Hub, else one that is trained on the dataset.
    Both are kept in data/, and made again only for other files (by name, size, time) or tokenizers."""
    on_hub = is_on_hub(dataset)
    files = [] if on_hub else find_files(dataset)
    stats = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    what, name = (dataset if on_hub else stats, config, column), Path(dataset).resolve().name
    Path("data").mkdir(exist_ok=True)
    if tokenizer is None and on_hub and vocab_size >= HUB_VOCAB:
        with reading(dataset):
            tokenizer = load_tokenizer(HUB_TOKENIZER)
    if tokenizer is None:
        path = Path("data", f"{name}-{sha256(repr((what, vocab_size)))[:12]}.json")
        with locked(path):
            if not path.exists():
                texts = first_texts(dataset, open_streams(dataset, config, column, files))
                write_whole(path, train_tokenizer(texts, vocab_size).to_str())
        tokenizer = load_tokenizer(path)
    folder = Path("data", f"{name}-{sha256(repr((what, tokenizer.to_str())))[:12]}")
    with locked(folder):
        folder.mkdir(exist_ok=True)
        dtype = "uint16" if max(tokenizer.get_vocab().values()) < 2**16 else "uint32"
        sizes = [0] * len(HUB[dataset]) if on_hub and dataset in HUB else [0]
        meta = read_meta(folder) or {"dataset": dataset, "dtype": dtype, "ended": False, "windows": [],
                                     "sizes": sizes, "states": []}
        if len(meta["windows"]) < windows and not meta["ended"]:
            write_windows(folder, meta, open_streams(dataset, config, column, files), tokenizer, windows)
    if not meta["windows"][-1]["train"] or meta["windows"][-1]["val"] < 2:
        raise InputError(f"dataset {dataset!r} is empty or too short: to train and to validate takes two "
                         "documents, or a text file of more than 32,000 characters")
    return folder, meta, tokenizer


def read_meta(folder: Path) -> dict | None:
    """The contents of meta.json, if there is one."""
    if not (folder / "meta.json").exists():
        return None
    meta = read_json(folder / "meta.json")
    for split in ("train", "val"):
        size, path = meta["windows"][-1][split] * np.dtype(meta["dtype"]).itemsize, folder / f"{split}.bin"
        if not path.exists() or path.stat().st_size < size:
            raise InputError(f"{path} has less than the {size} bytes that meta.json tells of: delete "
                             f"{folder}, it will be made again")
    return meta


@dataclass
class Options:
    dataset: str = "cosmopedia"  # as in train.py
    dataset_config: str | None = None
    text_column: str = "text"
    tokenizer: str | None = None
    vocab_size: int = HUB_VOCAB  # of the model
    max_tokens: int = WINDOW  # rounded up to whole windows of 2^24


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    o = tyro.cli(Options, description=__doc__, config=(tyro.conf.FlagConversionOff,), use_underscores=True)
    for name in ("vocab_size", "max_tokens"):
        if getattr(o, name) < 1:
            raise InputError(f"{name} is {getattr(o, name)}, it must be at least 1")
    tokenizer = load_tokenizer(o.tokenizer) if o.tokenizer else None
    folder, meta, _ = prepare_data(o.dataset, o.dataset_config, o.text_column, tokenizer, o.vocab_size,
                                   math.ceil(o.max_tokens / WINDOW))
    counts, all_of_it = meta["windows"][-1], ", all of the dataset" if meta["ended"] else ""
    print(f"{folder}: {counts['train']:,} tokens to train on, {counts['val']:,} held out{all_of_it}")
