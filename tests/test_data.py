"""Text to tokens to batches: lib/data.py and tools/prepare.py."""

import functools
import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lib import data
from lib.data import SPECIAL_TOKENS, block_at, get_batch
from smollm import InputError
from tests.helpers import prepare, run, tokens_in, write_jsonl, write_parquet
from tests.launch import Script


def documents_in(folder: Path, split: str, tokenizer) -> list[str]:
    text = tokenizer.decode(tokens_in(folder, split), skip_special_tokens=False)
    *documents, rest = text.split("<|endoftext|>")
    assert rest == ""
    return documents


# ---- Tokens


def test_tokenizer_has_special_tokens_first_and_digits_one_by_one(tokenizer):
    assert [tokenizer.id_to_token(i) for i in range(17)] == SPECIAL_TOKENS
    assert tokenizer.encode("12345").tokens == ["1", "2", "3", "4", "5"]
    text = "".join(map(chr, range(0x20, 0x3000, 7))) + "🙂\x00\r\n"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_documents_are_packed_with_eos_and_the_first_of_200_is_held_out(tokenizer, here):
    texts = [f"document {i}: {'x' * (i % 7)} <|im_end|> is a special token" for i in range(401)]
    write_parquet(here / "texts.parquet", texts)
    tokens = prepare("texts.parquet", tokenizer)
    held_out = texts[::200]
    trained_on = [text for i, text in enumerate(texts) if i % 200]
    counts = {"val_bytes": sum(map(len, held_out))}
    for split, expected in (("val", held_out), ("train", trained_on)):
        ids = tokens_in(tokens.folder, split)
        counts[split] = len(ids)
        assert np.array_equal(tokens.read(split, 1), ids)
        assert ids.dtype == np.uint16
        assert documents_in(tokens.folder, split, tokenizer) == expected
        assert set(ids[ids < 17]) == {0}  # what a text says of special tokens stays text
    assert tokens.meta["windows"] == [counts]
    assert tokens.meta["ended"]


def test_text_jsonl_and_parquet_give_the_same_tokens(tokenizer, here):
    texts = [f"text {i}: {'many words ' * (i % 5)}" for i in range(250)]
    write_parquet(here / "a.parquet", texts)
    write_parquet(here / "content.parquet", texts, column="content")
    write_jsonl(here / "a.jsonl", texts)
    expected = tokens_in(prepare("a.parquet", tokenizer).folder, "train")
    for name, column in (("a.jsonl", "text"), ("content.parquet", "content")):
        folder = prepare(name, tokenizer, column=column).folder
        assert np.array_equal(tokens_in(folder, "train"), expected)


def test_a_folder_may_have_files_of_all_kinds(tokenizer, here):
    texts = [f"text {i}: {'many words ' * (i % 5)}" for i in range(250)]
    (here / "mixed").mkdir()
    write_parquet(here / "mixed" / "a.parquet", texts[:80])
    write_jsonl(here / "mixed" / "b.jsonl", texts[80:160])
    for i, text in enumerate(texts[160:]):
        suffix = ("txt", "md", "py")[i % 3]
        (here / "mixed" / f"{i}.{suffix}").write_text(text)
    folder = prepare("mixed", tokenizer).folder
    found = documents_in(folder, "train", tokenizer) + documents_in(folder, "val", tokenizer)
    assert sorted(found) == sorted(texts)


def test_a_large_vocabulary_is_stored_as_uint32(here):
    words = {"<|endoftext|>": 0} | {f"w{i}": i for i in range(1, 70000)}
    write_jsonl(here / "a.jsonl", ["w3", "w69999"])
    tokens = prepare("a.jsonl", Tokenizer(WordLevel(words, unk_token="w1")))
    assert tokens.meta["dtype"] == "uint32"
    assert tokens_in(tokens.folder, "train").tolist() == [69999, 0]


def test_a_file_that_is_cut_into_documents_loses_nothing(tmp_path):
    lines = "".join(f"line {i} of the bóok\n" for i in range(9000)) + "no end of line"
    one_line = "one line of text8 " * 10000
    for text in (lines, one_line):
        (tmp_path / "book.txt").write_text(text, encoding="utf-8")
        rows = data.read_texts([tmp_path / "book.txt"], "text", True)
        documents = [row["text"] for row in rows]
        assert "".join(documents) == text
        assert len(documents) > 5
        assert all(16000 <= len(document) <= 32000 for document in documents[:-1])
        if text is lines:
            assert all(document.endswith("\n") for document in documents[:-1])


def test_files_that_are_not_utf_8_are_announced_once_in_one_line(tmp_path):
    """As those of the standard library are, when a newcomer's first run trains a tokenizer and
    then tokenizes."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i}.txt").write_text(f"{i} bottles of beer\n" * 50)
    for i in range(4):
        (folder / f"latin{i}.txt").write_bytes("a naïve text\n".encode("latin-1") * 50)
    result = run(tmp_path, "tools/prepare.py", "--dataset=texts", "--vocab_size=300")
    assert result.returncode == 0, result.stderr
    said = (result.stdout + result.stderr).splitlines()
    announced = [line for line in said if "UTF-8" in line]
    assert announced == ["4 of 304 files are not UTF-8 text, and were left out from the first such "
                         "byte on: latin0.txt, latin1.txt, latin2.txt, latin3.txt"]
    assert not any("latin" in line for line in said if line not in announced)
    again = run(tmp_path, "tools/prepare.py", "--dataset=texts", "--vocab_size=300")
    assert "UTF-8" not in again.stdout + again.stderr


# ---- Prepared once, and by one


def state_of(folder: Path) -> dict:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*.*")}


def test_data_is_prepared_once_and_again_only_when_it_changed(corpus, here):
    tokens = prepare(corpus, None, vocab_size=500)
    made = state_of(here / "data")
    names = sorted(path.name for path in tokens.folder.iterdir())
    assert names == ["meta.json", "train.bin", "val.bin"]
    for given in (None, tokens.tokenizer):  # the second as a run that resumes asks for it
        assert prepare(corpus, given, 9, vocab_size=500).folder == tokens.folder
    assert state_of(here / "data") == made
    assert prepare(corpus, None, vocab_size=501).folder != tokens.folder
    assert not list((here / "data").rglob("*.unfinished"))


def test_data_is_prepared_again_when_a_file_has_changed(here):
    (here / "book.txt").write_text("a line of a book\n" * 3000)
    before = prepare("book.txt", None, vocab_size=300).folder
    (here / "book.txt").write_text("another line of it\n" * 3000)
    assert prepare("book.txt", None, vocab_size=300).folder != before


def pause_in_preparation(at: int):
    """In a process: make small windows, and pause when a file is to be written whole: at 0 the
    tokenizer, at 1 the first window's meta.json, at 2 the second one's."""
    make_small_windows()
    write_text = data.write_text
    written = []

    def pausing(path, text):
        if len(written) == at:
            print(f"paused before {path.name}", flush=True)
            while not Path("go on").exists():
                time.sleep(0.01)
        written.append(path)
        write_text(path, text)

    data.write_text = pausing


def make_small_windows():
    data.WINDOW = 5000
    data.BATCH = 20


@pytest.mark.parametrize("at", [0, 1, 2], ids=["the tokenizer", "window 1", "window 2"])
def test_two_processes_that_prepare_at_once_make_what_one_makes(at, corpus, tmp_path):
    """The second, which comes amid the work of the first, waits, and then finds all done."""
    options = ("tools/prepare.py", f"--dataset={corpus}", "--vocab_size=400",
               "--max_tokens=20_000")
    for name in ("alone", "together"):
        (tmp_path / name).mkdir()
    alone = Script(tmp_path / "alone", *options, before=make_small_windows).wait()
    assert alone.returncode == 0, alone.stderr
    together = tmp_path / "together"
    first = Script(together, *options, before=functools.partial(pause_in_preparation, at))
    first.wait_for("paused before ")
    second = Script(together, *options, before=make_small_windows)
    try:
        second.wait_for("waiting for another process, which prepares data/")
    finally:
        (together / "go on").touch()
    for script in (first, second):
        result = script.wait()
        assert result.returncode == 0, result.stderr
        assert result.stdout.splitlines()[-1] == alone.stdout.splitlines()[-1]
    expected = {path.name: path.read_bytes() for path in (tmp_path / "alone").rglob("data/**/*.*")
                if path.suffix != ".lock"}
    assert len(expected) == 4
    for path in (together / "data").rglob("*.*"):
        if path.suffix != ".lock":
            assert path.read_bytes() == expected[path.name], path.name


@pytest.fixture
def shards(here, monkeypatch) -> Path:
    """A folder of three parquet files and a text file, and windows of 5,000 tokens."""
    monkeypatch.setattr(data, "WINDOW", 5000)
    folder = here / "shards"
    folder.mkdir()
    for shard in range(3):
        texts = [f"{shard}, {i}: {'lorem ipsum ' * (i % 9)}" for i in range(550)]
        write_parquet(folder / f"{shard}.parquet", texts)
    (folder / "book.txt").write_text("a line of a book\n" * 20000)
    return folder


def test_preparation_goes_on_where_it_stopped(shards, tokenizer, here, monkeypatch):
    whole = prepare(shards, tokenizer, 8)
    assert len(whole.meta["windows"]) == 8
    assert not whole.meta["ended"]
    expected = {split: tokens_in(whole.folder, split) for split in ("train", "val")}
    (here / "data").rename(here / "data-whole")
    first = prepare(shards, tokenizer, 3)
    assert first.folder == whole.folder
    assert first.meta["windows"] == whole.meta["windows"][:3]
    with monkeypatch.context() as patch:  # interrupted at the end of a window
        patch.setattr(data, "write_text", lambda path, text: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            prepare(shards, tokenizer, 4)
    with open(first.folder / "train.bin", "ab") as file:  # and in the middle of a token
        file.write(b"odd")
    for num_windows in (3, 4, 8):
        again = prepare(shards, tokenizer, num_windows)
        assert again.meta["windows"] == whole.meta["windows"][:num_windows]
    for split in ("train", "val"):
        assert np.array_equal(tokens_in(again.folder, split), expected[split])


def test_all_of_a_dataset_is_read_once(shards, tokenizer, here, monkeypatch):
    tokens = prepare(shards, tokenizer, 1000)
    assert tokens.meta["ended"]
    made = state_of(here / "data")
    monkeypatch.setattr(data, "open_streams", None)  # all is there: nothing is opened
    prepare(shards, tokenizer, 1000)
    assert state_of(here / "data") == made


@pytest.mark.parametrize("damage", [b"cut short", None], ids=["cut short", "gone"])
def test_tokens_that_were_damaged_are_refused(damage, shards, tokenizer):
    folder = prepare(shards, tokenizer, 3).folder
    if damage is None:
        (folder / "val.bin").unlink()
    else:
        (folder / "train.bin").write_bytes(damage)
    with pytest.raises(InputError, match="delete"):
        prepare(shards, tokenizer, 8)
    shutil.rmtree(folder)
    prepare(shards, tokenizer, 3)


def test_parts_of_a_mixture_keep_their_proportion(tokenizer, here, monkeypatch):
    parts = []
    for name, share, length in (("long", 0.70, 9), ("short", 0.15, 3)):
        (here / name).mkdir()
        texts = [f"{name} {i}" + " words" * length for i in range(20000)]
        write_parquet(here / name / "a.parquet", texts)
        parts.append((share, str(here / name), None))
    monkeypatch.setitem(data.HUB, "mixture", parts)
    monkeypatch.setattr(data, "WINDOW", 50000)
    tokens = prepare("mixture", tokenizer, 6)
    sizes = tokens.meta["sizes"]
    assert sizes[0] / sizes[1] == pytest.approx(0.70 / 0.15, rel=0.1)
    ids = tokens_in(tokens.folder, "train")
    half = tokens.meta["windows"][2]["train"]
    for part in (ids[:half], ids[half:]):
        text = tokenizer.decode(part)
        assert text.count("long") > 0 < text.count("short")


# ---- Batches


def test_batches_are_a_pure_function_of_seed_step_and_position():
    def blocks(seed, numbers, num_blocks=100):
        return [block_at(seed, number, num_blocks, 40) for number in numbers]

    stream = blocks(7, range(300))  # three epochs, of windows of 40, 40 and 20 blocks
    for start in range(0, 300, 100):
        for first, last in ((0, 40), (40, 80), (80, 100)):
            window = stream[start + first:start + last]
            assert sorted(window) == list(range(first, last))
            assert window != sorted(window)
    assert stream[:100] != stream[100:200]
    assert blocks(8, range(100)) != stream[:100]
    assert blocks(7, (250, 3, 99)) == [stream[250], stream[3], stream[99]]
    # more data changes nothing
    assert blocks(7, range(80), 80) == blocks(7, range(80), 1000) == stream[:80]


def test_targets_are_the_next_tokens():
    tokens = np.arange(101, dtype=np.uint16)
    x, y = get_batch(tokens, [0, 9, 3], 10, 101, torch.device("cpu"))
    assert x.tolist() == [list(range(start, start + 10)) for start in (0, 90, 30)]
    assert torch.equal(y, x + 1)
    with pytest.raises(InputError, match="token id 100"):
        get_batch(tokens, [9], 10, 100, torch.device("cpu"))


def test_prepare_tells_what_there_is(corpus, tmp_path):
    result = run(tmp_path, "tools/prepare.py", f"--dataset={corpus}", "--vocab_size=400")
    assert result.returncode == 0, result.stderr
    [meta] = tmp_path.glob("data/*/meta.json")
    counts = json.loads(meta.read_text())["windows"][-1]
    assert result.stdout == (
        f"{meta.parent.relative_to(tmp_path)}: {counts['train']:,} tokens to train on, "
        f"{counts['val']:,} held out\nthat is all of the dataset\n")
