"""Many small models trained at once on one GPU, each in its own way: how train.py's defaults were
found.

    python bench/sweep.py                                        # all plans, one after the other
    python bench/sweep.py --plans nano-muon --minutes 5.2        # one, and begin nothing later
    python bench/sweep.py --minutes 0                            # only write what was found

The weights of up to --at_once models are stacked, and torch.func.vmap trains the stack as if it
were one model, in bfloat16. A trial is a set of settings and a seed; its loss is that of the whole
held-out text, at its end. A search changes one setting at a time, with two seeds, then takes
together what helped, and goes around again. The losses are appended to --results, and what stands
there is not run again. Writes bench/SWEEP.md.
"""

import itertools
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.func import functional_call, grad_and_value, stack_module_state, vmap

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from lib import cli
from lib.data import WINDOW, Source, block_at, get_batch, prepare_data
from lib.device import pick_device
from lib.muon import orthogonalize
from smollm import PRESETS, SmolLM

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Trial:
    """How a model is trained. Where it counts steps, it has shares of them all."""
    model: str
    optimizer: Literal["muon", "adamw"]
    steps: int
    batch_size: int = 16
    block_size: int = 128
    seed: int = 0
    lr: float = 3e-3  # of the blocks' matrices and the norms
    embedding_lr: float = 0.018
    std: float = 0.0  # of the initial embedding; 0: 1/sqrt(hidden_size)
    zero: bool = False  # o_proj and down_proj begin as zero
    warmup: float = 0.02
    decay: float = 0.2
    linear: bool = False  # decay linearly; else 1 - sqrt
    end: float = 0.0  # the rate at the end, as a share of the peak
    clip: float = 1.0
    weight_decay: float = 0.01
    embedding_decay: float = 0.01
    beta1: float = 0.9
    beta2: float = 0.95
    momentum: float = 0.95  # of Muon, and the rest
    momentum_warmup: float = 0.0  # from 0.85
    normuon: float = 0.0  # beta2 of NorMuon's second moment of rows (arXiv:2510.05491); 0: none
    cautious: bool = False  # decay only weights that the update brings nearer to zero
    average: float = 0.0  # the model is the mean of the weights after so many of the last steps
    look_ahead: float = 0.0  # gradients are taken so many mean updates ahead


# trials that are stacked share these
STRUCTURE = ["model", "optimizer", "batch_size", "block_size"]


def rate_at(step: int, t: Trial) -> float:
    """The learning rate of a step, as a share of the peak: train.py's, but that it may decay to
    t.end. 0 once the trial has ended."""
    if step >= t.steps:
        return 0.0
    o = train.Options(max_iters=t.steps, warmup_iters=round(t.warmup * t.steps),
                      decay_iters=round(t.decay * t.steps), learning_rate=1.0,
                      decay_shape="linear" if t.linear else "sqrt")
    share = train.lr_at(step, o)
    if step >= o.warmup_iters and step > t.steps - o.decay_iters:
        share = t.end + (1 - t.end) * share
    return share


def momentum_at(step: int, t: Trial) -> float:
    warmup = t.momentum_warmup * t.steps
    if step >= warmup:
        return t.momentum
    return 0.85 + (t.momentum - 0.85) * step / warmup


def attend(q, k, v, mask):
    """Attention.attend, written out: the fused kernels can't be stacked."""
    groups = q.size(1) // k.size(1)
    k = k.repeat_interleave(groups, dim=1)
    v = v.repeat_interleave(groups, dim=1)
    scores = (q @ k.mT).float() / math.sqrt(q.size(-1))
    future = torch.ones(q.size(2), q.size(2), dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, -math.inf).softmax(-1).to(v.dtype) @ v


class Stack:
    """Models that train together: a trial each, equal in all of STRUCTURE."""
    def __init__(self, trials: list[Trial], tokens: dict, device):
        first = trials[0]
        self.trials = trials
        self.device = device
        self.steps = max(t.steps for t in trials)
        models = []
        for t in trials:
            torch.manual_seed(t.seed)
            models.append(self.initialize(SmolLM(replace(PRESETS[t.model])), t))
        parameters, _ = stack_module_state(models)
        self.weights = {name: p.detach().to(device) for name, p in parameters.items()}
        self.model = models[0].to("meta")
        for block in self.model.model.layers:
            block.self_attn.attend = attend
        # AdamW's two moments; of Muon's matrices the first is the momentum
        self.state = {name: [torch.zeros_like(p) for _ in range(2)]
                      for name, p in self.weights.items()}
        # NorMuon's second moments of rows
        self.rows = {name: torch.zeros(*p.shape[:2], 1, device=device)
                     for name, p in self.weights.items() if p.dim() == 3}
        self.val_batches = self.cut(tokens["val"], first, device)
        self.train_tokens = tokens["train"]
        self.starts = self.order(tokens, first)
        self.values = {}  # of each setting, (trials,)
        for name, value in asdict(first).items():
            if isinstance(value, (int, float)):
                values = [float(getattr(t, name)) for t in trials]
                self.values[name] = torch.tensor(values, device=device)

        def loss(weights, x, y):  # of one model
            with torch.autocast(device.type, torch.bfloat16):
                return functional_call(self.model, weights, (x, y))[1]

        self.gradients = vmap(grad_and_value(loss))
        self.losses = vmap(loss, in_dims=(0, None, None))
        shares = torch.tensor([[rate_at(k, t) for t in trials] for k in range(self.steps)])
        self.shares = shares.to(device)
        momenta = torch.tensor([[momentum_at(k, t) for t in trials] for k in range(self.steps)])
        self.momenta = momenta.to(device)
        self.sum = None  # of the weights that are averaged
        if any(t.average for t in trials):
            self.sum = {name: torch.zeros_like(p) for name, p in self.weights.items()}
        self.delta = None  # the running mean of updates, where look_ahead needs it
        if any(t.look_ahead for t in trials):
            self.delta = {name: torch.zeros_like(p) for name, p in self.weights.items()}

    @staticmethod
    @torch.no_grad()
    def initialize(model: SmolLM, t: Trial) -> SmolLM:
        if t.std:
            model.model.embed_tokens.weight.mul_(t.std / model.config.initializer_range)
        if t.zero:
            for block in model.model.layers:
                block.self_attn.o_proj.weight.zero_()
                block.mlp.down_proj.weight.zero_()
        return model

    @staticmethod
    def cut(tokens, first: Trial, device) -> list:
        """All of tokens in batches (x, y) of up to 16 blocks."""
        count = (len(tokens) - 1) // first.block_size
        vocab_size = PRESETS[first.model].vocab_size
        return [get_batch(tokens, range(i, min(i + 16, count)), first.block_size, vocab_size,
                          device) for i in range(0, count, 16)]

    def order(self, tokens: dict, first: Trial) -> torch.Tensor:
        """Where the sequences begin, (trials, steps, batch_size), in train.py's order."""
        num_blocks = (len(tokens["train"]) - 1) // first.block_size
        of_seed = {}
        for seed in {t.seed for t in self.trials}:
            blocks = [block_at(seed, i, num_blocks, WINDOW // first.block_size)
                      for i in range(self.steps * first.batch_size)]
            of_seed[seed] = torch.tensor(blocks).view(self.steps, first.batch_size)
        starts = torch.stack([of_seed[t.seed] for t in self.trials]) * first.block_size
        return starts.to(self.device)

    def get(self, name: str, like: torch.Tensor) -> torch.Tensor:
        """A setting's values, (trials, 1, ...), to be multiplied with like."""
        return self.as_tall(self.values[name], like)

    @staticmethod
    def as_tall(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return values.view(-1, *[1] * (like.dim() - 1))

    @torch.no_grad()
    def step(self, k: int):
        """A training step of all, k counted from 0."""
        first = self.trials[0]
        offsets = torch.arange(first.block_size + 1, device=self.device)
        sequences = self.train_tokens[self.starts[:, k, :, None] + offsets]
        weights = self.weights
        if self.delta:
            weights = {name: p + self.get("look_ahead", p) * self.delta[name]
                       for name, p in self.weights.items()}
        gradients, _ = self.gradients(weights, sequences[..., :-1], sequences[..., 1:])
        squares = [g.flatten(1).square().sum(1) for g in gradients.values()]
        norm = torch.stack(squares).sum(0).sqrt()
        limit = torch.where(self.values["clip"] > 0, self.values["clip"], math.inf)
        scale = (limit / (norm + 1e-6)).clamp(max=1)
        is_muon = first.optimizer == "muon"
        before = None
        if self.delta:
            before = {name: p.clone() for name, p in self.weights.items()}
        by_shape = {}
        for name, g in gradients.items():
            g = g * self.as_tall(scale, g)
            if is_muon and "layers" in name and g.dim() == 3:
                by_shape.setdefault(g.shape, []).append((name, g))
            else:
                self.adamw(name, g, k)
        for group in by_shape.values():
            self.muon(group, k)
        if self.delta:
            for name, p in self.weights.items():
                self.delta[name].lerp_(p - before[name], 0.1)
        if self.sum:
            begins = torch.tensor([t.steps - round(t.average * t.steps) <= k < t.steps
                                   for t in self.trials], device=self.device)
            for name, p in self.weights.items():
                self.sum[name] += p * self.as_tall(begins, p)

    def adamw(self, name: str, g: torch.Tensor, k: int):
        """A parameter of all trials, with its gradient g."""
        p = self.weights[name]
        mean, square = self.state[name]
        beta1 = self.get("beta1", p)
        beta2 = self.get("beta2", p)
        mean.mul_(beta1).add_(g * (1 - beta1))
        square.mul_(beta2).add_(g.square() * (1 - beta2))
        is_embedding = "embed" in name
        peak = self.get("embedding_lr" if is_embedding else "lr", p)
        lr = self.as_tall(self.shares[k], p) * peak
        if p.dim() == 3:
            p.mul_(1 - lr * self.get("embedding_decay" if is_embedding else "weight_decay", p))
        root = (square / (1 - beta2**(k + 1))).sqrt() + 1e-8
        p.sub_(lr * mean / (1 - beta1**(k + 1)) / root)

    def muon(self, group: list, k: int):
        """Matrices of one shape (trials, rows, columns): their names and gradients."""
        ahead = []
        for name, g in group:
            mean = self.state[name][0]
            momentum = self.as_tall(self.momenta[k], g)
            mean.mul_(momentum).add_(g * (1 - momentum))
            ahead.append(g * (1 - momentum) + mean * momentum)
        stack = torch.stack(ahead)  # (matrices, models, rows, columns)
        updates = orthogonalize(stack.flatten(0, 1), torch.bfloat16).float().view(stack.shape)
        for (name, _), u in zip(group, updates, strict=True):
            p = self.weights[name]
            rows = self.rows[name]
            beta = self.get("normuon", p)
            rows.mul_(beta).add_(u.square().mean(2, keepdim=True) * (1 - beta))
            normed = u / (rows.sqrt() + 1e-8)
            normed_size = normed.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
            normed *= u.norm(dim=(1, 2), keepdim=True) / normed_size
            u = torch.where(beta > 0, normed, u)
            lr = self.as_tall(self.shares[k], p) * self.get("lr", p)
            decays = (u * p > 0) | (self.get("cautious", p) == 0)
            p.mul_(1 - lr * self.get("weight_decay", p) * decays)
            p.sub_(lr * 0.2 * max(p.shape[1:])**0.5 * u)

    @torch.no_grad()
    def evaluate(self) -> list[float]:
        """The whole held-out text."""
        weights = self.weights
        if self.sum:
            weights = {}
            counts = torch.tensor([round(t.average * t.steps) for t in self.trials],
                                  device=self.device)
            for name, p in self.weights.items():
                mean = self.sum[name] / self.as_tall(counts.clamp(min=1), p)
                weights[name] = torch.where(self.as_tall(counts > 0, p), mean, p)
        total = 0.0
        for x, y in self.val_batches:
            total += self.losses(weights, x, y) * y.numel()
        return (total / sum(y.numel() for _, y in self.val_batches)).tolist()

    def train(self) -> list[float]:
        """The validation loss of each trial at its end."""
        ends = {t.steps for t in self.trials}
        final = [math.nan] * len(self.trials)
        for k in range(self.steps):
            self.step(k)
            if k + 1 in ends:
                losses = self.evaluate()
                for i, t in enumerate(self.trials):
                    if t.steps == k + 1:
                        final[i] = losses[i]
        return final


@dataclass
class Options:
    plans: list[Literal["nano-muon", "nano-adamw", "micro", "135m"]] = field(
        default_factory=lambda: list(PLANS))
    at_once: int = 48  # nano models; of larger ones fewer
    minutes: float = 60.0  # begin nothing of a plan after so long
    dataset: cli.HomePath = "stdlib"
    device: str = "auto"  # as train.py's
    results: Path = Path("runs/sweep")  # folder of the losses, a file for each plan


class Lab:
    """Trains the trials of a plan, and keeps their losses and a page about them."""
    def __init__(self, o: Options, plan: str, model: str, steps: int, batch_size: int = 16,
                 block_size: int = 128, at_once: float = 1.0):
        self.o = o
        self.device = pick_device(o.device)
        self.deadline = time.monotonic() + 60 * o.minutes
        self.path = o.results / f"{plan}.jsonl"
        self.at_once = max(1, round(o.at_once * at_once))
        self.model = model
        self.windows = math.ceil(2 * steps * batch_size / (WINDOW // block_size))
        self.tokens = None
        self.page = [f"## {plan}: {steps} steps of {batch_size} x {block_size} tokens\n"]
        self.losses = {}
        if self.path.exists():
            for line in self.path.read_text().splitlines():
                entry = json.loads(line)
                loss = entry.pop("loss")
                self.losses[Trial(**entry)] = loss

    def say(self, line: str):
        self.page.append(line)
        print(line, flush=True)

    def read_tokens(self) -> dict:
        source = Source(self.o.dataset, None, "text", "replace", None)
        data = prepare_data(source, None, PRESETS[self.model].vocab_size, self.windows)
        train_tokens = data.read("train", self.windows).astype(np.int64)
        return {"train": torch.from_numpy(train_tokens).to(self.device),
                "val": data.read("val", 1)}

    def run(self, trials: list[Trial]) -> list[float]:
        """Their losses. TimeoutError where one would begin too late."""
        missing = [t for t in dict.fromkeys(trials) if t not in self.losses]
        missing.sort(key=self.structure)
        for _, group in itertools.groupby(missing, self.structure):
            group = sorted(group, key=lambda t: -t.steps)
            for i in range(0, len(group), self.at_once):
                if time.monotonic() >= self.deadline:
                    raise TimeoutError
                self.train(group[i:i + self.at_once])
        return [self.losses[t] for t in trials]

    @staticmethod
    def structure(t: Trial) -> tuple:
        return tuple(getattr(t, name) for name in STRUCTURE)

    def train(self, trials: list[Trial]):
        if self.tokens is None:
            self.tokens = self.read_tokens()
        losses = Stack(trials, self.tokens, self.device).train()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a") as file:
            for t, loss in zip(trials, losses, strict=True):
                self.losses[t] = round(loss, 4)
                file.write(json.dumps({**asdict(t), "loss": self.losses[t]}) + "\n")

    def mean(self, trials: list[Trial], seeds=(0, 1)) -> list[float]:
        """Their losses over seeds. One that diverged has infinity."""
        every = [replace(t, seed=seed) for t in trials for seed in seeds]
        losses = np.array(self.run(every)).reshape(len(trials), len(seeds))
        losses[np.isnan(losses)] = math.inf
        return losses.mean(1).tolist()

    def table(self, trials: list[Trial], names: list[str], seeds=(0,)):
        """Their losses, and the settings of these names."""
        self.say(f"| {' | '.join(names)} | loss |")
        self.say("|" + "---|" * (len(names) + 1))
        for t, loss in zip(trials, self.mean(trials, seeds), strict=True):
            values = [say_value(getattr(t, name)) for name in names]
            self.say(f"| {' | '.join(values)} | {loss:.3f} |")
        self.say("")

    def search(self, base: Trial, choices: dict, rounds: int) -> Trial:
        """Change settings one at a time, then together those that helped."""
        for _ in range(rounds):
            variants = []
            for name, values in choices.items():
                if callable(values):
                    values = values(getattr(base, name))
                variants += [(name, value) for value in values if value != getattr(base, name)]
            trials = [base] + [replace(base, **{name: value}) for name, value in variants]
            losses = self.mean(trials)
            self.say(f"From {describe(base)}: {losses[0]:.3f}. One thing changed:\n")
            self.say("| setting | value | change of the loss |\n|---|---|---|")
            best = {}  # setting: the gain, and the value that brings it
            for (name, value), loss in zip(variants, losses[1:], strict=True):
                self.say(f"| {name} | {say_value(value)} | {loss - losses[0]:+.3f} |")
                gain = losses[0] - loss
                if gain > best.get(name, (0.004,))[0]:
                    best[name] = (gain, value)
            self.say("")
            if not best:
                break
            ranked = sorted(best, key=lambda name: -best[name][0])
            together = [replace(base, **{name: best[name][1] for name in ranked[:count]})
                        for count in range(1, len(ranked) + 1)]
            losses = self.mean(together)
            base = together[int(np.argmin(losses))]
            self.say(f"Together: {describe(base)}: {min(losses):.3f}.\n")
        return base


def say_value(value) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def describe(t: Trial) -> str:
    """What of a trial isn't as in Trial's defaults."""
    default = Trial(t.model, t.optimizer, t.steps)
    words = [f"{t.optimizer}, {t.steps} steps"]
    for name, value in asdict(t).items():
        if value != getattr(default, name) and name not in ("batch_size", "block_size"):
            words.append(f"{name} {say_value(value)}")
    return ", ".join(words)


# ---- Plans

ROOT_2 = math.sqrt(2)
CHOICES = {
    "lr": lambda lr: (lr / ROOT_2, lr * ROOT_2),
    "embedding_lr": lambda lr: (lr / ROOT_2, lr * ROOT_2),
    "std": (0.0, 0.01, 0.02, 0.04),
    "zero": (False, True),
    "warmup": (0.0, 0.02, 0.05, 0.1),
    "decay": (0.2, 0.6, 0.8, 1.0),
    "linear": (False, True),
    "end": (0.0, 0.05),
    "clip": (0.0, 1.0),
    "weight_decay": (0.0, 0.01, 0.1, 0.3),
    "embedding_decay": (0.0, 0.01, 0.1),
    "beta1": (0.8, 0.9),
    "beta2": (0.9, 0.95, 0.98),
    "average": (0.0, 0.06),
}
CHOICES_OF_MUON = CHOICES | {
    "cautious": (False, True),
    "momentum": (0.9, 0.95),
    "momentum_warmup": (0.0, 0.15),
    "normuon": (0.0, 0.95),
    "look_ahead": (0.0, 1.0),
}
OURS = dict(std=0.02, zero=True, decay=0.7, linear=True)  # where the searches begin


def nano_muon(lab: Lab):
    lab.table([Trial("nano", "muon", 270)], ["steps", "lr", "embedding_lr"], seeds=(0, 1))
    base = Trial("nano", "muon", 270, embedding_lr=0.024, **OURS)
    lab.search(base, CHOICES_OF_MUON, rounds=2)


def nano_adamw(lab: Lab):
    rates = [3e-3 * ROOT_2**i for i in range(-3, 3)]
    published = [Trial("nano", "adamw", 600, lr=rate, embedding_lr=rate, warmup=0.1)
                 for rate in rates]
    lab.table(published, ["lr"], seeds=(0, 1, 2))
    base = Trial("nano", "adamw", 600, embedding_lr=0.018, warmup=0.05, **OURS)
    lab.search(base, CHOICES, rounds=1)


def micro(lab: Lab):
    rates = [1.5e-3 * ROOT_2**i for i in range(-2, 4)]
    published = [Trial("micro", "adamw", 300, lr=rate, embedding_lr=rate, warmup=0.1)
                 for rate in rates]
    plus = [Trial("micro", "adamw", 300, lr=rate, embedding_lr=embedding_rate, warmup=0.05, **OURS)
            for rate in (1.5e-3, 3e-3) for embedding_rate in (0.003, 0.006, 0.012, 0.024)]
    lab.table(published + plus, ["zero", "lr", "embedding_lr"])
    today = Trial("micro", "muon", 135, embedding_lr=3e-3)
    base = Trial("micro", "muon", 135, **OURS)
    silent = [replace(base, lr=rate, embedding_lr=embedding_rate, std=std)
              for rate in (2e-3, 3e-3, 4e-3) for embedding_rate in (0.006, 0.012, 0.024)
              for std in (0.01, 0.02)]
    loud = [replace(base, zero=False, embedding_lr=0.012, std=std) for std in (0.0, 0.02)]
    lab.table([today, *silent, *loud], ["zero", "std", "lr", "embedding_lr"])


def large(lab: Lab):
    shape = dict(batch_size=8, block_size=512)
    published = [Trial("smollm2-135m", "adamw", 250, lr=rate, embedding_lr=rate, warmup=0.1,
                       **shape) for rate in (1e-3, 2e-3)]
    lab.table(published, ["optimizer", "steps", "lr", "embedding_lr"])
    today = Trial("smollm2-135m", "muon", 125, lr=2e-3, embedding_lr=2e-3, **shape)
    base = Trial("smollm2-135m", "muon", 125, lr=2e-3, **shape, **OURS)
    muon = [replace(base, embedding_lr=0.006), replace(base, embedding_lr=0.012), today,
            replace(base, lr=3e-3, embedding_lr=0.006)]
    lab.table(muon, ["optimizer", "steps", "zero", "lr", "embedding_lr"])


PLANS = {
    "nano-muon": (nano_muon, dict(model="nano", steps=600)),
    "nano-adamw": (nano_adamw, dict(model="nano", steps=600, at_once=0.75)),
    "micro": (micro, dict(model="micro", steps=300, at_once=0.3)),
    "135m": (large, dict(model="smollm2-135m", steps=250, batch_size=8, block_size=512,
                         at_once=0.04)),
}

if __name__ == "__main__":
    o = cli.parse(Options, __doc__)
    pages = []
    for plan in o.plans:
        make, shape = PLANS[plan]
        lab = Lab(o, plan, **shape)
        try:
            make(lab)
        except TimeoutError:
            lab.say("Time was over here.\n")
        pages.append("\n".join(lab.page))
    header = ("# How the defaults were found\n\nWritten by `python bench/sweep.py`. Settings are "
              "those of its Trial: shares are of the steps, std 0 is 1/sqrt(hidden_size). A loss "
              "in a search is the mean of two seeds.\n\n")
    (ROOT / "bench" / "SWEEP.md").write_text(header + "\n".join(pages))
