"""What benchmarks share: users of realistic lengths, medians, a header of what the machine can do, --json.

Memory given back to the system comes back page by page, which a training loop that holds on to its memory does not
pay for; glibc maps every large block anew. Importing this module makes it keep what it has: the header says so.
"""

import argparse
import ctypes
import gc
import json
import platform
import re
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from tables import as_markdown
from torch import Tensor

from pcl_ext import ops


def keep_memory() -> str:
    """Have the C library reuse memory instead of mapping it anew; says whether it does."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return "as the C library gives it"
    trim_threshold, mmap_max = -1, -4  # malloc.h
    done = mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)
    return "reused" if done else "as the C library gives it"


def release_memory() -> None:
    """Give back what is free: between shapes that leave large holes behind."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


PRODUCT_GFLOP = 2 * 1024**3 / 1e9


def lengths_of(users: int, mean: float, *, most: int | None = None) -> Tensor:
    """Lognormal history lengths [users] of about this mean, at most `most`, 3.2 times the mean where left out."""
    generator = torch.Generator().manual_seed(0)
    raw = torch.exp(0.7 * torch.randn(users, generator=generator))
    return (raw * mean / raw.mean()).long().clamp(1, most or int(3.2 * mean))


def to_offsets(lengths: Tensor) -> Tensor:
    """Lengths [B] to offsets [B + 1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def times_ms(ways: dict[str, Callable], *, seconds: float = 0.2, least: int = 6) -> dict[str, list[float]]:
    """Wall-clock milliseconds of each call, shortest first.

    The ways take turns, so that what disturbs the machine for a while disturbs all of them. A turn is a call that is
    not counted, which meets the caches and the waiting threads that another way has left behind, and two that are.
    Turns go on for `seconds` a way.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    spent = 0.0
    while len(next(iter(times.values()))) < least or spent < seconds * len(ways):
        for name, run in ways.items():
            run()
            for _ in range(2):
                begin = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - begin))
                spent += times[name][-1] / 1e3
    return {name: sorted(calls) for name, calls in times.items()}


def medians_ms(ways: dict[str, Callable], *, seconds: float = 0.2, least: int = 6) -> dict[str, float]:
    """Median wall-clock milliseconds of each way, called in turn."""
    return {name: calls[len(calls) // 2] for name, calls in times_ms(ways, seconds=seconds, least=least).items()}


def median_ms(run: Callable, *, seconds: float = 0.2, least: int = 6) -> float:
    """medians_ms of a single way."""
    return medians_ms({"": run}, seconds=seconds, least=least)[""]


def processor() -> str:
    """The processor's name, as the system tells it."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE) if info.exists() else None
    return found[1].strip() if found else platform.machine()


def matrix_product(dtype: torch.dtype) -> Callable[[], Tensor]:
    """A product of PRODUCT_GFLOP operations, to be timed among what it is compared with."""
    a, b = torch.randn(2, 1024, 1024).to(dtype)
    return lambda: a @ b


def matrix_products(dtype: torch.dtype) -> dict[str, Callable[[], Tensor]]:
    """The same product by every way that may be the fastest known: of torch and, in float32, of ops.linear."""
    products = {"product": matrix_product(dtype)}
    if dtype == torch.float32:
        a, b = torch.randn(2, 1024, 1024)
        products["linear"] = lambda: ops.linear(a, b)
    return products


def copy_of(moved: int) -> Callable[[], Tensor]:
    """Filling a new tensor by copy_, so that `moved` bytes are read or written: half of them each."""
    source = torch.ones(moved // 2, dtype=torch.uint8)
    return lambda: torch.empty(source.shape, dtype=torch.uint8).copy_(source)


def machine_rates() -> dict[str, float]:
    """Of this run: matrix products of torch and ops.linear (GFLOP/s), a copy of 64 MB (GB/s, read and written).

    From the shortest call: a machine disturbed just then must not make every share below look large.
    """
    source, target = torch.randn(2, 16 << 20)
    float32 = matrix_products(torch.float32)
    products = {"float32": float32["product"], "bfloat16": matrix_product(torch.bfloat16), "linear": float32["linear"]}
    work = dict.fromkeys(products, PRODUCT_GFLOP) | {"copy": 2 * source.nbytes / 1e9}
    times = times_ms({**products, "copy": lambda: target.copy_(source)})
    return {name: 1e3 * work[name] / calls[0] for name, calls in times.items()}


class Report:
    """A Markdown table with a header of versions and machine rates; ratio first; --json FILE keeps the numbers.

    quick  sizes that show that the benchmark runs, not how fast (--quick)
    """

    def __init__(self, title: str, columns: list[str]):
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
        parser.add_argument("--threads", type=int, default=2)
        parser.add_argument("--quick", action="store_true", help="the smallest shapes only: does it run?")
        self.arguments = parser.parse_args()
        torch.set_num_threads(self.arguments.threads)
        self.title, self.columns, self.quick = title, columns, self.arguments.quick
        self.rows: list[tuple] = []
        self.rates = machine_rates()
        self.machine = {
            "processor": processor(),
            "date": date.today().isoformat(),
            "torch": torch.__version__,
            "python": platform.python_version(),
            "native": ops.native_status().split(".so, ")[-1],
            "threads": torch.get_num_threads(),
            "memory": keep_memory(),
        }
        print(f"# {title}\n\n{json.dumps(self.machine)}\n\n{describe_rates(self.rates)}\n\n{as_markdown(columns, [])}")

    def shapes(self, shapes: list, quick: list | None = None) -> list:
        """What to measure: `shapes`, or with --quick `quick`, the first of `shapes` where that is left out."""
        return (quick or shapes[:1]) if self.quick else shapes

    def row(self, *values) -> None:
        """Print one row at once, and keep it."""
        self.rows.append(values)
        print(as_markdown(self.columns, [values]).splitlines()[-1], flush=True)

    def close(self) -> None:
        """Write the JSON file when one was asked for."""
        if self.arguments.json:
            kept = {"title": self.title, "machine": self.machine, "rates": self.rates}
            rows = [dict(zip(self.columns, row)) for row in self.rows]
            Path(self.arguments.json).write_text(json.dumps({**kept, "rows": rows}, indent=1))


def main(title: str, columns: list[str], bench: Callable, shapes: list, quick: list | None = None) -> None:
    """A whole benchmark: `bench(report, *shape)` adds the rows of each shape; `quick` as `Report.shapes` has it."""
    torch.manual_seed(0)
    report = Report(title, columns)
    for shape in report.shapes(shapes, quick):
        bench(report, *shape)
    report.close()


def describe_rates(rates: dict[str, float]) -> str:
    """machine_rates in words."""
    return (
        f"Matrix product of torch {rates['float32']:.0f} GFLOP/s in float32, {rates['bfloat16']:.0f} in bfloat16, of"
        f" ops.linear {rates['linear']:.0f} in float32; copy {rates['copy']:.1f} GB/s."
    )
