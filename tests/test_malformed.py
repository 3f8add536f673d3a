"""Files that are not what they should be: each is refused in one line, and no code in it is run."""

import json
import math
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

from lib import models
from smollm import SHARD_INDEX, InputError, SmolLM, load_tokenizer
from test_smollm import Payload
from tests.helpers import write_model

NORM = "model.norm.weight"
DOWN = "model.layers.0.mlp.down_proj.weight"


def check_refused(read, payload: Path, what: str):
    """That reading raises an InputError of one line, and nothing in it was run."""
    with pytest.raises(InputError) as error:
        read()
    assert "\n" not in str(error.value), what
    assert not payload.exists(), what


# ---- HuggingFace directories


def safetensors_bytes(header: dict | bytes, data: bytes = b"") -> bytes:
    if isinstance(header, dict):
        header = json.dumps(header).encode()
    return len(header).to_bytes(8, "little") + header + data


def malformed(folder: Path, payload: Path) -> dict[str, dict[str, bytes | None]]:
    """By what is wrong: the files of the valid folder that are otherwise (None: gone)."""
    weights = (folder / "model.safetensors").read_bytes()
    start = 8 + int.from_bytes(weights[:8], "little")
    header = json.loads(weights[8:start])
    config = json.loads((folder / "config.json").read_text())
    norm = header[NORM]
    down = header[DOWN]

    def file(contents: bytes, name="model.safetensors"):
        return {name: contents}

    def tensors(**changed):
        """The header has other entries; None: it lacks one."""
        entries = dict(header)
        for name, entry in changed.items():
            entries[{"norm": NORM, "down": DOWN}.get(name, name)] = entry
        entries = {name: entry for name, entry in entries.items() if entry is not None}
        return file(safetensors_bytes(entries, weights[start:]))

    def settings(**changed):
        return file(json.dumps(config | changed).encode(), "config.json")

    def index(contents):
        return {"model.safetensors": None, SHARD_INDEX: json.dumps(contents).encode()}

    def shard(name):
        return index({"weight_map": {NORM: name}})

    return {
        "weights that are whole numbers": tensors(norm=norm | {"dtype": "I32"}),
        "cut short in the data": file(weights[:-10]),
        "cut short in the header": file(weights[:100]),
        "empty": file(b""),
        "seven bytes": file(b"\x01\0\0\0\0\0\0"),
        "over-long": file(weights + b"\0" * 8),
        "a header of 2^60 bytes": file((2**60).to_bytes(8, "little") + weights[8:]),
        "a header that is no JSON": file(safetensors_bytes(b"{" * 40)),
        "a header that is a list": file(safetensors_bytes(b"[1, 2]")),
        "overlapping": tensors(norm=norm | {"data_offsets": down["data_offsets"]}),
        "another shape": tensors(down=down | {"shape": down["shape"][::-1]}),
        "a shape that isn't its size": tensors(down=down | {"shape": [1, 1]}),
        "negative offsets": tensors(norm=norm | {"data_offsets": [-4, 188]}),
        "an unknown dtype": tensors(norm=norm | {"dtype": "F99"}),
        "a missing tensor": tensors(norm=None),
        "a renamed tensor": tensors(norm=None, other=norm),
        "a pickle as weights": file(pickle.dumps(Payload(payload))),
        "a pickle as config": file(pickle.dumps(Payload(payload)), "config.json"),
        "a pickle as tokenizer": file(pickle.dumps(Payload(payload)), "tokenizer.json"),
        "an index that points outside": shard("../model.safetensors"),
        "an index to /etc": shard("/etc/passwd"),
        "an index to nothing": shard("nothing.safetensors"),
        "an index of numbers": shard(7),
        "an index that is a list": index([]),
        "an empty index": index({}),
        "RoPE scaling": settings(rope_scaling={"rope_type": "linear", "factor": 2}),
        "biases": settings(attention_bias=True),
        "MLP biases": settings(mlp_bias=True),
        "an untied head": settings(tie_word_embeddings=False),
        "no heads": settings(num_attention_heads=0),
        "another model": settings(model_type="gpt2"),
        "NaN": settings(rms_norm_eps=math.nan),
        "infinite theta": settings(rope_theta=math.inf, rope_parameters=None),
        "absurdly many layers": settings(num_hidden_layers=10**9),
        "a negative size": settings(vocab_size=-5),
        "absurdly wide": settings(intermediate_size=10**18),
        "a size in words": settings(hidden_size="many"),
        "RoPE in words": settings(rope_parameters="yarn"),
        "a config that is a list": file(b"[1]", "config.json"),
        "a config cut short": file(b'{"model_type"', "config.json"),
        "a config that is not UTF-8": file(b"\xff\xfe\x00", "config.json"),
        "a smaller vocabulary than the tokenizer's": settings(vocab_size=999),
        "a tokenizer that is empty": file(b"{}", "tokenizer.json"),
    }


def test_malformed_directories_are_refused_in_one_line(valid, tmp_path):
    payload = tmp_path / "payload ran"
    whole = {path.name: path.read_bytes() for path in valid.iterdir()}
    # one that is whole, but outside
    (tmp_path / "model.safetensors").write_bytes(whole["model.safetensors"])
    cases = malformed(valid, payload)
    assert len(cases) >= 40
    for what, changed in cases.items():
        write_folder(valid, whole | changed)
        check_refused(lambda: models.load(valid), payload, what)
    write_folder(valid, whole)
    models.load(valid)


def write_folder(folder: Path, files: dict[str, bytes | None]):
    """Give the folder these files and no others. None: it has no such file."""
    shutil.rmtree(folder)
    folder.mkdir()
    for name, contents in files.items():
        if contents is not None:
            (folder / name).write_bytes(contents)


# ---- Checkpoints and GGUF files


@pytest.fixture
def good(valid, tmp_path) -> Path:
    """A folder with good.pt and good.gguf, the model of the valid directory."""
    for name in ("good.gguf", "good.pt"):
        write_model(tmp_path / name, SmolLM.from_pretrained(valid), load_tokenizer(valid))
    return tmp_path


def malformed_checkpoints(good: dict, payload: Path) -> dict[str, object]:
    larger = Tokenizer.from_str(good["tokenizer"])
    larger.add_tokens(["one more"])

    def tensors(changed):
        return good | {"model": good["model"] | changed}

    return {
        "payload": {"model": Payload(payload), "config": {}, "tokenizer": ""},
        "foreign": {"weights": torch.zeros(3)},
        "list": [1, 2],
        "another config": {"model": {}, "config": {"depth": 3}, "tokenizer": ""},
        "number": {"model": 3, "config": {}, "tokenizer": ""},
        "text": tensors({NORM: "text"}),
        "int key": tensors({7: torch.zeros(3)}),
        "whole numbers": tensors({NORM: torch.zeros(48).int()}),
        "sparse": tensors({NORM: torch.ones(48).to_sparse()}),
        "rows": good | {"config": good["config"] | {"vocab_size": 999}},
        "tokenizer": good | {"tokenizer": larger.to_str()},
    }


def test_malformed_checkpoints_are_refused_in_one_line(good):
    payload = good / "payload ran"
    checkpoint = torch.load(good / "good.pt", weights_only=True)
    data = (good / "good.pt").read_bytes()
    files = {"cut": data[:-1000], "empty": b"", "pickle": pickle.dumps(Payload(payload))}
    cases = malformed_checkpoints(checkpoint, payload)
    assert len(cases) + len(files) == 14
    for what, contents in cases.items():
        torch.save(contents, good / f"{what}.pt")
    for what, contents in files.items():
        (good / f"{what}.pt").write_bytes(contents)
    for what in (*cases, *files):
        path = good / f"{what}.pt"
        check_refused(lambda path=path: models.load(path), payload, what)
    models.load(good / "good.pt")


def test_malformed_gguf_files_are_refused_in_one_line(good):
    payload = good / "payload ran"
    data = (good / "good.gguf").read_bytes()
    cases = {
        "pickle": pickle.dumps(Payload(payload)),
        "empty": b"",
        "cut in the data": data[:-1000],
        "cut in the header": data[:300],
        "magic": b"GGML" + data[4:],
        "version": data[:4] + b"\x63" + data[5:],
        "gpt2": data.replace(b"llama", b"gpt2x"),
        "pre": data.replace(b"smollm", b"llama3"),
        "name": data.replace(b"blk.1.attn_k", b"blk.9.attn_k"),
        "count": data[:8] + b"\xff" * 8 + data[16:],
        "pairs": data[:16] + b"\xff" * 7 + b"\0" + data[24:],
        "key": data.replace(b"llama.block_count", b"llama.block_cound"),
    }
    for what, contents in cases.items():
        path = good / f"{what}.gguf"
        path.write_bytes(contents)
        check_refused(lambda path=path: models.load(path), payload, what)
    models.load(good / "good.gguf")
