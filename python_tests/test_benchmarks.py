"""Every benchmark runs, on sizes that say nothing about speed: each checks its results before it times them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.slow
@pytest.mark.needs_ext
def test_every_benchmark_runs(tmp_path):
    out = tmp_path / "results"
    subprocess.run([sys.executable, BENCHMARKS / "run_all.py", "--quick", "--out", out], cwd=tmp_path, check=True)
    (text,), (numbers,) = out.glob("cpu-*.md"), out.glob("cpu-*.json")
    results = json.loads(numbers.read_text())
    assert len(results) == len(list(BENCHMARKS.glob("bench_*.py")))
    for result in results:
        assert f"## {result['title']}\n" in text.read_text()
        assert all(value > 0 for row in result["rows"] for value in row.values() if isinstance(value, float))
        assert result["rates"].keys() == {"float32", "bfloat16", "linear", "copy"}


def test_the_page_shows_what_the_kept_runs_reached():
    made = subprocess.run([sys.executable, BENCHMARKS / "aims.py"], capture_output=True, check=True, text=True).stdout
    assert made in (BENCHMARKS / "RESULTS.md").read_text()
