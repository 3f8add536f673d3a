"""What goes with a model travels with it, through every kind of file."""

import json
import logging
import os
import shutil
import urllib.request
from dataclasses import replace
from functools import partial
from pathlib import Path

import gguf
import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bench.llama_cpp import LlamaCpp
from lib import chat, gguf_format, gguf_values, hf_files, models
from smollm import InputError, id_list
from test_smollm import make
from tests.helpers import STEADY, TINY_1000, greedy, run, train_here, write_model
from tests.launch import Script

# The first ids of the tests' tokenizer: <|endoftext|> 0, <|im_start|> 1, <|im_end|> 2, <repo_name>
GENERATION = {"bos_token_id": 1, "eos_token_id": [2, 0], "pad_token_id": 3, "do_sample": True,
              "temperature": 0.3, "top_p": 0.9}
SETTINGS = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "model_max_length": 128,
    "clean_up_tokenization_spaces": False,
    "add_bos_token": False,
    "bos_token": "<|im_start|>",
    "eos_token": {"__type": "AddedToken", "content": "<|im_end|>", "lstrip": False,
                  "normalized": False, "rstrip": False, "single_word": False, "special": True},
    "unk_token": "<|endoftext|>",
    "pad_token": "<repo_name>",
}
TEMPLATE = "{{ bos_token }}{% for message in messages %}Bob: {{ message.content }}\n{% endfor %}"
TOOL_TEMPLATE = "{{ tools }}{{ messages[0].content }}\n\n"
NAMED_TEMPLATES = [{"name": "default", "template": TEMPLATE},
                   {"name": "tool_use", "template": TOOL_TEMPLATE}]
CARD = """---
license: apache-2.0
base_model: HuggingFaceTB/SmolLM2-135M
language:
- en
---

# A fine model
"""
JINJA = {"chat_template.jinja": TEMPLATE}
WITH_TOOLS = JINJA | {"additional_chat_templates/tool_use.jinja": TOOL_TEMPLATE}


def write_text(path: Path, text: str):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, "utf-8")


def write_hf(folder: Path, tokenizer, files=None, generation=GENERATION, settings=SETTINGS,
             **changes) -> Path:
    """A HuggingFace directory, written as others write it."""
    # an initializer_range that the width gives, as SmolLM's: a GGUF file need not hold it
    changes = {"initializer_range": None, **changes}
    config = replace(TINY_1000, bos_token_id=1, eos_token_id=2, pad_token_id=3, **changes)
    make(config).save_pretrained(folder, tokenizer)
    write_text(folder / "generation_config.json", json.dumps(generation))
    write_text(folder / "tokenizer_config.json", json.dumps(settings))
    for name, text in (files or {}).items():
        write_text(folder / name, text)
    return folder


def travel(source: Path, *stations: str) -> Path:
    """Convert source to the first of the stations beside it, that to the next, and so on."""
    for station in stations:
        target = source.with_name(station)
        models.write(target, models.load(source), "float32")
        source = target
    return source


def templates_at(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): path.read_text("utf-8")
            for path in folder.rglob("*.jinja")}


def check_same_for_transformers(folder: Path, other: Path):
    """That transformers finds the same weights, tokens and settings in both."""
    theirs = [AutoTokenizer.from_pretrained(path) for path in (folder, other)]
    assert theirs[0].special_tokens_map == theirs[1].special_tokens_map
    text = "<|im_start|>user\nnaïve 漢字 123<|im_end|>"
    assert theirs[0](text)["input_ids"] == theirs[1](text)["input_ids"]
    assert theirs[0].chat_template == theirs[1].chat_template
    assert theirs[0].model_max_length == theirs[1].model_max_length
    settings = [GenerationConfig.from_pretrained(path).to_diff_dict() for path in (folder, other)]
    for setting in settings:
        setting.pop("transformers_version", None)
    assert settings[0] == settings[1]
    weights = [load_file(path / "model.safetensors") for path in (folder, other)]
    assert weights[0].keys() == weights[1].keys()
    for name, weight in weights[0].items():
        assert torch.equal(weight, weights[1][name]), name


# ---- From a HuggingFace directory, and back

# Where a chat template may stand: the files, what tokenizer_config.json has, what comes back
TEMPLATE_PLACES = {
    "none": ({}, None, {}),
    "in a file": (JINJA, None, JINJA),
    "in files": (WITH_TOOLS, None, WITH_TOOLS),
    "in tokenizer_config.json": ({}, TEMPLATE, JINJA),
    "in a list": ({}, NAMED_TEMPLATES, WITH_TOOLS),
    "in a file that comes first": (JINJA, "another", JINJA),
}


@pytest.mark.parametrize("place", TEMPLATE_PLACES)
@pytest.mark.parametrize("station", ["a.pt", "a.gguf"])
def test_small_files_come_back_and_weights_are_exact(place, station, tokenizer, tmp_path, capsys):
    files, stated, expected = TEMPLATE_PLACES[place]
    settings = SETTINGS if stated is None else SETTINGS | {"chat_template": stated}
    there = write_hf(tmp_path / "there", tokenizer, files, settings=settings)
    back = travel(there, station, "back")
    assert capsys.readouterr().err == ""  # nothing is lost
    assert templates_at(back) == expected
    check_same_for_transformers(there, back)
    AutoTokenizer.from_pretrained(there).save_pretrained(tmp_path / "theirs")
    assert templates_at(back) == templates_at(tmp_path / "theirs")


def test_a_checkpoint_keeps_all_settings_and_the_card_to_the_letter(tokenizer, tmp_path):
    """Those, too, that nothing here knows of."""
    generation = GENERATION | {"max_new_tokens": 50, "no_repeat_ngram_size": 3}
    settings = SETTINGS | {"padding_side": "left", "of_tomorrow": {"deep": [1, None]}}
    there = write_hf(tmp_path / "there", tokenizer, {"README.md": CARD}, generation, settings)
    back = travel(there, "a.pt", "b.pt", "back")
    assert json.loads((back / "generation_config.json").read_text()) == generation
    assert json.loads((back / "tokenizer_config.json").read_text()) == settings
    assert (back / "README.md").read_text() == CARD


def test_license_and_base_model_pass_through_gguf(tokenizer, tmp_path):
    there = write_hf(tmp_path / "there", tokenizer, {"README.md": CARD})
    back = travel(there, "a.gguf", "back", "b.gguf", "c.pt", "again")
    for folder in (tmp_path / "back", back):
        card = ModelCard.load(folder / "README.md").data
        assert card.license == "apache-2.0"
        assert card.base_model == "HuggingFaceTB/SmolLM2-135M"


def test_what_gguf_says_is_said_again_after_any_conversion(tokenizer, tmp_path):
    there = write_hf(tmp_path / "there", tokenizer, WITH_TOOLS | {"README.md": CARD})
    travel(there, "a.gguf", "b.pt", "c", "d.gguf")
    keys = []
    for name in ("a", "d"):
        fields = gguf.GGUFReader(tmp_path / f"{name}.gguf").fields
        keys.append({key: field.contents() for key, field in fields.items()
                     if not key.startswith("GGUF.")})
        assert keys[-1].pop("general.name") == name
    assert keys[0] == keys[1]


def test_names_of_template_files_that_transformers_reads_pass_through_a_checkpoint(
        tokenizer, tmp_path):
    files = {"additional_chat_templates/tool.use v2.jinja": TOOL_TEMPLATE}
    there = write_hf(tmp_path / "there", tokenizer, JINJA | files)
    assert "tool.use v2" in AutoTokenizer.from_pretrained(there).chat_template
    back = travel(there, "a.pt", "back")
    assert templates_at(back) == JINJA | files


# ---- What a GGUF file can't hold

# What is said to be lost: what of the folder is so
LOST = {
    "max_new_tokens of generation_config.json":
        {"generation": GENERATION | {"max_new_tokens": 50}},
    "temperature of generation_config.json":  # greedy, with a temperature that waits
        {"generation": GENERATION | {"do_sample": False, "top_p": 1.0}},
    "eos_token_id":
        {"generation": GENERATION | {"eos_token_id": [2, 0, 4, 5]}},
    "padding_side of tokenizer_config.json": {"settings": SETTINGS | {"padding_side": "left"}},
    "eos_token of tokenizer_config.json":  # while a text ends with others
        {"settings": SETTINGS | {"eos_token": "<filename>"}},
    "the text of README.md": {"files": {"README.md": CARD}},
    "initializer_range": {"initializer_range": 0.02},
}


@pytest.mark.parametrize("lost", LOST)
def test_what_gguf_cannot_hold_is_named_in_one_line(lost, tokenizer, tmp_path, capsys):
    there = write_hf(tmp_path / "there", tokenizer, **LOST[lost])
    travel(there, "a.gguf")
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{tmp_path / 'a.gguf'}: a GGUF file can't hold ")
    assert lost in line
    travel(there, "a.pt", "back")
    assert capsys.readouterr().err == ""  # a checkpoint can


def test_all_that_is_lost_is_told_in_one_line_by_the_command(tokenizer, tmp_path):
    generation = GENERATION | {"max_new_tokens": 50, "eos_token_id": [2, 0, 4, 5]}
    write_hf(tmp_path / "there", tokenizer, {"README.md": CARD}, generation)
    result = run(tmp_path, "tools/convert.py", "there", "a.gguf")
    assert result.returncode == 0, result.stderr
    [line] = result.stderr.splitlines()
    for lost in ("max_new_tokens", "eos_token_id", "README.md"):
        assert lost in line
    assert "temperature" not in line
    quiet = run(tmp_path, "tools/convert.py", "there", "a.pt")
    assert quiet.stderr == ""


@pytest.mark.parametrize("eos", [None, 0, [2, 0], [0, 2], [2, 0, 4]], ids=str)
def test_gguf_keeps_where_a_text_ends_up_to_three_tokens(eos, tokenizer, tmp_path, capsys):
    ids = id_list(eos)
    # the tokenizer's own eos is the first of them, as usual
    settings = SETTINGS | {"eos_token": tokenizer.id_to_token(ids[0]) if ids else None}
    there = write_hf(tmp_path / "there", tokenizer, generation=GENERATION | {"eos_token_id": eos},
                     settings=settings)
    back = travel(there, "a.gguf", "back")
    assert capsys.readouterr().err == ""
    assert GenerationConfig.from_pretrained(back).eos_token_id == eos
    assert models.load(back).model.config.eos_token_id == eos
    fields = gguf.GGUFReader(tmp_path / "a.gguf").fields
    found = [fields[f"tokenizer.ggml.{key}_token_id"].contents() for key in ("eos", "eot", "eom")
             if f"tokenizer.ggml.{key}_token_id" in fields]
    assert found == ids


ADDS = {  # what tokenizer.json adds to a text, bos and eos; what tokenizer_config.json says of it
    "bos": (1, None, {}),
    "eos": (None, 2, {}),
    "both": (1, 2, {"add_bos_token": True, "add_eos_token": True}),
    "bos, which tokenizer_config.json denies": (1, None, {"add_bos_token": False}),
    "nothing, but tokenizer_config.json says so": (None, None, {"add_bos_token": True}),
}


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("station", ["a.pt", "a.gguf"])
def test_what_the_tokenizer_adds_to_a_text_it_adds_after_the_journey(
        station, adds, tokenizer, tmp_path):
    """Whatever transformers takes to count, of what says different things."""
    bos_id, eos_id, stated = ADDS[adds]
    tokenizer = Tokenizer.from_str(tokenizer.to_str())
    gguf_format.add_bos_and_eos(tokenizer, bos_id, eos_id)
    settings = SETTINGS | {"add_bos_token": None} | stated
    settings = {name: value for name, value in settings.items() if value is not None}
    there = write_hf(tmp_path / "there", tokenizer, settings=settings)
    back = travel(there, station, "back")
    ids = AutoTokenizer.from_pretrained(there)("Hi")["input_ids"]
    assert models.load(there).tokenizer.encode("Hi").ids == ids
    assert models.load(back).tokenizer.encode("Hi").ids == ids
    assert AutoTokenizer.from_pretrained(back)("Hi")["input_ids"] == ids


def test_the_eos_of_the_tokenizer_stays_its_eos_wherever_it_stands_in_the_list(
        tokenizer, tmp_path, capsys):
    there = write_hf(tmp_path / "there", tokenizer,
                     settings=SETTINGS | {"eos_token": "<|endoftext|>"})
    back = travel(there, "a.gguf", "back")
    assert capsys.readouterr().err == ""
    assert AutoTokenizer.from_pretrained(back).eos_token == "<|endoftext|>"
    assert sorted(GenerationConfig.from_pretrained(back).eos_token_id) == [0, 2]


def test_of_four_ends_gguf_keeps_three(tokenizer, tmp_path):
    generation = GENERATION | {"eos_token_id": [2, 0, 4, 5]}
    there = write_hf(tmp_path / "there", tokenizer, generation=generation)
    back = travel(there, "a.gguf", "back")
    assert GenerationConfig.from_pretrained(back).eos_token_id == [2, 0, 4]


PAD_PLACES = {  # config.json's, generation_config.json's, tokenizer_config.json's
    "everywhere": (3, 3, "<repo_name>"),
    "in generation_config.json and tokenizer_config.json": (None, 3, "<repo_name>"),
    "in config.json and tokenizer_config.json": (3, None, "<repo_name>"),
    "in tokenizer_config.json": (None, None, "<repo_name>"),
}


@pytest.mark.parametrize("place", PAD_PLACES)
def test_a_pad_token_passes_through_gguf_wherever_it_stands(place, tokenizer, tmp_path, capsys):
    of_config, of_generation, name = PAD_PLACES[place]
    there = write_hf(tmp_path / "there", tokenizer,
                     generation=GENERATION | {"pad_token_id": of_generation},
                     settings=SETTINGS | {"pad_token": name})
    config = json.loads((there / "config.json").read_text()) | {"pad_token_id": of_config}
    write_text(there / "config.json", json.dumps(config))
    back = travel(there, "a.gguf", "back")
    assert capsys.readouterr().err == ""
    assert AutoTokenizer.from_pretrained(back).pad_token_id == 3


# ---- What the keys of a GGUF file are


@pytest.fixture(scope="module")
def converted(tokenizer, tmp_path_factory) -> Path:
    """A GGUF file of a folder with all that goes with a model."""
    folder = tmp_path_factory.mktemp("converted")
    write_hf(folder / "there", tokenizer, WITH_TOOLS | {"README.md": CARD},
             GENERATION | {"eos_token_id": [2, 0, 4], "top_k": 40}, hidden_size=64,
             num_attention_heads=4, intermediate_size=96)
    result = run(folder, "tools/convert.py", "there", "My-Model.gguf", "--dtype=q8_0")
    assert result.returncode == 0, result.stderr
    return folder / "My-Model.gguf"


def test_gguf_has_the_keys_that_its_specification_and_its_readers_want(converted, tokenizer):
    fields = gguf.GGUFReader(converted).fields
    values = {key: field.contents() for key, field in fields.items()}
    model = models.load(converted).model
    expected = {
        "general.architecture": "llama",
        "general.type": "model",
        "general.name": "My-Model",
        "general.size_label": gguf.size_label(model.num_parameters(), 0, 0, 0),
        "general.quantization_version": gguf.GGML_QUANT_VERSION,
        "general.file_type": gguf.LlamaFileType.MOSTLY_Q8_0,
        "general.license": "apache-2.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": "SmolLM2-135M",
        "general.base_model.0.organization": "HuggingFaceTB",
        "general.base_model.0.repo_url": "https://huggingface.co/HuggingFaceTB/SmolLM2-135M",
        "general.sampling.temp": pytest.approx(0.3),
        "general.sampling.top_p": pytest.approx(0.9),
        "general.sampling.top_k": 40,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.eot_token_id": 0,
        "tokenizer.ggml.eom_token_id": 4,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 3,
        "tokenizer.chat_template": TEMPLATE,
        "tokenizer.chat_template.tool_use": TOOL_TEMPLATE,
        "tokenizer.chat_templates": ["tool_use"],
    }
    assert {key: values.get(key) for key in expected} == expected


def test_gguf_keys_have_the_types_of_the_specification(converted):
    fields = gguf.GGUFReader(converted).fields
    kinds = {key: field.types[0] for key, field in fields.items()}
    text, number = gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
    assert kinds["general.license"] == kinds["general.base_model.0.name"] == text
    assert kinds["general.quantization_version"] == kinds["general.base_model.count"] == number
    assert kinds["tokenizer.ggml.padding_token_id"] == number
    assert kinds["general.sampling.temp"] == gguf.GGUFValueType.FLOAT32


def test_llama_cpp_reads_template_and_tokens_and_ends(converted, tokenizer):
    llama = LlamaCpp(converted)
    with urllib.request.urlopen(llama.server.listening_address + "/props", timeout=60) as answer:
        properties = json.load(answer)
    assert properties["chat_template"] == TEMPLATE
    assert properties["bos_token"] == "<|im_start|>"
    assert properties["eos_token"] == "<|im_end|>"
    messages = [{"role": "user", "content": "Hi"}, {"role": "user", "content": "there"}]
    template = chat.ChatTemplate(TEMPLATE, {"bos_token": "<|im_start|>"})
    rendered = llama.post("/apply-template", messages=messages)["prompt"]
    # bos is left out where the tokens that are made of it will have it
    assert rendered.removeprefix("<|im_start|>") == (
        template.render(messages).removeprefix("<|im_start|>"))
    ids = tokenizer.encode("def f(").ids
    ends = models.load(converted).model.config.eos_token_id
    assert llama.generate(ids, 24) == greedy(models.load(converted).model, ids, 24, ends)


@pytest.mark.parametrize("name", ["bos_token", "eos_token", "unk_token", "pad_token"])
def test_gguf_says_nothing_of_a_token_that_there_is_not(name, tokenizer, tmp_path):
    settings = {key: value for key, value in SETTINGS.items() if key != name}
    there = write_hf(tmp_path / "there", tokenizer, settings=settings)
    for file, parsed in (("config.json", {}), ("generation_config.json", GENERATION)):
        parsed = parsed or json.loads((there / file).read_text())
        if f"{name}_id" in parsed:
            write_text(there / file, json.dumps(parsed | {f"{name}_id": None}))
    back = travel(there, "a.gguf", "back")
    key = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    assert f"tokenizer.ggml.{key[name]}_token_id" not in gguf.GGUFReader(tmp_path / "a.gguf").fields
    check_same_for_transformers(there, back)


# ---- A folder exported from a run


@pytest.fixture(scope="module")
def exported(ckpt, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    script = Script(folder, "tools/convert.py", str(ckpt), "nano", "--dtype=bfloat16",
                    before=partial(os.umask, 0o022))
    result = script.wait()
    assert result.returncode == 0
    assert result.stderr == ""
    return folder / "nano"


def test_an_export_of_a_run_is_complete_and_readable_by_all(exported):
    modes = {path.name: oct(path.stat().st_mode & 0o777) for path in exported.iterdir()}
    names = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
             "tokenizer_config.json", "README.md")
    assert modes == dict.fromkeys(names, "0o644")


def test_an_export_of_a_run_is_loaded_by_transformers_without_a_warning(
        exported, caplog, capfd):
    with caplog.at_level(logging.WARNING, logger="transformers"):
        logger = logging.getLogger("transformers")
        logger.addHandler(caplog.handler)
        try:
            hf = AutoModelForCausalLM.from_pretrained(exported)
            tokenizer = AutoTokenizer.from_pretrained(exported)
            generation = GenerationConfig.from_pretrained(exported)
            ids = tokenizer("def f(", return_tensors="pt")
            made = hf.generate(**ids, max_new_tokens=4, do_sample=False)
        finally:
            logger.removeHandler(caplog.handler)
    assert [record.message for record in caplog.records] == []
    assert "arning" not in capfd.readouterr().err
    assert hf.dtype == torch.bfloat16
    assert json.loads((exported / "config.json").read_text())["dtype"] == "bfloat16"
    assert hf.generation_config.eos_token_id == generation.eos_token_id == 0
    assert tokenizer.special_tokens_map == {"bos_token": "<|endoftext|>",
                                            "eos_token": "<|endoftext|>"}
    assert made.size(1) > ids["input_ids"].size(1)


def test_the_card_of_an_export_leaves_the_license_to_the_user(exported):
    card = ModelCard.load(exported / "README.md")
    assert card.data.license is None
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "text-generation"
    assert card.text.startswith("# nano\n") or "\n# nano\n" in card.text
    assert "license is not stated" in card.text


@pytest.mark.parametrize("stations", [("a",), ("a.gguf", "b"), ("a.pt", "b")], ids=str)
def test_a_model_of_the_hub_is_the_base_model_of_what_is_made_of_it(stations, tokenizer, tmp_path):
    bundle = models.Bundle(make(TINY_1000), tokenizer, {}, hub_id="owner/base")
    models.write(tmp_path / stations[0], bundle, "float32")
    back = travel(tmp_path / stations[0], *stations[1:])
    assert ModelCard.load(back / "README.md").data.base_model == "owner/base"


# ---- Training that begins with a model


@pytest.fixture(scope="module")
def further(tokenizer, corpus, tmp_path_factory) -> dict[str, Path]:
    """Folders in which train.py has gone on with a model, of either kind, and was resumed."""
    folder = tmp_path_factory.mktemp("further")
    files = WITH_TOOLS | {"README.md": CARD}
    travel(write_hf(folder / "there", tokenizer, files, vocab_size=1000), "there.gguf")
    for name in ("there", "there.gguf"):
        options = (*STEADY, "--dtype=float32", f"--dataset={corpus}", f"--out_dir=of-{name}")
        train_here(folder, *options, f"--init_from={name}", "--max_iters=3")
        shutil.copytree(folder / f"of-{name}", folder / f"resumed-{name}")
        train_here(folder, f"--out_dir=resumed-{name}", "--init_from=resume", "--max_iters=4")
    return folder


@pytest.mark.parametrize("kind", ["of", "resumed"])
@pytest.mark.parametrize("name", ["there", "there.gguf"])
def test_training_keeps_what_goes_with_the_model_that_it_begins_with(kind, name, further):
    base = models.load(further / name)
    files = torch.load(further / f"{kind}-{name}" / "ckpt.pt", weights_only=True)["files"]
    assert without_card(files) == without_card(base.files)
    assert set(WITH_TOOLS) < set(files)
    assert json.loads(files["generation_config.json"])["eos_token_id"] == [2, 0]
    trained = models.load(further / f"{kind}-{name}" / "ckpt.pt").model
    assert trained.config.eos_token_id == [2, 0]
    # it is another model: nobody has stated its license
    card = ModelCard(files["README.md"])
    assert "A fine model" not in card.content
    assert card.data.license is None


def without_card(files: dict[str, str]) -> dict[str, str]:
    return {name: text for name, text in files.items() if name != "README.md"}


# ---- Files that would write elsewhere

EVIL_FILES = {
    "a path upwards": {"../evil": "x"},
    "an absolute path": {"/evil": "x"},
    "upwards from the folder of templates": {"additional_chat_templates/../../evil.jinja": "x"},
    "weights": {"model.safetensors": "x"},
    "a pickle": {"pytorch_model.bin": "x"},
    "a line break at the end": {"additional_chat_templates/evil.jinja\n": "x"},
    "a number for a name": {5: "x"},
    "a number for a text": {"README.md": 5},
    "bytes for a text": {"README.md": b"x"},
    "none for a text": {"chat_template.jinja": None},
    "a list": ["README.md"],
    "a text": "README.md",
    "broken JSON": {"generation_config.json": "{"},
    "a list in JSON": {"tokenizer_config.json": "[]"},
}


@pytest.mark.parametrize("kind", EVIL_FILES)
def test_a_checkpoint_writes_nothing_but_its_small_files(kind, tiny, tmp_path):
    checkpoint = torch.load(tiny, weights_only=True) | {"files": EVIL_FILES[kind]}
    inside = tmp_path / "inside"
    inside.mkdir()
    torch.save(checkpoint, inside / "evil.pt")
    with pytest.raises(InputError) as refused:
        models.write(inside / "new", models.load(inside / "evil.pt"), "float32")
    assert len(str(refused.value).splitlines()) == 1
    assert list(inside.iterdir()) == [inside / "evil.pt"]
    assert list(tmp_path.iterdir()) == [inside]


def test_a_checkpoint_with_a_path_is_refused_in_one_line_by_the_command(tiny, tmp_path):
    checkpoint = torch.load(tiny, weights_only=True) | {"files": {"../evil": "x"}}
    torch.save(checkpoint, tmp_path / "evil.pt")
    result = run(tmp_path, "tools/convert.py", "evil.pt", "deep/new")
    assert result.returncode == 1
    assert result.stderr == "error: '../evil' is no file that goes with a model\n"
    assert list(tmp_path.iterdir()) == [tmp_path / "evil.pt"]


def test_settings_that_are_not_ours_and_a_license_stay(tokenizer, tmp_path):
    there = write_hf(tmp_path / "there", tokenizer, {"LICENSE": "as it is"})
    settings = json.loads((there / "config.json").read_text()) | {"attention_dropout": 0.1}
    (there / "config.json").write_text(json.dumps(settings))
    (there / "README.md").write_bytes(b"caf\xe9")  # no UTF-8
    back = travel(there, "a.pt", "back")
    models.write(tmp_path / "halves", models.load(back), "float16")
    for folder, dtype in (("back", "float32"), ("halves", "float16")):
        settings = json.loads((tmp_path / folder / "config.json").read_text())
        assert settings["attention_dropout"] == 0.1
        assert settings["dtype"] == settings["torch_dtype"] == dtype
    assert (back / "LICENSE").read_text() == "as it is"
    assert (back / "README.md").read_bytes() == b"caf\xe9"


def test_what_else_a_gguf_file_says_of_itself_stands_in_the_card(tokenizer, tmp_path):
    write_model(tmp_path / "a.gguf", make(TINY_1000), tokenizer)
    card = hf_files.model_card("Bob", license="mit", language=["en", "de"], tags=["tiny"])
    values = {"general.name": "Bob", "general.license": "mit", "general.languages": ["en", "de"],
              "general.tags": ["tiny"], "general.type": "model"}
    assert gguf_values.card_of(values) == card
    assert "- general.author: Ann" in gguf_values.card_of(values | {"general.author": "Ann"})


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", "", "x\n"], ids=repr)
def test_a_template_whose_name_is_a_path_is_refused(name, tokenizer, tmp_path):
    stated = [*NAMED_TEMPLATES, {"name": name, "template": "x"}]
    there = write_hf(tmp_path / "there", tokenizer, settings=SETTINGS | {"chat_template": stated})
    with pytest.raises(InputError, match="a chat template is named") as refused:
        models.load(there)
    assert repr(name) in str(refused.value)
    assert len(str(refused.value).splitlines()) == 1


def test_a_template_of_a_gguf_file_whose_name_is_a_path_is_refused(tokenizer, tmp_path):
    write_model(tmp_path / "a.gguf", make(TINY_1000), tokenizer, WITH_TOOLS)
    data = (tmp_path / "a.gguf").read_bytes()
    key = b"tokenizer.chat_template."
    assert data.count(key + b"tool_use") == 1
    (tmp_path / "a.gguf").write_bytes(data.replace(key + b"tool_use", key + b"../../ev"))
    with pytest.raises(InputError, match=r"named '\.\./\.\./ev'"):
        models.load(tmp_path / "a.gguf")


@pytest.mark.parametrize("stated", [5, {"default": 5}, [TEMPLATE], [{"name": "default"}],
                                    [{"name": "default", "template": 5}]], ids=str)
def test_a_template_that_is_no_text_is_refused(stated, tokenizer, tmp_path):
    there = write_hf(tmp_path / "there", tokenizer, settings=SETTINGS | {"chat_template": stated})
    with pytest.raises(InputError, match="chat_template is neither a string nor a list") as refused:
        models.load(there)
    assert len(str(refused.value).splitlines()) == 1


def test_the_card_is_read_without_its_metadata_if_they_are_broken(tokenizer, tmp_path):
    """A card is for people: a model is not refused for it."""
    there = write_hf(tmp_path / "there", tokenizer, {"README.md": "---\nlicense: [\n---\n# Hi\n"})
    back = travel(there, "a.pt", "back")
    assert "# Hi" in (back / "README.md").read_text()
    assert hf_files.license_and_base_model({"README.md": "# Hi\n"}) == (None, None)
