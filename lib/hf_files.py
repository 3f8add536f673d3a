"""The small files beside the weights in a HuggingFace directory, as a dict from name to text:

    generation_config.json  which tokens end a text, and how to sample
    tokenizer_config.json   the tokens that have names: bos_token, pad_token, ...
    chat_template.jinja     how a conversation is written; more of them in additional_chat_templates
    README.md               the model card, which begins with license and base_model in YAML
    LICENSE
    config.json             for the settings that are not ours

A ckpt.pt keeps them as they are. A GGUF file has keys for most of what they say.
"""

import json
import re
from pathlib import Path

from tokenizers import Tokenizer

from lib.cli import reading
from smollm import Config, InputError, to_json, tokenizer_settings

NAMES = ("generation_config.json", "tokenizer_config.json", "chat_template.jinja", "README.md",
         "LICENSE", "config.json")
MORE_TEMPLATES = "additional_chat_templates"
# The names of tokens, as chat templates and transformers know them
TOKEN_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token",
               "mask_token")


def read(folder: Path) -> dict[str, str]:
    """The small files of a folder. InputError if one is not what it should be."""
    files = {}
    paths = [folder / name for name in NAMES]
    paths += sorted(folder.glob(f"{MORE_TEMPLATES}/*.jinja"))
    for path in paths:
        if path.exists():
            is_prose = path.name in ("README.md", "LICENSE")  # which may have any bytes
            with reading(path):
                text = path.read_text("utf-8", "surrogateescape" if is_prose else "strict")
            files[path.relative_to(folder).as_posix()] = text
    settings = contents(files, "tokenizer_config.json")
    if "added_tokens_decoder" not in settings:
        settings |= read_old_settings(folder)
    templates = named_templates(settings.pop("chat_template", None))
    # a .jinja file comes before tokenizer_config.json, as in transformers
    if not any(name.endswith(".jinja") for name in files):
        files |= template_files(templates)
    if settings or "tokenizer_config.json" in files:
        files["tokenizer_config.json"] = to_json(settings)
    check(files)
    return files


def read_old_settings(folder: Path) -> dict:
    """What transformers 4 wrote into files of their own."""
    settings = {}
    names_path = folder / "special_tokens_map.json"
    if names_path.exists():
        with reading(names_path):
            settings |= json.loads(names_path.read_text("utf-8"))
    added_path = folder / "added_tokens.json"
    if added_path.exists():
        with reading(added_path):
            added = json.loads(added_path.read_text("utf-8"))
            tokens = {str(token_id): {"content": token} for token, token_id in added.items()}
        with reading(folder / "tokenizer.json"):
            tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
            for flags in tokenizer["added_tokens"]:
                tokens[str(flags.pop("id"))] = flags
        settings["added_tokens_decoder"] = tokens
    return settings


def check(files):
    """InputError if these are not such files: if a name is a path, or a .json is no JSON."""
    for name, text in files.items():
        folder, _, rest = name.rpartition("/")
        is_template = folder == MORE_TEMPLATES and is_plain(rest) and rest.endswith(".jinja")
        if not isinstance(text, str) or not (name in NAMES or is_template):
            raise InputError(f"{name!r} is no file that goes with a model")
        if name.endswith(".json"):
            contents(files, name)


def is_plain(name: str) -> bool:
    """Whether it names a file in a folder, and no other place."""
    return name.isprintable() and not re.search(r"^\.|[/\\:]", name)


def contents(files: dict[str, str], name: str) -> dict:
    """What one of the JSON files says; nothing, {}, if it is absent."""
    with reading(name):
        parsed = json.loads(files.get(name, "{}"))
        if not isinstance(parsed, dict):
            raise ValueError(f"it has a {type(parsed).__name__}, not an object")
        return parsed


# ---- Chat templates


def named_templates(stated) -> dict[str, str]:
    """The templates of a tokenizer_config.json, by name. It states one, the "default", as a string,
    or several, as a dict or as a list of {"name": ..., "template": ...}."""
    if stated is None:
        return {}
    if isinstance(stated, str):
        return {"default": stated}
    templates = stated
    if isinstance(stated, list) and all(isinstance(entry, dict) for entry in stated):
        templates = {entry.get("name"): entry.get("template") for entry in stated}
    if not isinstance(templates, dict) or not are_strings(*templates, *templates.values()):
        raise InputError("tokenizer_config.json: its chat_template is neither a string nor a list "
                         "of names and templates")
    return templates


def are_strings(*values) -> bool:
    return all(isinstance(value, str) for value in values)


def template_files(templates: dict[str, str]) -> dict[str, str]:
    """The files in which transformers 5 keeps templates. InputError for a name that is a path."""
    files = {}
    for name, template in templates.items():
        if not name or not is_plain(name):
            raise InputError(f"a chat template is named {name!r}: rename it, in letters and digits")
        if name == "default":
            files["chat_template.jinja"] = template
        else:
            files[f"{MORE_TEMPLATES}/{name}.jinja"] = template
    return files


def templates_in(files: dict[str, str]) -> dict[str, str]:
    """The templates by name: the inverse of template_files."""
    templates = {}
    for name, text in files.items():
        if name == "chat_template.jinja":
            templates["default"] = text
        elif name.startswith(MORE_TEMPLATES):
            templates[Path(name).stem] = text
    return templates


# ---- Tokens


def named_tokens(settings: dict) -> dict[str, str]:
    """The tokens by name, {"bos_token": "<|endoftext|>", ...}, of a tokenizer_config.json."""
    named = {name: settings.get(name) for name in TOKEN_NAMES}
    if isinstance(settings.get("extra_special_tokens"), dict):  # names of the model's own
        named |= settings["extra_special_tokens"]
    tokens = {}
    for name, token in named.items():
        if isinstance(token, dict):
            token = token.get("content")
        if isinstance(token, str):
            tokens[name] = token
    return tokens


def more_special_tokens(settings: dict) -> list[str]:
    """The special tokens of a tokenizer_config.json that have no names."""
    more = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if isinstance(settings.get(key), list):
            more += settings[key]
    return [token["content"] if isinstance(token, dict) else token for token in more]


def token_names(files: dict[str, str], config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """A model's tokens by name. Without a tokenizer_config.json its config names them."""
    if "tokenizer_config.json" in files:
        return named_tokens(contents(files, "tokenizer_config.json"))
    return named_tokens(tokenizer_settings(config, tokenizer))


# ---- The model card


def model_card(name: str, notes: str = "", **data) -> str:
    """A README.md, with notes in its text and data in its YAML: license, base_model, language, ...
    The license is for whoever publishes it to fill in, if it isn't known."""
    from huggingface_hub import ModelCard, ModelCardData  # which takes a while to import
    yaml = ModelCardData(library_name="transformers", pipeline_tag="text-generation", **data)
    text = f"---\n{yaml.to_yaml()}\n---\n\n# {name}\n\nA language model of SmolLM's architecture.\n"
    if not data.get("license"):
        text += "\nIts license is not stated yet: add `license:` above.\n"
    return str(ModelCard(text + notes))


def license_and_base_model(files: dict[str, str]) -> tuple[str | None, str | None]:
    """What the model card says of both; of several, the first."""
    if "README.md" not in files:
        return None, None
    from huggingface_hub import ModelCard
    with reading("README.md"):
        data = ModelCard(files["README.md"], ignore_metadata_errors=True).data
    found = []
    for stated in (data.get("license"), data.get("base_model")):
        if isinstance(stated, list) and stated:
            stated = stated[0]
        found.append(stated if isinstance(stated, str) else None)
    return tuple(found)
