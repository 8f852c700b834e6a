"""Run every benchmark here and write their tables to results/cpu-<processor>.md, and the numbers beside it as JSON.

What a benchmark takes, this takes: --threads, --quick. --out FOLDER writes elsewhere.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from aims import aims_table
from measure import as_markdown, describe_rates

HERE = Path(__file__).parent


def run(bench: Path, options: list[str]) -> dict:
    """A benchmark's title, machine, rates and rows; it prints them as it goes."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        subprocess.run([sys.executable, bench, "--json", file.name, *options], check=True)
        return json.loads(Path(file.name).read_text())


def section(result: dict) -> str:
    """One benchmark in Markdown."""
    table = as_markdown(list(result["rows"][0]), [row.values() for row in result["rows"]])
    return f"## {result['title']}\n\n{describe_rates(result['rates'])}\n\n{table}\n"


def page(results: list[dict]) -> str:
    """All of them in Markdown, with what was asked for first."""
    machine = results[0]["machine"]
    head = "\n".join(f"- {name}: {value}" for name, value in machine.items())
    aims = f"## What was asked for\n\n{aims_table({'reached': results})}\n"
    return "\n".join([f"# Benchmarks on {machine['processor']}\n\n{head}\n", aims, *map(section, results)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=HERE / "results")
    arguments, options = parser.parse_known_args()
    results = [run(bench, options) for bench in sorted(HERE.glob("bench_*.py"))]
    slug = re.sub(r"[^a-z0-9]+", "-", results[0]["machine"]["processor"].lower()).strip("-")
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / f"cpu-{slug}.md").write_text(page(results))
    (arguments.out / f"cpu-{slug}.json").write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
