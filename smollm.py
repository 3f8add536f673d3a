"""SmolLM from scratch: the whole model in one file, to be read from top to bottom.

The architecture is Llama's. B sequences of T tokens go through SmolLM-135M like this:

    input_ids                                 (B, T)
        |
    embed_tokens                              (B, T, 576)    each token's row of 49152 x 576
        |
   +----|------------------------------------ 30 blocks -----------------------------------+
   |    |----> input_layernorm                (B, T, 576)                                  |
   |    |      q_proj, k_proj, v_proj         9 heads of 64 for q, 3 for k, 3 for v        |
   |    |      rotate q and k                 by angles that grow with the position        |
   |    |      attend, o_proj                 (B, T, 576)    3 heads of q share one of k   |
   |   (+) <---|                                                                           |
   |    |----> post_attention_layernorm       (B, T, 576)                                  |
   |    |      silu(gate_proj) * up_proj      (B, T, 1536)                                 |
   |    |      down_proj                      (B, T, 576)                                  |
   |   (+) <---|                                                                           |
   +----|----------------------------------------------------------------------------------+
        |
      norm                                    (B, T, 576)
        |
    embed_tokens, transposed                  (B, T, 49152)  logits: the head is the embedding

No layer has a bias. Modules have the names of the published checkpoints, so tensors travel to
HuggingFace's transformers and back as they are.
"""

import json
import math
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class InputError(ValueError):
    """What the user gave can't be used. One line: the value, the limit, the way out."""


# ---- Config: the model's shape

# What a config.json may state, but no SmolLM varies
FIXED_SETTINGS = {"hidden_act": "silu", "tie_word_embeddings": True,
                  "attention_bias": False, "mlp_bias": False}
# What a config.json that leaves it out means, by model_type (transformers' configuration_*.py)
HF_DEFAULTS = {
    "llama": {"tie_word_embeddings": False, "initializer_range": 0.02,
              "no_rope_layer_interval": 0, "bos_token_id": 1, "eos_token_id": 2},
    "smollm3": {"tie_word_embeddings": True, "initializer_range": 0.02,
                "no_rope_layer_interval": 4, "bos_token_id": 128000, "eos_token_id": 128001},
}


def check_number(name: str, value, kind: type, low, high):
    """InputError unless value is of that kind, int or float, and from low to high."""
    if type(value) not in (int, kind) or not low <= value <= high:
        raise InputError(f"config: {name} is {value!r}, not {kind.__name__} from {low} to {high}")


@dataclass
class Config:
    """The fields of HuggingFace's config.json. The defaults are SmolLM2-135M."""
    vocab_size: int = 49152
    hidden_size: int = 576  # width of the residual stream
    intermediate_size: int = 1536  # width inside the MLP
    num_hidden_layers: int = 30
    num_attention_heads: int = 9  # query heads
    num_key_value_heads: int = 3  # each is shared by so many query heads as to serve all
    max_position_embeddings: int = 8192  # the context, in tokens
    rope_theta: float = 1e5
    rms_norm_eps: float = 1e-5
    initializer_range: float | None = None  # std of the initial weights; None: 1/sqrt(hidden_size)
    no_rope_layer_interval: int = 0  # SmolLM3: every n-th layer has no RoPE; 0: every layer has it
    bos_token_id: int = 0
    eos_token_id: int = 0

    def __post_init__(self):
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads",
                     "num_key_value_heads", "max_position_embeddings"):
            check_number(name, getattr(self, name), int, 1, 2**30)
        if self.initializer_range is None:
            self.initializer_range = 1 / math.sqrt(self.hidden_size)
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            check_number(name, getattr(self, name), float, 1e-12, 1e12)
        check_number("num_hidden_layers", self.num_hidden_layers, int, 1, 1000)
        check_number("no_rope_layer_interval", self.no_rope_layer_interval, int, 0, 1000)
        for name in ("bos_token_id", "eos_token_id"):
            check_number(name, getattr(self, name), int, 0, self.vocab_size - 1)
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
        """For each layer: all have RoPE, but in SmolLM3 every fourth has not (3, 7, 11, ...)."""
        interval = self.no_rope_layer_interval or math.inf
        return [(layer + 1) % interval != 0 for layer in range(self.num_hidden_layers)]

    @classmethod
    def from_hf(cls, hf: dict) -> "Config":
        """From the contents of a config.json. InputError names what is missing or not
        implemented: what would change the result is never ignored."""
        model_type = hf.get("model_type")
        if model_type not in HF_DEFAULTS:
            raise InputError(f"config: model_type is {model_type!r}, not llama or smollm3")
        stated = {name: value for name, value in hf.items() if value is not None}
        values = HF_DEFAULTS[model_type] | stated
        values |= hf.get("rope_parameters") or {}  # where transformers 5 has rope_theta
        names = [field.name for field in fields(cls)]
        for name in names:
            if name not in values:
                raise InputError(f"config: {name} is missing")
        config = cls(**{name: values[name] for name in names})

        implemented = FIXED_SETTINGS | {
            "head_dim": config.head_dim,
            "no_rope_layers": config.layer_has_rope,  # in HF, too, a 1 means that the layer has it
            "rope_scaling": None, "rope_type": "default", "type": "default", "factor": 1,
            "partial_rotary_factor": 1, "use_sliding_window": False,
        }
        for name, value in implemented.items():
            if values.get(name) not in (None, value):
                raise InputError(f"config: {name} is {values[name]!r}, implemented is {value!r}")
        return config

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers 4 and 5 both read."""
        hf = asdict(self) | FIXED_SETTINGS
        hf["head_dim"] = self.head_dim
        hf["pad_token_id"] = None
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
SMALL = dict(max_position_embeddings=1024, rope_theta=1e4)

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
    # ours: learns in minutes on a laptop
    "nano": Config(vocab_size=4096, hidden_size=192, intermediate_size=512, num_hidden_layers=6,
                   num_attention_heads=6, num_key_value_heads=2, **SMALL),
    # ours: in an hour
    "micro": Config(vocab_size=8192, hidden_size=384, intermediate_size=1024, num_hidden_layers=8,
                    num_attention_heads=6, num_key_value_heads=2, **SMALL),
}

# ---- The parts, bottom up
#
# B: sequences, T: their new tokens, S: those and the cached ones that they see,
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
    """x @ weight.T, without a bias. SmolLM.init_weights, or a file, gives the weight its values."""
    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def reset_parameters(self):
        pass


class Embedding(nn.Embedding):
    """A row of weight (V, C) for each token id. Its values come as those of Linear."""
    def reset_parameters(self):
        pass


def rope_table(position, head_dim: int, theta: float):
    """cos and sin, each (T, D) float32, of the angles by which RoPE turns queries and keys at
    position (T,).

    Component i is paired with i + D/2, and the pair turns by position * theta^(-2i/D): RoFormer
    (Su et al. 2021, arXiv:2104.09864) in HF's order of components. The paper pairs neighbours, 2i
    and 2i + 1, which is the same but for the order of the rows in q_proj and k_proj. The table is
    made anew in every forward pass: it is no buffer that .to(bfloat16) could round.
    """
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angle = position[:, None].float() * (1.0 / theta**exponent)  # (T, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs of components of x (B, H, T, D) by the angles of cos and sin (T, D)."""
    x1, x2 = x.chunk(2, dim=-1)
    turned = x * cos + torch.cat((-x2, x1), dim=-1) * sin
    return turned.to(x.dtype)  # under autocast, x has 16 bits and the table has 32


class KVCache:
    """The keys and values of every layer, for up to max_length tokens, allocated once.

    length says how many tokens it holds. Set it lower, and it forgets those that came after.
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
        self.slots = torch.arange(max_length, device=device)
        self.position = None  # (T,): the slots of the current tokens

    def advance(self, T: int):
        """Claim the next T slots. Returns the mask (T, S) of the slots that each token sees, or
        None where no mask is needed. InputError if there are not so many."""
        start = self.length
        end = start + T
        if end > self.max_length:
            raise InputError(f"the KV cache has {self.max_length} slots, {end} are needed: "
                             "allocate more")
        self.length = end
        self.position = self.slots[start:end]
        if start == 0 or T == 1:
            return None  # causal from the first slot on, or one token that sees every slot
        return self.slots[:end] <= self.position[:, None]

    def update(self, layer: int, k, v):
        """Write k and v (B, H_kv, T, D) to the claimed slots of a layer. Returns its keys and
        values up to there, (B, H_kv, S, D)."""
        keys = self.keys[layer].index_copy_(2, self.position, k.to(self.dtype))
        values = self.values[layer].index_copy_(2, self.position, v.to(self.dtype))
        return keys[:, :, :self.length], values[:, :, :self.length]


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
        # is_causal lines up the first query with the first key. That is right where the cache was
        # empty; later there is a mask, or a single query that sees every key.
        is_causal = mask is None and q.size(2) > 1
        return F.scaled_dot_product_attention(q, k, v, mask, is_causal=is_causal, enable_gqa=True)


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
    """Attention, then the MLP: each gets a normalized copy of the residual stream, and what it
    makes of it is added to the stream."""
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
    """From token ids (B, T), at position (T,), to the last hidden state (B, T, C)."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, position, mask=None, cache=None):
        x = self.embed_tokens(input_ids)
        cos, sin = rope_table(position, self.config.head_dim, self.config.rope_theta)
        cos = cos.to(x.dtype)
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
        """The published recipe (training files of smollm1 and smollm2): normal, with a smaller std
        for the two matrices of a block that write to the residual stream, so that the stream does
        not grow with depth."""
        if self.model.embed_tokens.weight.is_meta:
            return  # there are no values to fill
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
        """Logits (..., V) of hidden states (..., C): the head is the embedding."""
        return F.linear(x, self.model.embed_tokens.weight)

    def forward(self, input_ids, targets=None, cache: KVCache | None = None):
        """Logits and loss for input_ids (B, T) int64.

        Without a cache, logits are (B, T, V). With one, input_ids go on from what it holds, and
        logits are those of the last position, (B, 1, V). The loss is None without targets (B, T),
        which go without a cache. Else it is the mean cross-entropy in nats, in float32, over the
        targets that are not -100 (0 if all are).
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
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")
        count = (targets != -100).sum()  # cross_entropy leaves out -100
        return logits, losses / count.clamp(min=1)

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    # ---- Inference

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens: int, temperature=1.0, top_k: int | None = None,
                 top_p: float | None = None, eos_id: int | None = None, generator=None,
                 cache: KVCache | None = None, step=None):
        """Continue input_ids (B, T): yields each new column (B, 1) as it is made, until there are
        max_new_tokens or every row has met eos_id. A row that has goes on with eos_id.

        The same state of generator (a torch.Generator) gives the same tokens. With a cache,
        input_ids go on from what it holds; at the end it has all but the last column. step, from
        (input_ids, cache) to logits (B, 1, V), replaces the model's own forward pass. InputError,
        at the first column, if a value is out of range.
        """
        B, T = input_ids.shape
        room = self.config.max_position_embeddings
        if cache is not None:
            room -= cache.length
        if not 0 < T <= room - max_new_tokens:
            raise InputError(f"a prompt of {T} tokens (at least 1) and {max_new_tokens} new ones "
                             f"must fit in the model's context of {room}: shorten it or ask for "
                             "fewer new ones")
        weight = self.model.embed_tokens.weight
        if cache is None:
            cache = KVCache(self.config, B, T + max_new_tokens, weight.device, weight.dtype)
        ended = torch.zeros(B, 1, dtype=torch.bool, device=weight.device)
        for _ in range(max_new_tokens):
            if step is None:
                logits, _ = self(input_ids, cache=cache)
            else:
                logits = step(input_ids, cache)
            input_ids = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            if eos_id is not None:
                input_ids = input_ids.masked_fill(ended, eos_id)
                ended |= input_ids == eos_id
            yield input_ids
            if eos_id is not None and ended.all():
                return

    # ---- Files

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=None) -> "SmolLM":
        """The model of a HuggingFace directory, a Hub id (owner/name or owner/name@revision) or a
        ckpt.pt of train.py, in dtype (None: float32).

        InputError names the first setting or tensor that is wrong; a file that is missing or
        damaged raises what the library that reads it raises.
        """
        path = local_path(source)
        if path.is_dir():
            config = Config.from_hf(json.loads((path / "config.json").read_text("utf-8")))
            tensors = read_tensors(path)
        else:
            checkpoint = read_checkpoint(path)
            config = Config(**checkpoint["config"])
            tensors = checkpoint["model"]
        with torch.device("meta"):  # no memory yet: what is loaded becomes the parameters
            model = cls(config)

        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in sorted(expected.keys() | found.keys()):
            if found.get(name, "absent") != expected.get(name, "absent"):
                raise InputError(f"{source}: {name} is {found.get(name, 'absent')}, by its config "
                                 f"it is {expected.get(name, 'absent')}")
            tensor = tensors[name]
            if not tensor.is_floating_point() or tensor.layout != torch.strided:
                raise InputError(f"{source}: {name} is {tensor.dtype}, {tensor.layout}, it must "
                                 "be of dense floats")
        state = {}
        for name in expected:
            state[name] = tensors[name].to(device, dtype or torch.float32, copy=True)
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def save_pretrained(self, directory, tokenizer=None):
        """Write what transformers' AutoModelForCausalLM loads and, with a tokenizer (of the library
        tokenizers), AutoTokenizer."""
        from safetensors.torch import save_file
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
        config = self.config.to_hf()
        config["torch_dtype"] = str(self.model.norm.weight.dtype).removeprefix("torch.")
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if tokenizer is None:
            return
        tokenizer.save(str(directory / "tokenizer.json"))
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": tokenizer.id_to_token(self.config.bos_token_id),
            "eos_token": tokenizer.id_to_token(self.config.eos_token_id),
            "model_max_length": self.config.max_position_embeddings,
            "clean_up_tokenization_spaces": False,
        }
        (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


# ---- Inference: choosing a token


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw ids (B, 1) from logits (B, V).

    temperature 0 takes the likeliest. top_k draws among so many likeliest, top_p among the fewest
    that have this probability together (Holtzman et al. 2019, arXiv:1904.09751); None: among all.
    """
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}, it must be 0 (greedy) or positive")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k is {top_k}, it must be at least 1")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p is {top_p}, it must be above 0 and at most 1")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = logits - logits.amax(-1, keepdim=True)  # at most 0, so that no quotient overflows
    logits = logits / max(temperature, 1e-30)
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


# ---- Files: where a model is, and what is read from it

SHARD_INDEX = "model.safetensors.index.json"


def local_path(source) -> Path:
    """The path that source is. A Hub id, owner/name or owner/name@revision, is downloaded to the
    Hub's cache, unless it is there."""
    path = Path(source)
    repo_id, _, revision = str(source).partition("@")
    if path.exists() or repo_id.count("/") != 1 or path.suffix in (".pt", ".json", ".gguf"):
        return path
    from huggingface_hub import snapshot_download
    files = ["*.safetensors", "*.json"]
    return Path(snapshot_download(repo_id, revision=revision or None, allow_patterns=files))


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
        if Path(shard).name != shard:
            raise InputError(f"{directory / SHARD_INDEX}: {shard!r} is no file in this folder")
        tensors |= load_file(directory / shard)
    return tensors


def read_checkpoint(path) -> dict:
    """The contents of a ckpt.pt of train.py: its "config", "tokenizer", "model", which has the
    tensors by name, mapped from the disk, and more. No code in it is run."""
    checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not {"config", "tokenizer", "model"} <= set(checkpoint):
        raise InputError(f"{path} is no checkpoint of train.py")
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
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


if __name__ == "__main__":
    with torch.device("meta"):
        model = SmolLM(Config())
    print(model)
    print(f"{model.num_parameters():,} parameters in {len(model.state_dict())} tensors")
