"""What cannot be used is told in one line: the value, the limit, the way out. Nothing is lost."""

import subprocess
import sys

import pytest

from tests.helpers import ROOT, contents, run

BAD = {  # what is said: the command
    "Unrecognized options: --batchsize=8": "train.py --batchsize=8",
    "Error parsing --batch_size": "train.py --batch_size=many",
    "invalid choice 'fast'": "train.py --schedule=fast",
    "batch_size is 0, it must be at least 1": "train.py --batch_size=0",
    "learning_rate is nan": "train.py --learning_rate=nan",
    "beta2 is 1.0": "train.py --beta2=1",
    "model 'gpt2' is no preset": "train.py --out_dir=new --model=gpt2",
    "dataset 'nowhere' does not exist": "train.py --out_dir=new --model=nano --dataset=nowhere",
    "has no .csv, .json, .jsonl, .md, .ndjson, .parquet, .py, .tsv, .txt files":
        "train.py --out_dir=new --model=nano --dataset=empty_folder",
    "is empty or too short": "train.py --out_dir=new --model=nano --dataset=empty.txt",
    "binary.txt: it is not UTF-8 text": "train.py --out_dir=new --model=nano --dataset=binary.txt",
    "has the suffix '.pt', which is none of .csv, .json":
        "train.py --out_dir=new --model=nano --dataset=cut.pt",
    "model is nano, but out/ckpt.pt brings its own":
        "train.py --out_dir=new --init_from=out/ckpt.pt --model=nano",
    "out/ckpt.pt is at step 12, where the learning rate has decayed to 0.001":
        "train.py --init_from=resume --max_iters=40",
    "out/ckpt-stable.pt does not exist": "train.py --init_from=stable --max_iters=40",
    "out: can't be read: it has no config.json: this is the folder of a run: name its ckpt.pt":
        "train.py --out_dir=new --init_from=out",
    "there is nothing to draw": "tools/plot.py",
    "less than a block of 99":
        "train.py --out_dir=new --model=nano --block_size=99 --dataset=short_folder",
    "block_size is 4096": "train.py --out_dir=new --model=nano --block_size=4096",
    "warmup_iters 90 and decay_iters 20 exceed max_iters 100":
        "train.py --out_dir=new --warmup_iters=90 --decay_iters=20 --max_iters=100",
    "File exists: 'empty.txt'": "train.py --out_dir=empty.txt --model=nano",
    "tokenizer is big, but out/ckpt.pt brings its own":
        "train.py --out_dir=new --init_from=out/ckpt.pt --tokenizer=big",
    "out/ckpt.pt is at step 12 of 12": "train.py --init_from=resume",
    "learning_rate is 0.002 in out/ckpt.pt": "train.py --init_from=resume --learning_rate=1e-3",
    "weights/ckpt.pt has weights, but not all the state":
        "train.py --init_from=resume --out_dir=weights",
    "device 'meta' can't be used": "sample.py --device=meta",
    "seed is -1": "sample.py --seed=-1",
    "the tokenizer has 70000 tokens": "train.py --out_dir=new --model=nano --tokenizer=big",
    "nowhere.json: can't be read": "train.py --out_dir=new --model=nano --tokenizer=nowhere.json",
    "device 'abacus' can't be used": "train.py --out_dir=new --device=abacus",
    "out has a checkpoint: go on from it with --init_from=resume": "train.py --model=nano",
    "other/ckpt.pt: can't be read": "train.py --init_from=resume --out_dir=other",
    "no/ckpt.pt: can't be read": "train.py --init_from=stable --out_dir=no",
    "out/nothing.pt: can't be read": "sample.py --ckpt=out/nothing.pt",
    "cut.pt: can't be read": "sample.py --ckpt=cut.pt",
    "empty_folder: can't be read": "sample.py --ckpt=empty_folder",
    "temperature is nan": "sample.py --temperature=nan",
    "temperature is -1.0": "sample.py --temperature=-1",
    "top_p is 0.0": "sample.py --top_p=0",
    "top_p is 1.5": "sample.py --top_p=1.5",
    "num_samples is 0": "sample.py --num_samples=0",
    "must fit in the 1024 tokens that are left of": "sample.py --max_new_tokens=1024 --prompt=long",
    "Unrecognized options: --promt=x": "sample.py --promt=x",
}


@pytest.fixture(scope="session")
def bad_results(mess) -> dict:
    """What each command of BAD ended with; none of them has changed a file."""
    before = contents(mess)
    results = {}
    for message, command in BAD.items():
        script, *options = command.split()
        results[message] = run(mess, script, *options)
    assert contents(mess) == before
    return results


@pytest.mark.parametrize("message", BAD, ids=BAD.values())
def test_bad_input_gets_one_line_and_loses_nothing(message, bad_results):
    result = bad_results[message]
    assert result.returncode in (1, 2), result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    lines = [line for line in result.stderr.splitlines() if message in line]
    assert lines, result.stderr
    if result.returncode == 1:  # else the command-line library has told what is wrong
        assert result.stderr.splitlines()[-1] == lines[0]
        assert lines[0].startswith("error: ")


def test_bugs_keep_their_traceback():
    code = "import sys; from lib import cli; sys.excepthook = cli.one_line_errors; 1 / 0"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1
    assert "Traceback" in result.stderr
