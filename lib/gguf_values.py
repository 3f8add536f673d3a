"""What goes with a model, as keys and values of a GGUF file, and as the small files of
lib/hf_files.py."""

import math

import gguf
import numpy as np
from tokenizers import Tokenizer

from lib import hf_files
from smollm import Config, id_list, to_json

# A token's name in HuggingFace's files, its key under tokenizer.ggml. (the misspelling is theirs)
TOKEN_KEYS = {"bos_token": "bos_token_id", "unk_token": "unknown_token_id",
              "sep_token": "seperator_token_id", "pad_token": "padding_token_id",
              "mask_token": "mask_token_id"}
# Where a text ends: the end of a text, of a turn, of a message. Any of them ends it.
EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# A setting of generation_config.json, its key under general.sampling.
SAMPLING_KEYS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
                 "repetition_penalty": "penalty_repeat"}
# A model card's YAML, the key under general.
CARD_KEYS = {"license": "license", "license_name": "license.name", "license_link": "license.link",
             "base_model": "base_model.0.repo_url", "language": "languages", "tags": "tags"}
ABOUT_THE_FILE = {"general.type", "general.architecture", "general.file_type", "general.alignment",
                  "general.size_label", "general.quantization_version"}
TEMPLATE = "tokenizer.chat_template"
HUB = "https://huggingface.co/"
# Settings of the JSON files that are about a program, or that model or tokenizer say, too
SAY_NOTHING = {
    "architectures", "use_cache", "pretraining_tp", "dtype", "torch_dtype", "_name_or_path",
    "rope_scaling", "rope_parameters", "id2label", "label2id", "return_dict", "layer_types",
    "chunk_size_feed_forward", "tokenizer_class", "backend", "is_local", "transformers_version",
    "vocab_size", "_from_model_config", "added_tokens_decoder", "additional_special_tokens",
    "extra_special_tokens", "add_bos_token", "add_eos_token", "model_input_names", "errors"}


def shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# ---- To values


def to_values(bundle) -> dict:
    """By key, the values for what goes with a model, a bundle of lib/models.py. What has no key is
    left out; what_is_lost names it."""
    generation = hf_files.contents(bundle.files, "generation_config.json")
    return (token_values(bundle) | sampling_values(generation) | template_values(bundle.files)
            | origin_values(bundle))


def token_values(bundle) -> dict:
    config = bundle.model.config
    ids = {"bos_token": config.bos_token_id, "pad_token": config.pad_token_id}
    for name, token in hf_files.token_names(bundle.files, config, bundle.tokenizer).items():
        if bundle.tokenizer.token_to_id(token) is not None:
            ids[name] = bundle.tokenizer.token_to_id(token)
    values = {}
    for name, key in TOKEN_KEYS.items():
        if ids.get(name) is not None:
            values[f"tokenizer.ggml.{key}"] = ids[name]
    eos_ids = id_list(config.eos_token_id)
    own = ids.get("eos_token")
    if own in eos_ids:  # the tokenizer's own comes first: a chat template may use it
        eos_ids = [own, *(eos_id for eos_id in eos_ids if eos_id != own)]
    for key, eos_id in zip(EOS_KEYS, eos_ids, strict=False):
        values[f"tokenizer.ggml.{key}"] = eos_id
    return values


def sampling_values(generation: dict) -> dict:
    values = {}
    if generation.get("do_sample"):
        for name, key in SAMPLING_KEYS.items():
            value = generation.get(name)
            if isinstance(value, int | float):
                values[f"general.sampling.{key}"] = value if name == "top_k" else float(value)
    return values


def template_values(files: dict[str, str]) -> dict:
    values = {}
    templates = hf_files.templates_in(files)
    if "default" in templates:
        values[TEMPLATE] = templates.pop("default")
    for name, template in templates.items():
        values[f"{TEMPLATE}.{name}"] = template
    if templates:
        values["tokenizer.chat_templates"] = list(templates)
    return values


def origin_values(bundle) -> dict:
    values = {}
    license, base_model = hf_files.license_and_base_model(bundle.files)
    base_model = base_model or bundle.hub_id
    if license:
        values["general.license"] = license
    if base_model:
        organization, _, name = base_model.rpartition("/")
        values["general.base_model.count"] = 1
        values["general.base_model.0.name"] = name
        values["general.base_model.0.organization"] = organization
        values["general.base_model.0.repo_url"] = HUB + base_model
    return values


def add_values(writer: gguf.GGUFWriter, values: dict):
    types = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32,
             float: gguf.GGUFValueType.FLOAT32, list: gguf.GGUFValueType.ARRAY}
    for key, value in values.items():
        value_type = types[type(value)]
        if key == "general.sampling.top_k":
            value_type = gguf.GGUFValueType.INT32
        writer.add_key_value(key, value, value_type)


# ---- From values


def eos_of(values: dict) -> int | list[int] | None:
    """Where a text ends, as config.json states it."""
    eos_ids = [values[f"tokenizer.ggml.{key}"] for key in EOS_KEYS
               if f"tokenizer.ggml.{key}" in values]
    eos_ids = list(dict.fromkeys(eos_ids))  # each once
    if len(eos_ids) > 1:
        return eos_ids
    return eos_ids[0] if eos_ids else None


def to_files(values: dict, config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """The small files that these values make."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_max_length": config.max_position_embeddings}
    for name, key in {**TOKEN_KEYS, "eos_token": "eos_token_id"}.items():
        if f"tokenizer.ggml.{key}" in values:
            settings[name] = tokenizer.id_to_token(values[f"tokenizer.ggml.{key}"])
    generation = {"bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
                  "eos_token_id": eos_of(values),
                  "pad_token_id": values.get("tokenizer.ggml.padding_token_id")}
    for name, key in SAMPLING_KEYS.items():
        if f"general.sampling.{key}" in values:
            value = values[f"general.sampling.{key}"]
            generation["do_sample"] = True
            generation[name] = value if name == "top_k" else shortest(value)
    files = {"tokenizer_config.json": to_json(settings),
             "generation_config.json": to_json(generation)}

    templates = {}
    for key, value in values.items():
        if key == TEMPLATE:
            templates["default"] = value
        elif key.startswith(f"{TEMPLATE}."):
            templates[key.removeprefix(f"{TEMPLATE}.")] = value
    files |= hf_files.template_files(templates)

    if "general.name" in values:
        files["README.md"] = card_of(values)
    return files


def card_of(values: dict) -> str:
    """A model card that says what the keys under general. do."""
    data = {}
    for name, key in CARD_KEYS.items():
        if f"general.{key}" in values:
            data[name] = values[f"general.{key}"]
    if "base_model" in data:
        data["base_model"] = data["base_model"].removeprefix(HUB)
    told = {"general.name", *(f"general.{key}" for key in CARD_KEYS.values())}
    notes = "".join(f"- {key}: {value}\n" for key, value in values.items()
                    if key.startswith("general.") and key not in told | ABOUT_THE_FILE
                    and not key.startswith(("general.base_model.", "general.sampling.")))
    if notes:
        notes = f"\nIts GGUF file says:\n\n{notes}"
    return hf_files.model_card(values["general.name"], notes, **data)


# ---- What has no key


def what_is_lost(values: dict, bundle) -> list[str]:
    """What goes with the bundle's model and is not in these values of it, in words."""
    config = bundle.model.config
    kept = to_files(values, config, bundle.tokenizer)
    lost = []
    settings = hf_files.contents(bundle.files, "config.json")
    ours = {name: settings.get(name) for name in Config.__dataclass_fields__}
    kept["config.json"] = to_json(config.to_hf() | ours)
    for name, text in bundle.files.items():
        if name.endswith(".json"):
            lost += [f"{key} of {name}" for key in lost_settings(name, bundle.files, kept)]
        elif text != kept.get(name):
            lost.append("the text of README.md" if name == "README.md" else name)
    if config.bos_token_id != values.get("tokenizer.ggml.bos_token_id"):
        lost.append(f"a bos_token_id of {config.bos_token_id} beside the tokenizer's")
    if len(id_list(config.eos_token_id)) > len(EOS_KEYS):
        lost.append(f"more than {len(EOS_KEYS)} of eos_token_id {config.eos_token_id}")
    if not math.isclose(config.initializer_range, 1 / math.sqrt(config.hidden_size)):
        lost.append("initializer_range")
    return lost


def lost_settings(name: str, files: dict[str, str], kept: dict[str, str]) -> list[str]:
    """The settings of the JSON file of that name which say something that kept does not."""
    lost = []
    others = hf_files.contents(kept, name)
    for key, value in hf_files.contents(files, name).items():
        other = others.get(key)
        if isinstance(value, dict) and "content" in value:  # a token with its flags
            value = value["content"]
        if key == "eos_token_id":  # whose order says nothing
            value = set(id_list(value))
            other = set(id_list(other))
        is_empty = value is None or value is False or value in ("", [], {}, set())
        if not is_empty and key not in SAY_NOTHING and value != other:
            lost.append(key)
    return lost
