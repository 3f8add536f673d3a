"""examples/ladder.py, from a GPT-2 block to SmolLM."""

from dataclasses import replace
from pathlib import Path

import matplotlib.image
import torch

from examples import ladder
from smollm import PRESETS
from test_smollm import TINY, ids_of


def test_the_ladder_has_the_counts_of_the_project_s_history():
    counts = []
    with torch.device("meta"):
        for rung in reversed(range(len(ladder.LADDER))):
            counts.append(ladder.build(rung, PRESETS["smollm2-135m"]).num_parameters())
    assert counts == [150_312_960, 122_001_408, 121_966_272, 108_672_192, 135_260_352,
                      134_670_528, 134_515_008]


def test_positions_of_the_ladder_are_learned_below_rope_and_turned_above():
    # in one layer, the last token sees all others in no order, unless positions tell
    config = replace(TINY, num_hidden_layers=1)
    ids = ids_of(1, 20)
    shuffled = torch.cat((ids[:, :19].flip(1), ids[:, 19:]), 1)
    names = [name for name, _ in ladder.LADDER]
    rope = names.index("RoPE")
    for rung, name in enumerate(names):
        model = ladder.build(rung, config).eval()
        if rung > rope:
            model.model.embed_tokens.positions.weight.data.zero_()
        with torch.no_grad():
            last = model(ids)[0][:, -1]
            of_shuffled = model(shuffled)[0][:, -1]
        assert torch.allclose(last, of_shuffled, atol=1e-5) == (rung > rope), name


def test_each_rung_of_the_ladder_trains(corpus, here):
    o = ladder.Options(steps=4, batch_size=2, block_size=32, seeds=(0, 1), dataset=str(corpus),
                       device="cpu")
    results = ladder.climb(o)
    assert list(results) == [name for name, _ in reversed(ladder.LADDER)]
    for name, trainings in results.items():
        assert len(trainings) == 2
        for training in trainings:
            assert training.losses[-1] < training.losses[0], name
    table = ladder.table(results, PRESETS["smollm2-135m"])
    assert "| no biases, no dropout: SmolLM | 134,515,008 | " in table
    ladder.draw(results, Path("ladder.png"))
    assert matplotlib.image.imread("ladder.png").ndim == 3
