"""Without a way to the Hub: what is in its cache loads, anything else is one line."""

from test_smollm import make
from tests.helpers import TINY_1000, run


def offline(folder) -> dict[str, str]:
    """An environment in which the Hub is out of reach, and its cache is in this folder."""
    return {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(folder / "hf")}


def test_a_model_that_the_hub_cannot_give_is_one_line(tmp_path):
    result = run(tmp_path, "sample.py", "--ckpt=HuggingFaceTB/SmolLM2-135M@main",
                 **offline(tmp_path))
    assert result.returncode == 1
    assert result.stderr.startswith("error: HuggingFaceTB/SmolLM2-135M@main: can't be read: ")
    assert result.stderr.endswith("on the Hub it was not found: see README.md\n")
    assert len(result.stderr.splitlines()) == 1


def test_a_dataset_that_the_hub_cannot_give_is_one_line(tmp_path):
    """As unplugged, for a model that has the Hub's tokenizer; and if told so, at once."""
    told_so = {"HF_HUB_OFFLINE": "1"}
    for model, environment, what, said in (
            ("smollm2-135m", {}, "tokenizer HuggingFaceTB/cosmo2-tokenizer", "onnect"),
            ("nano", told_so, "dataset 'cosmopedia'", "HuggingFaceTB/smollm-corpus")):
        result = run(tmp_path, "train.py", "--dataset=cosmopedia", f"--model={model}",
                     **offline(tmp_path), **environment)
        assert result.returncode == 1
        error = result.stderr.splitlines()[-1]
        assert error.startswith(f"error: {what}: can't be read: ")
        assert said in error
        assert error.endswith("give a file or folder of your own, --dataset=PATH")
        assert "Traceback" not in result.stderr


def test_a_model_in_the_cache_loads(tokenizer, tmp_path):
    cached = tmp_path / "hf" / "hub" / "models--someone--tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    make(TINY_1000).save_pretrained(cached / "snapshots" / commit, tokenizer)
    (cached / "refs").mkdir()
    for revision in ("main", "v2"):
        (cached / "refs" / revision).write_text(commit)
    result = run(tmp_path, "sample.py", "--ckpt=someone/tiny@v2", "--max_new_tokens=5",
                 **offline(tmp_path))
    assert result.returncode == 0, result.stderr
