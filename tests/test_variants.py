"""Models as other programs write them: what repeats itself is accepted, what is left out means what
it means to transformers, what would change the result is refused."""

import json
import math
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType as Kind
from huggingface_hub import snapshot_download
from huggingface_hub._tree_cache import TreeCacheEntry, write_tree_cache
from huggingface_hub.errors import IncompleteSnapshotError
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, SmolLM3Config

import sample
from bench.llama_cpp import LlamaCpp
from lib import models
from smollm import SHARD_INDEX, Config, InputError, SmolLM, id_list
from test_smollm import CONFIGS, make
from tests.helpers import TINY_1000, greedy, run, write_model
from tests.test_hub import offline

IDS = torch.arange(3, 43)[None]
EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
NORM = "model.norm.weight"
KEYS = "model.layers.1.self_attn.k_proj.weight"
INV_FREQ = "self_attn.rotary_emb.inv_freq"


def message_of(action) -> str:
    """The message of the InputError that the action raises, which is one line."""
    with pytest.raises(InputError) as error:
        action()
    message = str(error.value)
    assert "\n" not in message
    return message


# ---- HuggingFace directories: tensors and RoPE


def write_tensors(folder: Path, tensors: dict, sharded: bool):
    """As model.safetensors, or as two shards and their index."""
    # safetensors refuses tensors that share memory
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    if not sharded:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        shard = f"model-{number:05}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard,
                  metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / SHARD_INDEX).write_text(json.dumps(index))


def settings_of(folder: Path) -> dict:
    """Those of its config.json as transformers 4 wrote it, with another theta than the default."""
    settings = json.loads((folder / "config.json").read_text())
    del settings["rope_parameters"]
    return settings | {"rope_theta": 1e5}


def renamed(tensors: dict, change) -> dict:
    return {change(name): tensor for name, tensor in tensors.items()}


def without_prefix(tensors: dict) -> dict:
    return renamed(tensors, lambda name: name.removeprefix("model."))


def head_alone(tensors: dict) -> dict:
    return renamed(tensors, lambda name: HEAD if name == EMBEDDING else name)


def frequencies(theta: float, prefix: str = "model.") -> dict:
    """RoPE's frequencies, stored for each layer, as transformers did before 4.32."""
    frequency = 1 / theta ** (torch.arange(0, TINY_1000.head_dim, 2) / TINY_1000.head_dim)
    return {f"{prefix}layers.{layer}.{INV_FREQ}": frequency
            for layer in range(TINY_1000.num_hidden_layers)}


def rounded(tensors: dict) -> dict:
    return {name: tensor.bfloat16() for name, tensor in tensors.items()}


REDUNDANT = {  # what a folder has, from its tensors; and its settings
    "the head, too": (lambda t: t | {HEAD: t[EMBEDDING]}, {}),
    "the head alone": (head_alone, {}),
    "the head, too, with more bits": (
        lambda t: t | {EMBEDDING: t[EMBEDDING].bfloat16(), HEAD: t[EMBEDDING].bfloat16().float()},
        {}),
    "the head, too, of a config that says untied": (
        lambda t: t | {HEAD: t[EMBEDDING]}, {"tie_word_embeddings": False}),
    "the head, too, of a config that does not say tied": (
        lambda t: t | {HEAD: t[EMBEDDING]}, {"tie_word_embeddings": ...}),
    "frequencies": (lambda t: t | frequencies(1e5), {}),
    "frequencies in bfloat16": (lambda t: t | rounded(frequencies(1e5)), {}),
    "frequencies of the whole model": (
        lambda t: t | {"model.rotary_emb.inv_freq": next(iter(frequencies(1e5).values()))}, {}),
    "no prefix": (without_prefix, {}),
    "no prefix, and frequencies": (
        lambda t: without_prefix(t) | frequencies(1e5, prefix=""), {}),
    "a norm with the prefix and without": (lambda t: t | {"norm.weight": t[NORM]}, {}),
}
PLAIN_ROPE = {
    "rope_type default": {"rope_scaling": {"rope_type": "default"}},
    "type default": {"rope_scaling": {"type": "default"}},
    "linear by one": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "rope_type linear by one": {"rope_scaling": {"rope_type": "linear", "factor": 1}},
    "empty": {"rope_scaling": {}},
    "null": {"rope_scaling": None},
    "theta inside": {"rope_scaling": {"rope_type": "default", "rope_theta": 1e5}},
    "theta in both": {"rope_scaling": {"type": "default"},
                      "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}},
    "all of the head turned": {"partial_rotary_factor": 1.0},
    "another name of silu": {"hidden_act": "swish"},
    "an old pad": {"pad_token_id": -1},
}


def write_variant(folder: Path, change, changed: dict, sharded: bool = False):
    """Rewrite the folder with its tensors changed, and its settings. ...: without that setting."""
    settings = settings_of(folder) | changed
    settings = {name: value for name, value in settings.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(settings))
    write_tensors(folder, change(load_file(folder / "model.safetensors")), sharded)


def check_same_as_transformers(folder: Path):
    with torch.no_grad():
        right = AutoModelForCausalLM.from_pretrained(folder)(IDS).logits
        for model in (SmolLM.from_pretrained(folder), models.load(folder).model):
            torch.testing.assert_close(model(IDS)[0], right, atol=1e-5, rtol=0)


@pytest.mark.parametrize("sharded", [False, True], ids=["one file", "shards"])
@pytest.mark.parametrize("what", REDUNDANT)
def test_tensors_that_repeat_what_is_known_change_nothing(what, sharded, valid):
    change, changed = REDUNDANT[what]
    write_variant(valid, change, changed, sharded)
    check_same_as_transformers(valid)


@pytest.mark.parametrize("what", PLAIN_ROPE)
def test_rope_settings_that_say_nothing_new_change_nothing(what, valid):
    write_variant(valid, dict, PLAIN_ROPE[what])
    check_same_as_transformers(valid)


def with_one_number_else(tensor: torch.Tensor) -> torch.Tensor:
    other = tensor.clone()
    other.view(-1)[5] += 0.5
    return other


CONTRADICTIONS = {  # as above, and what the message says
    "another head": (lambda t: t | {HEAD: with_one_number_else(t[EMBEDDING])}, {}, HEAD),
    "the head before it was rounded": (
        lambda t: t | {EMBEDDING: t[EMBEDDING].bfloat16(), HEAD: t[EMBEDDING]}, {}, HEAD),
    "another head, said to be untied": (
        lambda t: t | {HEAD: with_one_number_else(t[EMBEDDING])},
        {"tie_word_embeddings": False}, HEAD),
    # transformers has no embedding to take it for, and makes one at random
    "the head alone, said to be untied": (
        head_alone, {"tie_word_embeddings": False}, "embed_tokens.weight|tie_word_embeddings"),
    "the head alone, not said to be tied": (
        head_alone, {"tie_word_embeddings": ...}, "embed_tokens.weight|tie_word_embeddings"),
    "frequencies of another theta": (lambda t: t | frequencies(1e4), {}, "inv_freq"),
    "frequencies of a bigger head": (
        lambda t: t | {f"model.layers.0.{INV_FREQ}": torch.ones(8)}, {}, "inv_freq"),
    "a norm twice, else": (
        lambda t: t | {"norm.weight": t[NORM] + 1}, {}, r"norm\.weight(?!.*lm_head)"),
    "a bias": (
        lambda t: t | {"model.layers.0.self_attn.q_proj.bias": torch.ones(48)}, {}, "q_proj.bias"),
    "yarn": (dict, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope_type 'yarn'"),
    "llama3": (dict, {"rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64}}, "rope_type 'llama3'"),
    "dynamic": (dict, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
    "linear by two": (dict, {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
    "yarn by one": (dict, {"rope_scaling": {"rope_type": "yarn", "factor": 1.0}}, "'yarn'"),
    # transformers 4 takes the one at the top, 5 the other
    "two thetas": (
        dict, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    "two thetas, one in rope_scaling": (
        dict, {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta"),
    "three thetas": (
        dict, {"rope_scaling": {"rope_type": "default", "rope_theta": 5e5},
               "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, "rope_theta"),
}


@pytest.mark.parametrize("what", CONTRADICTIONS)
def test_what_repeats_itself_otherwise_is_refused_by_name(what, valid):
    change, changed, named = CONTRADICTIONS[what]
    write_variant(valid, change, changed)
    with pytest.raises(InputError, match=named):
        models.load(valid)
    message_of(lambda: models.load(valid))


# ---- The Hub's cache, with a part of a repository


COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEEDED = {"config.json", "model.safetensors", "tokenizer.json"}


def cache_in_part(folder: Path, tokenizer, names: set[str]):
    """The cache after `hf download someone/tiny NAMES` of a repository that has more."""
    repository = folder / "hf" / "hub" / "models--someone--tiny"
    snapshot = repository / "snapshots" / COMMIT
    make(TINY_1000).save_pretrained(snapshot, tokenizer)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    files = {path.name for path in snapshot.iterdir()}
    listed = files | {"special_tokens_map.json", "chat_template.jinja", "onnx/model.onnx"}
    entries = {name: TreeCacheEntry(size=1, blob_id="0" * 40) for name in listed}
    write_tree_cache(str(repository), COMMIT, entries)
    for name in files - names:
        (snapshot / name).unlink()
    for patterns in (None, ["*.json"]):
        with pytest.raises(IncompleteSnapshotError):
            snapshot_download("someone/tiny", cache_dir=folder / "hf" / "hub",
                              local_files_only=True, allow_patterns=patterns)


def test_what_is_needed_of_a_repository_loads_from_the_cache_offline(tokenizer, tmp_path):
    cache_in_part(tmp_path, tokenizer, NEEDED)
    result = run(tmp_path, "sample.py", "--ckpt=someone/tiny", "--max_new_tokens=5",
                 "--prompt=import", "--temperature=0", **offline(tmp_path))
    assert result.returncode == 0, result.stderr
    ids = tokenizer.encode("import").ids
    made = greedy(make(TINY_1000), ids, 5, eos_id=0)
    assert result.stdout == "import" + tokenizer.decode(made) + "\n"


@pytest.mark.parametrize("name", sorted(NEEDED))
def test_what_the_cache_lacks_is_named(name, tokenizer, tmp_path, monkeypatch):
    cache_in_part(tmp_path, tokenizer, NEEDED - {name})
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf" / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert name in message_of(lambda: models.load("someone/tiny"))


# ---- Settings that are left out, or null


LLAMA = {"model_type": "llama", "vocab_size": 1000, "hidden_size": 48, "intermediate_size": 80,
         "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
         "max_position_embeddings": 128, "rope_theta": 5e5, "rms_norm_eps": 1e-5,
         "initializer_range": 0.1, "bos_token_id": 5, "eos_token_id": 6, "pad_token_id": 7,
         "tie_word_embeddings": True}
SMOLLM3 = LLAMA | {"model_type": "smollm3", "vocab_size": 128256}
BASES = {"llama": LLAMA, "smollm3": SMOLLM3}
OPTIONAL = ("num_key_value_heads", "max_position_embeddings", "rope_theta", "rms_norm_eps",
            "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id")
# Those whose null transformers takes. It refuses the others, or fails with them later.
NULLABLE = ("num_key_value_heads", "bos_token_id", "eos_token_id", "pad_token_id")
BOTH = pytest.mark.parametrize("base", BASES.values(), ids=BASES)


def without(settings: dict, *names: str) -> dict:
    return {name: value for name, value in settings.items() if name not in names}


def of_transformers(settings: dict) -> dict:
    """What transformers takes the settings for."""
    classes = {"llama": LlamaConfig, "smollm3": SmolLM3Config}
    hf = classes[settings["model_type"]](**json.loads(json.dumps(settings)))
    values = {name: getattr(hf, name) for name in OPTIONAL if name != "rope_theta"}
    return values | {"rope_theta": hf.rope_parameters["rope_theta"]}


def of_this_project(settings: dict) -> dict:
    config = Config.from_hf(settings)
    return {name: getattr(config, name) for name in OPTIONAL}


@BOTH
@pytest.mark.parametrize("name", OPTIONAL)
def test_a_setting_that_is_left_out_has_transformers_default(name, base):
    settings = without(base, name)
    assert of_this_project(settings) == of_transformers(settings)


@BOTH
def test_all_that_may_be_left_out_at_once_has_transformers_defaults(base):
    settings = without(base, *OPTIONAL)
    assert of_this_project(settings) == of_transformers(settings)


@BOTH
@pytest.mark.parametrize("name", NULLABLE)
def test_null_means_what_it_means_to_transformers(name, base):
    settings = base | {name: None}
    assert of_this_project(settings) == of_transformers(settings)


@BOTH
@pytest.mark.parametrize("name", sorted(set(OPTIONAL) - set(NULLABLE)))
def test_null_where_there_must_be_a_number_is_as_if_left_out(name, base):
    assert of_this_project(base | {name: None}) == of_transformers(without(base, name))


@BOTH
def test_without_an_end_nothing_ends_a_text(base):
    assert Config.from_hf(base | {"eos_token_id": None}).eos_token_id is None
    assert Config.from_hf(base | {"bos_token_id": None}).bos_token_id is None


@BOTH
@pytest.mark.parametrize("vocab_size", [1, 2, 3, 128000, 128001, 128002, 128005])
def test_a_default_that_is_no_token_of_the_model_is_none(vocab_size, base):
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    settings = without(base, *names) | {"vocab_size": vocab_size}
    found = of_this_project(settings)
    right = of_transformers(settings)
    for name in names:
        if right[name] is not None and right[name] >= vocab_size:
            right[name] = None
        assert found[name] == right[name], name


THETAS = {
    "at the top": {"rope_theta": 7e5},
    "in rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 7e5}},
    "in rope_parameters without a type": {"rope_parameters": {"rope_theta": 7e5}},
    "in rope_scaling": {"rope_scaling": {"rope_type": "default", "rope_theta": 7e5}},
    "at the top and in rope_parameters": {"rope_theta": 7e5,
                                          "rope_parameters": {"rope_theta": 7e5}},
    "at the top, rope_parameters without it": {"rope_theta": 7e5,
                                               "rope_parameters": {"rope_type": "default"}},
    "nowhere, rope_parameters without it": {"rope_parameters": {"rope_type": "default"}},
}


@BOTH
@pytest.mark.parametrize("where", THETAS)
def test_theta_is_found_where_transformers_finds_it(where, base):
    settings = without(base, "rope_theta") | THETAS[where]
    theta = of_this_project(settings)["rope_theta"]
    assert theta == of_transformers(settings)["rope_theta"]
    assert (theta == 7e5) == (not where.startswith("nowhere"))


FAULTS_OF_DEFAULTS = {
    "tied embeddings": (without(LLAMA, "tie_word_embeddings"), "tie_word_embeddings"),
    "key/value heads": (
        without(SMOLLM3, "num_key_value_heads") | {"num_attention_heads": 6},
        "num_key_value_heads"),
}


@pytest.mark.parametrize("what", FAULTS_OF_DEFAULTS)
def test_a_refusal_that_a_default_causes_says_that_the_file_does_not_state_it(what):
    settings, name = FAULTS_OF_DEFAULTS[what]
    message = message_of(lambda: Config.from_hf(settings))
    assert name in message
    assert "the file does not state" in message


FAULTS_OF_FILES = {
    "tied embeddings": {"tie_word_embeddings": False},
    "key/value heads": {"num_key_value_heads": 3},
    "theta": {"rope_theta": 0},
    "heads": {"num_attention_heads": 7},
    "end": {"eos_token_id": 10**6},
}


@BOTH
@pytest.mark.parametrize("what", FAULTS_OF_FILES)
def test_a_refusal_that_a_stated_value_causes_names_it_and_no_default(what, base):
    [[name, value]] = FAULTS_OF_FILES[what].items()
    message = message_of(lambda: Config.from_hf(base | {name: value}))
    assert name in message
    assert str(value) in message
    assert "does not state" not in message


@BOTH
@pytest.mark.parametrize("eos", [[2, 0], [2], [], 0], ids=str)
def test_ends_may_be_several(eos, base):
    settings = base | {"eos_token_id": eos}
    assert Config.from_hf(settings).eos_token_id == of_transformers(settings)["eos_token_id"]
    assert id_list(Config.from_hf(settings).eos_token_id) == id_list(eos)


@pytest.mark.parametrize("eos", ["2", True, [[2]], ["2"], [2, None], [True], 2.5, {}, {"id": 2},
                                 1000, -1, [2, 1000], [2, -1]], ids=str)
def test_ends_that_are_no_tokens_are_refused_by_name(eos):
    assert "eos_token_id" in message_of(lambda: Config.from_hf(LLAMA | {"eos_token_id": eos}))


def test_an_empty_prompt_needs_a_bos_token(valid, tmp_path):
    settings = json.loads((valid / "config.json").read_text()) | {"bos_token_id": None}
    (valid / "config.json").write_text(json.dumps(settings))
    empty = run(tmp_path, "sample.py", f"--ckpt={valid}", "--max_new_tokens=5")
    assert empty.returncode == 1
    assert empty.stdout == ""
    assert len(empty.stderr.splitlines()) == 1
    assert empty.stderr.startswith("error: ")
    assert "bos" in empty.stderr
    given = run(tmp_path, "sample.py", f"--ckpt={valid}", "--max_new_tokens=5", "--prompt=def")
    assert given.returncode == 0, given.stderr


# ---- GGUF files


@pytest.fixture
def whole(tokenizer, tmp_path) -> Path:
    """A GGUF file that is as it should be."""
    write_model(tmp_path / "whole.gguf", make(TINY_1000), tokenizer)
    return tmp_path / "whole.gguf"


def rewrite(source: Path, target: Path, values: dict | None = None, tensors: dict | None = None,
            alignment: int | None = None):
    """Copy a GGUF file, with other values of keys, each (value, kind), and other tensors, which
    are arrays of float32 here."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    if alignment is not None:
        writer.add_custom_alignment(alignment)
    fields = {}
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            element = field.types[-1] if field.types[0] == Kind.ARRAY else None
            fields[key] = (field.contents(), field.types[0], element)
    for key, (value, kind) in (values or {}).items():
        fields[key] = (value, kind, None)
    for key, (value, kind, element) in fields.items():
        writer.add_key_value(key, value, kind, sub_type=element)
    arrays = {tensor.name: np.array(tensor.data) for tensor in reader.tensors}
    for name, array in (arrays | (tensors or {})).items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def embedding_of(path: Path) -> np.ndarray:
    [tensor] = [tensor for tensor in gguf.GGUFReader(path).tensors
                if tensor.name == "token_embd.weight"]
    return np.array(tensor.data)


# The norms have 192 bytes: aligned to 128 bytes they need padding, to 32 or 64 none
REDUNDANT_GGUF = {  # values of keys, and the alignment
    "alignment 32": ({}, 32),
    "alignment 64": ({}, 64),
    "alignment 128": ({}, 128),
    "factor 1": ({"llama.rope.scaling.factor": (1.0, Kind.FLOAT32)}, None),
    "linear by one": ({"llama.rope.scaling.type": ("linear", Kind.STRING),
                       "llama.rope.scaling.factor": (1.0, Kind.FLOAT32)}, None),
    "no scaling": ({"llama.rope.scaling.type": ("none", Kind.STRING)}, None),
    "scale_linear 1": ({"llama.rope.scale_linear": (1.0, Kind.FLOAT32)}, None),
    "head sizes": ({"llama.attention.key_length": (8, Kind.UINT32),
                    "llama.attention.value_length": (8, Kind.UINT32)}, None),
    "no scaling, whatever its factor": ({"llama.rope.scaling.type": ("none", Kind.STRING),
                                         "llama.rope.scaling.factor": (4.0, Kind.FLOAT32)}, None),
    "zeros": ({"llama.attention.sliding_window": (0, Kind.UINT32),
               "llama.expert_shared_count": (0, Kind.UINT32),
               "llama.use_parallel_residual": (False, Kind.BOOL),
               "llama.rope.scaling.finetuned": (False, Kind.BOOL)}, None),
    "a number for each layer": ({"llama.attention.head_count_kv": ([2, 2, 2], Kind.ARRAY)}, None),
    "no such token": ({"tokenizer.ggml.eot_token_id": (2**32 - 1, Kind.UINT32)}, None),
}


@pytest.mark.parametrize("what", REDUNDANT_GGUF)
def test_gguf_keys_that_say_nothing_new_change_nothing(what, whole, tmp_path):
    values, alignment = REDUNDANT_GGUF[what]
    path = tmp_path / "variant.gguf"
    rewrite(whole, path, values, alignment=alignment)
    assert path.read_bytes() != whole.read_bytes()
    check_same_as_original(path)


def check_same_as_original(path: Path):
    """The model of `whole`, to the last bit; llama.cpp, too, takes the file for that."""
    original = make(TINY_1000)
    found = models.load(path).model
    assert found.config == replace(TINY_1000, initializer_range=found.config.initializer_range)
    for name, tensor in original.state_dict().items():
        assert torch.equal(found.state_dict()[name], tensor), name
    ids = IDS[0].tolist()
    assert LlamaCpp(path, threads=1).generate(ids, 8) == greedy(original, ids, 8, eos_id=0)


def test_gguf_may_repeat_the_embedding_as_its_head(whole, tmp_path):
    path = tmp_path / "variant.gguf"
    rewrite(whole, path, tensors={"output.weight": embedding_of(whole)})
    check_same_as_original(path)


def test_gguf_may_have_factors_of_one_for_rope(whole, tmp_path):
    path = tmp_path / "variant.gguf"
    rewrite(whole, path, tensors={"rope_freqs.weight": np.ones(4, np.float32)})
    check_same_as_original(path)


def test_gguf_with_another_head_is_refused_by_name(whole, tmp_path):
    head = embedding_of(whole)
    head[7, 3] += 0.5
    rewrite(whole, tmp_path / "variant.gguf", tensors={"output.weight": head})
    assert "output.weight" in message_of(lambda: models.load(tmp_path / "variant.gguf"))


CHANGES_OF_GGUF = {
    "llama.rope.scaling.factor": (4.0, Kind.FLOAT32),
    "llama.rope.scale_linear": (2.0, Kind.FLOAT32),
    "llama.rope.scaling.type": ("yarn", Kind.STRING),
    "llama.rope.scaling.attn_factor": (2.0, Kind.FLOAT32),
    "llama.rope.dimension_count": (4, Kind.UINT32),
    "llama.attention.key_length": (16, Kind.UINT32),
    "llama.attention.sliding_window": (64, Kind.UINT32),
    "llama.attention.causal": (False, Kind.BOOL),
    "llama.expert_count": (8, Kind.UINT32),
    "llama.logit_scale": (0.5, Kind.FLOAT32),
    "llama.of_tomorrow": (1, Kind.UINT32),
    "llama.attention.head_count_kv": ([2, 2, 6], Kind.ARRAY),
}


@pytest.mark.parametrize("key", CHANGES_OF_GGUF)
def test_a_gguf_key_that_would_change_the_result_is_refused_by_name(key, whole, tmp_path):
    rewrite(whole, tmp_path / "variant.gguf", {key: CHANGES_OF_GGUF[key]})
    assert key in message_of(lambda: models.load(tmp_path / "variant.gguf"))


@pytest.mark.parametrize("name", ["rope_freqs.weight", "blk.0.attn_q.bias"])
def test_a_gguf_tensor_that_would_change_the_result_is_refused_by_name(name, whole, tmp_path):
    array = np.array([1, 1, 2, 8], np.float32)
    rewrite(whole, tmp_path / "variant.gguf", tensors={name: array})
    assert name in message_of(lambda: models.load(tmp_path / "variant.gguf"))


# ---- Tokens that tokenizer.json does not tell of, or tells of otherwise


def token(content: str, **flags: bool) -> dict:
    return {"content": content, "lstrip": False, "rstrip": False, "single_word": False,
            "normalized": False, "special": True} | flags


ADDED_ELSEWHERE = {  # the contents of tokenizer_config.json, and of another file
    "added_tokens_decoder": ({"added_tokens_decoder": {"1000": token("<think>")}}, {}),
    "additional_special_tokens": ({"additional_special_tokens": ["<think>"]}, {}),
    "extra_special_tokens": ({"extra_special_tokens": ["<think>"]}, {}),
    "extra_special_tokens by name": ({"extra_special_tokens": {"think_token": "<think>"}}, {}),
    "special_tokens_map.json": (
        {}, {"special_tokens_map.json": {"additional_special_tokens": ["<think>"]}}),
    "added_tokens.json": ({}, {"added_tokens.json": {"<think>": 1000}}),
    "a name": ({"pad_token": "<think>"}, {}),
    "flags": ({"added_tokens_decoder": {"3": token("<repo_name>", lstrip=True),
                                        "5": token("<file_sep>", special=False)}}, {}),
    "nothing": ({}, {}),
}


@pytest.mark.parametrize("is_special", [True, False], ids=["special", "not special"])
@pytest.mark.parametrize("where", ADDED_ELSEWHERE)
def test_added_tokens_are_those_of_transformers_wherever_they_stand(
        where, is_special, tokenizer, tmp_path):
    settings, files = ADDED_ELSEWHERE[where]
    make(replace(TINY_1000, vocab_size=1100)).save_pretrained(tmp_path, tokenizer)
    contents = json.loads((tmp_path / "tokenizer.json").read_text())
    for added in contents["added_tokens"]:
        added["special"] = is_special
    settings = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>"} | settings
    files = {"tokenizer.json": contents, "tokenizer_config.json": settings} | files
    for name, value in files.items():
        (tmp_path / name).write_text(json.dumps(value))
    ours = models.load(tmp_path).tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "a <think> b <repo_name> c <file_sep> <|im_start|>Hi<|im_end|><|endoftext|>"
    ids = ours.encode(text).ids
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_several_tokens_that_only_have_names_get_the_ids_of_transformers(tokenizer, tmp_path):
    make(replace(TINY_1000, vocab_size=1100)).save_pretrained(tmp_path, tokenizer)
    settings = {"pad_token": "<pad>", "unk_token": "<unk>", "mask_token": "<mask>",
                "sep_token": "<sep>", "additional_special_tokens": ["<b>", "<a>"]}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    text = "<mask><pad><sep><unk><a><b>"
    assert models.load(tmp_path).tokenizer.encode(text).ids == (
        AutoTokenizer.from_pretrained(tmp_path)(text)["input_ids"])


def test_a_named_token_without_a_row_in_the_model_is_not_added(tokenizer, tmp_path):
    make(TINY_1000).save_pretrained(tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "[PAD]"}))
    assert models.load(tmp_path).tokenizer.token_to_id("[PAD]") is None


def test_special_tokens_that_shall_be_split_are_refused(tokenizer, tmp_path):
    make(TINY_1000).save_pretrained(tmp_path, tokenizer)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"split_special_tokens": True}))
    assert "split_special_tokens" in message_of(lambda: models.load(tmp_path))


def test_a_llama_without_rope_in_some_layers_is_refused_by_name():
    settings = TINY_1000.to_hf() | {"no_rope_layer_interval": 2}
    assert "no_rope_layer_interval is 2" in message_of(lambda: Config.from_hf(settings))


def test_an_added_token_that_cannot_get_its_id_is_refused_by_name(tokenizer, tmp_path):
    make(replace(TINY_1000, vocab_size=1100)).save_pretrained(tmp_path, tokenizer)
    settings = {"added_tokens_decoder": {"1050": token("<think>")}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert "'<think>' gets the id 1000, it should be 1050" in message_of(
        lambda: models.load(tmp_path))


# ---- Tokens that a tokenizer adds


WITH_ENDS = replace(TINY_1000, bos_token_id=1, eos_token_id=2)
TEXTS = ["", "def f(x):", "a<|im_end|>b"]
ADDED_ENDS = {  # what comes before a text, and after
    "bos": ([1], []),
    "eos": ([], [2]),
    "both": ([1], [2]),
}
END_SETTINGS = {
    "unsaid": {},
    "bos true": {"add_bos_token": True},
    "bos false": {"add_bos_token": False},
    "bos null": {"add_bos_token": None},
    "eos true": {"add_eos_token": True},
    "eos false": {"add_eos_token": False},
    "both true": {"add_bos_token": True, "add_eos_token": True},
}


def copy(tokenizer: Tokenizer) -> Tokenizer:
    return Tokenizer.from_str(tokenizer.to_str())


def adding(tokenizer: Tokenizer, before: list[int], after: list[int]) -> Tokenizer:
    """The tokenizer, with a post-processor that adds these."""
    tokenizer = copy(tokenizer)
    names = {token: tokenizer.id_to_token(token) for token in before + after}
    parts = [*(names[token] for token in before), "$A", *(names[token] for token in after)]
    ends = [(name, token) for token, name in names.items()]
    tokenizer.post_processor = TemplateProcessing(single=parts, special_tokens=ends)
    return tokenizer


def ids_of_transformers(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return [tokenizer(text).input_ids for text in TEXTS]


def ids_of(tokenizer: Tokenizer) -> list[list[int]]:
    return [tokenizer.encode(text).ids for text in TEXTS]


@pytest.mark.parametrize("said", END_SETTINGS)
@pytest.mark.parametrize("added", ["none", *ADDED_ENDS])
def test_a_tokenizer_adds_what_it_adds_in_transformers(added, said, tokenizer, tmp_path):
    """In a folder, and after a conversion."""
    if added != "none":
        tokenizer = adding(tokenizer, *ADDED_ENDS[added])
    folder = tmp_path / "hf"
    make(WITH_ENDS).save_pretrained(folder, tokenizer)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | END_SETTINGS[said]))
    right = ids_of_transformers(folder)
    bundle = models.load(folder)
    assert ids_of(bundle.tokenizer) == right
    models.write(tmp_path / "a.pt", bundle, "float32")
    assert ids_of(models.load(tmp_path / "a.pt").tokenizer) == right
    models.write(tmp_path / "back", models.load(tmp_path / "a.pt"), "float32")
    assert ids_of_transformers(tmp_path / "back") == right


@pytest.mark.parametrize("added", ["none", *ADDED_ENDS])
def test_gguf_says_which_ends_the_tokenizer_adds(added, tokenizer, tmp_path):
    """To llama.cpp, and to us when it is read back."""
    before, after = ADDED_ENDS.get(added, ([], []))
    if before or after:
        tokenizer = adding(tokenizer, before, after)
    path = tmp_path / "a.gguf"
    write_model(path, make(WITH_ENDS), tokenizer)
    fields = gguf.GGUFReader(path).fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() == bool(before)
    assert fields["tokenizer.ggml.add_eos_token"].contents() == bool(after)
    assert ids_of(models.load(path).tokenizer) == ids_of(tokenizer)
    llama = LlamaCpp(path, threads=1)
    for text in TEXTS[1:]:  # of an empty one its server says nothing
        answer = llama.post("/tokenize", content=text, add_special=True, parse_special=True)
        assert answer["tokens"] == tokenizer.encode(text).ids
    models.write(tmp_path / "back", models.load(path), "float32")
    assert ids_of_transformers(tmp_path / "back") == ids_of(tokenizer)


@pytest.mark.parametrize("ends", [([5], []), ([1, 1], []), ([], [1]), ([2], [])], ids=str)
def test_gguf_refuses_a_tokenizer_that_adds_something_else(ends, tokenizer, tmp_path):
    other = adding(tokenizer, *ends)
    message = message_of(lambda: write_model(tmp_path / "a.gguf", make(WITH_ENDS), other))
    assert str(other.encode("a").ids) in message
    assert "llama.cpp" in message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("flag", ["lstrip", "rstrip", "single_word"])
@pytest.mark.parametrize("special", [False, True], ids=["text", "special"])
def test_gguf_refuses_flags_of_added_tokens_that_a_folder_keeps(flag, special, tokenizer, tmp_path):
    tokenizer = copy(tokenizer)
    tokenizer.add_tokens([AddedToken("<think>", special=special, **{flag: True})])
    model = make(replace(TINY_1000, vocab_size=1001))
    message = message_of(lambda: write_model(tmp_path / "a.gguf", model, tokenizer))
    assert "'<think>'" in message
    assert flag in message
    assert list(tmp_path.iterdir()) == []
    write_model(tmp_path / "hf", model, tokenizer)
    text = "a <think> b<think>c"
    right = AutoTokenizer.from_pretrained(tmp_path / "hf")(text).input_ids
    assert models.load(tmp_path / "hf").tokenizer.encode(text).ids == right


# ---- Ends that are no special tokens


@pytest.fixture
def plain_end(tokenizer) -> Tokenizer:
    """Its <|im_end|> is a token like any other, which decoding shows."""
    contents = json.loads(tokenizer.to_str())
    for token in contents["added_tokens"]:
        if token["content"] == "<|im_end|>":
            token["special"] = False
    tokenizer = Tokenizer.from_str(json.dumps(contents))
    assert tokenizer.decode([2]) == "<|im_end|>"
    return tokenizer


def says(*rows: list[int]):
    """In place of a model's step: so many rows at once, each says these tokens, one after the
    other."""
    columns = iter(zip(*rows, strict=True))

    def step(input_ids, cache):
        logits = torch.zeros(len(rows), 1, 1000)
        for row, token in zip(logits, next(columns), strict=True):
            row[0, token] = 1
        return logits

    return step


def complete(tokenizer, *rows: list[int]):
    bundle = models.Bundle(make(WITH_ENDS), tokenizer, files={})
    o = sample.Options(prompt="def", num_samples=len(rows))
    sample.complete(bundle, o, {"temperature": 0, "step": says(*rows)})


def test_one_sample_does_not_show_its_end(plain_end, capsys):
    [token] = plain_end.encode("x").ids
    complete(plain_end, [token, token, 2])
    assert capsys.readouterr().out == "defxx\n"
    complete(plain_end, [2])
    assert capsys.readouterr().out == "def\n"


def test_samples_that_end_early_do_not_show_their_end(plain_end, capsys):
    [token] = plain_end.encode("x").ids
    complete(plain_end, [2, 5, 5, 5], [token, 2, 5, 5], [token, token, token, 2])
    line = "-" * 60
    assert capsys.readouterr().out == f"def\n{line}\ndefx\n{line}\ndefxxx\n{line}\n"


@pytest.mark.parametrize("eos", [2, [2, 0], [0, 2], 0, None], ids=str)
def test_an_answer_in_a_chat_does_not_show_its_end(eos, plain_end, capsys):
    [token] = plain_end.encode("x").ids
    config = replace(TINY_1000, eos_token_id=eos)
    bundle = models.Bundle(make(config), plain_end, files={})  # without a template: ChatML
    o = sample.Options(chat=True, prompt="Hi")
    for answer, shown in (([token, token, 2], "xx\n"), ([2], "\n")):
        sample.converse(bundle, o, {"temperature": 0, "step": says(answer)})
        assert capsys.readouterr().out == shown


# ---- Weights that are not finite, or will not be


NOT_FINITE = [math.nan, math.inf, -math.inf]


def spoiled(name: str, value: float, config: Config = TINY_1000) -> SmolLM:
    """A model with one weight else."""
    model = make(config)
    model.state_dict()[name].view(-1)[7] = value
    return model


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", [EMBEDDING, KEYS, NORM])
def test_a_folder_with_a_weight_that_is_not_finite_is_refused_by_name(
        name, value, tokenizer, tmp_path):
    spoiled(name, value).save_pretrained(tmp_path / "hf", tokenizer)
    assert name in message_of(lambda: models.load(tmp_path / "hf"))


@pytest.mark.parametrize("value", NOT_FINITE, ids=str)
@pytest.mark.parametrize("name", [EMBEDDING, KEYS, NORM])
def test_a_checkpoint_with_a_weight_that_is_not_finite_is_refused_by_name(
        name, value, tiny, tmp_path):
    checkpoint = torch.load(tiny, weights_only=True)
    checkpoint["model"] = spoiled(name, value).state_dict()
    torch.save(checkpoint, tmp_path / "a.pt")
    assert name in message_of(lambda: models.load(tmp_path / "a.pt"))


@pytest.mark.parametrize(("theirs", "name", "value"), [
    ("token_embd.weight", EMBEDDING, math.nan), ("blk.1.attn_k.weight", KEYS, math.inf),
    ("output_norm.weight", NORM, -math.inf), ("output_norm.weight", NORM, math.nan)])
def test_a_gguf_with_a_weight_that_is_not_finite_is_refused_by_name(
        theirs, name, value, whole, tmp_path):
    [tensor] = [tensor for tensor in gguf.GGUFReader(whole).tensors if tensor.name == theirs]
    array = np.array(tensor.data)
    array.reshape(-1)[7] = value
    rewrite(whole, tmp_path / "variant.gguf", tensors={theirs: array})
    message = message_of(lambda: models.load(tmp_path / "variant.gguf"))
    assert name in message or theirs in message


@pytest.mark.parametrize("kind", ["hf", "a.pt", "a.gguf"])
def test_a_weight_that_a_dtype_cannot_hold_is_refused_when_loaded_so(kind, tokenizer, tmp_path):
    path = tmp_path / kind
    write_model(path, spoiled(KEYS, 70000.0), tokenizer)
    assert models.load(path).model.state_dict()[KEYS].view(-1)[7] == 70000
    assert KEYS in message_of(lambda: models.load(path, dtype=torch.float16))


# With blocks of 32 in every row, so that q8_0 fits
WIDE = replace(CONFIGS["wide heads"], vocab_size=1000, intermediate_size=96)
TOO_LARGE = {  # a weight, a dtype that can't hold it, and the targets
    "float16": (70000.0, "float16", ("new/hf", "a.pt", "a.gguf")),
    "float16, negative": (-70000.0, "float16", ("new/hf", "a.pt", "a.gguf")),
    "bfloat16": (3.4e38, "bfloat16", ("new/hf", "a.pt", "a.gguf")),
    "q8_0": (1e7, "q8_0", ("a.gguf",)),  # the scale of a block is a float16
    "float32": (math.nan, "float32", ("new/hf", "a.pt", "a.gguf")),
}
CASES = [(what, target) for what, (_, _, targets) in TOO_LARGE.items() for target in targets]


@pytest.mark.parametrize(("what", "target"), CASES)
def test_a_weight_that_the_dtype_cannot_hold_is_not_written(what, target, tokenizer, tmp_path):
    value, dtype, _ = TOO_LARGE[what]
    model = spoiled(KEYS, value, WIDE)
    message = message_of(lambda: write_model(tmp_path / target, model, tokenizer, dtype=dtype))
    assert KEYS in message
    assert list(tmp_path.iterdir()) == []


def test_gguf_in_float16_keeps_large_norms(tokenizer, tmp_path):
    """They stay in float32 there, so nothing is lost."""
    model = spoiled(NORM, 70000.0)
    write_model(tmp_path / "a.gguf", model, tokenizer, dtype="float16")
    assert models.load(tmp_path / "a.gguf").model.state_dict()[NORM][7] == 70000
    message = message_of(lambda: write_model(tmp_path / "hf", model, tokenizer, dtype="float16"))
    assert NORM in message
