"""GGUF, llama.cpp's kind of file: a model and its tokenizer, read and written."""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

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
        for tensor in self.tensors:
            if tensor.data_offset != offset:
                raise ValueError(f"it is damaged: {tensor.name} begins at {tensor.data_offset}, "
                                 f"not {offset}")
            offset += -(-tensor.n_bytes // self.alignment) * self.alignment

    def value(self, key: str, default=None):
        if key in self.fields:
            return self.fields[key].contents()
        if default is None:
            raise ValueError(f"it has no {key}")
        return default


def read(path: Path) -> tuple[SmolLM, Tokenizer, str | None]:
    """Model in float32, tokenizer, chat template. ValueError, or what gguf raises, if it can't be
    read."""
    reader = Reader(path)
    reader.check_layout()
    shapes = {tensor.name: tuple(tensor.shape.tolist()[::-1]) for tensor in reader.tensors}
    if "token_embd.weight" not in shapes:
        raise ValueError("it has no token_embd.weight")
    config = read_config(reader, shapes)
    with torch.device("meta"):
        model = SmolLM(config)
    names = tensor_names(config)
    needed = {names[name]: tuple(p.shape) for name, p in model.state_dict().items()}
    for name in sorted(shapes.keys() | needed.keys()):
        found = shapes.get(name, "absent")
        right = needed.get(name, "absent")
        if found != right:
            raise ValueError(f"{name} is {found}, by its config it should be {right}")
    tokenizer = read_tokenizer(reader)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    state = {}
    for name, theirs in names.items():
        weight = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        num_heads = heads_to_reorder(name, config)
        if num_heads:
            weight = deinterleave(weight, num_heads)
        state[name] = torch.from_numpy(np.array(weight, dtype=np.float32))
    model.load_state_dict(state, strict=True, assign=True)
    template = reader.value("tokenizer.chat_template", "")
    return model, tokenizer, template or None


def read_config(reader: Reader, shapes: dict[str, tuple]) -> Config:
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
    return tokenizer


# ---- Write


def write(path: Path, model: SmolLM, tokenizer: Tokenizer, template: str | None, dtype: str):
    """What llama.cpp loads: matrices in dtype (float16 where q8_0's blocks don't fit), norms in
    float32."""
    config = model.config
    if config.no_rope_layer_interval not in (0, 4):
        raise InputError(f"no_rope_layer_interval is {config.no_rope_layer_interval}, llama.cpp "
                         "knows 4 only")
    writer = gguf.GGUFWriter(path, "smollm3" if config.no_rope_layer_interval else "llama")
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
    add_tokenizer(writer, config, tokenizer)
    if template:
        writer.add_chat_template(template)
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
        data = gguf.quantize(np.ascontiguousarray(weight), kind)
        writer.add_tensor(names[name], data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, config: Config, tokenizer: Tokenizer):
    contents = json.loads(tokenizer.to_str())
    if not splits_as_smollm(contents):
        raise InputError("the tokenizer is no byte-level BPE that splits digits one by one, as "
                         "SmolLM's is: llama.cpp would split text differently")
    added = {}
    for token in contents["added_tokens"]:
        added[token["id"]] = gguf.TokenType.USER_DEFINED
        if token["special"]:
            added[token["id"]] = gguf.TokenType.CONTROL
    tokens = []
    types = []
    for i in range(config.vocab_size):  # llama.cpp wants a token for every row of the embedding
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
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_add_bos_token(False)
    writer.add_add_space_prefix(False)


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
