"""Where a text ends: at any of a set of tokens, of config.json or generation_config.json."""

import io
import itertools
import json
from contextlib import redirect_stdout
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import sample
from lib import models
from smollm import Config, InputError, SmolLM
from test_smollm import make
from tests.helpers import TINY_1000, greedy

UNSTATED = "not stated"


def state(path, name: str, value):
    """Let the JSON file say so; UNSTATED: not at all."""
    settings = json.loads(path.read_text()) if path.exists() else {}
    settings.pop(name, None)
    if value is not UNSTATED:
        settings[name] = value
    path.write_text(json.dumps(settings))


@pytest.mark.parametrize(("in_config", "in_generation_config", "right"), [
    (2, UNSTATED, 2), ([2, 0], UNSTATED, [2, 0]), (None, UNSTATED, None), (0, 2, 2),
    (0, [2, 1], [2, 1]), (None, [1, 2], [1, 2]), ([2, 0], 1, 1), (2, None, None)], ids=str)
def test_generation_config_says_where_texts_end_or_else_config(
        in_config, in_generation_config, right, valid):
    (valid / "generation_config.json").unlink()
    state(valid / "config.json", "eos_token_id", in_config)
    if in_generation_config is not UNSTATED:
        state(valid / "generation_config.json", "eos_token_id", in_generation_config)
    theirs = AutoModelForCausalLM.from_pretrained(valid)
    assert theirs.generation_config.eos_token_id == right
    assert SmolLM.from_pretrained(valid).config.eos_token_id == right
    assert models.load(valid).model.config.eos_token_id == right


def test_a_generation_config_that_says_nothing_of_it_leaves_it_to_config(valid):
    state(valid / "config.json", "eos_token_id", 2)
    (valid / "generation_config.json").write_text('{"temperature": 0.5}')
    assert SmolLM.from_pretrained(valid).config.eos_token_id == 2


@pytest.mark.parametrize("value", ["2", True, [0, [2]], [0, "2"], 1000, [0, -1], 2.0, {"a": 1}],
                         ids=str)
def test_what_is_no_token_does_not_end_texts(value):
    hf = TINY_1000.to_hf()
    with pytest.raises(InputError, match="eos_token_id is "):
        Config.from_hf(hf | {"eos_token_id": value})


@pytest.fixture(scope="module")
def model() -> SmolLM:
    return make(TINY_1000)


@pytest.fixture(scope="module")
def hf(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ends")
    model.save_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder)


def test_a_row_ends_at_any_of_several_tokens_as_in_transformers(model, hf):
    ids = torch.tensor([[5, 6, 7], [300, 20, 4], [11, 12, 13]])
    free = [greedy(model, row, 24) for row in ids.tolist()]
    ends = [row[-1] for row in free]
    assert len(set(ends)) == 3
    columns = model.generate(ids, 24, temperature=0, eos_id=ends)
    ours = torch.cat(list(columns), 1)
    theirs = hf.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=24,
                         do_sample=False, eos_token_id=ends, pad_token_id=ends[0])[:, 3:]
    assert ours.shape == theirs.shape
    for row, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        end = min(row.index(token) for token in ends if token in row)
        assert row[:end + 1] == other[:end + 1]
        assert set(row[end:]) == {row[end]}  # what has ended repeats its end
    assert ours[:, -1].tolist() == ends  # each of them has ended a row


def test_a_row_that_has_ended_repeats_its_end_whatever_the_model_says(model):
    says = torch.tensor([[5, 9, 7, 8, 6], [6, 7, 5, 4, 9]])

    def step(input_ids, cache):
        made = next(columns)
        return F.one_hot(says[:, made], 1000)[:, None].float()  # (B, 1, V)

    columns = itertools.count()
    made = model.generate(torch.ones(2, 3, dtype=torch.int64), 5, temperature=0, eos_id=[9, 4],
                          step=step)
    assert torch.cat(list(made), 1).tolist() == [[5, 9, 9, 9], [6, 7, 5, 4]]


@pytest.mark.parametrize("eos_id", [None, []], ids=str)
def test_without_an_end_a_text_goes_on(eos_id, model):
    assert len(greedy(model, [5, 6, 7], 24, eos_id)) == 24


@pytest.mark.parametrize("num_samples", [1, 2])
def test_a_completion_ends_where_generation_config_says_and_not_where_config_does(
        num_samples, model, tokenizer, tmp_path):
    ids = tokenizer.encode("def f(").ids
    free = greedy(model, ids, 20)
    first = next(token for token in free if token != free[0])
    assert first in free
    model = make(replace(TINY_1000, eos_token_id=999))
    model.save_pretrained(tmp_path, tokenizer)
    state(tmp_path / "generation_config.json", "eos_token_id", [free[6], first])
    bundle = models.load(tmp_path)
    end = min(free.index(first), free.index(free[6]))
    with redirect_stdout(io.StringIO()) as out:
        o = sample.Options(prompt="def f(", max_new_tokens=20, num_samples=num_samples)
        sample.complete(bundle, o, {"temperature": 0})
    text = "def f(" + tokenizer.decode(free[:end]) + "\n"
    if num_samples == 1:
        assert out.getvalue() == text
    else:
        assert out.getvalue() == 2 * (text + "-" * 60 + "\n")
