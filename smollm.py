"""SmolLM from scratch: the whole model in one file, to be read from top to bottom.

The architecture is Llama's, as HuggingFace's SmolLM, SmolLM2 and SmolLM3 use it: RMSNorm before each half of
a block, rotary positions, grouped-query attention, a SwiGLU MLP, no biases, and one matrix as embedding and
output head. Modules have the names of the published checkpoints: tensors travel to and fro as they are."""

import json
import math
import zipfile
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import nn
from torch.overrides import TorchFunctionMode


class InputError(ValueError):
    """What the user gave can't be used. The message is one line: the value, the limit, the way out."""


# What a config.json may state, but no SmolLM varies.
FIXED = {"hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}


@dataclass
class Config:
    """The model's shape, in the field names of HuggingFace's config.json. The defaults are SmolLM2-135M."""
    vocab_size: int = 49152
    hidden_size: int = 576
    intermediate_size: int = 1536  # width inside the MLP
    num_hidden_layers: int = 30
    num_attention_heads: int = 9  # query heads
    num_key_value_heads: int = 3  # each serves num_attention_heads / num_key_value_heads query heads
    max_position_embeddings: int = 8192  # the context, in tokens
    rope_theta: float = 1e5
    rms_norm_eps: float = 1e-5
    initializer_range: float = 576**-0.5  # std of the initial weights: 1 / sqrt(hidden_size)
    no_rope_layer_interval: int = 0  # SmolLM3: every n-th layer does not rotate; 0: every layer rotates
    bos_token_id: int = 0
    eos_token_id: int = 0

    def __post_init__(self):
        limits = {"num_hidden_layers": 1000, "bos_token_id": self.vocab_size, "eos_token_id": self.vocab_size}
        for f in fields(self):  # only what is 0 by default may be 0
            value, limit = getattr(self, f.name), limits.get(f.name, 2**30)
            if type(value) not in (int, f.type) or not (0 < value < limit or value == f.default == 0):
                raise InputError(f"config: {f.name} is {value!r}, not a positive {f.type.__name__} < {limit}")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        if self.hidden_size % (2 * heads) or heads % kv_heads:
            raise InputError(f"config: hidden_size {self.hidden_size} must be a multiple of 2 x "
                             f"num_attention_heads {heads}, and that of num_key_value_heads {kv_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def rotates(self) -> list[bool]:
        """Which layers have rotary positions: all, but in SmolLM3 every fourth (3, 7, 11, ...)."""
        interval = self.no_rope_layer_interval or math.inf
        return [(layer + 1) % interval != 0 for layer in range(self.num_hidden_layers)]

    @classmethod
    def from_hf(cls, hf: dict) -> "Config":
        """From the contents of a config.json. InputError names what is missing, or not implemented here."""
        if hf.get("model_type") not in ("llama", "smollm3"):
            raise InputError(f"config: model_type is {hf.get('model_type')!r}, not llama or smollm3")
        smollm3 = hf["model_type"] == "smollm3"
        # HF's own defaults, the file, and what transformers 5 keeps in rope_parameters and 4 kept at the top
        defaults = {"tie_word_embeddings": smollm3, "no_rope_layer_interval": 4 if smollm3 else 0,
                    "bos_token_id": 128000 if smollm3 else 1, "eos_token_id": 128001 if smollm3 else 2}
        hf = defaults | {k: v for k, v in hf.items() if v is not None} | (hf.get("rope_parameters") or {})
        config = cls(**{f.name: hf[f.name] for f in fields(cls) if hf.get(f.name) is not None})
        if missing := [f.name for f in fields(cls)[:9] if hf.get(f.name) is None]:
            raise InputError(f"config: {missing[0]} is missing")
        implemented = FIXED | {"head_dim": config.head_dim, "no_rope_layers": config.rotates,
                               "rope_scaling": None, "rope_type": "default", "type": "default", "factor": 1,
                               "partial_rotary_factor": 1, "use_sliding_window": False}
        for name, value in implemented.items():
            if hf.get(name) not in (None, value):
                raise InputError(f"config: {name} is {hf[name]!r}, implemented is {value!r}")
        return config

    def to_hf(self) -> dict:
        """The contents of a config.json that transformers 4 and 5 both read."""
        hf = asdict(self) | FIXED | {"head_dim": self.head_dim, "pad_token_id": None}  # documents are packed
        hf["rope_parameters"] = {"rope_type": "default", "rope_theta": self.rope_theta}
        if not hf.pop("no_rope_layer_interval"):
            return hf | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
        hf |= {"model_type": "smollm3", "architectures": ["SmolLM3ForCausalLM"]}
        return hf | {"no_rope_layers": [int(rotates) for rotates in self.rotates],  # 1: rotates
                     "no_rope_layer_interval": self.no_rope_layer_interval}


PRESETS = {
    "smollm-135m": Config(49152, 576, 1536, 30, 9, 3, 2048, 1e4, 1e-5, 576**-0.5),
    "smollm-360m": Config(49152, 960, 2560, 32, 15, 5, 2048, 1e4, 1e-5, 960**-0.5),
    "smollm-1.7b": Config(49152, 2048, 8192, 24, 32, 32, 2048, 1e4, 1e-5, 2048**-0.5),
    "smollm2-135m": Config(49152, 576, 1536, 30, 9, 3, 8192, 1e5, 1e-5, 576**-0.5),
    "smollm2-360m": Config(49152, 960, 2560, 32, 15, 5, 8192, 1e5, 1e-5, 960**-0.5),
    "smollm2-1.7b": Config(49152, 2048, 8192, 24, 32, 32, 8192, 1.3e5, 1e-5, 2048**-0.5),
    "smollm3-3b": Config(128256, 2048, 11008, 36, 16, 4, 65536, 5e6, 1e-6, 2048**-0.5, 4, 128000, 128001),
    "nano": Config(4096, 192, 512, 6, 6, 2, 1024, 1e4, 1e-5, 192**-0.5),  # for minutes on a laptop's CPU,
    "micro": Config(8192, 384, 1024, 8, 6, 2, 1024, 1e4, 1e-5, 384**-0.5),  # and for an hour
}

# ---- The parts, bottom up. B: batch, T: tokens, C: hidden_size, H: heads, D: head_dim, V: vocab_size


class RMSNorm(nn.Module):
    """x / rms(x) * weight, the mean square taken in float32 (Zhang & Sennrich 2019, arXiv:1910.07467)."""
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


def rope_table(position, head_dim: int, theta: float):
    """cos and sin, each (T, D) float32, of the angles by which each component turns at position (T,).

    Component i is paired with i + D/2, and the pair turns by position * theta^(-2i/D): RoFormer (Su et al.
    2021, arXiv:2104.09864), but in HF's half-split layout. The paper pairs 2i with 2i + 1, which is the same
    up to an order of q_proj's and k_proj's rows. Made in every forward pass: no buffer for .to() to round."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim
    angle = position[:, None].float() * (1.0 / theta**exponent)  # (T, D/2)
    angle = torch.cat((angle, angle), dim=-1)  # (T, D)
    return angle.cos(), angle.sin()


def rotate(x, cos, sin):
    """Turn the pairs of components of x (B, H, T, D) by the angles of rope_table."""
    x1, x2 = x.chunk(2, dim=-1)
    return x * cos.to(x.dtype) + torch.cat((-x2, x1), dim=-1) * sin.to(x.dtype)


class KVCache:
    """The keys and values of every layer for up to max_length tokens, allocated once.

    A step attends to the filled slots alone. With static=True, every step after the first attends to all
    slots under a mask instead: then no shape changes from step to step, and one compiled graph serves all.
    """
    def __init__(self, config, batch_size: int, max_length: int, device=None, dtype=None, static=False):
        shape = (batch_size, config.num_key_value_heads, max_length, config.head_dim)
        self.keys, self.values = ([torch.zeros(shape, device=device, dtype=dtype)
                                   for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.slots, self.max_length, self.static = torch.arange(max_length, device=device), max_length, static
        self.length = 0  # slots filled
        self.visible, self.position = 0, None  # slots that the current step reads, and (T,) that it writes

    def advance(self, T: int):
        """Claim the next T slots. Returns the mask (T, visible) of what each sees; None: all up to itself."""
        start, end = self.length, self.length + T
        if end > self.max_length:
            raise InputError(f"the KV cache has {self.max_length} slots, {end} are needed: allocate more")
        whole = self.static and start > 0
        self.length, self.visible = end, self.max_length if whole else end
        self.position = self.slots[start:end]
        return self.slots[:self.visible] <= self.position[:, None] if whole or (start > 0 and T > 1) else None

    def update(self, layer: int, k, v):
        """Write k and v (B, H_kv, T, D) to the claimed slots; returns what the layer reads, T = visible."""
        for cached, new in ((self.keys[layer], k), (self.values[layer], v)):
            cached.index_copy_(2, self.position, new.to(cached.dtype))
        return self.keys[layer][:, :, :self.visible], self.values[layer][:, :, :self.visible]


class Attention(nn.Module):
    """Causal attention with grouped queries (Ainslie et al. 2023, arXiv:2305.13245).

    Neighbouring query heads share a key/value head. In SmolLM-135M:
        query      0 1 2   3 4 5   6 7 8
        key/value    0       1       2
    """
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.rotates = layer, config.head_dim, config.rotates[layer]
        q_size, kv_size = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x, cos, sin, mask=None, cache=None):
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        v = self.v_proj(x).view(B, T, -1, self.head_dim).transpose(1, 2)  # (B, H_kv, T, D)
        if self.rotates:
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if cache is not None:
            k, v = cache.update(self.layer, k, v)
            if T == 1:  # query heads that share a key head go as so many queries of it: each key is read once
                q = q.view(B, k.size(1), -1, self.head_dim)
        # is_causal lines up first query and first key: for an empty cache alone; later is a mask, or T is 1.
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and T > 1, enable_gqa=True)
        return self.o_proj(y.reshape(B, -1, T, self.head_dim).transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """The MLP, down(silu(gate(x)) * up(x)) (Shazeer 2020, arXiv:2002.05202)."""
    def __init__(self, config: Config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """Attention, then the MLP, each fed a normalized copy of the residual stream and added back to it."""
    def __init__(self, config: Config, layer: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x, cos, sin, mask=None, cache=None):
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, cache)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """From token ids (B, T) to the last hidden state (B, T, C), normalized."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, input_ids, position, mask=None, cache=None):
        cos, sin = rope_table(position, self.config.head_dim, self.config.rope_theta)
        x = self.embed_tokens(input_ids)
        for layer in self.layers:
            x = layer(x, cos, sin, mask, cache)
        return self.norm(x)


class _SkipInit(TorchFunctionMode):
    """Inside, torch.nn.init's normal_ and uniform_ do nothing, which on the meta device take two seconds."""
    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) != "torch.nn.init":
            return function(*args, **kwargs or {})


class SmolLM(nn.Module):
    """The language model. Its state dict has exactly the tensors of the published model.safetensors."""
    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.init_weights()

    def init_weights(self):
        """The published recipe (training files of smollm1 and smollm2): normal, with a smaller std for the
        two matrices of each block that write to the residual stream, so that it does not grow with depth."""
        std = self.config.initializer_range
        residual_std = std / math.sqrt(2 * self.config.num_hidden_layers)
        nn.init.normal_(self.model.embed_tokens.weight, std=std)
        for block in self.model.layers:
            attn, mlp = block.self_attn, block.mlp
            for linear in (attn.q_proj, attn.k_proj, attn.v_proj, mlp.gate_proj, mlp.up_proj):
                nn.init.normal_(linear.weight, std=std)
            for linear in (attn.o_proj, mlp.down_proj):
                nn.init.normal_(linear.weight, std=residual_std)

    def forward(self, input_ids, targets=None, cache: KVCache | None = None):
        """Logits and loss for input_ids (B, T) int64.

        Without a cache, logits are (B, T, V). With one, input_ids go on from what it holds, and logits are
        those of the last position, (B, 1, V). The loss is None with a cache or without targets (B, T); else
        it is the mean cross-entropy in nats, in float32, over the targets that are not -100 (0 if all are).
        """
        T = input_ids.size(1)
        if cache is not None:
            return self.next_logits(input_ids, cache.advance(T), cache), None
        x = self.model(input_ids, torch.arange(T, device=input_ids.device))  # (B, T, C)
        logits = F.linear(x, self.model.embed_tokens.weight)  # the head is the embedding
        if targets is None:
            return logits, None
        total = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="sum")  # no -100
        return logits, total / (targets != -100).sum().clamp(min=1)

    def next_logits(self, input_ids, mask, cache: KVCache):
        """Logits (B, 1, V) after the last of input_ids, for which cache.advance has made room and the mask.
        With a static cache, torch.compile makes one graph of it for all single tokens."""
        x = self.model(input_ids, cache.position, mask, cache)[:, -1]  # (B, C)
        return F.linear(self.model.embed_tokens.weight, x).T[:, None]  # x @ weight.T, but faster for few rows

    def num_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, T: int) -> int:
        """FLOPs of training, forward and backward, for each token of a sequence of T: 6 a weight of the
        matrices (the embedding counts, as the head) and 6 * layers * C * T for attention, to T/2 keys on
        average. PaLM (Chowdhery et al. 2022, appendix B) has 12 there, counting the masked half as work."""
        matrices = sum(p.numel() for p in self.parameters() if p.dim() == 2)
        return 6 * matrices + 6 * self.config.num_hidden_layers * self.config.hidden_size * T

    @torch.no_grad()
    def generate(self, input_ids, max_new_tokens: int, temperature=1.0, top_k: int | None = None,
                 top_p: float | None = None, eos_id: int | None = None, generator=None, cache=None,
                 decode=None):
        """Continue input_ids (B, T): yields each new column (B, 1) as it is made.

        It ends after max_new_tokens, or when every row has met eos_id; a row that has goes on as eos_id. The
        same state of generator gives the same tokens. With a cache, input_ids go on from what it holds; at
        the end it has all but the last column. decode is next_logits, compiled, for single tokens: a cache is
        static then, of few sizes for few graphs. InputError, at the first column, if a value is out of range.
        """
        (B, T), weight = input_ids.shape, self.model.embed_tokens.weight
        limit = self.config.max_position_embeddings - (cache.length if cache else 0)
        if not 0 < T <= limit - max_new_tokens:
            raise InputError(f"a prompt of {T} tokens (at least 1) and {max_new_tokens} new ones must fit in "
                             f"the model's context of {limit}: shorten it or ask for fewer new ones")
        length = 2**max(8, (T + max_new_tokens - 1).bit_length()) if decode else T + max_new_tokens
        cache = cache or KVCache(self.config, B, length, weight.device, weight.dtype, static=bool(decode))
        done = torch.zeros(B, 1, dtype=torch.bool, device=weight.device)
        onednn = torch.backends.mkldnn.enabled
        for count in range(max_new_tokens):
            mask = cache.advance(input_ids.size(1))
            try:  # for a single row, oneDNN reads bfloat16 weights at half the speed (on AMD's Zen 4)
                torch.backends.mkldnn.enabled = onednn and input_ids.numel() > 1
                logits = (decode if decode and count else self.next_logits)(input_ids, mask, cache)
            finally:
                torch.backends.mkldnn.enabled = onednn
            input_ids = sample_token(logits[:, -1].float(), temperature, top_k, top_p, generator)
            if eos_id is not None:
                input_ids = input_ids.masked_fill(done, eos_id)
                done |= input_ids == eos_id
            yield input_ids
            if eos_id is not None and done.all():
                return

    @classmethod
    def empty(cls, config: Config) -> "SmolLM":
        """With that config, without memory: load_state_dict(assign=True) makes tensors its parameters."""
        with torch.device("meta"), _SkipInit():
            return cls(config)

    @classmethod
    def from_pretrained(cls, source, device=None, dtype=None) -> "SmolLM":
        """From a HuggingFace directory, a Hub id (owner/name, owner/name@revision) or a ckpt.pt of train.py.
        dtype None is float32. InputError names a missing or damaged file, or the first wrong tensor."""
        config, tensors = _read_model(local_path(source))
        model = cls.empty(config)
        needed = model.state_dict()
        for name in sorted(needed.keys() | tensors.keys()):
            found, right = (list(d[name].shape) if name in d else "absent" for d in (tensors, needed))
            if found != right or not tensors[name].is_floating_point():
                raise InputError(f"{source}: {name} is {found}, by its config it is {right}, floats")
        state = {name: tensors.pop(name).to(device, dtype or torch.float32, copy=True) for name in needed}
        model.load_state_dict(state, strict=True, assign=True)
        return model

    def save_pretrained(self, directory, tokenizer: Tokenizer | None = None):
        """Write what transformers' AutoModelForCausalLM and, with a tokenizer, AutoTokenizer load."""
        (directory := Path(directory)).mkdir(parents=True, exist_ok=True)
        save_file(self.state_dict(), directory / "model.safetensors", metadata={"format": "pt"})
        hf = self.config.to_hf() | {"torch_dtype": str(self.model.norm.weight.dtype).removeprefix("torch.")}
        (directory / "config.json").write_text(json.dumps(hf, indent=2) + "\n")
        if tokenizer is not None:
            bos, eos = map(tokenizer.id_to_token, (self.config.bos_token_id, self.config.eos_token_id))
            hf = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False,
                  "bos_token": bos, "eos_token": eos, "model_max_length": self.config.max_position_embeddings}
            (directory / "tokenizer_config.json").write_text(json.dumps(hf, indent=2) + "\n")
            tokenizer.save(str(directory / "tokenizer.json"))

# ---- Sampling


def sample_token(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Draw ids (B, 1) from logits (B, V): among the top_k likeliest, among the fewest that together have a
    probability of top_p (Holtzman et al. 2019, arXiv:1904.09751), or all. Temperature 0: the likeliest."""
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature is {temperature}, it must be 0 (greedy) or a positive finite number")
    if (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise InputError(f"top_k is {top_k}, it must be at least 1; top_p is {top_p}, it must be in (0, 1]")
    if temperature == 0:
        return logits.argmax(-1, keepdim=True)
    logits = (logits - logits.amax(-1, keepdim=True)) / max(temperature, 1e-30)  # at most 0: none overflows
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probs = logits.softmax(-1)
    if top_p is not None:
        ranked, ids = probs.sort(-1, descending=True)
        likelier = ranked.cumsum(-1) - ranked  # the probability of all that rank before
        probs = torch.zeros_like(probs).scatter(-1, ids, ranked.masked_fill(likelier >= top_p, 0))
    return torch.multinomial(probs, 1, generator=generator)

# ---- Files and devices

HUB_FILES, SHARD_INDEX = ["*.safetensors", "*.json"], "model.safetensors.index.json"


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]


@contextmanager
def _reading(path):
    """Says in one line that a file is missing, damaged or of another kind, whatever its library raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{path}: can't be read: {first_line(error)}") from error


def local_path(source) -> Path:
    """The path that source is. A Hub id (owner/name, owner/name@revision) is fetched to the Hub's cache."""
    path, (name, _, revision) = Path(source), str(source).partition("@")
    if path.exists() or name.count("/") != 1 or path.suffix in (".pt", ".json", ".gguf"):
        return path
    try:
        return Path(snapshot_download(name, revision=revision or None, allow_patterns=HUB_FILES))
    except Exception as error:
        raise InputError(f"{source}: not here, nor on the Hub ({first_line(error)}): see README") from error


def read_json(path: Path) -> dict:
    with _reading(path):
        return dict(json.loads(path.read_text(encoding="utf-8")))


def _read_model(path: Path) -> tuple[Config, dict]:
    """Config and tensors, by name, of a HuggingFace directory (model.safetensors, or an index's shards) or of
    a ckpt.pt. The tensors are mapped from the disk, to be read when they are used."""
    with _reading(path):
        if not path.is_dir():
            checkpoint = load_checkpoint(path)
            return Config(**checkpoint["config"]), dict(checkpoint["model"])
        config, shards, tensors = Config.from_hf(read_json(path / "config.json")), {"model.safetensors"}, {}
        if not (path / "model.safetensors").exists() and (path / SHARD_INDEX).exists():
            shards = set(read_json(path / SHARD_INDEX)["weight_map"].values())
        for shard in sorted(shards):
            if Path(shard).name != shard:
                raise ValueError(f"its index names {shard!r}, which is no file in this folder")
            with _reading(path / shard), safe_open(path / shard, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no dict)
        return config, tensors


def load_checkpoint(path, check=True) -> dict:
    """The contents of a ckpt.pt of train.py, checked by its checksums; tensors are mapped from the disk."""
    with _reading(path):
        if Path(path).suffix == ".gguf":
            raise ValueError("first make it a folder: python tools/convert.py FILE.gguf FOLDER")
        if check and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"its checksums don't fit: {damaged} is damaged")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        tensors = {"config", "tokenizer"} <= set(checkpoint) and checkpoint["model"].items()
        if not tensors or not all(type(k) is str and t.layout == torch.strided for k, t in tensors):
            raise ValueError("it is no checkpoint of train.py")
        return checkpoint


def load_tokenizer(source) -> Tokenizer:
    """The tokenizer of a HuggingFace directory, a Hub id, a tokenizer.json or a ckpt.pt of train.py."""
    path = local_path(source)
    path = path / "tokenizer.json" if path.is_dir() else path
    with _reading(path):
        text = path.read_text("utf8") if path.suffix == ".json" else load_checkpoint(path, False)["tokenizer"]
        tokenizer = Tokenizer.from_str(text)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, config: Config):
    size = max(tokenizer.get_vocab().values(), default=-1) + 1
    if not 0 < size <= config.vocab_size:
        raise InputError(f"the tokenizer has {size} tokens, the model {config.vocab_size}: they don't fit")


if __name__ == "__main__":
    model = SmolLM.empty(Config())
    print(model)
    print(f"{model.num_parameters():,} parameters in {len(model.state_dict())} tensors")
