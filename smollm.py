"""SmolLM from scratch: the whole model in one file, to be read from top to bottom.

The architecture is Llama's (Touvron et al. 2023, arXiv:2302.13971): GPT-2 with RMSNorm for
LayerNorm, RoPE for learned positions, grouped-query attention, a SwiGLU MLP, and no biases.
Here B sequences of T tokens go through SmolLM-135M:

    input_ids                           (B, T)
        |
    embed_tokens                        (B, T, 576)    look up each id's row, 49152 x 576
        |
    .---|---------------------------------------------------------------------------- 30 blocks
    |   |---.
    |   |   |  input_layernorm          (B, T, 576)    RMSNorm
    |   |   |  q_proj                   (B, T, 576)    9 query heads of 64
    |   |   |  k_proj, v_proj           (B, T, 192)    3 key heads and 3 value heads of 64
    |   |   |  rotate q and k                          RoPE: by angles proportional to position
    |   |   |  attend                   (B, 9, T, 64)  each key/value head serves 3 query heads
    |   |   |  o_proj                   (B, T, 576)
    |  (+)<-'                                          x = x + attention
    |   |---.
    |   |   |  post_attention_layernorm (B, T, 576)    RMSNorm
    |   |   |  silu(gate) * up          (B, T, 1536)   SwiGLU, of gate_proj and up_proj
    |   |   |  down_proj                (B, T, 576)
    |  (+)<-'                                          x = x + MLP
    '---|--------------------------------------------------------------------------------------
        |
      norm                              (B, T, 576)    RMSNorm
        |
      head                              (B, T, 49152)  logits: x times embed_tokens, transposed

Modules have the names of the published checkpoints, so HuggingFace's transformers reads our files
unchanged, and we read theirs. The model needs only torch; safetensors, tokenizers and
huggingface_hub are imported where files are read and written.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """Something that the user can mend. Its message is one line: the value, the limit, what to do
    instead. Our commands show it without a traceback."""


# ---- Config: the model's shape

# Settings that every SmolLM shares. A config.json with another value is refused.
FIXED_SETTINGS = {"hidden_act": "silu", "tie_word_embeddings": True,
                  "attention_bias": False, "mlp_bias": False}
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def check_number(name: str, value, kind: type, low, high):
    """InputError unless value is of that kind, int or float, and from low to high."""
    if type(value) not in (int, kind) or not low <= value <= high:
        raise InputError(f"config: {name} is {value!r}, not {kind.__name__} from {low} to {high}")


def id_list(ids: int | list[int] | None) -> list[int]:
    """Token ids as a list: a config.json may state one, several, or null."""
    if ids is None:
        return []
    return ids if isinstance(ids, list) else [ids]


@dataclass
class Config:
    """The fields of HuggingFace's config.json. The defaults are SmolLM2-135M."""
    vocab_size: int = 49152
    hidden_size: int = 576  # width of the residual stream
    intermediate_size: int = 1536  # width inside the MLP
    num_hidden_layers: int = 30
    num_attention_heads: int = 9  # query heads
    num_key_value_heads: int = 3  # each serves several query heads, here 3
    max_position_embeddings: int = 8192  # the context, in tokens
    rope_theta: float = 1e5
    rms_norm_eps: float = 1e-5
    initializer_range: float | None = None  # std of the initial weights; None: 1/sqrt(hidden_size)
    no_rope_layer_interval: int = 0  # SmolLM3: every n-th layer has no RoPE; 0: every layer has it
    bos_token_id: int | None = 0  # begins a text
    eos_token_id: int | list[int] | None = 0  # ends a text; each of a list does; None: nothing does
    pad_token_id: int | None = None  # for other programs: nothing is padded here

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):
            check_number(name, getattr(self, name), int, 1, 2**30)
        if self.initializer_range is None:
            self.initializer_range = 1 / math.sqrt(self.hidden_size)
        for name in ("rope_theta", "rms_norm_eps"):
            check_number(name, getattr(self, name), float, 1e-12, 1e12)
        check_number("initializer_range", self.initializer_range, float, 0, 1e12)
        check_number("num_hidden_layers", self.num_hidden_layers, int, 1, 1000)
        check_number("no_rope_layer_interval", self.no_rope_layer_interval, int, 0, 1000)
        for name in TOKEN_IDS:
            for token_id in id_list(getattr(self, name)):
                check_number(name, token_id, int, 0, self.vocab_size - 1)
        if self.hidden_size % (2 * self.num_attention_heads) != 0:
            raise InputError(f"config: hidden_size is {self.hidden_size}, it must be a multiple of "
                             f"2 x num_attention_heads {self.num_attention_heads}")
        if self.num_attention_heads % self.num_key_value_heads != 0:
            raise InputError(f"config: num_attention_heads is {self.num_attention_heads}, it must "
                             f"be a multiple of num_key_value_heads {self.num_key_value_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_has_rope(self) -> list[bool]:
        """Whether each layer has RoPE: all have, but in SmolLM3 all but 3, 7, 11, ..."""
        interval = self.no_rope_layer_interval or math.inf
        return [(layer + 1) % interval != 0 for layer in range(self.num_hidden_layers)]

    @classmethod
    def from_hf(cls, hf: dict) -> "Config":
        """From the contents of a config.json. InputError names what is missing or not
        implemented: what would change the result is never ignored."""
        model_type = hf.get("model_type")
        if model_type not in HF_DEFAULTS:
            raise InputError(f"config: model_type is {model_type!r}, not llama or smollm3")
        stated = {name: value for name, value in hf.items()
                  if value is not None or name in NULL_SETTINGS}
        stated |= read_rope(hf)
        defaults = HF_DEFAULTS[model_type]
        unstated = [name for name in defaults if name not in stated]
        values = defaults | stated
        names = [field.name for field in fields(cls)]
        for name in names:
            if name not in values:
                raise InputError(f"config: {name} is missing")
        if values["num_key_value_heads"] is None:
            values["num_key_value_heads"] = values["num_attention_heads"]
        check_number("vocab_size", values["vocab_size"], int, 1, 2**30)
        for name in TOKEN_IDS:
            if name in unstated and (defaults[name] or 0) >= values["vocab_size"]:
                values[name] = None  # the default is no token of this model
        if values["pad_token_id"] == -1:  # none, in old files
            values["pad_token_id"] = None
        if model_type == "llama" and values["no_rope_layer_interval"] != 0:
            raise InputError("config: no_rope_layer_interval is "
                             f"{values['no_rope_layer_interval']!r}, but a llama has RoPE in every "
                             "layer")
        try:
            config = cls(**{name: values[name] for name in names})
            config.check_implemented(values)
        except InputError as error:
            for name in unstated:
                if name in str(error):
                    raise InputError(f"{error} (the file does not state {name}: this is what "
                                     "transformers takes then)") from None
            raise
        return config

    def check_implemented(self, settings: dict):
        """InputError if one of the settings of a config.json asks for another computation."""
        implemented = FIXED_SETTINGS | {
            "head_dim": self.head_dim,
            # despite the name, 1 is a layer that has RoPE
            "no_rope_layers": [int(has_rope) for has_rope in self.layer_has_rope],
            "layer_types": ["full_attention"] * self.num_hidden_layers,
            "use_sliding_window": False, "partial_rotary_factor": 1, "quantization_config": None,
        }
        if settings.get("hidden_act") == "swish":  # another name of silu
            del implemented["hidden_act"]
        for name, value in implemented.items():
            if settings.get(name) not in (None, value):
                raise InputError(f"config: {name} is {settings[name]!r}, only {value!r} is "
                                 "implemented")

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers 4 and 5 both read."""
        hf = asdict(self) | FIXED_SETTINGS
        hf["head_dim"] = self.head_dim
        hf["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if self.no_rope_layer_interval == 0:
            del hf["no_rope_layer_interval"]
            hf["model_type"] = "llama"
            hf["architectures"] = ["LlamaForCausalLM"]
        else:
            hf["no_rope_layers"] = [int(has_rope) for has_rope in self.layer_has_rope]
            hf["model_type"] = "smollm3"
            hf["architectures"] = ["SmolLM3ForCausalLM"]
        return hf


SMOLLM_360M = dict(hidden_size=960, intermediate_size=2560, num_hidden_layers=32,
                   num_attention_heads=15, num_key_value_heads=5)
SMOLLM_1_7B = dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=24,
                   num_attention_heads=32, num_key_value_heads=32)

PRESETS = {
    "smollm-135m": Config(max_position_embeddings=2048, rope_theta=1e4),
    "smollm-360m": Config(**SMOLLM_360M, max_position_embeddings=2048, rope_theta=1e4),
    "smollm-1.7b": Config(**SMOLLM_1_7B, max_position_embeddings=2048, rope_theta=1e4),
    "smollm2-135m": Config(),
    "smollm2-360m": Config(**SMOLLM_360M),
    "smollm2-1.7b": Config(**SMOLLM_1_7B, rope_theta=1.3e5),
    "smollm3-3b": Config(vocab_size=128256, hidden_size=2048, intermediate_size=11008,
                         num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=4,
                         max_position_embeddings=65536, rope_theta=5e6, rms_norm_eps=1e-6,
                         no_rope_layer_interval=4, bos_token_id=128000, eos_token_id=128001),
    # ours, for a laptop: minutes
    "nano": Config(vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
                   num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1024,
                   rope_theta=1e4),
    # ours, for a laptop: an hour
    "micro": Config(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
                    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=1024,
                    rope_theta=1e4),
}

# ---- The parts, bottom up, from RMSNorm to SmolLM
#
# B: sequences, T: their tokens in this call, S: the tokens they can see (T and those in the cache),
# C: hidden_size, H: query heads, H_kv: key/value heads, D: head_dim, V: vocab_size


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x):
        x32 = x.float()
        x32 = x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * x32.to(x.dtype)

    def extra_repr(self):
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class Linear(nn.Linear):
    """x @ weight.T, without a bias."""
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self):
        pass  # SmolLM.init_weights fills the weight; torch's own values would be wasted time


class Embedding(nn.Embedding):
    """The row of weight (V, C) for each token id."""
    def reset_parameters(self):
        pass  # as in Linear


def rope_frequency(head_dim: int, base: float, device=None):
    """base^(-2i/D) for i = 0, 1, ..., D/2 - 1, in float32: radians by which a position turns."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim
    return 1.0 / base**exponent


def rope_table(position, head_dim: int, base: float):
    """Rotary position embedding (RoPE; Su et al. 2021, arXiv:2104.09864): the cos and sin, each
    (T, D) float32, of the angles by which queries and keys at position (T,) are turned.

    Component i is paired with i + D/2, and the pair turns by position * base^(-2i/D). The paper
    pairs neighbours, 2i and 2i + 1, which is the same up to the order of q_proj's and k_proj's
    rows. The angles are made anew in every forward pass: as a buffer, model.to(bfloat16) would
    round them, which is wrong at far positions. Only cos and sin may be rounded.
    """
    frequency = rope_frequency(head_dim, base, position.device)
    angle = position[:, None].float() * frequency  # (T, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs of components of x (B, H, T, D) by the angles of cos and sin (T, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-x2, x1), dim=-1) * sin
    return turned.to(x.dtype)  # under autocast x has 16 bits, and cos and sin have 32


def fast_kernel_takes_groups(q, mask) -> bool:
    """Whether a kernel that never stores all T x S scores takes fewer key/value heads than query
    heads, on the device of q (B, H, T, D).

    On CUDA only flash attention does, which needs compute capability 8 (Ampere; a T4 has 7.5), 16
    bits, and no mask. The memory-efficient kernel needs none of these, but a key and a value head
    for each query head: to repeat them takes little memory, beside the scores.
    """
    if q.device.type != "cuda":
        return True
    has_flash = torch.cuda.get_device_capability(q.device) >= (8, 0)
    return has_flash and q.dtype in (torch.float16, torch.bfloat16) and mask is None


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

    Neighbouring query heads share a key/value head. In SmolLM-135M:
        query      0 1 2   3 4 5   6 7 8
        key/value    0       1       2
    """
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer = layer
        self.head_dim = config.head_dim
        self.has_rope = config.layer_has_rope[layer]
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, kv_size)
        self.v_proj = Linear(config.hidden_size, kv_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        if self.has_rope:
            q = rotate(q, cos, sin)
            k = rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)  # (B, H_kv, S, D)
        y = self.attend(q, k, v, mask)  # (B, H, T, D)
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))

    def attend(self, q, k, v, mask):
        """softmax(q k^T / sqrt(D)) v, for each query over the keys that it may see."""
        # Without a mask, several queries begin at position 0 and are causal; a single one, the
        # last of all, sees every key.
        is_causal = mask is None and q.size(2) > 1
        is_grouped = q.size(1) != k.size(1)
        if is_grouped and not fast_kernel_takes_groups(q, mask):
            k = k.repeat_interleave(q.size(1) // k.size(1), dim=1)  # (B, H, S, D)
            v = v.repeat_interleave(q.size(1) // v.size(1), dim=1)
            is_grouped = False
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal,
                                              enable_gqa=is_grouped)


class SwiGLU(nn.Module):
    """The MLP, down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP: each gets a normalized copy of the residual stream x, and its output
    is added to x. (HF's names: both layernorms are RMSNorms, each before its part.)"""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x


class Decoder(nn.Module):
    """Token ids (B, T) and their position (T,) in, final hidden states (B, T, C) out.

    HF's LlamaModel. SmolLM holds it as `model`, so the names of its tensors begin with "model.".
    """
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, position, mask=None, cache=None):
        x = self.embed_tokens(input_ids)
        cos, sin = rope_table(position, self.config.head_dim, self.config.rope_theta)
        cos = cos.to(x.dtype)  # as transformers does; under autocast x is in float32 here
        sin = sin.to(x.dtype)
        for block in self.layers:
            x = block(x, cos, sin, mask, cache)
        return self.norm(x)


class SmolLM(nn.Module):
    """The language model. Its state dict has exactly the tensors of a published checkpoint."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.init_weights()

    def init_weights(self):
        """Normal, as in the published recipe (text/pretraining in github.com/huggingface/smollm),
        with GPT-2's factor of 1/sqrt(2 * layers) for o_proj and down_proj: both write to the
        residual stream, which else would grow with depth."""
        if self.model.embed_tokens.weight.is_meta:
            return  # in from_pretrained: a meta tensor has a shape, but no values
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        nn.init.normal_(self.model.embed_tokens.weight, std=std)
        for block in self.model.layers:
            attn = block.self_attn
            mlp = block.mlp
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
                nn.init.normal_(linear.weight, std=std)
            for linear in (attn.o_proj, mlp.down_proj):
                nn.init.normal_(linear.weight, std=residual_std)

    def head(self, x):
        """Logits (..., V) of hidden states (..., C). The weights are tied (Press & Wolf 2017,
        arXiv:1608.05859): the embedding is also the output matrix."""
        return F.linear(x, self.model.embed_tokens.weight)

    def loss(self, logits, targets):
        """Mean cross-entropy in nats, in float32, of logits (B, T, V) over the targets (B, T) that
        are not -100; 0 if all are."""
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        count = (targets != -100).sum()
        return losses / count.clamp(min=1)  # cross_entropy's own mean of none is NaN

    def forward(self, input_ids, targets=None, cache: "KVCache | None" = None):
        """Logits and loss for input_ids (B, T) int64.

        Without a cache: logits (B, T, V), and the loss if targets (B, T) are given, else None. With
        a cache: input_ids go on from what it holds, logits are those of the last token, (B, 1, V),
        and the loss is None.
        """
        T = input_ids.size(1)
        if cache is not None:
            mask = cache.advance(T)
            x = self.model(input_ids, cache.position, mask, cache)  # (B, T, C)
            return self.head(x[:, -1:]), None
        position = torch.arange(T, device=input_ids.device)
        x = self.model(input_ids, position)  # (B, T, C)
        logits = self.head(x)
        if targets is None:
            return logits, None
        return logits, self.loss(logits, targets)

    def check_finite(self, where):
        """InputError, which begins with where, if a weight is NaN or infinite."""
        for name, p in self.named_parameters():
            if not all(bound.isfinite() for bound in p.data.aminmax()):  # which NaN goes through
                raise InputError(f"{where}: not all of {name} is finite in {p.dtype}: choose "
                                 "another dtype, or another model")

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens: int, temperature=1.0, top_k: int | None = None,
                 top_p: float | None = None, eos_id: int | list[int] | None = None,
                 generator=None, cache: "KVCache | None" = None, step=None):
        """Continue input_ids (B, T): yields each new column of tokens (B, 1) as it is made, until
        there are max_new_tokens, or every row has met eos_id, which may be several ids. A row that
        has ended repeats the one that ended it.

        The same state of generator (a torch.Generator) gives the same tokens. With a cache,
        input_ids go on from what it holds; at the end it has all but the last column. step is
        for lib/decode.py: a faster function, from (input_ids, cache) to logits (B, 1, V), in place
        of our own forward pass. InputError, raised by the first next(): a value is out of range.
        """
        B, T = input_ids.shape
        room = self.config.max_position_embeddings
        if cache is not None:
            room -= cache.length
        if not 0 < T <= room - max_new_tokens:
            raise InputError(f"a prompt of {T} tokens (at least 1) and {max_new_tokens} new ones "
                             f"must fit in the {room} tokens that are left of the model's context: "
                             "shorten it or ask for fewer new ones")
        weight = self.model.embed_tokens.weight
        if cache is None:
            cache = KVCache(self.config, B, T + max_new_tokens, weight.device, weight.dtype)
        eos_ids = torch.tensor(id_list(eos_id), dtype=torch.int64, device=weight.device)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=weight.device)
        for _ in range(max_new_tokens):  # input_ids: the prompt at first, then the newest column
            if step is None:
                logits, _ = self(input_ids, cache=cache)
            else:
                logits = step(input_ids, cache)
            new_ids = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            input_ids = torch.where(ended, input_ids[:, -1:], new_ids)
            yield input_ids
            if len(eos_ids) > 0:
                ended |= torch.isin(input_ids, eos_ids)
                if ended.all():
                    return

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=None) -> "SmolLM":
        """The model of a HuggingFace directory, a Hub id (owner/name or owner/name@revision) or a
        ckpt.pt of train.py, in dtype (None: float32).

        InputError names a setting that is not implemented, or a tensor that is not finite. A file
        that is missing or damaged, or has other tensors than the config tells of, raises what torch
        or safetensors raise.
        """
        path = local_path(source)
        if path.is_dir():
            config, tensors = read_hf(path)
        else:
            checkpoint = read_checkpoint(path)
            config = Config(**checkpoint["config"])
            tensors = checkpoint["model"]
        with torch.device("meta"):  # no memory: the tensors that are loaded become the parameters
            model = cls(config)
        model.load_state_dict(tensors, strict=True, assign=True)
        for name, p in model.named_parameters():
            if not p.is_floating_point() or p.layout != torch.strided:
                raise InputError(f"{source}: {name} is {p.dtype}, {p.layout}, not dense floats")
            # a copy, for what is mapped from a file would change with it
            p.data = p.data.to(device, dtype or torch.float32, copy=True)
        model.check_finite(source)
        return model

    def save_pretrained(self, directory, tokenizer=None):
        """Write what transformers' AutoModelForCausalLM loads and, with a tokenizer (of the library
        tokenizers), AutoTokenizer."""
        from safetensors.torch import save_file
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_hf()
        dtype = str(self.model.norm.weight.dtype).removeprefix("torch.")
        config |= {"dtype": dtype, "torch_dtype": dtype}  # for transformers 5, and 4
        (directory / "config.json").write_text(to_json(config), "utf-8")
        # safetensors lets only its owner read the file
        (directory / "model.safetensors").chmod((directory / "config.json").stat().st_mode)
        generation = {name: config[name] for name in TOKEN_IDS}
        (directory / "generation_config.json").write_text(to_json(generation), "utf-8")
        if tokenizer is None:
            return
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = tokenizer_settings(self.config, tokenizer)
        (directory / "tokenizer_config.json").write_text(to_json(settings), "utf-8")


# ---- Inference: what generate uses


class KVCache:
    """The keys and values of every layer, for up to max_length tokens, allocated once.

    length says how many tokens it holds. Set it lower to forget those that came after.
    """
    def __init__(self, config: Config, batch_size: int, max_length: int, device=None, dtype=None):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys = []
        self.values = []
        for _ in range(config.num_hidden_layers):
            self.keys.append(torch.zeros(shape, device=device, dtype=dtype))
            self.values.append(torch.zeros(shape, device=device, dtype=dtype))
        self.dtype = self.keys[0].dtype
        self.max_length = max_length
        self.length = 0
        self.positions = torch.arange(max_length, device=device)
        self.position = None  # (T,): those of the current tokens

    def advance(self, T: int):
        """Make room for the next T tokens. Returns the mask (T, S) of the tokens that each of them
        sees, or None where none is needed. InputError if the cache is too short."""
        start = self.length
        end = start + T
        if end > self.max_length:
            raise InputError(f"the KV cache has room for {self.max_length} tokens, not {end}: "
                             "allocate a longer one")
        self.length = end
        self.position = self.positions[start:end]
        if start == 0 or T == 1:
            return None  # Attention.attend knows these two cases: all is new, or one token is
        return self.positions[:end] <= self.position[:, None]

    def update(self, layer: int, k, v):
        """Write k and v (B, H_kv, T, D) of the current tokens. Returns the layer's keys and values
        up to there, (B, H_kv, S, D)."""
        # keys[:, :, start:end] = k, with the position in a tensor, as lib/decode.py compiles it
        keys = self.keys[layer].index_copy_(2, self.position, k.to(self.dtype))
        values = self.values[layer].index_copy_(2, self.position, v.to(self.dtype))
        return keys[:, :, :self.length], values[:, :, :self.length]


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw ids (B, 1) from logits (B, V).

    temperature 0 takes the likeliest. top_k draws among the k likeliest (and ties), top_p among the
    fewest whose probabilities reach p (Holtzman et al. 2019, arXiv:1904.09751); None: all.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}, it must be 0 (greedy) or positive")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}, it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, it must be above 0 and at most 1")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits - logits.amax(-1, keepdim=True)  # at most 0, so never inf below
    logits = logits / max(temperature, 1e-30)  # a smaller one may be 0 in float32
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        ranked, ids = probs.sort(-1, descending=True)
        before = ranked.cumsum(-1) - ranked  # the probability of all that rank before
        ranked = ranked.masked_fill(before >= top_p, 0)
        probs = torch.zeros_like(probs).scatter(-1, ids, ranked)
    return torch.multinomial(probs, 1, generator=generator)


# ---- Files: what from_hf and from_pretrained use

# What transformers takes, by model_type, for settings that a config.json leaves out. A llama that
# says nothing of tied embeddings is not tied.
HF_DEFAULTS = {
    "llama": {"num_key_value_heads": None, "max_position_embeddings": 2048, "rope_theta": 1e4,
              "rms_norm_eps": 1e-6, "initializer_range": 0.02, "no_rope_layer_interval": 0,
              "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
              "tie_word_embeddings": False},
    "smollm3": {"num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
                "rms_norm_eps": 1e-6, "initializer_range": 0.02, "no_rope_layer_interval": 4,
                "bos_token_id": 128000, "eos_token_id": 128001, "pad_token_id": 128004,
                "tie_word_embeddings": True},
}
# Settings whose null says something: as many key/value heads as query heads; no such token
NULL_SETTINGS = ("num_key_value_heads", *TOKEN_IDS)
# Plain RoPE, as a config.json spells it
PLAIN_ROPE = {"rope_type": "default", "type": "default", "factor": 1, "partial_rotary_factor": 1}
SHARD_INDEX = "model.safetensors.index.json"
EMBEDDING = "model.embed_tokens.weight"


def read_rope(hf: dict) -> dict:
    """The rope_theta of a config.json: {"rope_theta": ...}, or nothing. It may stand at the top, in
    "rope_scaling" (transformers 4) or "rope_parameters" (5). InputError if these ask for more than
    plain RoPE."""
    found = {}
    for key in ("rope_scaling", "rope_parameters"):
        rope = hf.get(key) or {}
        if not isinstance(rope, dict):
            raise InputError(f"config: {key} is {rope!r}, not a dict")
        if rope.get("factor") == 1:  # linear scaling by 1 is none
            rope = {name: value for name, value in rope.items() if value != "linear"}
        for name, value in rope.items():
            if isinstance(value, dict):
                raise InputError(f"config: {key} has {name} {value!r}: only one RoPE, for all "
                                 "layers, is implemented")
            if name in PLAIN_ROPE and value not in (None, PLAIN_ROPE[name]):
                raise InputError(f"config: {key} has {name} {value!r}, only {PLAIN_ROPE[name]!r} "
                                 "is implemented")
        for theta in (hf.get("rope_theta"), rope.get("rope_theta")):
            if theta is None:
                continue
            if found and found["rope_theta"] != theta:
                raise InputError(f"config: rope_theta is stated twice, {found['rope_theta']!r} and "
                                 f"{theta!r}: leave the right one")
            found["rope_theta"] = theta
    return found


def local_path(source) -> Path:
    """A local path for source. A Hub id, owner/name or owner/name@revision, is downloaded first,
    unless the Hub's cache has it."""
    path = Path(source).expanduser()
    repo_id, _, revision = str(source).partition("@")
    looks_local = path.suffix in (".pt", ".json", ".gguf") or str(source).startswith(("~", "."))
    if path.exists() or looks_local or repo_id.count("/") != 1:
        return path
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import IncompleteSnapshotError
    files = ["*.safetensors", "*.json", "*.jinja", "README.md", "LICENSE"]
    try:
        return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=files))
    except IncompleteSnapshotError as error:
        return Path(error.snapshot_path)  # offline: what the cache has may be all that is needed


def to_json(contents: dict) -> str:
    return json.dumps(contents, indent=2, ensure_ascii=False) + "\n"


def tokenizer_settings(config: Config, tokenizer) -> dict:
    """The contents of a tokenizer_config.json, with the names of tokens: bos_token, eos_token."""
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": config.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    for name in TOKEN_IDS:
        for token_id in id_list(getattr(config, name))[:1]:
            token = tokenizer.id_to_token(token_id)
            if token is not None:  # a row of the embedding that has no token
                settings[name.removesuffix("_id")] = token
    return settings


def read_hf(directory: Path) -> tuple[Config, dict]:
    """The config of a HuggingFace directory, and its tensors by name."""
    settings = json.loads((directory / "config.json").read_text("utf-8"))
    generation_path = directory / "generation_config.json"
    if generation_path.exists():
        generation = json.loads(generation_path.read_text("utf-8"))
        if "eos_token_id" in generation:  # then this one counts
            settings["eos_token_id"] = generation["eos_token_id"]
    tensors = read_tensors(directory)
    names = [name.removeprefix("model.") for name in tensors]
    if "lm_head.weight" in names and "embed_tokens.weight" in names:
        settings["tie_word_embeddings"] = True  # drop_redundant refuses them if they differ
    config = Config.from_hf(settings)
    return config, drop_redundant(tensors, config)


def read_tensors(directory: Path) -> dict:
    """The tensors, by name, of model.safetensors, or of the shards that an index names. They are
    mapped from the disk, to be read when they are used."""
    from safetensors.torch import load_file
    shards = {"model.safetensors"}
    if not (directory / "model.safetensors").exists() and (directory / SHARD_INDEX).exists():
        index = json.loads((directory / SHARD_INDEX).read_text("utf-8"))
        shards = set(index["weight_map"].values())
    tensors = {}
    for shard in sorted(shards):
        if Path(shard).name != shard:  # an index must not point outside of its folder
            raise InputError(f"{directory / SHARD_INDEX}: {shard!r} is no file in this folder")
        with open(directory / shard, "rb"):
            pass  # tells why, if it can't be opened; safetensors says that it is not there
        tensors |= load_file(directory / shard)
    return tensors


def drop_redundant(tensors: dict, config: Config) -> dict:
    """The tensors under their published names, without those that only repeat what is known: some
    files store the tied head, too, or RoPE's frequencies. InputError if one says otherwise."""
    frequency = rope_frequency(config.head_dim, config.rope_theta)
    named = {}
    for name, tensor in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):
            if tensor.shape != frequency.shape or not tensor.float().allclose(frequency, rtol=0.01):
                raise InputError(f"{name} is not what rope_theta {config.rope_theta} gives")
            continue
        if name.startswith(("embed_tokens.", "layers.", "norm.")):
            name = f"model.{name}"  # of a model that was saved without its head
        if name == "lm_head.weight":
            name = EMBEDDING
        if name in named and not torch.equal(tensor.float(), named[name].float()):
            if name == EMBEDDING:
                raise InputError(f"lm_head.weight differs from {name}: an untied head is not "
                                 "implemented")
            raise InputError(f"{name} is stored twice, with other values")
        named[name] = tensor
    return named


def read_checkpoint(path) -> dict:
    """The contents of a ckpt.pt of train.py: its "config", "tokenizer", "model", which has the
    tensors by name, mapped from the disk, and more. No code in it is run."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not {"config", "tokenizer", "model"} <= set(checkpoint):
        raise InputError(f"{path} is no checkpoint of train.py")
    size = sum(tensor.numel() * tensor.element_size() for tensor in checkpoint["model"].values())
    if size > Path(path).stat().st_size:  # views of a few numbers, which a copy would spread out
        raise InputError(f"{path}: its tensors have {size} bytes, more than the file")
    return checkpoint


def load_tokenizer(source):
    """The tokenizers.Tokenizer of a HuggingFace directory, a Hub id, a tokenizer.json or a ckpt.pt
    of train.py."""
    from tokenizers import Tokenizer
    path = local_path(source)
    if path.is_dir():
        path = path / "tokenizer.json"
    if path.suffix == ".json":
        text = path.read_text("utf-8")
    else:
        text = read_checkpoint(path)["tokenizer"]
    tokenizer = Tokenizer.from_str(text)
    # a file may ask for these, but we want all tokens of a text, and no others
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


if __name__ == "__main__":
    with torch.device("meta"):
        model = SmolLM(Config())
    print(model)
    print(f"{model.num_parameters():,} parameters in {len(model.state_dict())} tensors")
