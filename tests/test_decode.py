"""lib/decode.py: the faster step gives what the model's own forward pass gives."""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from lib import decode
from lib.decode import StaticKVCache, avoid_onednn, make_cache, make_step
from lib.faster import with_classes
from smollm import KVCache
from test_smollm import CONFIGS, LLAMA_AND_SMOLLM3, PIECES, TINY, check_cache, ids_of, make

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def assert_near(logits, expected):
    """Up to the rounding of several layers: float32 has 24 bits, bfloat16 8."""
    assert logits.shape == expected.shape
    assert logits.dtype == expected.dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.03}[logits.dtype]
    assert (logits - expected).float().norm() <= tolerance * expected.float().norm()


@pytest.fixture(params=[True, False], ids=["oneDNN", "no oneDNN"])
def onednn(request, monkeypatch) -> bool:
    """Whether torch may use oneDNN by itself: it may unless avoid_onednn was called."""
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", request.param)
    return request.param


@pytest.mark.parametrize("batch_size", [1, 2, 8, 17])
@LLAMA_AND_SMOLLM3
@DTYPES
def test_a_step_gives_the_logits_of_the_model(dtype, config, batch_size, onednn):
    """A prompt of 1 token, of 2, of 23; then single tokens."""
    model = make(config).to(dtype)
    step = make_step(model, compiled=False)
    ids = ids_of(batch_size, 26)
    with torch.no_grad():
        expected = model(ids)[0]
        for length in (1, 2, 23):
            cache = make_cache(model, batch_size, 26, compiled=False)
            logits = step(ids[:, :length], cache)
            for position in range(length, 26):
                assert_near(logits, expected[:, position - 1:position])
                logits = step(ids[:, position:position + 1], cache)


def test_a_step_has_the_very_parameters_of_the_model():
    model = make(TINY)
    parameters = {id(p) for p in model.parameters()}
    copy = with_classes(model, decode.FEW_ROWS_CLASSES)
    assert {id(p) for p in copy.parameters()} == parameters
    assert type(model.model.layers[0].self_attn.q_proj) is not decode.FewRowsLinear
    assert type(copy.model.layers[0].self_attn.q_proj) is decode.FewRowsLinear


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@pytest.mark.parametrize("pieces", PIECES, ids=str)
def test_a_static_cache_gives_the_logits_of_none(config, pieces):
    check_cache(StaticKVCache, config, pieces)


def test_caches_of_compiled_steps_have_few_sizes():
    model = make(TINY)
    sizes = {make_cache(model, 1, length, compiled=True).max_length for length in range(1, 1025)}
    assert sizes == {256, 512, 1024}
    assert make_cache(model, 1, 300, compiled=False).max_length == 300


# ---- Compiled


def new_tokens(model, ids, count: int, **how) -> torch.Tensor:
    return torch.cat(list(model.generate(ids, count, temperature=0, **how)), 1)


def test_static_decode_is_one_graph():
    graphs = []

    def count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    model = make(TINY)
    ids = ids_of(2, 30)
    cache = StaticKVCache(TINY, 2, 30)
    torch._dynamo.reset()  # graphs of other models
    with torch.no_grad():
        expected = model(ids)[0]
        model(ids[:, :10], cache=cache)
        model.model = torch.compile(model.model, backend=count, fullgraph=True)
        for i in range(10, 30):
            logits, _ = model(ids[:, i:i + 1], cache=cache)
            torch.testing.assert_close(logits, expected[:, i:i + 1], rtol=0, atol=1e-4)
    assert len(graphs) == 1


# one row is a sum of products, several are a matmul
@pytest.mark.parametrize(("batch_size", "dtype"), [(1, torch.bfloat16), (2, torch.float32)],
                         ids=str)
def test_a_compiled_step_is_one_graph_and_gives_the_logits_of_the_model(batch_size, dtype):
    config = replace(CONFIGS["smollm3, every 2nd"], num_hidden_layers=2)
    model = make(config).to(dtype)
    torch._dynamo.reset()  # graphs of other models
    step = make_step(model, compiled=True)
    ids = ids_of(batch_size, 30)
    with torch.no_grad(), torch._dynamo.config.patch(error_on_recompile=True):
        expected = model(ids)[0]
        for start in (10, 17):  # the second time with another cache
            cache = make_cache(model, batch_size, 30 + start, compiled=True)
            step(ids[:, :start], cache)
            for i in range(start, 30):
                logits = step(ids[:, i:i + 1], cache)
                assert_near(logits, expected[:, i:i + 1])


# ---- oneDNN


def test_a_step_never_changes_the_setting_of_onednn(onednn):
    """Nor while it runs, nor when it fails: the setting is that of all threads."""
    model = make(TINY).bfloat16()
    seen = []

    def look(module, args):
        seen.append(torch.backends.mkldnn.enabled)
        if len(seen) > 20:
            raise MemoryError

    for layer in model.model.layers:  # make_step copies hooks, too
        layer.mlp.register_forward_pre_hook(look)
    step = make_step(model, compiled=False)
    with pytest.raises(MemoryError):
        new_tokens(model, ids_of(1, 10), 20, step=step)
    assert seen == [onednn] * 21
    assert torch.backends.mkldnn.enabled == onednn


def test_avoiding_onednn_is_for_good(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    avoid_onednn()
    assert torch.backends.mkldnn.enabled == (not decode.ONEDNN_IS_SLOW)


@DTYPES
def test_eight_threads_generate_what_one_does(dtype, onednn):
    model = make(TINY).to(dtype)
    step = make_step(model, compiled=False)

    def generate(seed):
        torch.set_num_threads(1)  # of this thread
        cache = make_cache(model, 1, 60, compiled=False)
        ids = ids_of(1, 10 + seed, seed=seed)
        return new_tokens(model, ids, 40, cache=cache, step=step).tolist()

    with ThreadPoolExecutor(1) as pool:
        expected = list(pool.map(generate, range(8)))
    assert len({str(text) for text in expected}) == 8
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            assert list(pool.map(generate, range(8))) == expected
    assert torch.backends.mkldnn.enabled == onednn


def test_a_cache_without_a_step_is_a_plain_one():
    cache = make_cache(make(TINY).bfloat16(), 2, 20, compiled=False)
    assert type(cache) is KVCache
    assert cache.dtype == torch.bfloat16
