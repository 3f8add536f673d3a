"""The recipe of train.py: gradients, optimizers, schedules, precision, and what it logs."""

import functools
import json
import math
import platform
import re
import shlex
import statistics
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import train
from bench import sweep
from lib import cli
from lib.data import WINDOW, block_at
from lib.device import fastest, flops_per_token
from lib.muon import Muon, orthogonalize
from lib.plot import read_curve
from lib.run import RESUMABLE
from smollm import PRESETS, SmolLM, load_tokenizer
from test_smollm import TINY, ids_of, make
from tests.helpers import (
    ROOT,
    SMALL,
    STEADY,
    TINY_1000,
    data_folder,
    last_validation,
    losses_in,
    losses_of,
    run,
    tokens_in,
    train_here,
    write_parquet,
)
from tests.launch import Script

NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)

# ---- Gradients and optimizers


@pytest.mark.parametrize("ignored", [0.0, 0.3, "a whole micro-batch"])
def test_accumulated_gradients_equal_those_of_one_batch(ignored):
    """Micro-batches of 2 sequences, of whose targets some are ignored."""
    ids = ids_of(6, 21)
    x = ids[:, :-1]
    y = ids[:, 1:].clone()
    if ignored == "a whole micro-batch":
        y[2:4] = -100
        y[0, 3:] = -100
    else:
        y[torch.rand(y.shape, generator=torch.Generator().manual_seed(0)) < ignored] = -100
    whole = make(TINY)
    parts = make(TINY)
    loss = train.accumulate(train.Loss(whole), [(x, y)], nullcontext(), NO_SCALER)
    pieces = [(x[i:i + 2], y[i:i + 2]) for i in (0, 2, 4)]
    accumulated = train.accumulate(train.Loss(parts), pieces, nullcontext(), NO_SCALER)
    torch.testing.assert_close(accumulated, loss, rtol=1e-6, atol=0)
    expected = F.cross_entropy(make(TINY)(x)[0].flatten(0, 1), y.flatten())
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-6, atol=0)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_weight_has_one_optimizer_and_norms_do_not_decay(optimizer):
    model = make(TINY)
    names = {p: name for name, p in model.named_parameters()}
    o = train.Options(optimizer=optimizer, weight_decay=0.1, embedding_lr_scale=7.0,
                      momentum=0.7, dtype="float32")
    found = {}
    optimizers = train.make_optimizers(model, o)
    if optimizer == "muon":
        assert {group["momentum"] for group in optimizers[1].param_groups} == {0.7}
    for each in optimizers:
        for group in each.param_groups:
            for p in group["params"]:
                assert names[p] not in found
                scale = group.get("lr_scale", 1)
                found[names[p]] = (type(each).__name__, group["weight_decay"], scale)
    expected = {}
    for name in names.values():
        expected[name] = ("Muon" if optimizer == "muon" else "AdamW", 0.1, 1)
        if "norm" in name:
            expected[name] = ("AdamW", 0.0, 1)
        if "embed" in name:
            expected[name] = ("AdamW", 0.1, 7)
    assert found == expected


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_first_step_is_as_large_as_the_rates_say(optimizer, tiny, corpus, tmp_path):
    """AdamW's first step is the rate for each weight, Muon's 0.2 of it in root mean square."""
    train_here(tmp_path, *STEADY, f"--dataset={corpus}", f"--init_from={tiny}", "--max_iters=1",
               "--warmup_iters=0", "--dtype=float32", "--weight_decay=0",
               f"--optimizer={optimizer}", "--embedding_lr_scale=3")
    before = torch.load(tiny, weights_only=True)["model"]
    after = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    for name, p in after.items():
        step = (p - before[name]).square().mean().sqrt().item() / 2e-3
        expected = 1
        if "embed" in name:
            expected = 3
        elif "proj" in name and optimizer == "muon":
            expected = 0.2
        assert step == pytest.approx(expected, rel=0.25), name


@torch.no_grad()
def test_a_silent_model_begins_as_its_embedding_alone():
    """Its logits are those of the embedding, normalized; of half of the published one."""
    model = make(TINY)
    embedding = model.model.embed_tokens.weight
    published = embedding.clone()
    train.begin_silently(model)
    assert torch.equal(embedding, published / 2)
    x = ids_of(3, 9)
    expected = F.linear(model.model.norm(embedding[x]), embedding)
    torch.testing.assert_close(model(x)[0], expected, rtol=0, atol=0)


@pytest.mark.parametrize("init", ["silent", "published"])
def test_a_run_begins_as_init_says(init, corpus, tmp_path):
    """In a rate of 0 nothing changes: what is saved is what it began with."""
    train_here(tmp_path, "--model=nano", f"--init={init}", "--max_iters=1", "--learning_rate=0",
               "--block_size=16", "--batch_size=1", "--eval_iters=1", "--device=cpu",
               "--dtype=float32", f"--dataset={corpus}")
    saved = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]
    torch.manual_seed(0)
    model = SmolLM(PRESETS["nano"])
    if init == "silent":
        train.begin_silently(model)
    for name, weight in model.state_dict().items():
        assert torch.equal(saved[name], weight), name


@pytest.mark.parametrize(("hidden_size", "scale"), [(64, 9), (192, 9), (288, 4), (384, 2.25),
                                                    (576, 1), (960, 1), (2048, 1)])
def test_the_embedding_of_a_narrow_model_learns_faster(hidden_size, scale):
    assert train.embedding_scale(hidden_size) == scale


def test_muon_is_that_of_torch():
    """Two matrices of one shape and others, tall and wide. torch's rounds before it divides by
    the norm."""
    shapes = [(48, 80), (48, 80), (80, 48), (16, 48)]
    starts = [ids_of(*shape, seed=i) / 100 for i, shape in enumerate(shapes)]
    ours = [torch.nn.Parameter(start.clone()) for start in starts]
    theirs = [torch.nn.Parameter(start.clone()) for start in starts]
    our_muon = Muon(ours, 1e-2, 0.1, torch.bfloat16)
    torch_muon = torch.optim.Muon(theirs, 1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for optimizer, parameters in ((our_muon, ours), (torch_muon, theirs)):
        for step in range(10):
            for i, p in enumerate(parameters):
                generator = torch.Generator().manual_seed(step * 10 + i)
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for p, q, start in zip(ours, theirs, starts, strict=True):
        assert (p - q).norm() < 0.03 * (q - start).norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e4])
def test_orthogonalize_brings_singular_values_near_one(dtype, size):
    """Of small gradients, too, which float16 by itself would lose; and of each of a stack by
    itself."""
    u, _ = torch.linalg.qr(torch.randn(3, 64, 24, generator=torch.Generator().manual_seed(0)))
    v, _ = torch.linalg.qr(torch.randn(3, 24, 24, generator=torch.Generator().manual_seed(1)))
    matrices = u * torch.linspace(0.1, 1, 24) * size @ v.mT
    for given in (matrices, matrices.mT):
        made = orthogonalize(given, dtype)
        assert made.shape == given.shape
        values = torch.linalg.svdvals(made.float())
        assert 0.6 < values.min() < values.max() < 1.25
    together = orthogonalize(matrices, dtype).float()
    u_vt = together @ v @ u.mT  # of U S' V^T it makes U S' U^T: no direction is turned
    torch.testing.assert_close(u_vt, u_vt.mT, rtol=0, atol=0.02)
    alone = torch.stack([orthogonalize(matrix, dtype) for matrix in matrices])
    torch.testing.assert_close(alone.float(), together, rtol=0, atol=0.02)


def test_an_evaluation_counts_the_sizes_of_its_batches():
    """The last batch of an evaluation is often smaller than the others."""
    loss_model = train.Loss(make(TINY))
    ids = ids_of(7, 21)
    x = ids[:, :-1]
    y = ids[:, 1:].clone()
    with torch.no_grad():
        y[6] = loss_model.model(x[6:])[0].argmax(-1)  # what the last batch predicts is right
        expected = loss_model(x, y).item()
        last = loss_model(x[6:], y[6:]).item()
    assert last < expected - 1
    batches = [(x[:4], y[:4]), (x[4:6], y[4:6]), (x[6:], y[6:])]
    assert train.evaluate(loss_model, batches, nullcontext()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_models_of_bench_sweep_train_as_those_of_train_py(
        optimizer, corpus, tmp_path, monkeypatch):
    """Two in a stack, one of them for fewer steps."""
    monkeypatch.chdir(tmp_path)
    silent = sweep.Trial("nano", optimizer, 5, batch_size=4, block_size=32, zero=True, decay=0.6,
                         std=0.5 / math.sqrt(192), linear=True, beta1=0.8, beta2=0.99,
                         momentum=0.85, lr=2e-3, embedding_lr=0.018, warmup=0.2)
    published = replace(silent, steps=3, std=0.0, zero=False, linear=False, seed=1, decay=2 / 3,
                        warmup=1 / 3)
    lab = sweep.Lab(sweep.Options(device="cpu", dataset=str(corpus)), "plan", "nano", steps=5,
                    batch_size=4, block_size=32)
    found = lab.run([published, silent])
    assert lab.run([published, silent]) == found
    common = (f"--optimizer={optimizer}", "--model=nano", f"--dataset={corpus}", "--batch_size=4",
              "--block_size=32", "--learning_rate=2e-3", "--eval_iters=9999", "--device=cpu",
              "--dtype=bfloat16", "--warmup_iters=1")
    train_here(tmp_path, *common, "--max_iters=5", "--decay_iters=3", "--out_dir=silent")
    train_here(tmp_path, *common, "--max_iters=3", "--decay_iters=2", "--out_dir=published",
               "--init=published", "--decay_shape=sqrt", "--seed=1")
    expected = []
    for name in ("published", "silent"):
        curve = read_curve(tmp_path / name / "metrics.jsonl")
        expected.append([entry["val_loss"] for entry in curve if "val_loss" in entry][-1])
    assert found == pytest.approx(expected, rel=5e-3)
    assert expected[0] > expected[1] + 0.3


# ---- Schedules and options


@pytest.mark.parametrize(("schedule", "shape", "expected"), [  # step: share of the peak
    ("wsd", "linear", {0: 0.1, 9: 1, 10: 1, 79: 1, 80: 1, 85: 0.75, 99: 1 / 20}),
    ("wsd", "sqrt", {0: 0.1, 9: 1, 10: 1, 79: 1, 80: 1, 85: 0.5, 99: 1 - math.sqrt(19 / 20)}),
    ("cosine", "linear", {0: 0.1, 9: 1, 55: 0.5, 99: (1 + math.cos(math.pi * 89 / 90)) / 2}),
    ("constant", "linear", {0: 0.1, 9: 1, 50: 1, 99: 1})])
def test_schedules(schedule, shape, expected):
    o = train.Options(max_iters=100, warmup_iters=10, decay_iters=20, learning_rate=0.3,
                      schedule=schedule, decay_shape=shape)
    for step, share in expected.items():
        assert train.lr_at(step, o) == pytest.approx(0.3 * share, rel=1e-12), step


def test_warm_up_and_decay_are_shares_of_the_steps_unless_they_are_given():
    o = train.check_options(train.Options(max_iters=350))
    assert (o.warmup_iters, o.decay_iters) == (7, 245)
    o = train.check_options(train.Options(max_iters=350, warmup_iters=0, decay_iters=1))
    assert (o.warmup_iters, o.decay_iters) == (0, 1)
    o = train.check_options(train.Options(max_iters=350, warmup_iters=150))
    assert (o.warmup_iters, o.decay_iters) == (150, 200)  # as many as are left


def options_of(*words: str) -> tuple[train.Options, str]:
    """What train.py makes of a command line, and what it says of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *words])
        patch.setattr(sys, "excepthook", sys.excepthook)
        return train.parse_options()


def recipe() -> train.Options:
    """The options of the command for the published recipe, in README.md or docs/."""
    commands = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        text = page.read_text().replace("\\\n", " ")
        commands += re.findall(r"python train\.py (.*--model=smollm-135m .*)", text)
    commands = [command for command in commands if "smollm-corpus" in command]
    assert commands
    o, _ = options_of(*shlex.split(commands[0], comments=True))
    return train.check_options(o)


def test_the_recipe_is_the_published_one():
    """text/pretraining/smollm1/config_smollm1_135M.yaml of github.com/huggingface/smollm."""
    o = recipe()
    assert o.batch_size * o.gradient_accumulation_steps * o.block_size == 1_048_576
    assert (o.block_size, o.max_iters) == (2048, 600_000)
    assert (o.weight_decay, o.grad_clip) == (0.01, 1.0)
    assert (o.beta1, o.beta2, o.dataset) == (0.9, 0.95, "smollm-corpus")
    assert (o.optimizer, o.init) == ("adamw", "published")
    hidden_size = PRESETS[o.model].hidden_size
    assert o.embedding_lr_scale is None
    assert train.embedding_scale(hidden_size) == 1
    # steps from 0: warm-up of 5,000, decay by 1 - sqrt in the last 100,000
    expected = {
        0: 3e-3 / 5000, 2499: 1.5e-3, 4999: 3e-3, 5000: 3e-3, 499_999: 3e-3, 500_000: 3e-3,
        525_000: 1.5e-3, 550_000: 3e-3 * (1 - math.sqrt(0.5)), 564_000: 3e-3 * 0.2,
        581_000: 3e-3 * 0.1, 599_999: 3e-3 * (1 - math.sqrt(0.99999))}
    for step, rate in expected.items():
        assert train.lr_at(step, o) == pytest.approx(rate, rel=1e-12), step


NANO = dict(max_iters=600, batch_size=16, block_size=128, eval_iters=20)


def test_nano_trains_with_what_is_best_for_it():
    o, said = options_of("--model=nano")
    assert o == replace(train.Options(model="nano", eval_interval=o.eval_interval), **NANO)
    evaluations = {*range(0, o.max_iters, o.eval_interval), o.max_iters}
    assert len(evaluations) >= 8  # points of validation in loss.png
    of_model, given = said.split("; given: ")
    assert of_model.startswith("options of nano: ")
    for name, value in NANO.items():
        assert f"--{name}={value}" in of_model
    assert given == "none"


def test_the_command_line_goes_before_what_is_best_for_a_model():
    """Even where it asks for what is the default of other models."""
    default = train.Options()
    o, said = options_of("--model=nano", "--seed=7", "--batch_size=4",
                         f"--block_size={default.block_size}")
    assert (o.seed, o.batch_size, o.block_size) == (7, 4, default.block_size)
    assert o.max_iters == 600
    of_model, given = said.split("; given: ")
    assert set(of_model.removeprefix("options of nano: ").split()) == {
        "--model=nano", "--max_iters=600", f"--eval_interval={o.eval_interval}",
        "--eval_iters=20"}
    assert set(given.split()) == {
        "--seed=7", "--batch_size=4", f"--block_size={default.block_size}"}


@pytest.mark.parametrize("model", [name for name in PRESETS if name not in ("nano", "micro")])
def test_other_models_have_the_default_options(model):
    o, said = options_of(f"--model={model}", "--max_iters=7")
    assert o == train.Options(model=model, max_iters=7)
    assert said.endswith("; given: --max_iters=7")
    assert "max_iters" not in said.split("; given: ")[0]


def test_a_model_that_is_not_from_scratch_has_the_default_options():
    o, said = options_of("--init_from=hf", "--batch_size=4")
    assert o == train.Options(init_from="hf", batch_size=4)
    assert said == "options: --init_from=hf --batch_size=4"


def test_checkpoints_of_earlier_versions_have_these_options():
    """A run resumes only if its checkpoint has the very options of train.py."""
    names = set(vars(train.Options()))
    assert names == {
        "out_dir", "overwrite", "init_from", "model", "dataset", "dataset_config", "text_column",
        "encoding_errors", "separator", "max_tokens", "tokenizer", "block_size", "batch_size",
        "gradient_accumulation_steps", "init", "optimizer", "max_iters", "learning_rate",
        "embedding_lr_scale", "schedule", "decay_shape", "warmup_iters", "decay_iters",
        "weight_decay", "momentum", "beta1", "beta2", "grad_clip", "eval_interval", "eval_iters",
        "log_interval", "sample_prompt", "seed", "device", "dtype", "compile", "overfit"}
    assert names > RESUMABLE


# ---- Speed and precision


@pytest.mark.parametrize(("device", "preset", "num_steps", "expected"), [
    ("cpu", "nano", 200, False), ("cpu", "nano", 400, True),
    ("cpu", "smollm2-135m", 5, False), ("cpu", "smollm2-135m", 10, True),
    ("cuda", "nano", 1, True), ("mps", "nano", 10_000, False)])
def test_long_runs_on_cpus_and_all_on_cuda_are_compiled(device, preset, num_steps, expected):
    with torch.device("meta"):
        num_parameters = SmolLM(PRESETS[preset]).num_parameters()
    assert train.pays_to_compile(torch.device(device), num_steps, num_parameters) == expected


def test_flops_are_those_of_the_matmuls():
    model = make(TINY)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(ids_of(1, 64))
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    attention = 6 * TINY.num_hidden_layers * TINY.hidden_size * 64
    assert flops_per_token(model, 64) - attention == 3 * counted / 64


@pytest.mark.parametrize(("peaks", "expected"), [
    ({"float32": 2, "bfloat16": 3, "float16": 3}, "float32"),
    ({"float32": 2, "bfloat16": 4}, "bfloat16"),
    ({"float32": 2, "bfloat16": 1, "float16": 4}, "float16")])
def test_precision_is_of_16_bits_where_that_is_much_faster(peaks, expected):
    assert fastest(peaks) == expected


PAUSE = 0.2  # seconds, far more than a step of a tiny model takes


def slow_down():
    """Let a step of AdamW pause, and evaluations and saves even longer."""
    step = torch.optim.AdamW.step
    forward = SmolLM.forward
    save = torch.save

    def slow_step(self, *arguments, **more):
        time.sleep(PAUSE)
        return step(self, *arguments, **more)

    def slow_forward(self, input_ids, targets=None, cache=None):
        if targets is not None and not torch.is_grad_enabled():
            time.sleep(2 * PAUSE)
        return forward(self, input_ids, targets, cache)

    def slow_save(*arguments, **more):
        time.sleep(2 * PAUSE)
        return save(*arguments, **more)

    torch.optim.AdamW.step = slow_step
    SmolLM.forward = slow_forward
    torch.save = slow_save


def test_tokens_per_second_and_mfu_are_those_of_the_steps_alone(tiny, corpus, tmp_path):
    """Steps that pause for long can't be faster than their pauses, whatever the machine does.
    Evaluations and saves, which pause longer, do not count."""
    options = (*STEADY, f"--dataset={corpus}", f"--init_from={tiny}", "--dtype=float32",
               "--max_iters=4", "--eval_interval=1", "--log_interval=2")
    result = train_here(tmp_path, *options, before=slow_down)
    curve = read_curve(tmp_path / "out" / "metrics.jsonl")
    entries = [entry for entry in curve if "loss" in entry]
    assert [entry["step"] for entry in entries] == [1, 2, 4]
    rates = [entry["tok_per_s"] for entry in entries]
    largest = 4 * 32 / PAUSE  # tokens of a step, and the least that it takes
    assert max(rates) <= largest
    assert statistics.median(rates) > largest / 2
    flops = flops_per_token(make(TINY_1000), 32)
    peak = 1e9 * float(re.search(r"matmul peak ([\d,.]+) GFLOP/s", result.stdout)[1]
                       .replace(",", ""))
    for entry in entries:
        assert entry["mfu"] == pytest.approx(entry["tok_per_s"] * flops / peak, rel=0.01)
        assert f" | {entry['tok_per_s']:,.0f} tok/s | MFU {entry['mfu']:.1%}\n" in result.stdout


PAGES = """
import resource, sys, torch, train
from lib.device import keep_freed_memory
from smollm import Config, SmolLM
if sys.argv[1] == "keep":
    keep_freed_memory()
loss_model = train.Loss(SmolLM(Config(vocab_size=4096, hidden_size=48, num_hidden_layers=1,
                                      num_attention_heads=3, num_key_value_heads=1)))
ids = torch.randint(4096, (16, 256))  # the logits take 67 MB, their gradient as much
for step in range(16):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    loss_model(ids, ids).backward()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is an option of glibc")
@pytest.mark.parametrize("what", ["keep", "give back"])
def test_a_step_takes_no_new_pages_if_freed_memory_is_kept(what):
    command = [sys.executable, "-c", PAGES, what]
    pages = subprocess.check_output(command, cwd=ROOT, text=True).split()
    usual = statistics.median(int(number) for number in pages[-10:])
    assert (usual < 16384) == (what == "keep"), pages  # 67 MB


def half_overflowed(name: str):
    """In the first gradients that this optimizer gets one number has overflowed."""
    unscale = torch.amp.GradScaler.unscale_

    def unscale_(scaler, optimizer):
        if type(optimizer).__name__ == name and scaler.get_scale() == 2**16:
            optimizer.param_groups[0]["params"][0].grad[0, 0] = math.inf
        unscale(scaler, optimizer)

    torch.amp.GradScaler.unscale_ = unscale_


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_a_step_that_overflows_in_float16_is_left_out_by_both_optimizers(
        name, tiny, corpus, tmp_path):
    train_here(tmp_path, *STEADY, "--dtype=float16", f"--dataset={corpus}", f"--init_from={tiny}",
               "--max_iters=1", "--warmup_iters=0",
               before=functools.partial(half_overflowed, name))
    before = torch.load(tiny, weights_only=True)
    after = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)
    for key, p in before["model"].items():
        assert torch.equal(p, after["model"][key]), key
    assert after["scaler"]["scale"] == 2**15


# ---- The whole, beside a plain loop and transformers


def blocks_of(tokens, number: int, size: int) -> list[int]:
    """The blocks of size tokens that a run reads first, in its order."""
    num_blocks = (len(tokens) - 1) // size
    return [block_at(0, i, num_blocks, WINDOW // size) for i in range(number)]


def test_the_published_recipe_is_a_plain_loop_of_adamw_bit_for_bit(corpus, tmp_path):
    """Of nano, in 8 steps: 2 of warm-up, 2 at the peak, 4 of decay."""
    options = cli.difference(recipe(), train.Options())
    options |= dict(model="nano", dataset=corpus, embedding_lr_scale=1, block_size=32, batch_size=4,
                    gradient_accumulation_steps=1, max_iters=8, warmup_iters=2, decay_iters=4,
                    eval_iters=1, device="cpu", dtype="float32")
    train_here(tmp_path, *[f"--{name}={value}" for name, value in options.items()])
    found = torch.load(tmp_path / "out" / "ckpt.pt", weights_only=True)["model"]

    torch.manual_seed(0)
    model = SmolLM(PRESETS["nano"])
    norms = [p for p in model.parameters() if p.dim() == 1]
    matrices = [p for p in model.parameters() if p.dim() == 2]
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": norms, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    tokens = tokens_in(data_folder(tmp_path), "train").astype(np.int64)
    blocks = blocks_of(tokens, 32, 32)
    rates = [1.5e-3, 3e-3, 3e-3, 3e-3, 3e-3]
    rates += [3e-3 * (1 - math.sqrt(done / 4)) for done in (1, 2, 3)]
    for step, rate in enumerate(rates):
        rows = torch.from_numpy(np.stack([tokens[32 * b:32 * b + 33]
                                          for b in blocks[4 * step:4 * step + 4]]))
        model(rows[:, :-1], targets=rows[:, 1:])[1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.state_dict().items():
        assert torch.equal(found[name], weight), name


class Reference(Trainer):
    """transformers' own training loop, which keeps the losses of its micro-batches."""
    def training_step(self, *arguments, **more):
        loss = super().training_step(*arguments, **more)
        self.losses = [*getattr(self, "losses", []), loss.item()]
        return loss


def reference_losses(hf: Path, rows: np.ndarray, folder: Path) -> list[float]:
    """Of 50 steps of two micro-batches of four rows (T + 1), whose last T are targets."""
    options = TrainingArguments(
        folder, max_steps=50, per_device_train_batch_size=4, gradient_accumulation_steps=2,
        use_cpu=True, learning_rate=3e-3, lr_scheduler_type="constant", optim="adamw_torch",
        weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, report_to="none",
        train_sampling_strategy="sequential", save_strategy="no", logging_strategy="no",
        disable_tqdm=True)
    texts = [{"input_ids": row, "labels": row} for row in torch.from_numpy(rows)]
    trainer = Reference(AutoModelForCausalLM.from_pretrained(hf), options, train_dataset=texts)
    trainer.train()
    return [sum(trainer.losses[i:i + 2]) for i in range(0, 100, 2)]


def norms_decay_too():
    init = torch.optim.AdamW.__init__

    def init_(self, groups, *arguments, **more):
        groups = [group | {"weight_decay": 0.1} for group in groups]
        init(self, groups, *arguments, **more)

    torch.optim.AdamW.__init__ = init_


@pytest.mark.parametrize("broken", [None, norms_decay_too], ids=["as it is", "norms decay"])
def test_training_gives_the_loss_curve_of_transformers(broken, tokenizer, corpus, tmp_path):
    """50 steps of train.py and of transformers' Trainer, from the same weights, on the same
    batches."""
    make(TINY_1000).save_pretrained(tmp_path / "hf", tokenizer)
    train_here(
        tmp_path, "--init_from=hf", f"--dataset={corpus}", "--optimizer=adamw", "--max_iters=50",
        "--batch_size=4", "--gradient_accumulation_steps=2", "--block_size=32",
        "--learning_rate=3e-3", "--embedding_lr_scale=1", "--beta1=0.9", "--beta2=0.95",
        "--schedule=constant", "--warmup_iters=0", "--weight_decay=0.1", "--eval_iters=1",
        "--log_interval=1", "--device=cpu", "--dtype=float32", before=broken)
    tokens = tokens_in(data_folder(tmp_path), "train").astype(np.int64)
    rows = [tokens[32 * block:32 * block + 33] for block in blocks_of(tokens, 50 * 8, 32)]
    expected = reference_losses(tmp_path / "hf", np.stack(rows), tmp_path)
    found = losses_in(tmp_path)
    assert expected[0] - expected[-1] > 1
    assert len(found) == 50
    apart = max(abs(a - b) for a, b in zip(found, expected, strict=True))
    assert (apart < 1e-4) == (broken is None), apart


# ---- What a run says of itself


def test_train_logs_evaluates_and_saves(trained):
    log = (trained / "log.txt").read_text()
    validation = [float(loss) for loss in re.findall(r"\| validation loss ([\d.]+), best", log)]
    assert len(validation) == 4  # at steps 0, 6, 10, where the decay begins, and 12
    # logits of std 0.5, and of the token itself sqrt(hidden_size) / 2
    others = 4096 * math.exp(0.5**2 / 2)
    assert validation[0] == pytest.approx(math.log(others + math.exp(192**0.5 / 2)), abs=0.1)
    assert validation[3] < validation[1] < validation[0] - 0.1
    assert list(losses_of(log)) == list(range(1, 13))
    for word in ("lr ", "norm ", "tok/s", "MFU", "perplexity", "bits per byte",
                 "\ndef __init__(self"):
        assert word in log, word
    assert log.startswith("options of nano: ")
    files = {path.name for path in (trained / "out").iterdir()}
    assert files == {".lock", "ckpt-best.pt", "ckpt-previous.pt", "ckpt-stable.pt", "ckpt.pt",
                     "loss.png", "metrics.jsonl"}


def test_validation_loss_and_bits_per_byte_are_those_of_the_held_out_text(trained, ckpt):
    model = SmolLM.from_pretrained(ckpt)
    tokenizer = load_tokenizer(ckpt)
    folder = data_folder(trained)
    val = tokens_in(folder, "val")
    x = torch.tensor(val[:8 * 32 + 1].astype(np.int64))  # 2 batches of 4 blocks of 32
    with torch.no_grad():
        _, loss = model(x[:-1].view(8, 32), targets=x[1:].view(8, 32))
    counts = json.loads((folder / "meta.json").read_text())["windows"][0]
    bits = loss.item() / math.log(2) * counts["val"] / counts["val_bytes"]
    said = last_validation((trained / "log.txt").read_text())
    number = r"([\d.]+)"
    figures = re.fullmatch(rf"step 12 \| validation loss {number}, best {number} \| perplexity "
                           rf"{number} \| {number} bits per byte", said).groups()
    assert [float(figure) for figure in figures] == pytest.approx(
        [loss.item(), loss.item(), math.exp(loss), bits], rel=1e-4)
    text = tokenizer.decode(val, skip_special_tokens=False)
    assert counts["val_bytes"] == len(text.replace("<|endoftext|>", "").encode())


def test_options_of_the_step_are_heeded(trained, corpus, tmp_path):
    """Clipping to almost nothing leaves the loss where it was, bfloat16 changes it a little."""
    log = (trained / "log.txt").read_text()

    def printed(log):
        return [float(loss.removeprefix("loss ")) for loss in losses_of(log).values()]

    def losses_with(option):
        result = run(tmp_path, "train.py", *SMALL, f"--dataset={corpus}", f"--out_dir={option}",
                     option)
        assert result.returncode == 0, result.stderr
        return printed(result.stdout)

    whole = printed(log)
    clipped = losses_with("--grad_clip=1e-12")
    bfloat16 = losses_with("--dtype=bfloat16")
    assert min(clipped) > whole[0] - 0.3 > whole[-1]
    assert 1e-4 < max(abs(a - b) for a, b in zip(bfloat16, whole, strict=True)) < 0.1


def test_cosmopedia_like_parquet_trains(tiny, tmp_path):
    (tmp_path / "cosmopedia-v2").mkdir()
    for shard in range(2):
        texts = [f"Lesson {i} of part {shard}: {'a fact, ' * (i % 30)}" for i in range(300)]
        write_parquet(tmp_path / "cosmopedia-v2" / f"{shard}.parquet", texts)
    train_here(tmp_path, *STEADY, "--dataset=cosmopedia-v2", f"--init_from={tiny}",
               "--max_iters=20")
    losses = losses_in(tmp_path)
    assert losses[-1] < losses[0] - 1


def test_overfit_says_whether_it_got_there(corpus, tmp_path):
    options = (*SMALL, "--overfit=True", f"--dataset={corpus}", "--schedule=constant")
    good = run(tmp_path, "train.py", *options, "--max_iters=300", "--learning_rate=3e-3")
    assert good.returncode == 0, good.stderr
    assert "\noverfit: the loss of the one batch is 0.0" in good.stdout
    bad = run(tmp_path, "train.py", *options, "--max_iters=5", "--learning_rate=1e-5")
    assert bad.returncode == 1
    assert "\noverfit: the loss of the one batch is 8." in bad.stdout
    assert "error: 0.05 was not reached" in bad.stderr
    assert not (tmp_path / "out").exists()


def test_finetuning_starts_from_a_checkpoint(trained, ckpt, corpus, tmp_path):
    options = [option for option in SMALL if not option.startswith("--model")]
    result = Script(tmp_path, "train.py", *options, f"--dataset={corpus}", "--max_iters=2",
                    f"--init_from={ckpt}").wait()
    assert result.returncode == 0, result.stderr
    last = last_validation((trained / "log.txt").read_text())
    assert f"step 0 | {last.split(' | ', 1)[1]}" in result.stdout
