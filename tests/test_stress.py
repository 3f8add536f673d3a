"""Short runs of tests/stress, whose long ones docs/proofs.md tells of."""

import sys

import pytest

from tests.helpers import ROOT, run
from tests.stress import data, faults


def run_here(campaigns, monkeypatch, *options: str) -> int:
    """The exit code of a command of tests/stress, whose processes are forked from what the other
    tests fork theirs from."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which commands set
    monkeypatch.setattr(sys, "argv", [campaigns.__file__, *options])
    with pytest.raises(SystemExit) as end:
        campaigns.main()
    return end.value.code


def test_faults_lose_nothing(monkeypatch, capsys):
    code = run_here(faults, monkeypatch, "--kills=1", "--moments=1", "--terms=1", "--disks=1",
                    "--flips=50")
    out = capsys.readouterr().out
    assert code == 0, out
    assert len(out.splitlines()) == 5


def test_the_preparation_of_data_gives_the_tokens_of_the_text(monkeypatch, capsys):
    code = run_here(data, monkeypatch, "--pairs=1", "--kills=1", "--ranks=2")
    out = capsys.readouterr().out
    assert code == 0, out
    assert len(out.splitlines()) == 3


def test_fuzzed_files_load_right_or_are_refused():
    result = run(ROOT, "tests/stress/fuzz.py", "--cases=40", "--seed=1")
    assert result.returncode == 0, result.stdout + result.stderr
