"""GGUF, llama.cpp's kind of file: a model, its tokenizer and what else goes with it, read and
written. The keys are those of github.com/ggml-org/ggml/blob/master/docs/gguf.md."""

import json
import math
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from lib import hf_files
from smollm import Config, InputError, SmolLM, id_list

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
# A token's name in HuggingFace's files, its key under tokenizer.ggml. (the misspelling is theirs)
TOKEN_KEYS = {"bos_token": "bos_token_id", "unk_token": "unknown_token_id",
              "sep_token": "seperator_token_id", "pad_token": "padding_token_id",
              "mask_token": "mask_token_id"}
# Where a text ends: the end of a text, of a turn, of a message. Any of them ends it.
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
# The setting in generation_config.json, its key under general.sampling.
SAMPLING_KEYS = {"temperature": "temp", "top_k": "top_k", "top_p": "top_p", "min_p": "min_p",
                 "repetition_penalty": "penalty_repeat"}


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
        alignment = int(self.alignment)
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
    config = read_config(reader, values, vocab_size=int(tensors["token_embd.weight"].shape[1]))
    with torch.device("meta"):
        model = SmolLM(config)
    drop_redundant(tensors)
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
    return model, tokenizer, to_files(values, config, tokenizer)


def dequantize(tensor) -> np.ndarray:
    return gguf.dequantize(tensor.data, tensor.tensor_type)


def drop_redundant(tensors: dict):
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
    read_keys = set()

    def value(key, default=None):
        read_keys.add(f"{arch}.{key}")
        return reader.value(f"{arch}.{key}", default)

    heads = value("attention.head_count")
    config = Config(
        vocab_size=vocab_size,
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv", heads),
        max_position_embeddings=value("context_length"),
        rope_theta=shortest(value("rope.freq_base", 1e4)),
        rms_norm_eps=shortest(value("attention.layer_norm_rms_epsilon")),
        no_rope_layer_interval=4 if arch == "smollm3" else 0,
        bos_token_id=values.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=read_ends(values),
        pad_token_id=values.get("tokenizer.ggml.padding_token_id"))

    # Keys that may stand there, if they say nothing new. Any other may change the result.
    neutral = {
        "vocab_size": [vocab_size],
        "rope.dimension_count": [config.head_dim],
        "attention.key_length": [config.head_dim],
        "attention.value_length": [config.head_dim],
        "rope.scaling.type": ["none", "linear"],  # which a factor of 1, or 0 for none, leaves as is
        "rope.scaling.factor": [0, 1],
        "rope.scaling.attn_factor": [1],
        "rope.scale_linear": [0, 1],
        "attention.causal": [True],
        "expert_count": [0],
        "expert_used_count": [0],
    }
    for key in reader.fields:
        name = key.removeprefix(f"{arch}.")
        if name == key or key in read_keys or name == "tensor_data_layout":
            continue
        if reader.value(key) not in neutral.get(name, []):
            raise ValueError(f"its {key} is {reader.value(key)!r}, which is not implemented")
    return config


def read_ends(values: dict) -> int | list[int] | None:
    """Where a text ends, as config.json states it."""
    ends = [values[f"tokenizer.ggml.{key}"] for key in END_KEYS
            if f"tokenizer.ggml.{key}" in values]
    ends = list(dict.fromkeys(ends))  # each once
    if len(ends) > 1:
        return ends
    return ends[0] if ends else None


def shortest(value: float) -> float:
    """The number that was meant by a float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


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
        hf_files.add_ends(tokenizer, *ends)
    return tokenizer


# ---- Write


def write(path: Path, name: str, bundle, dtype: str) -> list[str]:
    """What llama.cpp loads: matrices in dtype (float16 where q8_0's blocks don't fit), norms in
    float32. bundle is one of lib/models.py. Returns what can't be told in such a file."""
    model = bundle.model
    config = model.config
    if config.no_rope_layer_interval not in (0, 4):
        raise InputError(f"no_rope_layer_interval is {config.no_rope_layer_interval}, llama.cpp "
                         "knows 4 only")
    writer = gguf.GGUFWriter(path, "smollm3" if config.no_rope_layer_interval else "llama")
    writer.add_type("model")
    writer.add_name(name)
    writer.add_size_label(gguf.size_label(model.num_parameters(), 0, 0, 0))
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
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
    add_tokenizer(writer, config.vocab_size, bundle.tokenizer)
    values = to_values(bundle)
    bos_id = values.get("tokenizer.ggml.bos_token_id")
    eos_id = values.get("tokenizer.ggml.eos_token_id")
    adds_bos, adds_eos = ends_added(bundle.tokenizer, bos_id, eos_id)
    writer.add_add_bos_token(adds_bos)
    writer.add_add_eos_token(adds_eos)
    for key, value in values.items():
        kind = TYPES[type(value)]
        if key == "general.sampling.top_k":
            kind = gguf.GGUFValueType.INT32
        writer.add_key_value(key, value, kind)
    names = tensor_names(config)
    for name, tensor in model.state_dict().items():
        weight = tensor.float().numpy()
        num_heads = heads_to_reorder(name, config)
        if num_heads:
            weight = interleave(weight, num_heads)
        kind = Quantization.F32
        if weight.ndim == 2:
            kind = DTYPES[dtype]
        if weight.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] != 0:
            kind = Quantization.F16
        with np.errstate(over="ignore", invalid="ignore"):
            data = gguf.quantize(np.ascontiguousarray(weight), kind)
            is_finite = np.isfinite(gguf.dequantize(data, kind)).all()
        if not is_finite:
            raise InputError(f"not all of {name} is finite in {kind.name}: choose another dtype")
        writer.add_tensor(names[name], data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    lost = differences(bundle.files, to_files(values, config, bundle.tokenizer))
    if config.bos_token_id != bos_id:
        lost.append(f"a bos_token_id of {config.bos_token_id} beside the tokenizer's")
    if len(id_list(config.eos_token_id)) > len(END_KEYS):
        lost.append(f"more than {len(END_KEYS)} of eos_token_id {config.eos_token_id}")
    if not math.isclose(config.initializer_range, 1 / math.sqrt(config.hidden_size)):
        lost.append("initializer_range")
    return lost


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


def ends_added(tokenizer: Tokenizer, bos_id: int | None, eos_id: int | None) -> tuple[bool, bool]:
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


# ---- What goes with a model: as values of keys, and as the small files of lib/hf_files.py

TYPES = {str: gguf.GGUFValueType.STRING, int: gguf.GGUFValueType.UINT32,
         float: gguf.GGUFValueType.FLOAT32, list: gguf.GGUFValueType.ARRAY}


def to_values(bundle) -> dict:
    """The values of keys that say what the files of the bundle do, as far as there are keys."""
    config = bundle.model.config
    files = bundle.files
    tokens = hf_files.token_names(files, config, bundle.tokenizer)
    values = {}
    ids = {"bos_token": config.bos_token_id, "pad_token": config.pad_token_id}
    for name, token in tokens.items():
        if bundle.tokenizer.token_to_id(token) is not None:
            ids[name] = bundle.tokenizer.token_to_id(token)
    for name, key in TOKEN_KEYS.items():
        if ids.get(name) is not None:
            values[f"tokenizer.ggml.{key}"] = ids[name]
    # the first of the ends is the tokenizer's own, which a chat template may use
    ends = sorted(id_list(config.eos_token_id), key=lambda end: end != ids.get("eos_token"))
    for key, token_id in zip(END_KEYS, ends, strict=False):
        values[f"tokenizer.ggml.{key}"] = token_id

    generation = hf_files.contents(files, "generation_config.json")
    for name, key in SAMPLING_KEYS.items():
        value = generation.get(name)
        if generation.get("do_sample") and isinstance(value, int | float):
            values[f"general.sampling.{key}"] = int(value) if name == "top_k" else float(value)

    templates = hf_files.templates_in(files)
    if "default" in templates:
        values["tokenizer.chat_template"] = templates.pop("default")
    for name, template in templates.items():
        values[f"tokenizer.chat_template.{name}"] = template
    if templates:
        values["tokenizer.chat_templates"] = list(templates)

    license, base_model = hf_files.license_and_base_model(files)
    base_model = base_model or bundle.hub_id
    if license:
        values["general.license"] = license
    if base_model:
        organization, _, name = base_model.rpartition("/")
        values["general.base_model.count"] = 1
        values["general.base_model.0.name"] = name
        values["general.base_model.0.organization"] = organization
        values["general.base_model.0.repo_url"] = f"https://huggingface.co/{base_model}"
    return values


def to_files(values: dict, config: Config, tokenizer: Tokenizer) -> dict[str, str]:
    """The inverse of to_values."""
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                "model_max_length": config.max_position_embeddings}
    for name, key in {**TOKEN_KEYS, "eos_token": "eos_token_id"}.items():
        if f"tokenizer.ggml.{key}" in values:
            settings[name] = tokenizer.id_to_token(values[f"tokenizer.ggml.{key}"])
    generation = {"bos_token_id": values.get("tokenizer.ggml.bos_token_id"),
                  "eos_token_id": read_ends(values),
                  "pad_token_id": values.get("tokenizer.ggml.padding_token_id")}
    for name, key in SAMPLING_KEYS.items():
        if f"general.sampling.{key}" in values:
            value = values[f"general.sampling.{key}"]
            generation |= {"do_sample": True, name: value if name == "top_k" else shortest(value)}
    templates = {}
    for key, value in values.items():
        if key == "tokenizer.chat_template":
            templates["default"] = value
        elif key.startswith("tokenizer.chat_template."):
            templates[key.removeprefix("tokenizer.chat_template.")] = value
    files = {"tokenizer_config.json": hf_files.to_json(settings),
             "generation_config.json": hf_files.to_json(generation)}
    files |= hf_files.template_files(templates)
    base_model = values.get("general.base_model.0.repo_url", "")
    base_model = base_model.removeprefix("https://huggingface.co/") or None
    if base_model or "general.license" in values:
        files["README.md"] = hf_files.model_card(values.get("general.name", "A SmolLM"),
                                                 values.get("general.license"), base_model)
    return files


# Settings of tokenizer_config.json and generation_config.json that are about a program, or that
# the tokenizer says, too
SAY_NOTHING = {"tokenizer_class", "backend", "is_local", "transformers_version", "vocab_size",
               "_from_model_config", "added_tokens_decoder", "additional_special_tokens",
               "extra_special_tokens", "add_bos_token", "add_eos_token", "model_input_names",
               "errors"}


def differences(files: dict[str, str], others: dict[str, str]) -> list[str]:
    """What files say and the others don't, in words."""
    lost = []
    for name, text in files.items():
        if name.endswith(".json"):
            other = hf_files.contents(others, name)
            for key, value in hf_files.contents(files, name).items():
                if isinstance(value, dict) and "content" in value:
                    value = value["content"]
                if key == "eos_token_id":  # a set
                    value = sorted(id_list(value))
                    other[key] = sorted(id_list(other[key]))
                if value and key not in SAY_NOTHING and value != other.get(key):
                    lost.append(f"{key} of {name}")
        elif name == "README.md":
            if text != others.get(name):
                lost.append("the text of README.md")
        elif text != others.get(name):
            lost.append(name)
    return lost
