"""sample.py at a terminal and in a pipe: habits that must work, and errors of one line."""

import ctypes
import io
import itertools
import json
import os
import pty
import random
import resource
import select
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from contextlib import redirect_stdout
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoTokenizer

import sample
from lib import chat, models
from smollm import Config, InputError, KVCache, SmolLM
from test_smollm import make
from tests.helpers import (
    ROOT,
    STEADY,
    TINY_1000,
    full_disk,
    greedy,
    run,
    train_here,
    write_model,
)
from tests.launch import Script, open_stdin
from tools.convert import check_name

# Its chat tells what was said, as JSON in an error, when it is told to
TELLING = ("{% if messages[-1].content == 'tell' %}{{ raise_exception(messages | tojson) }}"
           "{% endif %}{% for message in messages %}{{ message.content }}\n{% endfor %}")
CHATTING = ("--chat=True", "--device=cpu", "--temperature=0")


@pytest.fixture(scope="module")
def telling(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint with that template."""
    path = tmp_path_factory.mktemp("telling") / "telling.pt"
    write_model(path, make(TINY_1000), tokenizer, {"chat_template.jinja": TELLING})
    return path


@pytest.fixture(scope="module")
def long(tokenizer, tmp_path_factory) -> Path:
    """A checkpoint of the smallest model with a long context, and with that template."""
    path = tmp_path_factory.mktemp("long") / "long.pt"
    config = replace(TINY_1000, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                     num_attention_heads=1, num_key_value_heads=1, eos_token_id=None,
                     max_position_embeddings=262_144)
    write_model(path, make(config), tokenizer, {"chat_template.jinja": TELLING})
    return path


def told(error: str) -> list[str]:
    """What the user has said, as the chat has told."""
    [line] = error.splitlines()
    messages = json.loads(line.split("can't be rendered: ")[1])
    return [message["content"] for message in messages if message["role"] == "user"]


def one_line(result: subprocess.CompletedProcess) -> str:
    """The error that a command ended with: a line, and nothing else."""
    assert result.returncode == 1, result
    assert result.stdout == ""
    [line] = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def refusal(source) -> str:
    """Why a model is not loaded, in one line."""
    with pytest.raises(InputError) as refused:
        models.load(source)
    [line] = str(refused.value).splitlines()
    return line


# ---- Closed descriptors

CLOSED = {
    "stdin of a chat": "--chat=True --max_new_tokens=3 <&-",
    "stdin, which has the prompt": "--prompt=- <&-",
    "stdout": "--max_new_tokens=3 >&-",
    "stderr": "--max_new_tokens=3 --prompt=Hi 2>&-",
}


@pytest.fixture(scope="module")
def closed(tiny) -> dict[str, subprocess.CompletedProcess]:
    """What each command of CLOSED ended with. They run at the same time."""
    processes = {}
    for name, options in CLOSED.items():
        command = f"exec '{sys.executable}' '{ROOT / 'sample.py'}' --ckpt='{tiny}' {options}"
        processes[name] = subprocess.Popen(["bash", "-c", command], stdin=subprocess.DEVNULL,
                                           stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                           text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    results = {}
    for name, process in processes.items():
        out, err = process.communicate(timeout=120)
        results[name] = subprocess.CompletedProcess(name, process.returncode, out, err)
    return results


def test_a_chat_whose_stdin_is_closed_ends_well(closed):
    result = closed["stdin of a chat"]
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


def test_a_prompt_from_a_closed_stdin_is_refused(closed):
    assert "stdin is closed" in one_line(closed["stdin, which has the prompt"])


def test_a_closed_stdout_is_refused(closed):
    assert "stdout is closed" in one_line(closed["stdout"])


def test_a_closed_stderr_takes_nothing_from_the_text(closed):
    result = closed["stderr"]
    assert result.returncode == 0
    assert result.stdout.startswith("Hi")


# ---- Too little memory, files that can't be read


def with_little_memory():
    """A process may have as much as it has, and a GB."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


@pytest.mark.parametrize("num_samples", [10**6, 2**62])
def test_too_many_samples_are_told_in_one_line(num_samples, long, tmp_path):
    result = Script(tmp_path, "sample.py", f"--ckpt={long}", f"--num_samples={num_samples}",
                    "--max_new_tokens=2000", "--device=cpu", before=with_little_memory).wait()
    assert "out of memory: ask for less at once" in one_line(result)


def as_anyone(call, *arguments):
    """What call returns, or the exception that it raises, in a thread without root's privilege to
    read every file."""
    results = []

    def work():
        header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # the version; this thread
        if ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) != 0:
            results.append(OSError("capset"))
            return
        try:
            results.append(call(*arguments))
        except BaseException as error:
            results.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return results[0]


UNREADABLE = ["hf/model.safetensors", "hf/config.json", "hf/generation_config.json",
              "hf/tokenizer.json", "hf/tokenizer_config.json", "hf", "a.pt", "a.gguf"]


@pytest.mark.parametrize("name", UNREADABLE)
def test_a_file_that_may_not_be_read_is_told_as_that(name, valid, tmp_path):
    for target in ("a.pt", "a.gguf"):
        models.write(tmp_path / target, models.load(valid), "float32")
    source = tmp_path / Path(name).parts[0]
    assert isinstance(as_anyone(models.load, source), models.Bundle)
    (tmp_path / name).chmod(0)
    error = as_anyone(models.load, source)
    (tmp_path / name).chmod(0o755)
    assert isinstance(error, InputError)
    assert len(str(error).splitlines()) == 1
    assert "Permission denied" in str(error)
    assert Path(name).name in str(error)
    assert "No such file" not in str(error)


def test_a_shard_that_may_not_be_read_is_told_as_that(valid):
    """By the model alone, too, which asks no other for advice."""
    (valid / "model.safetensors").rename(valid / "a.safetensors")
    index = {"weight_map": {"model.norm.weight": "a.safetensors"}}
    (valid / "model.safetensors.index.json").write_text(json.dumps(index))
    (valid / "a.safetensors").chmod(0)
    for load in (models.load, SmolLM.from_pretrained):
        error = as_anyone(load, valid)
        assert "Permission denied" in str(error)
        assert "a.safetensors" in str(error)
    (valid / "a.safetensors").chmod(0o644)
    assert isinstance(as_anyone(models.load, valid), models.Bundle)


@pytest.mark.parametrize("name", ["a.pt", "hf", "a.gguf"])
def test_a_file_in_a_folder_that_may_not_be_entered_is_told_as_that(name, tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir()
    locked.chmod(0)
    error = as_anyone(models.load, locked / name)
    locked.chmod(0o755)
    assert isinstance(error, InputError)
    assert "Permission denied" in str(error)
    for wrong in ("No such file", "not here", "not found"):
        assert wrong not in str(error)


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_folder_in_the_place_of_a_file_is_told_as_that(name, valid):
    (valid / name).unlink()
    (valid / name).mkdir()
    line = refusal(valid)
    assert "Is a directory" in line
    assert name in line


# ---- What a file is, its beginning says

GGUF_NAMES = ["sha256-0f1e2d3c", "X.GGUF", "blob", "model.bin", "model.pt", "model.Q8.gguf.part"]


@pytest.mark.parametrize("name", GGUF_NAMES)
def test_a_gguf_file_may_have_any_name(name, tokenizer, tmp_path):
    model = make(TINY_1000)
    write_model(tmp_path / "a.gguf", model, tokenizer)
    (tmp_path / "a.gguf").rename(tmp_path / name)
    found = models.load(tmp_path / name).model.state_dict()
    for key, weight in model.state_dict().items():
        assert torch.equal(found[key], weight), key


@pytest.mark.parametrize("name", ["out.gguf", "checkpoint", "ckpt.bin"])
def test_a_checkpoint_may_have_any_name(name, tiny, tmp_path):
    shutil.copy(tiny, tmp_path / name)
    assert models.load(tmp_path / name).tokenizer.get_vocab_size() == 1000


def test_sample_takes_gguf_files(tiny, tmp_path):
    models.write(tmp_path / "a.gguf", models.load(tiny), "float32")
    shutil.copy(tmp_path / "a.gguf", tmp_path / "sha256-0f1e2d3c")
    command = ("--prompt=def f(", "--temperature=0", "--max_new_tokens=9", "--device=cpu")
    texts = set()
    for name in (str(tiny), "a.gguf", "./a.gguf", "sha256-0f1e2d3c"):
        result = run(tmp_path, "sample.py", f"--ckpt={name}", *command)
        assert result.returncode == 0, result.stderr
        texts.add(result.stdout)
    assert len(texts) == 1


NO_MODELS = {  # the contents of a file of any name
    "a text": b"This is a text.\n" * 9,
    "nothing": b"",
    "less than four bytes": b"GG",
    "GGUF alone": b"GGUF",
    "GGUF and noise": b"GGUF" + bytes(range(200)),
    "the older GGML": b"lmgg" + bytes(200),
    "a zip's first bytes": b"PK\x03\x04" + bytes(200),
    "a page of the web": b"<!DOCTYPE html><html>404</html>",
    "a pointer of Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
}


@pytest.mark.parametrize("name", ["x.gguf", "x.pt", "x"])
@pytest.mark.parametrize("kind", NO_MODELS)
def test_a_file_that_is_no_model_is_refused_in_one_line(kind, name, tmp_path):
    (tmp_path / name).write_bytes(NO_MODELS[kind])
    line = refusal(tmp_path / name)
    assert line.startswith(f"{tmp_path / name}: can't be read: ")
    assert "mmap" not in line
    assert "module" not in line  # as a bug would be told


def test_a_text_that_is_named_gguf_is_refused_by_the_command(tmp_path):
    (tmp_path / "x.gguf").write_text("This is a text.\n")
    assert "neither" in one_line(run(tmp_path, "sample.py", "--ckpt=x.gguf"))


# ---- Folders that lack what is read

FOLDERS = {  # their files; what is said of them
    "a LoRA adapter": (["adapter_config.json", "adapter_model.safetensors", "README.md"],
                       ["LoRA adapter", "merge_and_unload"]),
    "a LoRA adapter with a tokenizer": (
        ["adapter_config.json", "adapter_model.bin", "tokenizer.json", "tokenizer_config.json"],
        ["LoRA adapter", "merge_and_unload"]),
    "a LoRA adapter with the config": (
        ["adapter_config.json", "adapter_model.safetensors", "config.json", "tokenizer.json"],
        ["LoRA adapter", "merge_and_unload"]),
    "a pickle": (["config.json", "tokenizer.json", "pytorch_model.bin"],
                 ["model.safetensors", "pickle", "save_pretrained"]),
    "shards of a pickle": (
        ["config.json", "tokenizer.json", "pytorch_model.bin.index.json",
         "pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"],
        ["model.safetensors", "pickle", "save_pretrained"]),
    "SentencePiece": (["config.json", "model.safetensors", "tokenizer.model"],
                      ["tokenizer.json", "SentencePiece", "save_pretrained"]),
    "an old tokenizer": (["config.json", "model.safetensors", "vocab.json", "merges.txt"],
                         ["tokenizer.json", "save_pretrained"]),
    "a GGUF file": (["SmolLM2-Q8_0.gguf"], ["GGUF file", "not the folder"]),
    "a GGUF file with a config": (["config.json", "tokenizer.json", "SmolLM2-Q8_0.gguf"],
                                  ["GGUF file", "not the folder"]),
    "a run of a Trainer": (["checkpoint-500"], ["Trainer", "checkpoints"]),
    "a run": (["ckpt.pt", "ckpt-previous.pt", "metrics.jsonl"], ["ckpt.pt", "run"]),
    "a tokenizer alone": (["tokenizer.json", "tokenizer_config.json"], ["config.json"]),
    "nothing": ([], ["config.json"]),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_folder_that_lacks_a_file_is_told_what_it_is_and_the_way_out(kind, valid, tmp_path):
    names, said = FOLDERS[kind]
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in names:
        (folder / name).write_text("{}")
        if (valid / name).exists():
            shutil.copy(valid / name, folder)
    line = refusal(folder)
    assert line.startswith(f"{folder}: can't be read: ")
    for words in said:
        assert words in line
    assert "No such file" not in line


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_a_pointer_in_a_file_s_place_is_told_as_that(name, valid):
    (valid / name).write_bytes(NO_MODELS["a pointer of Git LFS"])
    assert f"{name} is a pointer of git-lfs to it: run git lfs pull" in refusal(valid)


def test_an_address_of_the_hub_is_its_id(tiny, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("lib.models.local_path", lambda source: asked.append(source) or tiny)
    assert models.load("https://huggingface.co/someone/tiny").hub_id == "someone/tiny"
    assert asked == ["someone/tiny"]


@pytest.mark.parametrize("name", ["a.pt", "a.gguf", "a"])
def test_a_full_disk_in_a_conversion_is_one_line_and_leaves_nothing(name, tiny, tmp_path):
    bundle = models.load(tiny)
    with pytest.raises((InputError, OSError)) as error, full_disk():
        models.write(tmp_path / name, bundle, "float32")
    assert len(str(error.value).splitlines()) == 1
    assert str(tmp_path / name) in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_link_to_nothing_is_no_free_name(tiny, tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "nothing")
    result = run(tmp_path, "tools/convert.py", str(tiny), "a")
    assert "a exists: name another target" in one_line(result)
    assert (tmp_path / "a").is_symlink()


def test_what_generation_config_asks_for_in_vain_is_named(valid, capsys):
    generation = {"repetition_penalty": 1.3, "no_repeat_ngram_size": 0, "num_beams": None,
                  "suppress_tokens": [1], "temperature": 0.1}
    (valid / "generation_config.json").write_text(json.dumps(generation))
    sample.say_what_is_not_done(models.load(valid))
    assert capsys.readouterr().err == ("its generation_config.json also asks for "
                                       "repetition_penalty, suppress_tokens, which sample.py does "
                                       "not do\n")


@pytest.mark.parametrize("option", ["temperature=nan", "temperature=-1", "top_k=0", "top_p=0"])
def test_a_sampling_option_out_of_range_is_told_before_the_prompt(option, tiny, tmp_path):
    result = run(tmp_path, "sample.py", f"--ckpt={tiny}", "--prompt=Hello", f"--{option}")
    assert f"{option.partition('=')[0]} is " in one_line(result)
    assert result.stdout == ""


def test_a_folder_of_an_adapter_is_refused_by_the_commands(tmp_path):
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text("{}")
    for command in (("sample.py", "--ckpt=lora"), ("tools/convert.py", "lora", "new")):
        assert "LoRA adapter" in one_line(run(tmp_path, *command))
    assert [path.name for path in tmp_path.iterdir()] == ["lora"]


# ---- Checkpoints that would grow


def write_checkpoint(path: Path, config: Config, tokenizer, weights: dict):
    torch.save({"model": weights, "config": asdict(config), "tokenizer": tokenizer.to_str()}, path)


def shapes_of(config: Config) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: p.shape for name, p in SmolLM(config).state_dict().items()}


# 1.6 GB of weights
LARGE = replace(TINY_1000, hidden_size=1536, intermediate_size=16_384, num_hidden_layers=5)


def strided_zeros(shapes: dict) -> dict:
    return {name: torch.zeros(1).expand(shape) for name, shape in shapes.items()}


def shared_zeros(shapes: dict) -> dict:
    storage = torch.zeros(max(shape.numel() for shape in shapes.values()))
    return {name: storage[:shape.numel()].view(shape) for name, shape in shapes.items()}


def strided_once(shapes: dict) -> dict:
    weights = {name: torch.zeros(shape) for name, shape in shapes.items()}
    weights["model.embed_tokens.weight"] = torch.zeros(1, 1).expand(
        shapes["model.embed_tokens.weight"])
    return weights


@pytest.mark.parametrize("spread", [strided_zeros, shared_zeros, strided_once])
def test_a_checkpoint_of_views_is_refused(spread, tokenizer, tmp_path):
    write_checkpoint(tmp_path / "views.pt", TINY_1000, tokenizer, spread(shapes_of(TINY_1000)))
    assert "views.pt" in refusal(tmp_path / "views.pt")


def test_a_checkpoint_of_views_takes_no_memory(tokenizer, tmp_path):
    write_checkpoint(tmp_path / "views.pt", LARGE, tokenizer, strided_zeros(shapes_of(LARGE)))
    assert (tmp_path / "views.pt").stat().st_size < 200_000
    for options in (("sample.py", "--ckpt=views.pt"), ("tools/convert.py", "views.pt", "new")):
        result = Script(tmp_path, *options, before=with_little_memory).wait()
        line = one_line(result)
        assert "views.pt" in line
        assert "memory" not in line


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2,
                                         zipfile.ZIP_LZMA])
def test_a_compressed_checkpoint_is_refused(compression, tiny, tmp_path):
    compress(tiny, tmp_path / "small.pt", compression)
    assert "it is compressed: save it anew" in refusal(tmp_path / "small.pt")


def compress(source: Path, target: Path, compression: int, suffix=""):
    """Write the same zip file with those entries compressed whose names end so."""
    with zipfile.ZipFile(source) as before, zipfile.ZipFile(target, "w") as after:
        for entry in before.infolist():
            how = compression if entry.filename.endswith(suffix) else zipfile.ZIP_STORED
            after.writestr(entry.filename, before.read(entry), how)


def test_a_checkpoint_of_which_one_tensor_is_compressed_is_refused(tiny, tmp_path):
    compress(tiny, tmp_path / "small.pt", zipfile.ZIP_DEFLATED, suffix="data/7")
    assert "it is compressed: save it anew" in refusal(tmp_path / "small.pt")


# ---- Text as it comes, of other tokenizers


def byte_fallback_tokenizer() -> Tokenizer:
    """As Llama 2's: a space is ▁, each text begins with one, and characters that are no token are
    made of bytes."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    tokens += list("abcdefghijklmnopqrstuvwxyzABC.,!é")
    merges = [("▁", "a"), ("t", "h"), ("th", "e"), ("▁", "the"), ("i", "n"), ("▁", "▁")]
    tokens += ["".join(merge) for merge in merges]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"),
                                                 normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(),
                                           decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(token, normalized=False)
                                  for token in ("<unk>", "<s>", "</s>")])
    return tokenizer


def metaspace_tokenizer() -> Tokenizer:
    """The same, as newer files say it."""
    tokenizer = byte_fallback_tokenizer()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


TOKENIZERS = {"byte fallback": byte_fallback_tokenizer, "metaspace": metaspace_tokenizer}
TEXTS = ["the cat", " the cat in a hat", "漢字かな", "🙂", "naïve 🙂👩‍👩‍👧 the 漢字, end",
         "a  b   c ", "\n\tthe\n", "é the", "!", "0123 the 9", "the" * 20, "Привет, мир"]


def streamed(tokenizer, ids, before=()) -> tuple[str, list[str]]:
    """The text that is printed, without the last line's end, and its pieces."""
    pieces = []
    with redirect_stdout(io.StringIO()) as out:
        out.write = pieces.append
        assert sample.stream(tokenizer, iter(ids), before) == list(ids)
    text = "".join(pieces)
    assert text.endswith("\n")
    return text[:-1], pieces


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("prompt", ["", "the", "the ", "漢", "a 🙂"], ids=repr)
def test_what_is_streamed_is_what_the_tokenizer_makes_of_the_whole(kind, prompt):
    tokenizer = TOKENIZERS[kind]()
    before = tokenizer.encode(prompt).ids
    shown = tokenizer.decode(before)
    for text in TEXTS:
        ids = tokenizer.encode(text).ids
        whole = tokenizer.decode(before + ids)
        assert whole.startswith(shown)
        found, pieces = streamed(tokenizer, ids, before)
        assert found == whole[len(shown):], text
        assert not any("\ufffd" in piece for piece in pieces), text


def test_the_space_at_the_seam_is_kept():
    tokenizer = byte_fallback_tokenizer()
    before = tokenizer.encode("in a").ids
    assert streamed(tokenizer, tokenizer.encode("the hat").ids, before)[0] == " the hat"


def test_bytes_are_held_back_until_they_make_a_character():
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.encode("字🙂é").ids
    _, pieces = streamed(tokenizer, ids, tokenizer.encode("the").ids)
    assert [piece.strip() for piece in pieces if piece.strip()] == ["字", "🙂", "é"]
    cut = tokenizer.encode("the 🙂").ids[:-1]  # at the end they are shown as they are
    found, pieces = streamed(tokenizer, cut)
    assert found == tokenizer.decode(cut) == "the \ufffd\ufffd\ufffd"
    assert not any("\ufffd" in piece for piece in pieces[:-2])


@pytest.mark.parametrize("kind", ["byte level", *TOKENIZERS])
def test_streaming_bears_any_tokens(kind, tokenizer):
    if kind != "byte level":
        tokenizer = TOKENIZERS[kind]()
    rng = random.Random(0)
    size = tokenizer.get_vocab_size()
    for _ in range(100):
        ids = [rng.randrange(size) for _ in range(60)]
        before = tokenizer.encode(rng.choice(TEXTS)).ids
        found, _ = streamed(tokenizer, ids, before)
        if kind == "byte level":  # a byte of others can undo the character before it
            whole = tokenizer.decode(before + ids)
            assert found == whole[len(tokenizer.decode(before)):]


@pytest.mark.parametrize("num_samples", [1, 2])
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_completion_goes_on_from_its_prompt_as_transformers_decodes_it(
        kind, num_samples, tmp_path, capsys):
    tokenizer = TOKENIZERS[kind]()
    config = replace(TINY_1000, vocab_size=tokenizer.get_vocab_size(), bos_token_id=1,
                     eos_token_id=None)
    bundle = models.Bundle(make(config), tokenizer, {})
    models.write(tmp_path / "hf", bundle, "float32")
    hf = AutoTokenizer.from_pretrained(tmp_path / "hf")
    for prompt in ("the cat in", "naïve 漢字"):
        o = sample.Options(prompt=prompt, num_samples=num_samples, max_new_tokens=30)
        sample.complete(bundle, o, {"temperature": 0})
        ids = tokenizer.encode(prompt).ids
        new = hf.decode(ids + greedy(bundle.model, ids, 30), skip_special_tokens=True,
                        clean_up_tokenization_spaces=False)
        ending = "\n" if num_samples == 1 else "\n" + "-" * 60 + "\n"
        expected = (prompt + new[len(hf.decode(ids, skip_special_tokens=True)):] + ending)
        assert capsys.readouterr().out == expected * num_samples


# ---- Paths


def at_home(folder: Path, script: str, *options: str) -> subprocess.CompletedProcess:
    """What a script ended with, run in a folder below its user's home folder."""
    (folder / "elsewhere").mkdir(exist_ok=True)
    return Script(folder / "elsewhere", script, *options, HOME=str(folder)).wait()


def test_a_tilde_is_the_home_folder_in_every_path(tiny, corpus, tokenizer, tmp_path):
    shutil.copy(tiny, tmp_path / "a.pt")
    shutil.copytree(corpus, tmp_path / "texts")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    commands = [
        ("tools/convert.py", "~/a.pt", "~/hf"),
        ("tools/convert.py", "~/hf", "~/b.gguf"),
        ("sample.py", "--ckpt=~/a.pt", "--max_new_tokens=2"),
        ("sample.py", "--ckpt=~/hf", "--max_new_tokens=2"),
        ("sample.py", "--ckpt=~/b.gguf", "--max_new_tokens=2"),
        ("train.py", *STEADY, "--dtype=float32", "--dataset=~/texts", "--out_dir=~/out",
         "--init_from=~/b.gguf", "--max_iters=3"),
        ("train.py", *STEADY, "--dtype=float32", "--dataset=~/texts", "--out_dir=~/fresh",
         "--model=nano", "--tokenizer=~/tokenizer.json", "--max_iters=3"),
    ]
    for command in commands:
        result = at_home(tmp_path, *command)
        assert result.returncode == 0, (command, result.stderr)
    for name in ("hf/config.json", "b.gguf", "out/ckpt.pt", "fresh/ckpt.pt"):
        assert (tmp_path / name).exists()
    assert {path.name for path in (tmp_path / "elsewhere").iterdir()} == {"data"}


@pytest.mark.parametrize("target", ["m.pth", "m.safetensors", "m.bin", "m.onnx", "M.ONNX",
                                    "deep/m.ckpt", "m.ggml", "m.zip"])
def test_targets_of_other_kinds_are_refused(target):
    with pytest.raises(InputError) as refused:
        check_name(target)
    suffix = Path(target).suffix.lower()
    assert str(refused.value).startswith(f"{target}: a {suffix} file can't be written")
    assert len(str(refused.value).splitlines()) == 1


def test_a_target_of_another_kind_is_refused_before_anything_is_written(tiny, tmp_path):
    line = one_line(run(tmp_path, "tools/convert.py", str(tiny), "deep/m.safetensors"))
    assert line.startswith("error: deep/m.safetensors: a .safetensors file can't be written")
    assert list(tmp_path.iterdir()) == []


def test_names_with_a_dot_are_folders_all_the_same(tiny, tmp_path):
    for target in ("SmolLM2-1.7B", "a.7B-Instruct", "m.bin/"):
        result = run(tmp_path, "tools/convert.py", str(tiny), target)
        assert result.returncode == 0, result.stderr
        assert (tmp_path / target / "model.safetensors").is_file()


# ---- Ctrl-C amid an answer


class Interrupted:
    """A step for sample.converse, which is interrupted once: in its call of that number, at some
    place in it. held is what the cache holds by then, if it is as it should be."""
    def __init__(self, model: SmolLM, number: int, place: str):
        self.model = model
        self.number = number
        self.place = place
        self.calls = itertools.count()
        self.held = []
        self.new = []  # how many tokens each call was given

    def __call__(self, input_ids, cache: KVCache):
        interrupts = next(self.calls) == self.number
        self.held = self.held[:cache.length] + input_ids.flatten().tolist()
        self.new.append(input_ids.size(1))
        if interrupts and self.place == "before":
            raise KeyboardInterrupt
        if interrupts and self.place == "amid":
            self.raise_in_layer()
        logits = self.model(input_ids, cache=cache)[0]
        if interrupts:
            raise KeyboardInterrupt
        return logits

    def raise_in_layer(self):
        def interrupt(module, arguments):
            hook.remove()
            raise KeyboardInterrupt

        hook = self.model.model.layers[1].register_forward_pre_hook(interrupt)


def conversation(bundle, o, sampling, lines: list[str], monkeypatch) -> list[str]:
    """The lines that a chat prints, when it is told these."""
    lines = iter([*lines, None])
    monkeypatch.setattr("sample.read_line", lambda: next(lines))
    with redirect_stdout(io.StringIO()) as out:
        sample.converse(bundle, o, sampling)
    return out.getvalue().split("\n")


# Words on one line, so that each answer is a line
WORDY = ("{% for message in messages %}{{ message.role }}: {{ message.content }}<|im_end|>"
         "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}")


@pytest.fixture
def wordy(tokenizer) -> models.Bundle:
    """A model for whose conversations each token is a word."""
    model = make(replace(TINY_1000, max_position_embeddings=512, eos_token_id=None))
    plain = [token_id for token, token_id in tokenizer.get_vocab().items()
             if token.isascii() and token.isalpha() and len(token) > 2]
    mask = torch.ones(1000, dtype=torch.bool)
    mask[plain] = False
    head = model.head
    model.head = lambda x: head(x).masked_fill(mask, -1e9)
    return models.Bundle(model, tokenizer, {"chat_template.jinja": WORDY})


@pytest.mark.parametrize("place", ["before", "amid", "after"])
@pytest.mark.parametrize("number", [0, 1, 5, 10, 13])  # in the prefill; later; of the second turn
def test_ctrl_c_ends_the_answer_and_the_next_turn_goes_on_from_what_was_seen(
        number, place, wordy, monkeypatch):
    model = wordy.model
    step = Interrupted(model, number, place)
    o = sample.Options(chat=True, max_new_tokens=10)
    questions = ["Hello", "And again", "And at last"]
    *answers, rest = conversation(wordy, o, {"temperature": 0, "step": step}, questions,
                                  monkeypatch)
    assert rest == ""
    assert len(answers) == 3
    template, _ = chat.load(wordy.tokenizer, model.config, wordy.files, "it")
    # each call before the interrupted one has shown a token
    expected_lengths = [10, 10, 10]
    expected_lengths[number // 10] = number % 10
    messages = []
    for question, answer, length in zip(questions, answers, expected_lengths, strict=True):
        messages.append({"role": "user", "content": question})
        ids = wordy.tokenizer.encode(template.render(messages), add_special_tokens=False).ids
        new = greedy(model, ids, 10)[:length]
        assert answer == wordy.tokenizer.decode(new)
        messages.append({"role": "assistant", "content": answer})
        if not length:  # ended before it began: as if nothing was said
            messages = messages[:-2]
    # with what the last turn was fed the cache has the conversation; what it had was not fed again
    assert step.held[:len(ids)] == ids
    kept = template.render(messages[:-3], add_generation_prompt=False)
    num_kept = len(wordy.tokenizer.encode(kept, add_special_tokens=False).ids)
    prefills = [count for count in step.new if count > 1]
    assert prefills[-1] <= len(ids) - num_kept < len(ids)


def test_a_prompt_whose_answer_is_interrupted_ends_well(wordy, capsys):
    o = sample.Options(chat=True, prompt="Hello", max_new_tokens=10)
    step = Interrupted(wordy.model, 4, "before")
    sample.converse(wordy, o, {"temperature": 0, "step": step})
    assert capsys.readouterr().err == ""


# ---- A terminal


def sit_at(name: str):
    """Make the terminal of that name the process's own: its stdin and stdout."""
    os.setsid()
    descriptor = os.open(name, os.O_RDWR)
    for number in (0, 1):
        os.dup2(descriptor, number)
    open_stdin()
    sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115


class Terminal:
    """A pseudo-terminal with sample.py in it, chatting."""
    def __init__(self, cwd: Path, *options: str):
        self.master, self.slave = pty.openpty()
        self.script = Script(cwd, "sample.py", *CHATTING, *options, TERM="xterm",
                             before=partial(sit_at, os.ttyname(self.slave)))
        self.seen = ""

    def read(self):
        if select.select([self.master], [], [], 0.05)[0]:
            self.seen += os.read(self.master, 65536).decode(errors="replace")

    def wait_for(self, text: str):
        """Until the text has come. What was seen by then is forgotten."""
        self.wait_until(lambda: text in self.seen)
        self.seen = self.seen.partition(text)[2]

    def wait_until(self, is_done, seconds: float = 30):
        deadline = time.monotonic() + seconds
        while not is_done():
            assert time.monotonic() < deadline, (self.seen, self.script.err)
            assert self.script.process.is_alive(), (self.seen, self.script.err)
            self.read()

    def type(self, keys: str):
        os.write(self.master, keys.encode())

    def end(self, again: str = "") -> subprocess.CompletedProcess:
        """Until it ends. The key `again` is pressed each second: Python's readline looks for
        signals and then waits for keys, and a Ctrl-C between the two is heard at the next key."""
        deadline = time.monotonic() + 30
        pressed = time.monotonic()
        while self.script.process.is_alive() and time.monotonic() < deadline:
            self.read()
            if again and time.monotonic() - pressed > 1:
                self.type(again)
                pressed = time.monotonic()
        return self.script.wait(1)


@pytest.fixture
def chatting(tmp_path):
    """Begins a Terminal with these options. It is gone after the test, whatever became of it."""
    terminals = []

    def begin(*options: str) -> Terminal:
        terminals.append(Terminal(tmp_path, *options))
        return terminals[-1]

    yield begin
    for terminal in terminals:
        terminal.script.process.kill()
        os.close(terminal.master)
        os.close(terminal.slave)


LEFT, UP, BACKSPACE = "\x1b[D", "\x1b[A", "\x7f"
CTRL_A, CTRL_C, CTRL_D = "\x01", "\x03", "\x04"
KEYS = {  # what is typed at the first prompt, each a turn, and what is said by it
    f"hellp{BACKSPACE}o{LEFT}": ["hello"],
    f"ïve 漢字{CTRL_A}na": ["naïve 漢字"],
}


@pytest.mark.parametrize("keys", KEYS, ids=repr)
def test_a_line_can_be_edited_and_comes_again_with_arrow_up(keys, telling, chatting):
    terminal = chatting(f"--ckpt={telling}", "--max_new_tokens=1")
    for typed in (keys, UP, "tell"):
        terminal.wait_for("> ")
        terminal.type(f"{typed}\r")
    result = terminal.end()
    assert told(result.stderr) == [*KEYS[keys], *KEYS[keys], "tell"]


@pytest.mark.parametrize("key", [CTRL_D, f"half a line{CTRL_C}"], ids=repr)
def test_ctrl_c_and_ctrl_d_at_the_prompt_leave_quietly(key, telling, chatting):
    terminal = chatting(f"--ckpt={telling}")
    terminal.wait_for("> ")
    terminal.type(key)
    result = terminal.end(again=key[-1])
    assert (result.returncode, result.stderr) == (0, "")
    assert "Traceback" not in terminal.seen


def test_ctrl_c_at_a_terminal_ends_the_answer_and_not_the_chat(long, chatting):
    terminal = chatting(f"--ckpt={long}")
    terminal.wait_for("> ")
    for question in ("one", "two"):
        terminal.type(f"{question}\r")
        terminal.wait_for(f"{question}\r\n")
        terminal.wait_until(lambda: len(terminal.seen) > 100)  # of an answer of 8000 tokens
        terminal.type(CTRL_C)
        terminal.wait_for("^C")
        terminal.wait_for("\r\n> ")
    terminal.type(CTRL_D)
    result = terminal.end()
    assert (result.returncode, result.stderr) == (0, "")


# ---- A pipe


def read_from(path: str):
    os.dup2(os.open(path, os.O_RDONLY), 0)
    open_stdin()


def piped(folder: Path, stdin: bytes, *options: str) -> subprocess.CompletedProcess:
    """What sample.py ended with, that has read these bytes."""
    (folder / "stdin").write_bytes(stdin)
    return Script(folder, "sample.py", "--device=cpu", *options,
                  before=partial(read_from, str(folder / "stdin"))).wait()


LINES = {  # what is sent, and what is said by it
    b"one\r\n\r\ntell": ["one", "tell"],
    b"\xef\xbb\xbfone\ntell": ["one", "tell"],
    "漢字".encode() + b"\xff\r\ntell": ["漢字\ufffd", "tell"],
    b"one\r\n/reset\r\ntwo\r\ntell\r\n": ["two", "tell"],
}


@pytest.mark.parametrize("lines", LINES, ids=repr)
def test_lines_of_any_system_are_read_from_a_pipe(lines, telling, tmp_path):
    result = piped(tmp_path, lines, f"--ckpt={telling}", "--chat=True", "--max_new_tokens=1")
    assert told(result.stderr) == LINES[lines]


@pytest.mark.parametrize("text", ["def f(x):\r\n漢字\n".encode()], ids=repr)
def test_a_prompt_can_come_from_a_pipe(text, tiny, tmp_path):
    options = (f"--ckpt={tiny}", "--temperature=0", "--max_new_tokens=9")
    prompt = text.decode().replace("\r\n", "\n")
    result = piped(tmp_path, text, "--prompt=-", *options)
    assert result.returncode == 0, result.stderr
    given = run(tmp_path, "sample.py", "--device=cpu", f"--prompt={prompt}", *options)
    assert result.stdout == given.stdout
    assert result.stdout.startswith(prompt)


def test_the_question_of_a_chat_can_come_from_a_pipe(telling, tmp_path):
    result = piped(tmp_path, b"tell", f"--ckpt={telling}", "--chat=True", "--prompt=-")
    assert told(result.stderr) == ["tell"]
    options = (f"--ckpt={telling}", *CHATTING, "--max_new_tokens=5")
    result = piped(tmp_path, b"Two\r\nlines", "--prompt=-", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout == run(tmp_path, "sample.py", "--prompt=Two\nlines", *options).stdout


@pytest.fixture(scope="module")
def book(corpus) -> bytes:
    """200 kB of text."""
    text = b"".join(path.read_bytes() for path in sorted(corpus.iterdir()))
    text = text.decode()[:210_000].encode()
    assert len(text) > 200_000
    return text


def test_a_prompt_of_200_kilobytes_goes_through_a_pipe_in_seconds(book, long, tmp_path):
    started = time.monotonic()
    result = piped(tmp_path, book, f"--ckpt={long}", "--prompt=-", "--max_new_tokens=20")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(book.decode())
    assert len(result.stdout) > len(book.decode()) + 5
    assert time.monotonic() - started < 30


def test_a_chat_of_200_kilobytes_is_told_in_one_line_that_its_context_is_full(
        book, long, tmp_path):
    result = piped(tmp_path, book, f"--ckpt={long}", "--chat=True", "--prompt=-")
    assert "the context of 8192 tokens is full: shorten the prompt" in one_line(result)


# ---- As many tokens as fit


@pytest.mark.parametrize(("length", "count"), [(1, 200), (300, 200), (311, 200), (312, 200),
                                               (313, 199), (400, 112), (511, 1)])
def test_without_a_number_of_tokens_200_are_made_or_what_fits(length, count, tokenizer, capsys):
    model = make(replace(TINY_1000, max_position_embeddings=512, eos_token_id=None))
    prompt = tokenizer.decode(tokenizer.encode("x y " * 300).ids[:length])
    ids = tokenizer.encode(prompt).ids
    assert len(ids) == length
    made = []
    model.model.register_forward_pre_hook(lambda module, arguments: made.append(arguments[0]))
    sample.complete(models.Bundle(model, tokenizer, {}), sample.Options(prompt=prompt),
                    {"temperature": 0})
    assert len(made) == count
    whole = tokenizer.decode(ids + greedy(model, ids, count))
    assert capsys.readouterr().out == whole + "\n"


@pytest.mark.parametrize("length", [512, 513, 600])
def test_a_prompt_that_fills_the_context_is_refused(length, tokenizer):
    model = make(replace(TINY_1000, max_position_embeddings=512))
    prompt = tokenizer.decode(tokenizer.encode("x y " * 400).ids[:length])
    with pytest.raises(InputError, match=f"a prompt of {length} tokens") as refused:
        sample.complete(models.Bundle(model, tokenizer, {}), sample.Options(prompt=prompt), {})
    assert len(str(refused.value).splitlines()) == 1


def test_a_prompt_that_fills_the_context_is_refused_by_the_command(tiny, tmp_path):
    result = run(tmp_path, "sample.py", f"--ckpt={tiny}", "--prompt=" + "x y " * 100)
    assert result.returncode == 1
    assert len(result.stderr.splitlines()) == 1
    assert "shorten it" in result.stderr


def test_tokens_that_were_asked_for_and_do_not_fit_are_refused(tokenizer):
    bundle = models.Bundle(make(TINY_1000), tokenizer, {})
    o = sample.Options(prompt="x y", max_new_tokens=128)
    with pytest.raises(InputError, match="128 new ones must fit in the 128"):
        sample.complete(bundle, o, {})


# ---- All commands


INTERRUPTED = """
import os, signal, sys
class Interrupt:
    def find_spec(name, path=None, target=None):
        if name == "torch":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt)
"""
COMMANDS = ["train.py", "sample.py", "tools/convert.py", "tools/prepare.py", "tools/plot.py"]


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_in_the_first_seconds_is_one_line(command, tmp_path):
    """While torch is imported, before there is a command line."""
    (tmp_path / "sitecustomize.py").write_text(INTERRUPTED)
    result = run(tmp_path, command, PYTHONPATH=str(tmp_path))
    assert result.returncode == 130
    assert result.stderr == "error: interrupted\n"


@pytest.mark.parametrize(("command", "name"), [
    ("train.py --sample_prompt", "sample_prompt"),
    ("train.py --text_column", "text_column"),
    ("tools/prepare.py --separator", "separator"),
    ("sample.py --prompt", "prompt"),
    ("sample.py --system", "system"),
])
def test_an_option_that_is_not_utf_8_is_one_line(command, name, tmp_path):
    result = run(tmp_path, *f"{command}=a\udcff".split())
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {name} must be UTF-8 text: ")
    assert len(result.stderr.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_closed_stdout_is_one_line_in_training(tmp_path):
    result = subprocess.run(f"exec {sys.executable} {ROOT / 'train.py'} >&-", shell=True, text=True,
                            cwd=tmp_path, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr == "error: stdout is closed: send it to a file or to /dev/null\n"


def without_compilers():
    """In a process: as where none is in PATH."""
    os.environ["PATH"] = "/nowhere"
    os.environ.pop("CXX", None)


def test_without_a_compiler_all_goes_on_without_torch_compile(tiny, corpus, tmp_path):
    options = (f"--ckpt={tiny}", "--prompt=def", "--max_new_tokens=8", "--device=cpu")
    eager = run(tmp_path, "sample.py", *options)
    result = Script(tmp_path, "sample.py", *options, "--compile=True",
                    before=without_compilers).wait()
    assert result.returncode == 0, result.stderr
    assert result.stdout == eager.stdout
    assert result.stderr.startswith("torch.compile finds no compiler: install g++")
    result = train_here(tmp_path, *STEADY, f"--dataset={corpus}", f"--init_from={tiny}",
                        "--dtype=float32", "--max_iters=4", "--compile=True",
                        before=without_compilers)
    assert "\ntorch.compile finds no compiler: install g++" in result.stdout
    assert "Traceback" not in result.stderr
