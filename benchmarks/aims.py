"""What was asked for beside what was reached: a table of the pages that run_all.py wrote.

python benchmarks/aims.py [benchmarks/results/cpu-*.json]
"""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tables import as_markdown

HERE = Path(__file__).parent

ATTENTION, RATIO, SHARE = "prompt_attention", "ratio to the best", "% of the best one"


@dataclass(frozen=True)
class Aim:
    """Every row of a benchmark whose `what` matches should reach a figure.

    benchmark  how its title begins
    most       whether at most `asked` is asked for, not at least
    using      the instruction set that it is asked of; any where empty
    """

    name: str
    asked: float
    benchmark: str
    column: str
    rows: str = ""
    most: bool = False
    using: str = ""

    def of(self, results: list[dict]) -> str:
        """The smallest and the largest figure, and how many rows reach what is asked for."""
        values = [
            row[self.column]
            for result in results
            if result["title"].startswith(self.benchmark) and result["machine"]["native"].endswith(self.using)
            for row in result["rows"]
            if re.search(self.rows, str(row.get("what", ""))) and row[self.column] != ""
        ]
        if not values:
            return ""
        reached = sum(value <= self.asked if self.most else value >= self.asked for value in values)
        return f"{min(values):.3g} to {max(values):.3g} ({reached} of {len(values)})"


AIMS = [
    Aim("attention, float32: best PyTorch way / fused", 4, ATTENTION, RATIO, "float32.*, forward$"),
    Aim("the same with backward", 3.5, ATTENTION, RATIO, "float32.*and backward$"),
    Aim("attention, float32, d 64: % of the best product", 70, ATTENTION, SHARE, "float32.* d 64, forward$"),
    Aim("the same with backward", 60, ATTENTION, SHARE, "float32.* d 64.*and backward$"),
    Aim(
        "attention, bfloat16 with AMX: best PyTorch way / fused",
        5,
        ATTENTION,
        RATIO,
        "bfloat16.*, forward$",
        using="amx",
    ),
    Aim("the same with backward", 10, ATTENTION, RATIO, "bfloat16.*and backward$", using="amx"),
    Aim("backward: all gradients / the prefix's alone", 4, ATTENTION, RATIO, "prefix only$"),
    Aim("`to_padded`: % of a copy", 60, "to_padded", "% of copy"),
    Aim("`to_packed`: % of a copy", 60, "to_packed", "% of copy"),
    Aim("`gather_histories`: % of a copy", 60, "gather_histories", "% of copy"),
    Aim("`embed`: gather + add + add / fused", 3, "embed", "gather + add + add / fused"),
    Aim("prompt-tuning step: padded / fused", 5, "train step", "padded / fused"),
    Aim("prompt-tuning step: length buckets / fused", 2, "train step", "buckets / fused"),
    Aim("encode, newest state: padded / fused", 8, "encode, users", "padded / fused", "last state,"),
    Aim("encode, newest state: length buckets / fused", 3, "encode, users", "buckets / fused", "last state,"),
    Aim("encode, newest state and mean: padded / fused", 8, "encode, users", "padded / fused", "means"),
    Aim("encode, newest state and mean: length buckets / fused", 3, "encode, users", "buckets / fused", "means"),
    Aim(
        "100 to 100,000 users a call, attention: time a row / the fastest",
        1.15,
        "flat",
        "attention / its fastest",
        most=True,
    ),
    Aim(
        "100 to 100,000 users a call, encode: time a row / the fastest", 1.15, "flat", "encode / its fastest", most=True
    ),
    Aim("a call on 8 rows: microseconds over an empty function", 10, "a call", "difference", most=True),
]


def aims_table(pages: dict[str, list[dict]]) -> str:
    """Aims by page: `pages` are what run_all.py writes as JSON, by the name of their column."""
    rows = []
    for aim in AIMS:
        asked = f"{'at most' if aim.most else 'at least'} {aim.asked:g}"
        rows.append([aim.name, asked, *(aim.of(results) for results in pages.values())])
    return as_markdown(["", "asked for", *pages], rows)


if __name__ == "__main__":
    files = [Path(name) for name in sys.argv[1:]] or sorted((HERE / "results").glob("cpu-*.json"))
    pages = {file.stem: json.loads(file.read_text()) for file in files}
    print(aims_table({results[0]["machine"]["processor"]: results for results in pages.values()}))
