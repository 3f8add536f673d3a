"""From GPT-2 to SmolLM, rung by rung: what each change costs and buys.

    python examples/ladder.py                  # counts at full size, training at the size of nano
    python examples/ladder.py --full=True      # trains at full size, too

The top rung is smollm.SmolLM itself. Each function below takes one of its ideas out again; at the
bottom none is left, and the model is the GPT-2-like one that this project began with. All rungs
train on the same tokens, from the same seeds, with AdamW at one learning rate. Prints a table, and
writes assets/ladder.png.
"""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from lib import cli
from lib.data import WINDOW, Source, get_batch, prepare_data
from lib.device import pick_device, pick_dtype
from smollm import PRESETS, Config, InputError, SmolLM

ROOT = Path(__file__).resolve().parent.parent
DROPOUT = 0.1  # that of GPT-2
POSITIONS = 1024  # as many as GPT-2 has
VAL_BATCHES = 5


@dataclass
class Options:
    full: bool = False  # train the 135M model's size, not nano's
    steps: int = 60
    batch_size: int = 16  # sequences
    block_size: int = 128  # tokens of each
    learning_rate: float = 3e-3
    seeds: tuple[int, ...] = (0, 1, 2)
    dataset: cli.HomePath = "stdlib"
    device: str = "auto"


# ---- The ideas, each undone


class Embedding(nn.Embedding):
    """With dropout. If told so, with a learned vector for each position from 0 on (so not for a KV
    cache), and with a matrix for the tokens that is not `weight`, which the model has as head."""
    def __init__(self, config: Config, has_positions=False, is_untied=False):
        super().__init__(config.vocab_size, config.hidden_size)
        self.positions = None
        self.tokens = None
        if has_positions:
            self.positions = nn.Embedding(POSITIONS, config.hidden_size)
        if is_untied:
            self.tokens = nn.Embedding(config.vocab_size, config.hidden_size)

    def forward(self, input_ids):
        if self.tokens is not None:
            x = self.tokens(input_ids)
        else:
            x = super().forward(input_ids)
        if self.positions is not None:
            x = x + self.positions.weight[:input_ids.size(1)]
        return F.dropout(x, DROPOUT, self.training)


def add_biases_and_dropout(model: SmolLM):
    """A bias in each linear layer, and dropout on the embedding and on what attention adds to
    it."""
    for block in model.model.layers:
        for module in (block.self_attn, block.mlp):
            for name, linear in list(module.named_children()):
                setattr(module, name, nn.Linear(linear.in_features, linear.out_features))
        attention = block.self_attn
        attention.o_proj = nn.Sequential(attention.o_proj, nn.Dropout(DROPOUT))
    model.model.embed_tokens = Embedding(model.config)


def learn_positions(model: SmolLM):
    """A learned vector for each position, in place of RoPE."""
    for block in model.model.layers:
        block.self_attn.has_rope = False
    model.model.embed_tokens = Embedding(model.config, has_positions=True)


class MLP(nn.Module):
    """down(silu(up(x))), without the gate."""
    def __init__(self, config: Config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(F.silu(self.up_proj(x)))


def remove_gates(model: SmolLM):
    for block in model.model.layers:
        block.mlp = MLP(model.config)


def give_each_head_its_keys(model: SmolLM):
    """As many key/value heads as query heads."""
    size = model.config.hidden_size
    for block in model.model.layers:
        block.self_attn.k_proj = nn.Linear(size, size)
        block.self_attn.v_proj = nn.Linear(size, size)


def subtract_means(model: SmolLM):
    """LayerNorm, which also takes off the mean and adds a bias, in place of RMSNorm."""
    size = model.config.hidden_size
    eps = model.config.rms_norm_eps
    for block in model.model.layers:
        block.input_layernorm = nn.LayerNorm(size, eps)
        block.post_attention_layernorm = nn.LayerNorm(size, eps)
    model.model.norm = nn.LayerNorm(size, eps)


def untie_the_head(model: SmolLM):
    """Tokens are looked up in one matrix, and told by another."""
    model.model.embed_tokens = Embedding(model.config, has_positions=True, is_untied=True)


# From the top: a rung's name, and what is undone below it
LADDER = [
    ("no biases, no dropout: SmolLM", add_biases_and_dropout),
    ("RoPE", learn_positions),
    ("SwiGLU (v2)", remove_gates),
    ("grouped queries", give_each_head_its_keys),
    ("RMSNorm", subtract_means),
    ("tied head", untie_the_head),
    ("GPT-2-like (v1)", None),
]


def build(rung: int, config: Config) -> SmolLM:
    """The model with everything undone that is above LADDER[rung]."""
    model = SmolLM(config)
    for _, undo in LADDER[:rung]:
        undo(model)
    return model


def init_weights(model: SmolLM):
    """As smollm.py's, for all the rungs: biases are 0, and what writes to the residual stream
    begins smaller."""
    std = model.config.initializer_range
    residual_std = std / math.sqrt(2 * model.config.num_hidden_layers)
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | nn.Embedding):
            continue
        is_residual = "o_proj" in name or "down_proj" in name
        nn.init.normal_(module.weight, std=residual_std if is_residual else std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)


def kv_bytes(model: SmolLM) -> int:
    """Of cache for a token, in bfloat16."""
    total = 0
    for block in model.model.layers:
        total += 2 * block.self_attn.k_proj.out_features
        total += 2 * block.self_attn.v_proj.out_features
    return total


# ---- Training


@dataclass
class Training:
    """What the training of a model came to."""
    tokens: list[int]  # read before each evaluation
    losses: list[float]  # at each evaluation
    tok_per_s: float


def train(model: SmolLM, batches: list, val_batches: list, o: Options, autocast) -> Training:
    optimizer = torch.optim.AdamW(model.parameters(), o.learning_rate, (0.9, 0.95), fused=True)
    warmup = max(1, o.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(  # linear, up and down
        optimizer, lambda step: min((step + 1) / warmup, 1 - step / o.steps))
    tokens = [0]
    losses = [evaluate(model, val_batches, autocast)]
    seconds = 0.0
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
            tokens.append(step * x.numel())
            losses.append(evaluate(model, val_batches, autocast))
    return Training(tokens, losses, tokens[-1] / seconds)


@torch.no_grad()
def evaluate(model: SmolLM, batches: list, autocast) -> float:
    model.eval()
    with autocast:
        losses = [model(x, targets=y)[1].item() for x, y in batches]
    return float(np.mean(losses))


def make_batches(tokens, blocks, count: int, o: Options, vocab_size: int, device) -> list:
    """[(x, y), ...], so many of the first of these blocks."""
    if len(blocks) < count * o.batch_size:
        raise InputError(f"{o.dataset} has {len(blocks)} blocks, not {count} x {o.batch_size}: "
                         "lower both")
    batches = []
    for i in range(0, count * o.batch_size, o.batch_size):
        of_batch = blocks[i:i + o.batch_size]
        batches.append(get_batch(tokens, of_batch, o.block_size, vocab_size, device))
    return batches


def climb(o: Options) -> dict[str, list[Training]]:
    """By rung, from the bottom: what its training came to, for each seed."""
    cli.check_range(o, 1, 10**6, "steps", "batch_size")
    cli.check_range(o, 1, POSITIONS + 1, "block_size")
    if not o.seeds:
        raise InputError("seeds is empty: name at least one")
    device = pick_device(o.device)
    config = PRESETS["smollm2-135m" if o.full else "nano"]
    autocast = torch.autocast(device.type, torch.bfloat16,
                              enabled=pick_dtype(device) == "bfloat16")
    num_windows = math.ceil(o.steps * o.batch_size * o.block_size / WINDOW)
    data = prepare_data(Source(o.dataset), None, config.vocab_size, num_windows)
    train_tokens = data.read("train", num_windows)
    val_tokens = data.read("val", num_windows)
    num_blocks = (len(train_tokens) - 1) // o.block_size
    val_blocks = range((len(val_tokens) - 1) // o.block_size)
    val_batches = make_batches(val_tokens, val_blocks, VAL_BATCHES, o, config.vocab_size, device)

    results = {name: [] for name, _ in reversed(LADDER)}
    for seed in o.seeds:
        blocks = np.random.default_rng(seed).permutation(num_blocks)
        batches = make_batches(train_tokens, blocks, o.steps, o, config.vocab_size, device)
        for rung, (name, _) in reversed(list(enumerate(LADDER))):
            torch.manual_seed(seed)
            model = build(rung, config)
            init_weights(model)
            training = train(model.to(device), batches, val_batches, o, autocast)
            results[name].append(training)
            print(f"{name}, seed {seed}: {training.losses[-1]:.4f}", file=sys.stderr, flush=True)
    return results


def table(results: dict[str, list[Training]], config: Config) -> str:
    lines = ["| rung | parameters at 135M | validation loss | tokens/s | "
             "KV cache at 135M, bytes a token |",
             "|---|---|---|---|---|"]
    for rung, (name, _) in reversed(list(enumerate(LADDER))):
        with torch.device("meta"):
            model = build(rung, config)
        losses = [training.losses[-1] for training in results[name]]
        rate = np.median([training.tok_per_s for training in results[name]])
        loss = f"{np.mean(losses):.3f}"
        if len(losses) > 1:
            loss += f" ± {np.std(losses, ddof=1):.3f}"
        lines.append(f"| {name} | {model.num_parameters():,} | {loss} | {rate:,.0f} | "
                     f"{kv_bytes(model):,} |")
    return "\n".join(lines)


def draw(results: dict[str, list[Training]], picture: Path):
    """Validation loss over tokens: the mean of the seeds, and a band from the lowest to the highest
    of them."""
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for number, (name, trainings) in enumerate(results.items()):
        color = f"C{number}"
        tokens = trainings[0].tokens
        losses = np.array([training.losses for training in trainings])
        axes.plot(tokens, losses.mean(0), color=color, label=name)
        axes.fill_between(tokens, losses.min(0), losses.max(0), color=color, alpha=0.2,
                          linewidth=0)
    lowest = losses.min()  # of SmolLM, the last
    axes.set(xlabel="tokens read", ylabel="validation loss (nats per token)",
             ylim=(None, lowest + 2))
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(picture, dpi=120)


if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    results = climb(o)
    print(table(results, PRESETS["smollm2-135m"]))
    (ROOT / "assets").mkdir(exist_ok=True)
    draw(results, ROOT / "assets" / "ladder.png")
