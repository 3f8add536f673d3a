"""Documents: the texts of a dataset, as streams whose place can be saved and found again.

find_files lists the files of a dataset here, and says what it leaves out. FileStream reads their
documents, HubStream those of a dataset on the Hub. Of a row only its text is read, and as it
stands: no type is guessed, and what the other columns hold does not matter.
"""

import codecs
import copy
import csv
import gzip
import io
import json
import math
import os
import random
import re
import shutil
import sysconfig
import tempfile
import zlib
from collections import Counter, defaultdict
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow
import pyarrow.parquet
from datasets import load_dataset

from lib.cli import in_one_line, reading
from smollm import InputError

OPEN_FILES = 8  # that are read at a time
ROWS = 200  # documents that are read at once
HELD_OUT = 200  # of so many documents, one is held out
LONG = 16_000  # bytes: where a text file is cut into documents, at a line's end
LONG_SEPARATED = 1_000_000  # the same, where a separator tells documents apart
END_OF_TEXT = "<|endoftext|>"
CSV_LIMIT = 2**31 - 1  # bytes of a cell; Python's own limit is 131,072
COMPRESSIONS = (".gz", ".zst")
CORPUS = "HuggingFaceTB/smollm-corpus"
HUB = {  # name: (share of the tokens, Hub id, config) of each part; the shares of SmolLM's recipe
    "cosmopedia": [(1.0, CORPUS, "cosmopedia-v2")],
    "fineweb-edu": [(1.0, CORPUS, "fineweb-edu-dedup")],
    "smollm-corpus": [(0.70, CORPUS, "fineweb-edu-dedup"), (0.15, CORPUS, "cosmopedia-v2")],
}
# Names of a dataset's parts that are not for training, as the Hub knows them
OTHER_SPLITS = {"test", "testing", "eval", "evaluation", "validation", "valid", "val", "dev"}


@dataclass
class Source:
    """Where the text is, and how it is read: options of train.py."""
    dataset: str
    config: str | None = None
    column: str = "text"
    encoding_errors: str = "replace"
    separator: str | None = None

    @property
    def is_on_hub(self) -> bool:
        is_id = self.dataset.count("/") == 1 and split_suffix(self.dataset)[0] not in READERS
        return not Path(self.dataset).exists() and (self.dataset in HUB or is_id)

    @property
    def hint(self) -> str:
        """What to do when it can't be read."""
        if not self.is_on_hub:
            return ""
        return ("; see --dataset_config and --text_column, or do without the Hub: give a file or "
                "folder of your own, --dataset=PATH")


@dataclass
class File:
    """A file of a dataset. Its name is that within the dataset, its kind a suffix of READERS."""
    path: Path
    name: str
    kind: str
    compression: str  # a suffix of COMPRESSIONS, or empty
    size: int = 0  # in bytes


# ---- Which files


def split_suffix(name: str) -> tuple[str, str]:
    """The suffix and the compression of a file's name: .JSONL.gz is ('.jsonl', '.gz')."""
    path = Path(name.lower())
    if path.suffix in COMPRESSIONS:
        return Path(path.stem).suffix, path.suffix
    return path.suffix, ""


def find_files(dataset: str) -> tuple[list[File], dict[str, list[str]]]:
    """A dataset's files here, in an order drawn from a seed; and the names of what is left out, by
    the reason."""
    root = Path(dataset)
    kinds = set(READERS)
    not_here = set()
    if dataset == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        kinds = {".py"}
        not_here = {"site-packages", "dist-packages"}
    if not root.exists():
        raise InputError(f"dataset {dataset!r} does not exist: give a file or folder with text, "
                         f"stdlib, or what the Hub has: {', '.join(HUB)} or owner/name")
    if root.is_file():
        kind, compression = split_suffix(root.name)
        if kind not in kinds:
            raise InputError(f"dataset {dataset!r} has the suffix {kind!r}, which is none of "
                             f"{', '.join(sorted(kinds))}: if it is plain text, name it .txt")
        return [File(root, root.name, kind, compression, root.stat().st_size)], {}
    files, left_out = find_in_folder(root, kinds, not_here)
    if dataset == "stdlib":
        left_out = {}  # its other files are none that anybody would look for
    if is_hub_download(root, files):
        files = train_split(files, left_out)
    if not files:
        raise InputError(f"dataset {dataset!r} has no {', '.join(sorted(kinds))} files"
                         f"{describe_left_out(left_out)}: give a file or folder with text")
    files.sort(key=lambda file: file.name)
    random.Random(0).shuffle(files)
    return files, left_out


def find_in_folder(root: Path, kinds: set[str],
                   not_here: set[str]) -> tuple[list[File], dict[str, list[str]]]:
    """The files of these kinds, and the names of others, by the reason; nothing of folders whose
    names are in not_here. Links are followed, and what is reached twice is taken once."""
    files = []
    left_out = defaultdict(list)
    seen = set()  # devices and inodes of folders and files
    for folder, subfolders, names in os.walk(root, onerror=cant_be_listed, followlinks=True):
        if is_seen(os.stat(folder), seen):
            subfolders.clear()
            continue
        left_out["hidden"] += [name for name in subfolders + names if name.startswith(".")]
        subfolders[:] = sorted(name for name in subfolders
                               if not name.startswith(".") and name not in not_here)
        for name in sorted(names):
            path = Path(folder, name)
            kind, compression = split_suffix(name)
            if name.startswith("."):
                continue
            if kind not in kinds:
                left_out["of other kinds"].append(name)
            elif not path.is_file():
                left_out["no files, or links to nothing"].append(name)
            elif is_seen(path.stat(), seen):
                left_out["links to what is there already"].append(name)
            else:
                relative = path.relative_to(root).as_posix()
                files.append(File(path, relative, kind, compression, path.stat().st_size))
    return files, left_out


def is_seen(stat: os.stat_result, seen: set) -> bool:
    """Whether it is among the seen, where it is from now on."""
    key = (stat.st_dev, stat.st_ino)
    if key in seen:
        return True
    seen.add(key)
    return False


def cant_be_listed(error: OSError):
    raise InputError(f"folder {error.filename}: can't be read: {error.strerror}") from error


def is_hub_download(root: Path, files: list[File]) -> bool:
    """Whether a folder is, by what else it holds, the download of a dataset of the Hub."""
    card = root / "README.md"
    if card.is_file():
        with open(card, "rb") as file:
            if file.read(4) in (b"---\n", b"---\r"):
                return True
    is_shard = re.compile(r"-\d{5}-of-\d{5}")
    marks = (".gitattributes", ".cache/huggingface", "dataset_infos.json", "dataset_info.json")
    return (any((root / mark).exists() for mark in marks)
            or any(is_shard.search(file.name) for file in files))


def train_split(files: list[File], left_out: dict[str, list[str]]) -> list[File]:
    """The files of a Hub download to train on: not its card, and not its other splits."""
    def words(file: File) -> set[str]:
        return set(re.split(r"[^a-z]+", file.name.lower()))

    has_train = any("train" in words(file) for file in files)
    taken = []
    for file in files:
        if file.name in ("README.md", "dataset_infos.json", "dataset_info.json"):
            left_out["about the dataset"].append(file.name)
        elif has_train and words(file) & OTHER_SPLITS and "train" not in words(file):
            left_out["of other splits than train"].append(file.name)
        else:
            taken.append(file)
    return taken


def describe(files: list[File], left_out: dict[str, list[str]]) -> str:
    """So many files and megabytes of each kind, and what is left out."""
    sizes = defaultdict(list)
    for file in files:
        sizes[file.kind + file.compression].append(file.size)
    parts = []
    for kind, of_kind in sorted(sizes.items()):
        files_of_kind = "file" if len(of_kind) == 1 else "files"
        parts.append(f"{len(of_kind):,} {kind} {files_of_kind} ({sum(of_kind) / 1e6:,.1f} MB)")
    return ", ".join(parts) + describe_left_out(left_out)


def describe_left_out(left_out: dict[str, list[str]]) -> str:
    parts = []
    for reason, names in left_out.items():
        if names:
            parts.append(f"{len(names):,} {reason} ({some_of(sorted(names))})")
    if not parts:
        return ""
    return "; left out: " + ", ".join(parts)


def some_of(names: list[str]) -> str:
    if len(names) > 4:
        names = [*names[:3], "..."]
    return ", ".join(names)


# ---- What was read


@dataclass
class Tally:
    """What has been read, and what was left out of it."""
    documents: Counter = field(default_factory=Counter)  # by kind
    without_text: int = 0  # rows whose text is missing, null or empty
    not_utf8: dict = field(default_factory=dict)  # a file's name: what there is, and where
    left_out: dict = field(default_factory=dict)  # a file's name: why
    separated: set = field(default_factory=set)  # names of files with lines of END_OF_TEXT

    def add(self, other: "Tally"):
        self.documents += other.documents
        self.without_text += other.without_text
        self.not_utf8 |= other.not_utf8
        self.left_out |= other.left_out
        self.separated |= other.separated

    def lines(self, source: Source) -> list[str]:
        """What to say of it."""
        kinds = [f"{count:,} of {kind}" for kind, count in sorted(self.documents.items())]
        lines = [f"read {self.documents.total():,} documents: {', '.join(kinds) or 'none'}"]
        if self.without_text:
            lines[0] += f"; {self.without_text:,} without text were left out"
        if self.not_utf8:
            done = "left out" if source.encoding_errors == "skip" else "replaced by U+FFFD"
            places = [f"{name} at {place}" for name, place in sorted(self.not_utf8.items())]
            files = "file has" if len(places) == 1 else "files have"
            lines.append(f"{len(places):,} {files} bytes that are not UTF-8, which were {done} "
                         f"(--encoding_errors), first in {some_of(places)}")
        lines += [f"left out: {reason}" for reason in self.reasons()]
        if self.separated:
            lines.append(f"{some_of(sorted(self.separated))}: lines are {END_OF_TEXT} alone; if "
                         f"they separate documents, give --separator='{END_OF_TEXT}'")
        return lines

    def reasons(self) -> list[str]:
        """Why files were left out; of the first few, for it may be the same with thousands."""
        reasons = [f"{name}: {reason}" for name, reason in sorted(self.left_out.items())]
        if len(reasons) > 4:
            reasons = [*reasons[:3], f"{len(reasons) - 3:,} more files"]
        return reasons


MISSING = object()  # the text of a row that has no such column
SURROGATE = re.compile("[\ud800-\udfff]")  # half a character, which JSON can spell and UTF-8 can't


@dataclass
class Reader:
    """How the rows of files are read: what is asked for, and what was found."""
    source: Source
    tally: Tally

    def decode(self, data: bytes, file: File, place: str, offset: int = 0) -> str | None:
        """UTF-8 as a string. What becomes of other bytes is for encoding_errors to say; None: they
        are left out with the line or row they are in. offset is that of data, within place."""
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            self.note_not_utf8(file, f"{place}byte {offset + error.start:,}")
        if self.source.encoding_errors == "skip":
            return None
        return data.decode("utf-8", "replace")

    def note_not_utf8(self, file: File, place: str):
        if self.source.encoding_errors == "fail":
            raise InputError(f"{file.path}, {place}: it is not UTF-8: convert the file, or give "
                             "--encoding_errors=replace or skip")
        self.tally.not_utf8.setdefault(file.name, place)

    def check(self, value, file: File, place: str) -> str:
        """The text of a row as a string, which is empty if it has none."""
        is_nan = isinstance(value, float) and math.isnan(value)  # as json writes what is missing
        if value is None or value is MISSING or is_nan:
            return ""
        if not isinstance(value, str):
            raise InputError(f"{file.path}, {place}: {self.source.column!r} is {value!r:.50}, it "
                             "must be a string or null: mend it, or choose another --text_column")
        if SURROGATE.search(value):
            self.note_not_utf8(file, place)
            if self.source.encoding_errors == "skip":
                return ""
            return SURROGATE.sub("\ufffd", value)
        return value

    def lacks_column(self, file: File, columns) -> str:
        names = ", ".join(map(str, columns)) or "none"
        return (f"it has no {self.source.column!r}: choose one of its columns with --text_column: "
                f"{names:.200}")


# ---- Readers: each yields (number, text) for the rows of a file, counted from 1, after the first
# `start` of them. The text is as it was found: of any type, None or MISSING.


@contextmanager
def opened(file: File):
    """A file's bytes, decompressed, without a byte order mark; and the place where they begin."""
    with open(file.path, "rb") as raw, ExitStack() as stack:
        stream = raw
        if file.compression == ".gz":
            stream = io.BufferedReader(gzip.GzipFile(fileobj=raw))
        if file.compression == ".zst":
            stream = io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd"))
        if file.compression and file.kind == ".parquet":  # is not read from front to back
            temporary = stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(stream, temporary)
            temporary.seek(0)
            stream = temporary
        offset = 0
        if stream.peek(3)[:3] == codecs.BOM_UTF8:
            offset = len(stream.read(3))
        yield stream, offset


def is_binary(file: File, stream, reader: Reader) -> bool:
    """Whether it begins as no UTF-8 text does. Then it is left out, or that is an error."""
    beginning = stream.peek(1)[:4096]
    is_utf16 = beginning.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if b"\0" not in beginning and not is_utf16:
        return False
    reason = "it is not UTF-8 text: convert it, or take it out"
    if reader.source.encoding_errors == "fail":
        raise InputError(f"{file.path}: {reason}")
    reader.tally.left_out[file.name] = reason
    return True


def read_text(file: File, reader: Reader, start: int):
    """Documents are cut at the ends of lines, when they have LONG bytes, or at each line that is
    the separator."""
    separator = reader.source.separator
    longest = LONG if separator is None else LONG_SEPARATED
    with opened(file) as (stream, offset):
        if is_binary(file, stream, reader):
            return
        number = 0
        document = bytearray()
        is_at_end = False
        while not is_at_end:
            line = read_line(stream)
            is_at_end = line == b""
            is_separator = separator is not None and line.strip() == separator.encode()
            if not is_separator:
                document += line
            is_whole = is_separator or len(document) >= longest
            if is_whole or (is_at_end and (document or number == 0)):
                number += 1
                if number > start:
                    yield number, text_of(bytes(document), file, reader, offset)
                offset += len(document) + (len(line) if is_separator else 0)
                document.clear()


def read_line(stream) -> bytes:
    """A line, or LONG bytes of it; never a part of a character, or of the end of a line."""
    line = stream.readline(LONG)
    if line.endswith(b"\n"):
        return line
    for _ in range(3):
        next_byte = stream.peek(1)[:1]
        continues = b"\x80" <= next_byte < b"\xc0" and line[-1:] >= b"\x80"
        if continues or (line.endswith(b"\r") and next_byte == b"\n"):
            line += stream.read(1)
    return line


def text_of(document: bytes, file: File, reader: Reader, offset: int) -> str:
    """The text of a document of a text file: all ends of lines are \\n."""
    text = reader.decode(document, file, "", offset)
    if text is None:  # leave out the lines that are not UTF-8
        lines = [reader.decode(line, file, "") for line in document.splitlines(keepends=True)]
        text = "".join(line for line in lines if line is not None)
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if f"\n{END_OF_TEXT}\n" in text:
        reader.tally.separated.add(file.name)
    return text


def read_json(file: File, reader: Reader, start: int):
    """A .json file is an array of objects, or has an object a line, as .jsonl and .ndjson have."""
    with opened(file) as (stream, offset):
        if is_binary(file, stream, reader):
            return
        if file.kind == ".json" and stream.peek(1).lstrip().startswith(b"["):
            rows = read_array(file, stream)
        else:
            rows = read_objects(file, reader, stream, offset, start)
        columns = None  # of the first row
        has_column = start > 0  # then it has been seen
        for number, row in rows:
            columns = columns or list(row)
            value = row.get(reader.source.column, MISSING)
            has_column = has_column or value is not MISSING
            if number > start:
                yield number, value
        if columns is not None and not has_column:
            reader.tally.left_out[file.name] = reader.lacks_column(file, columns)


def read_objects(file: File, reader: Reader, stream, offset: int, start: int):
    """Yields (number of the line, object) for each line after `start` that is not blank."""
    for number, line in enumerate(stream, 1):
        text = None
        if number > start:
            text = reader.decode(line, file, "", offset)
        offset += len(line)
        if text is None or not text.strip():
            continue
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{file.path}, line {number:,}: it is no JSON: {in_one_line(error)}: "
                             "mend the line, or take it out") from None
        yield number, as_object(row, file, f"line {number:,}")


def read_array(file: File, stream):
    """Yields (number, object) for each object of an array."""
    decoder = json.JSONDecoder()
    more_text = io.TextIOWrapper(stream, "utf-8", "surrogateescape")  # Reader.check finds these
    text = more_text.read(2**20).lstrip()[1:]
    place = 0  # in text
    number = 0
    while True:
        while place < len(text) and text[place] in " \t\r\n,":
            place += 1
        if text[place:place + 1] == "]":
            return
        try:
            row, place = decoder.raw_decode(text, place)
        except (ValueError, RecursionError) as error:  # or it goes on in what has not been read yet
            more = more_text.read(max(2**20, len(text)))
            if not more:
                raise InputError(f"{file.path}, row {number + 1:,}: it is no JSON: "
                                 f"{in_one_line(error)}: mend the file") from None
            text = text[place:] + more
            place = 0
            continue
        number += 1
        yield number, as_object(row, file, f"row {number:,}")


def as_object(row, file: File, place: str) -> dict:
    if not isinstance(row, dict):
        raise InputError(f"{file.path}, {place}: it is {row!r:.50}, it must be an object with its "
                         "columns: mend it, or name the file .txt to take it as plain text")
    return row


def read_csv(file: File, reader: Reader, start: int):
    """Comma-separated values, or .tsv, separated by tabs. The first row names the columns."""
    csv.field_size_limit(CSV_LIMIT)
    with opened(file) as (stream, offset):
        if is_binary(file, stream, reader):
            return
        delimiter = "\t" if file.kind == ".tsv" else ","
        lines = read_lines(file, reader, stream, offset)
        rows = csv.reader(lines, delimiter=delimiter, strict=True)
        try:
            columns = next(rows, None)
            if columns is None:
                return
            if reader.source.column not in columns:
                reader.tally.left_out[file.name] = reader.lacks_column(file, columns)
                return
            column = columns.index(reader.source.column)
            for number, row in enumerate(rows, 1):
                if number > start:
                    yield number, row[column] if column < len(row) else None
        except csv.Error as error:
            raise InputError(f"{file.path}, line {rows.line_num:,}: {error}: mend the quotes "
                             "there") from None


def read_lines(file: File, reader: Reader, stream, offset: int):
    """Yields the lines of a text."""
    for line in stream:
        text = reader.decode(line, file, "", offset)
        offset += len(line)
        if text is not None:
            yield text


def read_parquet(file: File, reader: Reader, start: int):
    with opened(file) as (stream, _):
        parquet = pyarrow.parquet.ParquetFile(stream, buffer_size=2**20)
        schema = parquet.schema_arrow
        column = reader.source.column
        if column not in schema.names:
            reader.tally.left_out[file.name] = reader.lacks_column(file, schema.names)
            return
        check_is_text(file, schema.field(column))
        number = 0
        for group in range(parquet.num_row_groups):
            num_rows = parquet.metadata.row_group(group).num_rows
            if number + num_rows <= start:
                number += num_rows
                continue
            for batch in parquet.iter_batches(ROWS, [group], [column]):
                # as bytes, since files may hold some that are not UTF-8
                values = batch.column(0).cast(pyarrow.large_string()).cast(pyarrow.large_binary())
                for value in values.to_pylist():
                    number += 1
                    if number > start:
                        text = value
                        if value is not None:
                            text = reader.decode(value, file, f"row {number:,}, ")
                        yield number, text


def check_is_text(file: File, field: pyarrow.Field):
    kind = field.type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pyarrow.types.is_string(kind) or pyarrow.types.is_large_string(kind)
            or pyarrow.types.is_string_view(kind) or pyarrow.types.is_null(kind)):
        raise InputError(f"{file.path}: its column {field.name!r} is of type {field.type}, it must "
                         "be of strings: choose another --text_column")


READERS = {".txt": read_text, ".md": read_text, ".py": read_text, ".jsonl": read_json,
           ".ndjson": read_json, ".json": read_json, ".csv": read_csv, ".tsv": read_csv,
           ".parquet": read_parquet}
ROW = {".jsonl": "line", ".ndjson": "line"}  # what a row is called, where it is not "row"


# ---- Streams: all of them have read(count), the next documents; state() and load_state(), the
# place where they are; close(); and tally


@dataclass
class Document:
    text: str
    is_held_out: bool  # from training, to validate


@lru_cache(maxsize=64)
def drawn_place(source: str, block: int) -> int:
    """Which of HELD_OUT documents is held out. Of the first ones it is the first, so that there is
    one from wherever text comes; of others it is drawn, for files that take turns have their own
    places."""
    if block == 0:
        return 0
    return random.Random(f"{source} {block}").randrange(HELD_OUT)


def next_document(text: str, source: str, num_documents: Counter) -> Document:
    """The next document of a source, whose number is counted in num_documents, from 0."""
    block, place = divmod(num_documents[source], HELD_OUT)
    num_documents[source] += 1
    return Document(text, place == drawn_place(source, block))


@dataclass
class OpenFile:
    number: int  # of the file in its stream
    rows: object  # the iterator of READERS
    num_rows: int  # that were read
    progress: float


class FileStream:
    """The documents of files, of several at a time: each is read as fast as its size asks for, so
    that any stretch of the stream holds of all of them. (As in fair queueing, the next document is
    of the file whose progress, bytes of text over size, is least.)"""
    def __init__(self, files: list[File], source: Source):
        self.files = files
        self.tally = Tally()
        self.reader = Reader(source, self.tally)
        self.num_opened = 0
        self.num_documents = Counter()  # by the reader of their files
        self.open_files = []
        self.progress = 0.0  # of the last document's file, at which those that are opened begin

    def read(self, count: int) -> list[Document]:
        """The next documents, so many, or as there are."""
        found = []
        while len(found) < count:
            while len(self.open_files) < OPEN_FILES and self.num_opened < len(self.files):
                self.open(self.num_opened, 0, self.progress)
                self.num_opened += 1
            if not self.open_files:
                break
            chosen = min(self.open_files, key=lambda open_file: open_file.progress)
            text = self.next_text(chosen)
            if text is None:
                self.open_files.remove(chosen)
            elif text:
                source = READERS[self.files[chosen.number].kind].__name__
                found.append(next_document(text, source, self.num_documents))
        return found

    def open(self, number: int, num_rows: int, progress: float):
        file = self.files[number]
        rows = READERS[file.kind](file, self.reader, num_rows)
        self.open_files.append(OpenFile(number, rows, num_rows, progress))

    def next_text(self, open_file: OpenFile) -> str | None:
        """The text of its next row; empty if that has none, and None at the end."""
        file = self.files[open_file.number]
        try:
            number, value = next(open_file.rows, (0, None))
        except (OSError, EOFError, zlib.error, pyarrow.ArrowException) as error:
            raise InputError(f"{file.path}: can't be read: {in_one_line(error)}: bring a whole "
                             "copy of it, or take it out") from error
        if number == 0:
            return None
        text = self.reader.check(value, file, f"{ROW.get(file.kind, 'row')} {number:,}")
        self.progress = open_file.progress
        open_file.num_rows = number
        open_file.progress += len(text.encode()) / max(1, file.size)
        if text:
            self.tally.documents[file.kind] += 1
        else:
            self.tally.without_text += 1
        return text

    def state(self) -> dict:
        places = [[file.number, file.num_rows, file.progress] for file in self.open_files]
        return {"num_opened": self.num_opened, "open": places, "progress": self.progress,
                "num_documents": dict(self.num_documents)}

    def load_state(self, state: dict):
        self.num_opened = state["num_opened"]
        self.progress = state["progress"]
        self.num_documents = Counter(state["num_documents"])
        self.open_files = []
        for place in state["open"]:
            self.open(*place)

    def close(self):
        for open_file in self.open_files:
            open_file.rows.close()


class HubStream:
    """The documents of a dataset of the Hub, or of what the library datasets reads as one."""
    def __init__(self, name: str, stream, source: Source):
        self.file = File(Path(name), name, "", "")
        self.stream = stream  # a datasets.IterableDataset
        self.tally = Tally()
        self.reader = Reader(source, self.tally)
        self.batches = None
        self.num_rows = 0
        self.num_documents = Counter()
        # A stream tells its place only when it has been read since it was told its place.
        self.place = stream.state_dict()

    def read(self, count: int) -> list[Document]:
        """The next documents: up to so many, none at the end."""
        found = []
        while not found:
            with reading(f"dataset {self.file.name!r}", self.reader.source.hint):
                if self.batches is None:
                    self.batches = self.stream.iter(count)
                batch = next(self.batches, None)
                self.place = self.stream.state_dict()
            if batch is None:
                break
            for value in batch[self.reader.source.column]:
                self.num_rows += 1
                text = self.reader.check(value, self.file, f"row {self.num_rows:,}")
                if text:
                    found.append(next_document(text, self.file.name, self.num_documents))
                else:
                    self.tally.without_text += 1
        if found:
            self.tally.documents[self.file.name] += len(found)
        return found

    def state(self) -> dict:
        return {"num_rows": self.num_rows, "num_documents": dict(self.num_documents),
                "stream": self.place}

    def load_state(self, state: dict):
        self.num_rows = state["num_rows"]
        self.num_documents = Counter(state["num_documents"])
        self.place = copy.deepcopy(state["stream"])
        self.stream.load_state_dict(state["stream"])
        self.batches = None

    def close(self):
        if self.batches is not None:
            self.batches.close()


def open_streams(source: Source, files: list[File]) -> list[tuple]:
    """The parts of a dataset: [(share of the tokens, stream)]."""
    if files:
        return [(1.0, FileStream(files, source))]
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # what matters is raised
    huggingface_hub.logging.set_verbosity_error()
    streams = []
    with reading(f"dataset {source.dataset!r}", source.hint):
        for share, hub_id, config in hub_parts(source):
            stream = load_dataset(hub_id, config, split="train", streaming=True)
            stream = stream.select_columns([source.column])
            streams.append((share, HubStream(hub_id, stream, source)))
    return streams


def hub_parts(source: Source) -> list[tuple]:
    """(share of the tokens, Hub id, config) of each part of a dataset of the Hub."""
    return HUB.get(source.dataset, [(1.0, source.dataset, source.config)])


def read_batches(streams: list[tuple], sizes: list[int]):
    """Yields (i, documents) from the stream i whose size, for the caller to keep, is least for its
    share, until one of them ends: so the parts of a mixture keep their proportion."""
    try:
        while True:
            i = min(range(len(streams)), key=lambda i: sizes[i] / streams[i][0])
            found = streams[i][1].read(ROWS)
            if not found:
                return
            yield i, found
    finally:
        for _, stream in streams:
            stream.close()
