"""GGUF, llama.cpp's kind of file: a model and its tokenizer, read and written.

The keys are those of github.com/ggml-org/ggml/blob/master/docs/gguf.md. lib/gguf_values.py has
those of what else goes with a model.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.processors import TemplateProcessing

from lib import gguf_values
from lib.gguf_values import shortest
from smollm import Config, InputError, SmolLM

DTYPES = {"float32": Quantization.F32, "float16": Quantization.F16,
          "bfloat16": Quantization.BF16, "q8_0": Quantization.Q8_0}
FILE_TYPES = {"float32": gguf.LlamaFileType.ALL_F32, "float16": gguf.LlamaFileType.MOSTLY_F16,
              "bfloat16": gguf.LlamaFileType.MOSTLY_BF16, "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0}
MODULES = {  # HuggingFace's name, llama.cpp's
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "post_attention_layernorm": "ffn_norm",
}
CONFIG_KEYS = {  # a setting of config.json, its key under llama. or smollm3.
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}


def tensor_names(config: Config) -> dict[str, str]:
    """Our names, which are HuggingFace's, to llama.cpp's."""
    names = {"model.embed_tokens.weight": "token_embd.weight",
             "model.norm.weight": "output_norm.weight"}
    for layer in range(config.num_hidden_layers):
        for ours, theirs in MODULES.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return names


def interleave(weight, num_heads: int):
    """Reorder the rows of q_proj or k_proj, (H * D, C): the pairs that RoPE turns, which in HF are
    i and i + D/2 of a head, become neighbours, 2i and 2i + 1, as llama.cpp has them."""
    heads = weight.reshape(num_heads, 2, -1, weight.shape[-1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def deinterleave(weight, num_heads: int):
    """The inverse of interleave."""
    heads = weight.reshape(num_heads, -1, 2, weight.shape[-1])
    return heads.swapaxes(1, 2).reshape(weight.shape)


def heads_to_reorder(name: str, config: Config) -> int:
    """How many heads' rows are stored in another order in GGUF; 0 for most tensors."""
    if "q_proj" in name:
        return config.num_attention_heads
    if "k_proj" in name:
        return config.num_key_value_heads
    return 0


# ---- Read


class Reader(gguf.GGUFReader):
    """gguf's reader, but it does not read past the end of a file that is cut short or damaged."""
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
        alignment = int(self.alignment)  # of NumPy's uint32, which knows no negative numbers
        for tensor in self.tensors:
            if tensor.data_offset != offset:
                raise ValueError(f"it is damaged: {tensor.name} begins at {tensor.data_offset}, "
                                 f"not {offset}")
            offset += -(-int(tensor.n_bytes) // alignment) * alignment

    def value(self, key: str, default=None):
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise ValueError(f"it has no {key}")
        return default


def read(path: Path) -> tuple[SmolLM, Tokenizer, dict[str, str]]:
    """Model in float32, tokenizer, and the small files of lib/hf_files.py. ValueError, or what gguf
    raises, if it can't be read."""
    reader = Reader(path)
    if reader.value("general.type", "model") != "model":
        raise ValueError(f"it is no model, its general.type is {reader.value('general.type')!r}")
    if reader.value("split.count", 1) > 1:
        raise ValueError(f"it is one of {reader.value('split.count')} parts: join them, with "
                         "llama-gguf-split --merge")
    reader.check_layout()
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    if "token_embd.weight" not in tensors:
        raise ValueError("it has no token_embd.weight")
    values = {key: field.contents() for key, field in reader.fields.items()
              if key.startswith("general.") or "_token_id" in key or "chat_template" in key}
    values = {key: value for key, value in values.items() if value != 2**32 - 1}  # no token
    config = read_config(reader, values, vocab_size=int(tensors["token_embd.weight"].shape[1]))
    with torch.device("meta"):
        model = SmolLM(config)
    drop_repeated(tensors)
    names = tensor_names(config)
    shapes = {name: tuple(tensor.shape.tolist()[::-1]) for name, tensor in tensors.items()}
    needed = {names[name]: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in sorted(shapes.keys() | needed.keys()):
        found = shapes.get(name, "absent")
        right = needed.get(name, "absent")
        if found != right:
            raise ValueError(f"{name} is {found}, by its config it should be {right}")
    tokenizer = read_tokenizer(reader)
    state = {}
    for name, theirs in names.items():
        weight = dequantize(tensors[theirs])
        num_heads = heads_to_reorder(name, config)
        if num_heads:
            weight = deinterleave(weight, num_heads)
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32))
    model.load_state_dict(state, strict=True, assign=True)
    return model, tokenizer, gguf_values.to_files(values, config, tokenizer)


def dequantize(tensor) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def drop_repeated(tensors: dict):
    """Some files repeat the embedding as the output head, or state factors for RoPE's frequencies
    that are all 1. ValueError if they are something else."""
    if "output.weight" in tensors:
        head = dequantize(tensors.pop("output.weight"))
        if not np.array_equal(head, dequantize(tensors["token_embd.weight"])):
            raise ValueError("output.weight differs from token_embd.weight: with an untied head it "
                             "is another architecture")
    if "rope_freqs.weight" in tensors and np.any(tensors.pop("rope_freqs.weight").data != 1):
        raise ValueError("its rope_freqs.weight scales RoPE, which is not implemented")


def read_config(reader: Reader, values: dict, vocab_size: int) -> Config:
    arch = reader.value("general.architecture")
    if arch not in ("llama", "smollm3"):
        raise ValueError(f"its architecture is {arch!r}, not llama or smollm3")
    keys = {name: f"{arch}.{key}" for name, key in CONFIG_KEYS.items()}
    defaults = {"num_key_value_heads": reader.value(keys["num_attention_heads"]), "rope_theta": 1e4}
    settings = {name: reader.value(key, defaults.get(name)) for name, key in keys.items()}
    for name, value in settings.items():
        if isinstance(value, list):  # a number for each layer
            if set(value) != {value[0]}:
                raise ValueError(f"its {keys[name]} is {value}: layers that differ are not "
                                 "implemented")
            settings[name] = value[0]
    for name in ("rope_theta", "rms_norm_eps"):
        settings[name] = shortest(settings[name])
    config = Config(
        **settings,
        vocab_size=vocab_size,
        no_rope_layer_interval=4 if arch == "smollm3" else 0,
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=gguf_values.eos_of(values),
        pad_token_id=values.get("tokenizer.ggml.padding_token_id"))

    # Other keys may stand there if they say nothing new. If they do, they may change the result.
    expected = {
        "vocab_size": [vocab_size],
        "rope.dimension_count": [config.head_dim],
        "attention.key_length": [config.head_dim],
        "attention.value_length": [config.head_dim],
        "attention.causal": [True],
        "rope.scaling.type": ["none", "linear"],  # by a factor of 1; 0 is none
        "rope.scaling.factor": [0, 1],
        "rope.scaling.attn_factor": [0, 1],
        "rope.scale_linear": [0, 1],
        "residual_scale": [0, 1],
        "embedding_scale": [0, 1],
        "logit_scale": [0, 1],
    }
    never_matter = {"tensor_data_layout", "rope.scaling.finetuned",
                    "rope.scaling.original_context_length"}
    is_unscaled = reader.value(f"{arch}.rope.scaling.type", "") == "none"
    for key in reader.fields:
        name = key.removeprefix(f"{arch}.")
        if name == key or key in keys.values() or name in never_matter:
            continue
        if is_unscaled and name.startswith("rope.scaling."):
            continue
        value = reader.value(key)
        if value not in expected.get(name, [0]):  # of others 0, or False, says nothing
            raise ValueError(f"its {key} is {value!r}, which is not implemented")
    return config


def read_tokenizer(reader: Reader) -> Tokenizer:
    kind = (reader.value("tokenizer.ggml.model"), reader.value("tokenizer.ggml.pre"))
    if kind != ("gpt2", "smollm"):
        raise ValueError(f"its tokenizer is {'/'.join(kind)}, implemented is gpt2/smollm")
    tokens = reader.value("tokenizer.ggml.tokens")
    types = reader.value("tokenizer.ggml.token_type")
    merges = [tuple(merge.split(" ")) for merge in reader.value("tokenizer.ggml.merges", [])]
    vocab = {}
    added = []
    for i, (token, token_type) in enumerate(zip(tokens, types, strict=True)):
        if token_type != gguf.TokenType.UNUSED:
            vocab[token] = i
        if token_type in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED):
            is_special = token_type == gguf.TokenType.CONTROL
            added.append(AddedToken(token, special=is_special, normalized=False))
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(added)
    ends = []
    for end in ("bos", "eos"):
        is_added = reader.value(f"tokenizer.ggml.add_{end}_token", False)
        ends.append(reader.value(f"tokenizer.ggml.{end}_token_id") if is_added else None)
    if ends != [None, None]:
        add_bos_and_eos(tokenizer, *ends)
    return tokenizer


def add_bos_and_eos(tokenizer: Tokenizer, bos_id: int | None, eos_id: int | None):
    """Let the tokenizer begin each text with bos and end it with eos; None: without."""
    parts = ["$A"]
    ends = []
    if bos_id is not None:
        ends.append((tokenizer.id_to_token(bos_id), bos_id))
        parts.insert(0, ends[-1][0])
    if eos_id is not None:
        ends.append((tokenizer.id_to_token(eos_id), eos_id))
        parts.append(ends[-1][0])
    tokenizer.post_processor = TemplateProcessing(single=parts, special_tokens=ends)


# ---- Write


def write(path: Path, name: str, bundle, dtype: str) -> list[str]:
    """What llama.cpp loads: matrices in dtype (float16 where q8_0's blocks don't fit), norms in
    float32. bundle is one of lib/models.py. Returns what can't be told in such a file."""
    model = bundle.model
    config = model.config
    if config.no_rope_layer_interval not in (0, 4):
        raise InputError(f"no_rope_layer_interval is {config.no_rope_layer_interval}, llama.cpp "
                         "knows 4 only")
    arch = "smollm3" if config.no_rope_layer_interval else "llama"
    writer = gguf.GGUFWriter(path, arch)
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(model.num_parameters(), 0, 0, 0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_file_type(FILE_TYPES[dtype])
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(config.head_dim)
    settings = {f"{arch}.{key}": getattr(config, name) for name, key in CONFIG_KEYS.items()}
    for name in ("rope_theta", "rms_norm_eps"):
        settings[f"{arch}.{CONFIG_KEYS[name]}"] = float(getattr(config, name))
    gguf_values.add_values(writer, settings)
    values = gguf_values.to_values(bundle)
    gguf_values.add_values(writer, values)
    add_tokenizer(writer, config.vocab_size, bundle.tokenizer)
    bos_id = values.get("tokenizer.ggml.bos_token_id")
    eos_id = values.get("tokenizer.ggml.eos_token_id")
    adds_bos, adds_eos = adds_bos_and_eos(bundle.tokenizer, bos_id, eos_id)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    add_tensors(writer, model, dtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return gguf_values.what_is_lost(values, bundle)


def add_tensors(writer: gguf.GGUFWriter, model: SmolLM, dtype: str):
    names = tensor_names(model.config)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        num_heads = heads_to_reorder(name, model.config)
        if num_heads:
            weight = interleave(weight, num_heads)
        quantization = Quantization.F32
        if weight.ndim == 2:
            quantization = DTYPES[dtype]
        if weight.shape[-1] % gguf.GGML_QUANT_SIZES[quantization][0] != 0:
            quantization = Quantization.F16
        with np.errstate(over="ignore", invalid="ignore"):
            data = gguf.quantize(np.ascontiguousarray(weight), quantization)
            is_finite = np.isfinite(gguf.dequantize(data, quantization)).all()
        if not is_finite:
            raise InputError(f"not all of {name} is finite in {quantization.name}: choose another "
                             "dtype")
        writer.add_tensor(names[name], data, raw_dtype=quantization)


def add_tokenizer(writer: gguf.GGUFWriter, vocab_size: int, tokenizer: Tokenizer):
    contents = json.loads(tokenizer.to_str())
    if not splits_as_smollm(contents):
        raise InputError("the tokenizer is no byte-level BPE that splits digits one by one, as "
                         "SmolLM's is: llama.cpp would split text differently")
    added = {}
    for token in contents["added_tokens"]:
        for flag in ("lstrip", "rstrip", "single_word"):
            if token[flag]:
                raise InputError(f"the added token {token['content']!r} has {flag}, which a GGUF "
                                 "file can't say: llama.cpp would split text differently")
        added[token["id"]] = gguf.TokenType.USER_DEFINED
        if token["special"]:
            added[token["id"]] = gguf.TokenType.CONTROL
    tokens = []
    types = []
    for i in range(vocab_size):  # llama.cpp wants a token for every row of the embedding
        token = tokenizer.id_to_token(i)
        if token is None:
            tokens.append(f"[UNUSED{i}]")
            types.append(gguf.TokenType.UNUSED)
        else:
            tokens.append(token)
            types.append(added.get(i, gguf.TokenType.NORMAL))
    merges = []
    for merge in contents["model"]["merges"]:  # "a b" in older files, ["a", "b"] in newer ones
        merges.append(merge if isinstance(merge, str) else " ".join(merge))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_space_prefix(False)


def adds_bos_and_eos(tokenizer: Tokenizer, bos_id: int | None,
                     eos_id: int | None) -> tuple[bool, bool]:
    """Whether the tokenizer adds bos before a text, and eos after it. InputError if it adds
    something else."""
    text = tokenizer.encode("a", add_special_tokens=False).ids
    whole = tokenizer.encode("a").ids
    for before in ([], [bos_id]):
        for after in ([], [eos_id]):
            if whole == before + text + after:
                return bool(before), bool(after)
    raise InputError(f"the tokenizer makes {whole} of 'a', llama.cpp only adds bos, {bos_id}, and "
                     f"eos, {eos_id}, to {text}")


def splits_as_smollm(contents: dict) -> bool:
    """Whether a tokenizer.json is of a byte-level BPE that splits text as llama.cpp does for
    SmolLM: digits one by one, then by GPT-2's pattern."""
    steps = []
    for step in (contents["pre_tokenizer"] or {}).get("pretokenizers", []):
        steps.append({key: step[key] for key in ("type", "individual_digits", "use_regex",
                                                 "add_prefix_space") if key in step})
    right_steps = [{"type": "Digits", "individual_digits": True},
                   {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]
    is_bpe = contents["model"]["type"] == "BPE"
    return is_bpe and contents["normalizer"] is None and steps == right_steps
