"""Which files are read, and that their documents are what is in them: lib/documents.py."""

import csv
import gzip
import json
import math
import os
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from lib import data, documents
from lib.documents import FileStream, Source, describe, find_files
from smollm import InputError
from tests.helpers import prepare, run, write_parquet

TEXTS = [f'text {i}: "quoted", \n two lines, ünïcode 天地 🙂{" word" * (i % 7)}'
         for i in range(60)]


def stream_of(path, **how) -> FileStream:
    files, _ = find_files(str(path))
    return FileStream(files, Source(str(path), **how))


def read(path, **how) -> list[str]:
    return texts_of(stream_of(path, **how))


def texts_of(stream, count=10**6) -> list[str]:
    return [document.text for document in stream.read(count)]


def write_rows(path: Path, rows: list):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_table(path: Path, texts, kind=None):
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(texts, kind)}), path)


# ---- What a text is


NOT_A_TEXT = {"NaN": math.nan, "null": None, "empty": ""}
WRONG = {"5": 5, "True": True, "['a']": ["a"], "{'a': 1}": {"a": 1}, "2.5": 2.5}


@pytest.mark.parametrize("value", NOT_A_TEXT.values(), ids=NOT_A_TEXT)
@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "json"])
def test_rows_without_text_are_left_out_and_counted(suffix, value, here):
    rows = [{"text": text} for text in TEXTS]
    rows[7:7] = [{"text": value}, {"other": "x"}]
    path = here / f"a.{suffix}"
    write_rows(path, rows)
    stream = stream_of(path)
    assert texts_of(stream, 1000) == TEXTS
    assert stream.tally.without_text == 2
    assert "read 60 documents: 60 of" in stream.tally.lines(stream.reader.source)[0]


@pytest.mark.parametrize("said", WRONG)
@pytest.mark.parametrize("kind", ["lines", "array"])
def test_a_text_of_another_type_is_refused_by_its_place(kind, said, here):
    rows = [{"text": text} for text in TEXTS]
    rows.insert(41, {"text": WRONG[said]})
    (here / "deep").mkdir()
    if kind == "lines":
        path = here / "deep" / "a.jsonl"
        write_rows(path, rows)
        path.write_text("\n" + path.read_text())  # blank lines count as lines
        place = "line 43"
    else:
        path = here / "deep" / "a.json"
        path.write_text(json.dumps(rows, indent=1))
        place = "row 42"
    with pytest.raises(InputError) as error:
        read(here / "deep")
    assert str(error.value) == (f"{path}, {place}: 'text' is {said}, it must be a string or null: "
                                "mend it, or choose another --text_column")


def test_what_looks_like_a_date_or_a_number_stays_a_string(here):
    texts = [f"2024-01-{i % 28 + 1:02}" for i in range(400)] + ["12", "1e5", "true", "null", "NaN"]
    write_rows(here / "a.jsonl", [{"text": text} for text in texts])
    (here / "a.csv").write_text("text\n" + "\n".join(texts))
    for name in ("a.jsonl", "a.csv"):
        assert read(here / name) == texts


COLUMNS = {
    "string": pyarrow.string(),
    "large string": pyarrow.large_string(),
    "string view": pyarrow.string_view(),
    "dictionary": pyarrow.dictionary(pyarrow.int32(), pyarrow.string()),
}


@pytest.mark.parametrize("kind", COLUMNS.values(), ids=COLUMNS)
def test_parquet_columns_of_strings_are_read(kind, here):
    texts = [*TEXTS[:30], None, "", *TEXTS[30:]]
    write_table(here / "a.parquet", pyarrow.array(texts).cast(kind))
    write_table(here / "b.parquet", [None, None], pyarrow.null())
    assert read(here / "a.parquet") == TEXTS
    assert sorted(read(here)) == sorted(TEXTS)


@pytest.mark.parametrize("values", [[1], [b"x"], [["a"]], [True], [1.5], [{"a": "b"}]], ids=str)
def test_parquet_columns_of_other_types_are_refused_by_name(values, here):
    write_table(here / "a.parquet", values)
    with pytest.raises(InputError, match=r"a\.parquet: its column 'text' is of type .* must be"):
        read(here / "a.parquet")


T = {"text": "t"}
OTHER_COLUMNS = {  # the rows of two shards
    "one more": ([T], [T | {"meta": 1}]),
    "one less": ([T | {"meta": 1}], [T]),
    "int, then string": ([T | {"id": 1}], [T | {"id": "a"}]),
    "int, then string in a file": ([T | {"id": 1}] * 300 + [T | {"id": "a"}], [T]),
    "null first": ([T | {"meta": None}] * 300 + [T | {"meta": {"x": [1]}}], [T]),
    "other structs": ([T | {"meta": {"x": 1}}], [T | {"meta": {"y": {"z": [None]}}}]),
    "list, then struct": ([T | {"meta": [1]}], [T | {"meta": {"a": 1}}]),
    "other order": ([{"id": 1, "text": "t"}], [{"text": "t", "id": 1}]),
    "dates, then not": ([T | {"day": "2024-01-01"}] * 300, [T | {"day": "soon"}]),
}


@pytest.mark.parametrize("what", OTHER_COLUMNS)
def test_other_columns_do_not_matter(what, here):
    shards = OTHER_COLUMNS[what]
    (here / "jsonl").mkdir()
    (here / "parquet").mkdir()
    for number, rows in enumerate(shards):
        write_rows(here / "jsonl" / f"{number}.jsonl", rows)
        if what not in ("int, then string in a file", "null first"):  # a table has one type each
            table = pyarrow.Table.from_pylist(rows)
            pyarrow.parquet.write_table(table, here / "parquet" / f"{number}.parquet")
            write_rows(here / "parquet" / f"{number}.jsonl", rows)
    assert read(here / "jsonl") == ["t"] * sum(map(len, shards))
    if any((here / "parquet").iterdir()):
        assert read(here / "parquet") == ["t"] * 2 * sum(map(len, shards))


def test_empty_files_are_no_error_beside_others(here):
    write_rows(here / "a.jsonl", [{"text": text} for text in TEXTS])
    for name in ("b.jsonl", "c.txt", "d.csv", "e.json"):
        (here / name).write_text("")
    (here / "f.jsonl").write_text("\n \n\n")
    (here / "g.csv").write_text("id,text\n")
    (here / "h.json").write_text("[]")
    write_table(here / "i.parquet", [], pyarrow.string())
    assert read(here) == TEXTS


# ---- Which files


NAMES = ["a[1].jsonl", "a1.jsonl", "b*.jsonl", "bb.jsonl", "c?.jsonl", "cc.jsonl", "d::e.jsonl",
         "f g.jsonl", "h\ni.jsonl", "$j.jsonl", "{k}.jsonl", "é.jsonl", os.fsdecode(b"l\xff.jsonl"),
         "~.jsonl", "%20.jsonl", "X.JSONL"]


def test_the_files_that_are_read_are_those_that_are_there(here):
    for name in NAMES:
        write_rows(here / name, [{"text": f"of {name!r}"}])
    assert sorted(read(here)) == sorted(f"of {name!r}" for name in NAMES)
    for name in NAMES:
        assert read(here / name) == [f"of {name!r}"]


def test_a_name_that_is_not_utf_8_can_be_printed(here):
    (here / "texts").mkdir()
    (here / "texts" / "a.txt").write_text("a line\n" * 10_000)
    (here / "texts" / os.fsdecode(b"l\xff.jpg")).write_text("")
    result = run(here, "tools/prepare.py", "--dataset=texts", "--vocab_size=300")
    assert result.returncode == 0, result.stderr
    assert "left out: 1 of other kinds (l?.jpg)" in result.stdout


def test_links_are_followed_and_nothing_is_read_twice(here):
    texts = here / "texts"
    for name in ("a/b", ".git", ".hidden"):
        (texts / name).mkdir(parents=True)
    (here / "elsewhere").mkdir()
    (texts / "a" / "b" / "1.txt").write_text("one")
    (here / "elsewhere" / "2.txt").write_text("two")
    (texts / "linked").symlink_to(here / "elsewhere")
    (texts / "linked again").symlink_to(here / "elsewhere")
    (texts / "a" / "loop").symlink_to(texts)
    (texts / "3.txt").symlink_to(texts / "a" / "b" / "1.txt")
    (texts / "4.txt").symlink_to("nowhere")
    for name in (".git/x.txt", ".hidden/y.txt", ".z.txt", "picture.jpg", "Makefile"):
        (texts / name).write_text("not read")
    os.mkfifo(texts / "pipe.txt")
    files, left_out = find_files(str(texts))
    assert sorted(read(texts)) == ["one", "two"]
    said = describe(files, left_out)
    assert said.startswith("2 .txt files (0.0 MB); left out: ")
    for part in ("3 hidden (.git, .hidden, .z.txt)", "2 of other kinds (Makefile, picture.jpg)",
                 "2 no files, or links to nothing (4.txt, pipe.txt)", "1 links to what is there"):
        assert part in said, said


@pytest.mark.parametrize("name", ["notes.log", "text8", "picture.jpg", "a.txt.bz2", "model.gguf"])
def test_a_file_of_another_kind_is_refused_by_its_suffix(name, here):
    (here / name).write_text("some text\n" * 10)
    with pytest.raises(InputError, match=r"has the suffix .* none of \.csv, .* name it \.txt"):
        find_files(str(here / name))


def make_download(folder: Path):
    (folder / "data").mkdir(parents=True)
    for name in ("train-00000-of-00002", "train-00001-of-00002", "test-00000-of-00001",
                 "validation-00000-of-00001"):
        write_parquet(folder / "data" / f"{name}.parquet", [f"of {name[:-9]}"])
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# The card\n")
    (folder / "dataset_infos.json").write_text("{}")
    (folder / ".gitattributes").write_text("")


def test_of_a_download_from_the_hub_the_train_split_is_taken(here):
    make_download(here / "texts")
    files, left_out = find_files("texts")
    assert sorted(read("texts")) == ["of train-00000", "of train-00001"]
    said = describe(files, left_out)
    assert "2 of other splits than train (data/test-00000-of-00001.parquet, data/val" in said
    assert "2 about the dataset (README.md, dataset_infos.json)" in said


def test_a_folder_of_prose_is_taken_whole_whatever_its_names(here):
    for name in ("test.txt", "train_notes.txt", "README.md", "dev.txt"):
        (here / name).write_text(name)
    assert sorted(read(here)) == ["README.md", "dev.txt", "test.txt", "train_notes.txt"]


# ---- All files side by side


def write_kind(path: Path, texts: list[str]):
    if path.suffix == ".txt":
        path.write_text("\n".join(texts))
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n"
                                for text in texts))
    else:
        write_parquet(path, texts)


def share_of_cyrillic(text: str) -> float:
    """By bytes."""
    cyrillic = 2 * sum("\u0430" <= letter <= "\u044f" for letter in text)
    return cyrillic / (cyrillic + sum("a" <= letter <= "z" for letter in text))


@pytest.mark.parametrize(("names", "share"), [
    (("c.txt", "l.jsonl"), 0.5),
    (("c.jsonl", "l.txt"), 0.5),
    (("c.jsonl", "l.jsonl"), 0.5),
    (("c1.txt", "l1.jsonl", "l2.jsonl", "l3.jsonl"), 0.25),
    ([f"c{i}.txt" for i in range(10)] + [f"l{i}.jsonl" for i in range(10)], 0.5),
], ids=["txt and jsonl", "jsonl and txt", "jsonl", "one to three", "twenty"])
def test_what_is_read_first_is_of_all_files_in_proportion(names, share, here, monkeypatch):
    """Training, held-out text and that of the tokenizer, though all are far longer."""
    for name in names:
        of_letters = "абвгд ежзик" if name.startswith("c") else "abcdefghi jklmnopqrst"
        write_kind(here / name, [f"{of_letters} " * 20 for _ in range(10_000)])
    read_first = []

    def train_tokenizer(texts, vocab_size):
        read_first.extend(texts)
        return train(read_first, vocab_size)

    train = data.train_tokenizer
    limit = data.first_texts.__defaults__
    monkeypatch.setattr(data, "train_tokenizer", train_tokenizer)
    monkeypatch.setattr(data.first_texts, "__defaults__", (1_000_000,))
    monkeypatch.setattr(data, "WINDOW", 100_000)
    assert limit == (50_000_000,)
    tokens = prepare(here, None, 1, vocab_size=300)
    assert not tokens.meta["ended"]
    texts = {"the tokenizer's": "".join(read_first)}
    for split in ("train", "val"):
        texts[split] = tokens.tokenizer.decode(tokens.read(split, 1).tolist())
    for what, text in texts.items():
        assert 0 < share_of_cyrillic(text) < 1, what
        if what != "val" and len(names) <= documents.OPEN_FILES:  # else there are few to draw from
            assert share_of_cyrillic(text) == pytest.approx(share, abs=0.1), what


# ---- Kinds of files


def write_csv(path: Path, delimiter: str):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file, delimiter=delimiter)
        writer.writerow(["id", "text"])
        writer.writerows(enumerate(TEXTS))


def of_kind(folder: Path, name: str) -> Path:
    """A file that holds TEXTS."""
    path = folder / name
    rows = [{"id": i, "text": text} for i, text in enumerate(TEXTS)]
    kind, compression = documents.split_suffix(name)
    plain = folder / f"plain{kind}"
    if name == "array.json":
        plain.write_text(json.dumps(rows))
    elif name == "pretty.json":
        plain.write_text(json.dumps(rows, indent=4, ensure_ascii=False))
    elif kind in (".json", ".jsonl", ".ndjson"):
        write_rows(plain, rows)
    elif kind == ".parquet":
        write_parquet(plain, TEXTS)
    elif kind == ".csv":
        write_csv(plain, ",")
    elif kind == ".tsv":
        write_csv(plain, "\t")
    else:  # documents of plain text end with a line's end
        plain.write_text("".join(f"{text}\n---\n" for text in TEXTS))
    content = plain.read_bytes()
    plain.unlink()
    half = len(content) // 2
    if compression == ".gz":  # of two members
        content = gzip.compress(content[:half]) + gzip.compress(content[half:])
    if compression == ".zst":  # of two frames
        codec = pyarrow.Codec("zstd")
        content = codec.compress(content[:half]).to_pybytes() + codec.compress(
            content[half:]).to_pybytes()
    path.write_bytes(content)
    return path


FILES = ["a.jsonl", "a.ndjson", "a.json", "array.json", "pretty.json", "a.csv", "a.tsv",
         "a.parquet", "A.JSONL", "A.Csv", "a.txt", "a.md",
         *(f"a.{kind}{compression}" for kind in ("jsonl", "csv", "json", "txt", "parquet")
           for compression in (".gz", ".zst")), "a.JSONL.GZ"]


@pytest.mark.parametrize("name", FILES)
def test_files_of_all_kinds_hold_the_same_and_go_on_anywhere(name, here):
    """The place is kept as JSON."""
    path = of_kind(here, name)
    is_text = documents.split_suffix(name)[0] in (".txt", ".md")
    expected = [f"{text}\n" for text in TEXTS] if is_text else TEXTS
    assert read(path, separator="---") == expected
    for count in (0, 1, 7, 59, 60):
        stream = stream_of(path, separator="---")
        assert texts_of(stream, count) == expected[:count]
        state = json.loads(json.dumps(stream.state()))
        stream.close()
        stream = stream_of(path, separator="---")
        stream.load_state(state)
        assert texts_of(stream, 1000) == expected[count:]


def test_a_stream_of_many_files_goes_on_anywhere(here):
    for number, name in enumerate(FILES):
        (here / str(number)).mkdir()
        of_kind(here / str(number), name)
    expected = read(here, separator="---")
    assert len(expected) == len(TEXTS) * len(FILES)
    texts = []
    state = stream_of(here, separator="---").state()
    while len(texts) < len(expected):
        stream = stream_of(here, separator="---")
        stream.load_state(state)
        texts += texts_of(stream, 83)
        state = json.loads(json.dumps(stream.state()))
        stream.close()
    assert texts == expected


def test_a_cell_of_csv_may_be_long_and_have_lines(here):
    text = "a long text, with \"quotes\"\r\nand lines\n" * 10_000
    with open(here / "a.csv", "w", newline="") as file:
        csv.writer(file).writerows([["text", "id"], [text, 1], ["", 2], ["short", 3], ["last"]])
    assert read(here / "a.csv") == [text, "short", "last"]


def test_an_array_may_be_of_any_length(here):
    texts = [letter * 3_000_000 for letter in "ab"] + ["天" * 100] * 20_000
    (here / "a.json").write_text(json.dumps([{"text": text, "n": 12} for text in texts]))
    assert read(here / "a.json") == texts


def cut(path: Path):
    path.write_bytes(path.read_bytes()[:-20])


def spoil_line(path: Path):
    lines = path.read_text().split("\n")
    lines[11] = '\n\r\n{"text": "half'
    path.write_text("\n".join(lines))


DAMAGED = {  # the file: what was done to it, what is said
    "a.jsonl": (spoil_line, "a.jsonl, line 14: it is no JSON: "),
    "a.json": (spoil_line, "a.json, line 14: it is no JSON: "),
    "array.json": (cut, "array.json, row 60: it is no JSON: "),
    "a.jsonl.gz": (cut, "a.jsonl.gz: can't be read: "),
    "a.jsonl.zst": (cut, "a.jsonl.zst: can't be read: "),
    "a.txt.gz": (cut, "a.txt.gz: can't be read: "),
    "a.parquet": (cut, "a.parquet: can't be read: "),
    "b.jsonl": (lambda path: path.write_text('["a"]\n'), "b.jsonl, line 1: it is ['a'], it must"),
    "b.csv": (lambda path: path.write_text('text\nab\n"c\nd\n'), "b.csv, line 4: "),
    "c.jsonl.gz": (lambda path: path.write_text("no gzip"), "c.jsonl.gz: can't be read: "),
    "c.txt.zst": (lambda path: path.write_text("no zstd"), "c.txt.zst: can't be read: "),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_is_refused_by_its_place(name, here):
    damage, said = DAMAGED[name]
    path = of_kind(here, name)
    damage(path)
    with pytest.raises(InputError) as error:
        read(here / name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_column_that_is_not_there_is_refused_with_those_that_are(here):
    rows = [{"id": 1, "content": "x"}] * 3
    write_rows(here / "a.jsonl", rows)
    (here / "a.json").write_text(json.dumps(rows))
    (here / "a.csv").write_text("id,content\n1,x\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), here / "a.parquet")
    for name in ("a.jsonl", "a.json", "a.csv", "a.parquet"):
        with pytest.raises(InputError) as error:
            prepare(here / name, None, vocab_size=300)
        assert str(error.value).endswith(f"{name}: it has no 'text': choose one of its columns "
                                         "with --text_column: id, content")
        assert read(here / name, column="content")[0] == "x"


# ---- Bytes that are not UTF-8


GOOD = "a good line\n"


def spoiled_parquet(path: Path):
    """A column of strings, in which the bytes of one are not UTF-8."""
    values = pyarrow.array([b"first", b"sec\xffond", b"third"], pyarrow.binary())
    strings = pyarrow.Array.from_buffers(pyarrow.string(), 3, values.buffers())
    pyarrow.parquet.write_table(pyarrow.table({"text": strings}), path)


SPOILED = {  # the file: how it is written, where the byte is, what is read if replaced or skipped
    "early.txt": (lambda path: path.write_bytes(b"\xff" + GOOD.encode() * 5), "byte 0",
                  "\ufffd" + GOOD * 5, GOOD * 4),
    "late.txt": (lambda path: path.write_bytes(GOOD.encode() * 3000 + b"b\xe9d\n" + b"more\n"),
                 "byte 36,001", GOOD * 3000 + "b\ufffdd\nmore\n", GOOD * 3000 + "more\n"),
    "with a mark.txt": (lambda path: path.write_bytes(b"\xef\xbb\xbfab\n\xe9\n"), "byte 6",
                        "ab\n\ufffd\n", "ab\n"),
    "a.jsonl": (lambda path: path.write_bytes(b'{"text": "one"}\n{"text": "t\xe9"}\n{"text": "x"}'),
                "byte 27", "onet\ufffdx", "onex"),
    "half.jsonl": (lambda path: path.write_text('{"text": "one"}\n{"text": "t\\ud800"}'), "line 2",
                   "onet\ufffd", "one"),
    "array.json": (lambda path: path.write_bytes(b'[{"text": "one"}, {"text": "t\xe9"}]'), "row 2",
                   "onet\ufffd", "one"),
    "a.csv": (lambda path: path.write_bytes(b"text\none\nt\xe9\nx\n"), "byte 10", "onet\ufffdx",
              "onex"),
    "a.parquet": (spoiled_parquet, "row 2, byte 3", "firstsec\ufffdondthird", "firstthird"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_bad_byte_is_replaced_or_skipped_or_refused_and_its_place_is_told(name, here):
    write, place, replaced, skipped = SPOILED[name]
    write(here / name)
    for how, expected, done in (("replace", replaced, "replaced by U+FFFD"),
                                ("skip", skipped, "left out")):
        stream = stream_of(here / name, encoding_errors=how)
        assert "".join(texts_of(stream, 1000)) == expected
        [_, said] = stream.tally.lines(stream.reader.source)
        assert said == (f"1 file has bytes that are not UTF-8, which were {done} "
                        f"(--encoding_errors), first in {name} at {place}")
    with pytest.raises(InputError, match=f"{name}, {place}: it is not UTF-8: convert the file"):
        read(here / name, encoding_errors="fail")


def test_files_that_are_not_utf_8_are_announced_once(here):
    """In a run that trains a tokenizer, too."""
    (here / "texts").mkdir()
    for i in range(300):
        (here / "texts" / f"{i}.txt").write_text(f"{i} bottles of beer\n" * 50)
    for i in range(4):
        (here / "texts" / f"latin{i}.txt").write_bytes("a naïve text\n".encode("latin-1") * 50)
    result = run(here, "tools/prepare.py", "--dataset=texts", "--vocab_size=300")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("UTF-8") == 1
    assert ("4 files have bytes that are not UTF-8, which were replaced by U+FFFD "
            "(--encoding_errors), first in latin0.txt at byte 4, latin1.txt at") in result.stdout
    again = run(here, "tools/prepare.py", "--dataset=texts", "--vocab_size=300")
    assert "UTF-8" not in again.stdout + again.stderr


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_mark_of_the_byte_order_is_no_text(name, here):
    path = of_kind(here, name)
    expected = read(path, separator="---")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read(path, separator="---") == expected


@pytest.mark.parametrize("content", [GOOD.encode("utf-16"), "天地玄黄".encode("utf-16"), b"ab\0c\n",
                                     bytes(range(256))], ids=["utf-16", "cjk", "zero", "binary"])
def test_what_is_no_utf_8_text_at_all_is_left_out_and_said(content, here):
    (here / "good.txt").write_text(GOOD)
    (here / "other.txt").write_bytes(content)
    stream = stream_of(here)
    assert texts_of(stream, 10) == [GOOD]
    assert "left out: other.txt: it is not UTF-8 text: convert it, or take it out" in (
        stream.tally.lines(stream.reader.source))
    with pytest.raises(InputError, match="it is not UTF-8 text"):
        read(here, encoding_errors="fail")


# ---- Plain text


def test_a_separator_ends_documents(here):
    stories = [f"Once {i}\n\nupon a time.\n" for i in range(50)]
    (here / "a.txt").write_text("<|endoftext|>\n".join(stories))
    (here / "b.txt").write_bytes("<|endoftext|>\r\n".join(stories).replace("\n", "\r\n").replace(
        "\r\r", "\r").encode())
    (here / "c.txt").write_text("".join(f"{story}  <|endoftext|>\n" for story in stories))
    for name in ("a.txt", "b.txt", "c.txt"):
        assert read(here / name, separator="<|endoftext|>") == stories
    long = "a word of a long story\n" * 10_000
    (here / "d.txt").write_text(f"{long}---\nshort\n")
    assert read(here / "d.txt", separator="---") == [long, "short\n"]
    stream = stream_of(here / "a.txt")
    texts_of(stream, 10)
    assert "give --separator='<|endoftext|>'" in stream.tally.lines(stream.reader.source)[-1]


LONG_TEXTS = {
    "lines": "".join(f"line {i} of the bóok\n" for i in range(9000)) + "no end of line",
    "one line": "one line of text8 " * 10000,
    "two bytes": "é" * 50_000,
    "three bytes": "x" + "天" * 50_000,
    "four bytes": "xy" + "🙂" * 50_000,
    "mixed": "x" + "aé天🙂" * 20_000,
    "ends of lines": "\n" * 50_000,
}


@pytest.mark.parametrize("what", LONG_TEXTS)
def test_a_text_that_is_cut_into_documents_loses_nothing(what, here):
    text = LONG_TEXTS[what]
    (here / "a.txt").write_text(text, encoding="utf-8")
    found = read(here / "a.txt")
    assert "".join(found) == text
    sizes = [len(document.encode()) for document in found]
    assert all(16_000 <= size <= 32_003 for size in sizes[:-1])
    assert len(sizes) > 2
    if what == "lines":
        assert all(document.endswith("\n") for document in found[:-1])


@pytest.mark.parametrize("offset", range(3))
def test_ends_of_lines_are_one_kind_wherever_a_text_is_cut(offset, here):
    text = "x" * (15_999 - offset) + "\r\nnext\r\n" + "y" * 40_000 + "\rold\r\n"
    (here / "a.txt").write_bytes(text.encode())
    assert "".join(read(here / "a.txt")) == text.replace("\r\n", "\n").replace("\r", "\n")


# ---- The Hub's datasets, by the library that streams them, from a folder here


def hub_stream(folder: Path) -> documents.HubStream:
    source = Source("somebody/something")
    streams = documents.open_streams(source, [])
    assert [share for share, _ in streams] == [1.0]
    return streams[0][1]


def test_rows_of_the_hub_are_checked_as_those_of_files_are(here, monkeypatch):
    (here / "part").mkdir()
    monkeypatch.setitem(documents.HUB, "somebody/something", [(1.0, str(here / "part"), None)])
    path = here / "part" / "a.parquet"
    write_table(path, [*TEXTS[:30], None, "", *TEXTS[30:]])
    stream = hub_stream(here)
    assert texts_of(stream, 1000) == TEXTS
    assert stream.tally.without_text == 2
    assert texts_of(stream, 1000) == []
    write_table(path, [1, 2, 3])
    with pytest.raises(InputError, match=r"row 1: 'text' is 1, it must be a string or null"):
        texts_of(hub_stream(here), 10)


def test_a_stream_of_the_hub_that_was_not_read_keeps_the_place_it_was_given(here, monkeypatch):
    (here / "part").mkdir()
    monkeypatch.setitem(documents.HUB, "somebody/something", [(1.0, str(here / "part"), None)])
    write_parquet(here / "part" / "a.parquet", TEXTS)
    stream = hub_stream(here)
    assert texts_of(stream, 25) == TEXTS[:25]
    for _ in range(3):
        state = json.loads(json.dumps(stream.state()))
        stream = hub_stream(here)
        stream.load_state(state)
    assert texts_of(stream, 25) + texts_of(stream, 25) == TEXTS[25:]
