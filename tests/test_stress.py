"""Short runs of tests/stress, whose long ones docs/proofs.md tells of."""

from tests.helpers import ROOT, run


def test_faults_lose_nothing():
    result = run(ROOT, "tests/stress/faults.py", "--kills=1", "--moments=2", "--terms=1",
                 "--disks=1", "--flips=100")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 5


def test_the_preparation_of_data_gives_the_tokens_of_the_text():
    result = run(ROOT, "tests/stress/data.py", "--pairs=1", "--kills=2", "--ranks=2")
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(result.stdout.splitlines()) == 3


def test_fuzzed_files_load_right_or_are_refused():
    result = run(ROOT, "tests/stress/fuzz.py", "--cases=40", "--seed=1")
    assert result.returncode == 0, result.stdout + result.stderr
