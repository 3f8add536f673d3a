"""From GPT-2 to SmolLM, rung by rung: what each change costs and buys.

    python examples/ladder.py                  # counts at full size, training at the size of nano
    python examples/ladder.py --full=True      # trains at full size, too

The top rung is smollm.SmolLM itself. Each function below takes one of its ideas out again; at the bottom none
is left, and the model is the GPT-2-like one that this project began with. All rungs train on the same tokens,
from the same seeds, with AdamW at one learning rate. Prints a table, and writes assets/ladder.png.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import nn
from torch.nn.functional import dropout, silu
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from smollm import PRESETS, Config, InputError, SmolLM
from tools.prepare import WINDOW, prepare_data
from tools.script import matmul_peak, one_line_errors, pick_device, pick_dtype
from train import get_batch

ROOT = Path(__file__).resolve().parent.parent
DROPOUT, POSITIONS = 0.1, 1024  # those of GPT-2


@dataclass
class Options:
    full: bool = False  # train the 135M model's size, not nano's
    steps: int = 60
    batch_size: int = 16  # sequences
    block_size: int = 128  # tokens of each
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: str = "stdlib"
    device: str = "auto"

# ---- The ideas, each undone


class Embedding(nn.Embedding):
    """With dropout; if told so, with a learned vector for each position, from 0 on (for training, not for
    a KV cache), and with a matrix for the tokens that is not `weight`, which the model takes as its head."""
    def __init__(self, config: Config, positions=False, untied=False):
        super().__init__(config.vocab_size, config.hidden_size)
        self.positions = nn.Embedding(POSITIONS, config.hidden_size) if positions else None
        self.tokens = nn.Embedding(config.vocab_size, config.hidden_size) if untied else None

    def forward(self, input_ids):
        x = self.tokens(input_ids) if self.tokens else super().forward(input_ids)
        x = x + self.positions.weight[:input_ids.size(1)] if self.positions else x
        return dropout(x, DROPOUT, self.training)


def add_biases_and_dropout(model: SmolLM):
    """A bias in each linear layer, and dropout on the embedding and on what attention adds to it."""
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            for name, linear in list(module.named_children()):
                setattr(module, name, nn.Linear(linear.in_features, linear.out_features))
        block.self_attn.o_proj = nn.Sequential(block.self_attn.o_proj, nn.Dropout(DROPOUT))
    model.model.embed_tokens = Embedding(model.config)


def learn_positions(model: SmolLM):
    """A learned vector for each position, in place of RoPE."""
    for block in model.model.layers:
        block.self_attn.rotates = False
    model.model.embed_tokens = Embedding(model.config, positions=True)


class MLP(nn.Module):
    """down(silu(up(x))), without the gate."""
    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(silu(self.up_proj(x)))


def remove_gates(model: SmolLM):
    for block in model.model.layers:
        block.mlp = MLP(model.config)


def give_each_head_its_keys(model: SmolLM):
    """As many key/value heads as query heads."""
    size = model.config.hidden_size
    for block in model.model.layers:
        block.self_attn.k_proj, block.self_attn.v_proj = nn.Linear(size, size), nn.Linear(size, size)


def subtract_means(model: SmolLM):
    """LayerNorm, which also takes off the mean and adds a bias, in place of RMSNorm."""
    shape = model.config.hidden_size, model.config.rms_norm_eps
    for block in model.model.layers:
        block.input_layernorm, block.post_attention_layernorm = nn.LayerNorm(*shape), nn.LayerNorm(*shape)
    model.model.norm = nn.LayerNorm(*shape)


def untie_the_head(model: SmolLM):
    """Tokens are looked up in one matrix, and told by another."""
    model.model.embed_tokens = Embedding(model.config, positions=True, untied=True)


# From the top: a rung's name, and what is undone below it
LADDER = [("no biases, no dropout: SmolLM", add_biases_and_dropout), ("RoPE", learn_positions),
          ("SwiGLU (seed.md's v2)", remove_gates), ("grouped queries", give_each_head_its_keys),
          ("RMSNorm", subtract_means), ("tied head", untie_the_head), ("GPT-2-like (v1)", None)]


def build(rung: int, config: Config) -> SmolLM:
    """The model with everything undone that is above LADDER[rung]."""
    model = SmolLM(config)
    for _, undo in LADDER[:rung]:
        undo(model)
    return model


def init_weights(model: SmolLM):
    """smollm.py's, for all the rungs: biases are 0, and what writes to the residual stream begins smaller."""
    std, shrink = model.config.initializer_range, math.sqrt(2 * model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            writes = "o_proj" in name or "down_proj" in name
            nn.init.normal_(module.weight, std=std / shrink if writes else std)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)


def kv_bytes(model: SmolLM) -> int:
    """Of cache for a token, in bfloat16."""
    return sum(2 * linear.out_features for block in model.model.layers
               for linear in (block.self_attn.k_proj, block.self_attn.v_proj))

# ---- Training


def train(model: SmolLM, batches: list, val_batches: list, o: Options, autocast) -> tuple[list, float]:
    """Validation losses [(tokens read, loss), ...] and tokens/s."""
    optimizer = torch.optim.AdamW(model.parameters(), o.learning_rate, (0.9, 0.95), fused=True)
    warmup = max(1, o.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, 1 - step / o.steps))  # linear, up and down
    curve, seconds = [(0, evaluate(model, val_batches, autocast))], 0.0
    for step, (x, y) in enumerate(tqdm(batches, leave=False, disable=None), 1):
        start = time.perf_counter()
        model.train()
        with autocast:
            loss = model(x, targets=y)[1]  # the logits are free to go
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()  # waits for the device
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        seconds += time.perf_counter() - start
        if step % max(1, o.steps // 10) == 0 or step == o.steps:
            curve.append((step * x.numel(), evaluate(model, val_batches, autocast)))
    return curve, curve[-1][0] / seconds


@torch.no_grad()
def evaluate(model: SmolLM, batches: list, autocast) -> float:
    model.eval()
    with autocast:
        return float(np.mean([model(x, targets=y)[1].item() for x, y in batches]))


def climb(o: Options) -> dict[str, list]:
    """By rung, from the bottom: what train came to, for each seed."""
    config, device, results = PRESETS["smollm2-135m" if o.full else "nano"], pick_device(o.device), {}
    for name, limit in (("steps", 10**6), ("batch_size", 10**6), ("block_size", POSITIONS)):
        if not 1 <= getattr(o, name) <= limit:
            raise InputError(f"{name} is {getattr(o, name)}, it must be at least 1 and at most {limit}")
    if not o.seeds:
        raise InputError("seeds is empty: name at least one")
    peak = {name: matmul_peak(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=pick_dtype(peak) == "bfloat16")
    windows = math.ceil(o.steps * o.batch_size * o.block_size / WINDOW)
    folder, meta, _ = prepare_data(o.dataset, None, "text", None, config.vocab_size, windows)
    text = {part: np.memmap(folder / f"{part}.bin", meta["dtype"], "r") for part in ("train", "val")}
    def batches(part: str, order, count: int) -> list:
        if len(order) < count * o.batch_size:
            raise InputError(f"{o.dataset} has {len(order)} blocks, not {count} x {o.batch_size}: lower both")
        return [get_batch(text[part], order[i * o.batch_size:(i + 1) * o.batch_size], o.block_size,
                          config.vocab_size, device) for i in range(count)]

    blocks = {part: (len(tokens) - 1) // o.block_size for part, tokens in text.items()}
    val_batches = batches("val", np.arange(blocks["val"]), 5)
    for seed in o.seeds:
        for rung in reversed(range(len(LADDER))):
            torch.manual_seed(seed)
            model = build(rung, config)
            init_weights(model)
            order = np.random.default_rng(seed).permutation(blocks["train"])
            runs = results.setdefault(LADDER[rung][0], [])
            runs.append(train(model.to(device), batches("train", order, o.steps), val_batches, o,
                              autocast))
            print(f"{LADDER[rung][0]}, seed {seed}: {runs[-1][0][-1][1]:.4f}", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, list], config: Config) -> str:
    lines = ["| rung | parameters at 135M | validation loss | tokens/s | KV cache at 135M, bytes a token |",
             "|---" * 5 + "|"]
    for rung in reversed(range(len(LADDER))):
        with torch.device("meta"):
            model = build(rung, config)
        runs = results[LADDER[rung][0]]
        losses, rates = [curve[-1][1] for curve, _ in runs], [rate for _, rate in runs]
        spread = f" ± {np.std(losses, ddof=1):.3f}" if len(losses) > 1 else ""
        lines.append(f"| {LADDER[rung][0]} | {model.num_parameters():,} | {np.mean(losses):.3f}{spread} | "
                     f"{np.median(rates):,.0f} | {kv_bytes(model):,} |")
    return "\n".join(lines)


def draw(results: dict[str, list], picture: Path):
    """Validation loss over tokens, the mean of the seeds, and their band."""
    axes = (figure := Figure(figsize=(8, 5), layout="constrained")).subplots()
    for number, (name, runs) in enumerate(results.items()):
        tokens = [tokens for tokens, _ in runs[0][0]]
        losses = np.array([[loss for _, loss in curve] for curve, _ in runs])
        axes.plot(tokens, losses.mean(0), color=f"C{number}", label=name)
        axes.fill_between(tokens, losses.min(0), losses.max(0), color=f"C{number}", alpha=0.2, linewidth=0)
    axes.set(xlabel="tokens read", ylabel="validation loss (nats per token)", ylim=(None, losses.min() + 2))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    sys.excepthook = one_line_errors
    o = tyro.cli(Options, description=__doc__, use_underscores=True, config=(tyro.conf.FlagConversionOff,))
    results = climb(o)
    print(table(results, PRESETS["smollm2-135m"]))
    (ROOT / "assets").mkdir(exist_ok=True)
    draw(results, ROOT / "assets" / "ladder.png")
