"""What benchmarks share: users of realistic lengths, medians, a header of what the machine can do, --json."""

import argparse
import json
import platform
import time
from collections.abc import Callable

import torch
from torch import Tensor

from pcl_ext import ops


def lengths_of(users: int, mean: float, *, seed: int = 0) -> Tensor:
    """Lognormal history lengths [users] of about this mean, at most 3.2 times it."""
    generator = torch.Generator().manual_seed(seed)
    raw = torch.exp(0.7 * torch.randn(users, generator=generator))
    return (raw * mean / raw.mean()).long().clamp(1, int(3.2 * mean))


def to_offsets(lengths: Tensor) -> Tensor:
    """Lengths [B] to offsets [B + 1]."""
    return torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])


def median_ms(run: Callable, *, seconds: float = 0.3, least: int = 3) -> float:
    """Median wall-clock milliseconds of a call, after one that is not counted."""
    run()
    times: list[float] = []
    while len(times) < least or sum(times) < seconds:
        begin = time.perf_counter()
        run()
        times.append(time.perf_counter() - begin)
    return sorted(times)[len(times) // 2] * 1e3


def matmul_gflops() -> float:
    """The float32 matrix-product rate of this run, 2 * n^3 for n = 1024."""
    a, b = torch.randn(2, 1024, 1024)
    return 2 * 1024**3 / median_ms(lambda: a @ b) / 1e6


def copy_gbytes() -> float:
    """The rate of this run's plain copy of 256 MB, bytes read or written once each."""
    source, target = torch.randn(2, 32 << 20)
    return 4 * source.numel() / median_ms(lambda: target.copy_(source)) / 1e6


class Report:
    """A Markdown table with a header of versions and machine rates; ratio first; --json FILE keeps the numbers."""

    def __init__(self, title: str, columns: list[str]):
        parser = argparse.ArgumentParser(description=title)
        parser.add_argument("--json", metavar="FILE", help="also write the rows to FILE")
        parser.add_argument("--threads", type=int, default=2)
        self.arguments = parser.parse_args()
        torch.set_num_threads(self.arguments.threads)
        self.columns, self.rows = columns, []
        self.matmul, self.copy = matmul_gflops(), copy_gbytes()
        self.machine = {
            "torch": torch.__version__,
            "python": platform.python_version(),
            "processor": platform.machine(),
            "native": ops.native_status(),
            "threads": torch.get_num_threads(),
            "matmul_gflops": round(self.matmul, 1),
            "copy_gbytes": round(self.copy, 2),
        }
        print(f"# {title}\n\n{json.dumps(self.machine)}\n")
        print("| " + " | ".join(columns) + " |\n|" + "---|" * len(columns))

    def row(self, *values) -> None:
        """Print one row at once, and keep it."""
        self.rows.append(dict(zip(self.columns, values)))
        print("| " + " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in values) + " |", flush=True)

    def close(self) -> None:
        """Write the JSON file when one was asked for."""
        if self.arguments.json:
            with open(self.arguments.json, "w") as file:
                json.dump({"machine": self.machine, "rows": self.rows}, file, indent=1)
