"""Text to tokens to batches: lib/data.py and tools/prepare.py."""

import errno
import fcntl
import functools
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from lib import bpe, data, documents, files
from lib.bpe import SPECIAL_TOKENS
from lib.data import block_at, get_batch
from smollm import InputError
from tests.helpers import ROOT, prepare, run, tokens_in, write_jsonl, write_parquet
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


def test_documents_are_packed_with_eos_and_one_of_200_is_held_out(tokenizer, here):
    """The first, and then one that is drawn."""
    texts = [f"document {i}: {'x' * (i % 7)} <|im_end|> is a special token" for i in range(400)]
    write_parquet(here / "texts.parquet", texts)
    tokens = prepare("texts.parquet", tokenizer)
    places = [0, 200 + random.Random("read_parquet 1").randrange(200)]
    held_out = [texts[place] for place in places]
    trained_on = [text for i, text in enumerate(texts) if i not in places]
    counts = {"val_bytes": sum(map(len, held_out))}
    for split, expected in (("val", held_out), ("train", trained_on)):
        ids = tokens_in(tokens.folder, split)
        counts[split] = len(ids)
        counts[f"{split}_sha256"] = hashlib.sha256(ids.tobytes()).hexdigest()
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
    documents.ROWS = 20


SMALL_WINDOWS = ("tools/prepare.py", "--vocab_size=400", "--max_tokens=20_000")


@pytest.fixture(scope="module")
def prepared_alone(corpus, tmp_path_factory) -> tuple[Path, str]:
    """A folder in which one process has prepared the corpus, and the last that it said."""
    folder = tmp_path_factory.mktemp("alone")
    result = Script(folder, *SMALL_WINDOWS, f"--dataset={corpus}", before=make_small_windows).wait()
    assert result.returncode == 0, result.stderr
    return folder, result.stdout.splitlines()[-1]


@pytest.mark.parametrize("at", [0, 1, 2], ids=["the tokenizer", "window 1", "window 2"])
def test_two_processes_that_prepare_at_once_make_what_one_makes(
        at, prepared_alone, corpus, tmp_path):
    """The second, which comes amid the work of the first, waits, and then finds all done."""
    alone, said = prepared_alone
    options = (*SMALL_WINDOWS, f"--dataset={corpus}")
    together = tmp_path
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
        assert result.stdout.splitlines()[-1] == said
    expected = {path.name: path.read_bytes() for path in alone.rglob("data/**/*.*")
                if path.suffix != ".lock"}
    assert len(expected) == 4
    for path in (together / "data").rglob("*.*"):
        if path.suffix != ".lock":
            assert path.read_bytes() == expected[path.name], path.name


# what is done to a folder whose text stays the same; then nothing is prepared anew
SAME_TEXT = {
    "touched": lambda here: (here / "texts" / "a.txt").touch(),
    "copied": lambda here: shutil.copytree(here / "texts", here / "texts", dirs_exist_ok=True,
                                           copy_function=copy_anew),
    "under another path": lambda here: (here / "elsewhere").symlink_to(here),
}


def copy_anew(source, target):
    text = Path(source).read_bytes()
    Path(target).unlink()
    Path(target).write_bytes(text)


@pytest.mark.parametrize("how", SAME_TEXT)
def test_the_same_text_is_prepared_once(how, here, tokenizer):
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("a line of a book\n" * 3000)
    folder = prepare("texts", tokenizer).folder
    made = state_of(folder)
    SAME_TEXT[how](here)
    for spelling in ("texts", "./texts/", str(here / "texts"), str(here / "elsewhere" / "texts")):
        if Path(spelling).exists():
            assert prepare(spelling, tokenizer).folder == folder
    assert state_of(folder) == made


def test_text_of_the_same_size_and_time_is_prepared_anew_if_it_is_other_text(here, tokenizer):
    path = here / "a.txt"
    path.write_text("0123456789" * 5000)
    stat = path.stat()
    before = prepare("a.txt", tokenizer)
    path.write_text("0123456798" * 5000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    after = prepare("a.txt", tokenizer)
    assert after.folder != before.folder
    assert after.meta["windows"][0]["train"] == before.meta["windows"][0]["train"]


def test_text_that_changes_while_it_is_read_is_refused(shards, tokenizer, here, monkeypatch):
    add_windows = data.add_windows

    def disturbed(*arguments):
        add_windows(*arguments)
        (shards / "book.txt").write_text("another book\n" * 3000)

    with monkeypatch.context() as patch:
        patch.setattr(data, "add_windows", disturbed)
        with pytest.raises(InputError, match="has changed while it was read: try again"):
            prepare(shards, tokenizer, 2)
    prepare(shards, tokenizer, 2)


# ---- Where locks don't lock


def without_flock():
    """In a process: a lock of the system's may be had by all, as on Lustre and GPFS."""
    make_small_windows()
    fcntl.flock = lambda descriptor, operation: None


def test_two_processes_that_prepare_at_once_make_what_one_makes_where_flock_does_nothing(
        corpus, tmp_path):
    options = ("tools/prepare.py", f"--dataset={corpus}", "--vocab_size=400",
               "--max_tokens=100_000")
    found = []
    for name, count in (("alone", 1), ("together", 2)):
        (tmp_path / name).mkdir()
        scripts = [Script(tmp_path / name, *options, before=without_flock) for _ in range(count)]
        for script in scripts:
            result = script.wait()
            assert result.returncode == 0, result.stderr
        assert not list(tmp_path.glob(f"{name}/data/*.claim"))
        [folder] = tmp_path.glob(f"{name}/data/*/")
        found.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert found[0] == found[1]
    assert len(found[0]) == 3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_one_line(number, here, tokenizer, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    (here / "a.txt").write_text("a line of a book\n" * 3000)
    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(InputError, match=r"data/digests.lock can't be locked.*another file sys"):
        prepare("a.txt", tokenizer)


def test_a_claim_ends_with_its_process_or_when_it_is_not_renewed(here, monkeypatch, capsys):
    """That of a process of this machine at once; of another machine, when it gives no sign."""
    monkeypatch.setattr(files, "CLAIM_SECONDS", 0.5)
    claim = here / "x.lock.claim"
    held = files.lock(here / "x.lock", "taken")
    text = claim.read_text()
    held.close()
    assert not claim.exists()
    claim.write_text(text.replace(f"pid={os.getpid()}", "pid=999999999"))
    files.lock(here / "x.lock", "taken").close()
    assert capsys.readouterr().err == ""
    claim.write_text(re.sub("host=.*", "host=elsewhere", text))
    files.lock(here / "x.lock", "taken").close()
    assert "taken: " in capsys.readouterr().err
    monkeypatch.setattr(fcntl, "flock", lambda descriptor, operation: None)
    held = files.lock(here / "x.lock", "taken")
    with pytest.raises(InputError, match="taken"):  # its process lives, and renews it
        files.lock(here / "x.lock", "taken")
    held.close()


def test_tokens_that_other_processes_wrote_as_well_are_found_out(shards, tokenizer, monkeypatch):
    """As if two had written at once in spite of all."""
    write_windows = data.write_windows

    def write_twice(folder, *arguments):
        write_windows(folder, *arguments)
        path = folder / "train.bin"
        path.write_bytes(path.read_bytes()[:3000][::-1] + path.read_bytes()[2000:])

    with monkeypatch.context() as patch:
        patch.setattr(data, "write_windows", write_twice)
        with pytest.raises(InputError, match="does not hold the tokens that were written: delete"):
            prepare(shards, tokenizer, 2)
    with pytest.raises(InputError, match="does not hold the tokens that were written: delete"):
        prepare(shards, tokenizer, 2)


def test_a_bit_that_flips_in_the_tokens_is_found_when_they_are_added_to(shards, tokenizer):
    folder = prepare(shards, tokenizer, 2).folder
    tokens = bytearray((folder / "train.bin").read_bytes())
    tokens[100] ^= 1
    (folder / "train.bin").write_bytes(tokens)
    with pytest.raises(InputError, match="does not hold the tokens that were written: delete"):
        prepare(shards, tokenizer, 3)


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
    monkeypatch.setattr(data, "open_streams", None)  # all is there: no document is read
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
    monkeypatch.setitem(documents.HUB, "mixture", parts)
    monkeypatch.setattr(data, "WINDOW", 50000)
    tokens = prepare("mixture", tokenizer, 6)
    sizes = tokens.meta["sizes"]
    assert sizes[0] / sizes[1] == pytest.approx(0.70 / 0.15, rel=0.1)
    ids = tokens_in(tokens.folder, "train")
    half = tokens.meta["windows"][2]["train"]
    for part in (ids[:half], ids[half:]):
        text = tokenizer.decode(part)
        assert text.count("long") > 0 < text.count("short")


@pytest.mark.parametrize("shares", [(0.70, 0.15), (0.5, 0.3, 0.2)], ids=["two", "three"])
def test_a_mixture_that_is_prepared_in_parts_is_what_is_prepared_at_once(
        shares, tokenizer, here, monkeypatch):
    """Windows are smaller than a batch of one part, so that there are windows in which a part is
    not read."""
    parts = []
    for number, share in enumerate(shares):
        (here / str(number)).mkdir()
        texts = [f"part {number} document {i}" + " words" * (i % 9) for i in range(1500)]
        write_parquet(here / str(number) / "a.parquet", texts)
        parts.append((share, str(here / str(number)), None))
    monkeypatch.setitem(documents.HUB, "mixture", parts)
    monkeypatch.setattr(data, "WINDOW", 3000)
    whole = prepare("mixture", tokenizer, 1000)
    assert whole.meta["ended"]
    expected = {path.name: path.read_bytes() for path in whole.folder.glob("*.bin")}
    shutil.rmtree(here / "data")
    for num_windows in range(1, len(whole.meta["windows"]) + 2):
        folder = prepare("mixture", tokenizer, num_windows).folder
    for name, content in expected.items():
        assert (folder / name).read_bytes() == content, name
    assert json.loads((folder / "meta.json").read_text())["windows"] == whole.meta["windows"]
    found = documents_in(folder, "train", tokenizer) + documents_in(folder, "val", tokenizer)
    assert len(found) == len(set(found)) > 1500
    for number in range(len(shares)):  # each part from its beginning, without a gap
        of_part = [document for document in found if document.startswith(f"part {number} ")]
        numbers = sorted(int(document.split()[3]) for document in of_part)
        assert numbers == list(range(len(numbers)))


# ---- A tokenizer is trained


def test_long_words_are_cut_for_the_training_of_a_tokenizer_alone():
    """A language without spaces would take hours."""
    text = "天地玄黄宇宙洪荒日月盈昃辰宿列张" * 1000
    pieces = bpe.split_long_words(f"a word {text} and more")
    assert "".join(pieces) == f"a word {text} and more"
    assert max(len(word) for piece in pieces for word in piece.split()) == bpe.LONGEST_WORD
    assert bpe.split_long_words("short words, of any number " * 100) == [
        "short words, of any number " * 100]
    tokenizer = data.train_tokenizer([text], 400)
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert "\0" not in tokenizer.to_str()


SLOW = """
import time
from tokenizers import Tokenizer
def train_slowly(self, texts, trainer):
    list(texts)
    print("training", flush=True, file=__import__("sys").stderr)
    time.sleep(1000)
Tokenizer.train_from_iterator = train_slowly
"""


@pytest.mark.parametrize("send", [os.kill, os.killpg], ids=["to the process", "to its group"])
def test_sigint_ends_the_training_of_a_tokenizer(send, here):
    """The library that does it hears no signal; the process that it has does. Ctrl-C goes to the
    group."""
    (here / "a.txt").write_text("a line of a book\n" * 3000)
    (here / "sitecustomize.py").write_text(SLOW)
    process = subprocess.Popen(
        [sys.executable, ROOT / "tools" / "prepare.py", "--dataset=a.txt", "--vocab_size=400"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONPATH": str(here)})
    assert process.stderr.readline() == "training\n"
    send(process.pid, signal.SIGINT)
    assert process.stderr.read() == "error: interrupted\n"
    process.wait(10)
    with pytest.raises(ProcessLookupError):  # none of its group is left
        os.killpg(process.pid, 0)


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
    size = sum(path.stat().st_size for path in corpus.iterdir())
    num_documents = sum(np.fromfile(path, np.uint16).tolist().count(0)
                        for path in meta.parent.glob("*.bin"))
    assert result.stdout.splitlines() == [
        f"dataset {corpus}: 30 .py files ({size / 1e6:.1f} MB)",
        f"read {num_documents} documents: {num_documents} of .py",
        f"{meta.parent.relative_to(tmp_path)}: {counts['train']:,} tokens to train on, "
        f"{counts['val']:,} held out",
        "that is all of the dataset"]
