"""What the GPU benchmarks share: CUDA events, the card's rates, rows with a roofline share, failures kept apart.

On the CPU (--dry) everything runs once, on small sizes, to show that it runs: its times say nothing.
"""

import math
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from measure import lengths_of, to_offsets
from torch import Tensor

FLUSH_BYTES = 1 << 29
Way = Callable[[], object]


@dataclass(frozen=True)
class Work:
    """What an op must do at least: bytes it moves, operations of the matrix kind, by the count in its header."""

    bytes: float
    flops: float = 0
    dtype: torch.dtype = torch.bfloat16


@dataclass
class Bench:
    """Rows of one part of the check.

    dry         on the CPU, small, once
    after_case  called when there is more to keep
    once        calls every way a single time, which compiles what is to be compiled, and measures nothing
    """

    dry: bool
    after_case: Callable[[], object] = lambda: None
    once: bool = False
    rows: list[dict] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.device, self.backend = ("cpu", "eager") if self.dry else ("cuda", "inductor")
        self.flush = torch.empty(1 if self.dry else FLUSH_BYTES, dtype=torch.uint8, device=self.device)
        self.rates = {} if self.once else self._measure_rates()

    def random(self, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Normal numbers."""
        return torch.randn(*shape, device=self.device, dtype=dtype)

    def users(self, users: int, mean: int, most: int) -> tuple[Tensor, Tensor, int]:
        """Lengths [B] on the CPU, offsets [B + 1] on the device, and the longest."""
        users, mean, most = (9, 12, 24) if self.dry else (users, mean, most)
        lengths = lengths_of(users, mean, most=most)
        return lengths, to_offsets(lengths).to(self.device), int(lengths.max())

    def times_ms(self, ways: dict[str, Way], *, seconds: float = 0.3) -> dict[str, float]:
        """Median milliseconds of each way, called in turn, caches flushed before every call."""
        times: dict[str, list[float]] = {name: [] for name in ways}
        begin = time.perf_counter()
        for turn in range(1 if self.dry else 60):
            if turn >= 8 and time.perf_counter() - begin > seconds * len(ways):
                break
            for name, run in ways.items():
                times[name].append(self._time(run))
        return {name: sorted(calls[2:] or calls)[len(calls[2:]) // 2] for name, calls in times.items()}

    def _time(self, run: Way) -> float:
        if self.dry:
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush.zero_()  # while this runs, the host has time to launch what is measured
        self.flush.sum()  # and what was written has left the cache when the clock starts
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def _measure_rates(self) -> dict[str, float]:
        """Copy in bytes a second, read and written; matrix products in operations a second."""
        size, n = (1 << 12, 16) if self.dry else (1 << 28, 8192)
        source, target = torch.empty(2, size, dtype=torch.float32, device=self.device).normal_()
        ways: dict[str, Way] = {"copy": lambda: target.copy_(source)}
        work = {"copy": 2.0 * source.nbytes}
        for dtype, width in ((torch.bfloat16, n), (torch.float16, n), (torch.float32, n // 2)):
            a, b = torch.randn(2, width, width, device=self.device).to(dtype)
            ways[str(dtype)[6:]] = lambda a=a, b=b: a @ b
            work[str(dtype)[6:]] = 2.0 * width**3
        return {name: 1e3 * work[name] / ms for name, ms in self.times_ms(ways).items()}

    def case(self, what: str, build: Callable[[], tuple[Way, dict[str, Callable[[], Way]], Work]]) -> None:
        """Measure one case: build() checks the results, then gives ours, builders of the peers, and the work.

        Whatever fails is noted, and the rest goes on.
        """
        ways: dict[str, Way] = {}
        with self._noting(what):
            ways["ours"], builders, work = build()
            ways["ours"]()
            for name, builder in builders.items():
                with self._noting(f"{what}, {name}"):
                    way = builder()
                    way()
                    ways[name] = way
            if not self.once:
                self._row(what, self.times_ms(ways), work)
        self.after_case()

    @contextmanager
    def _noting(self, what: str) -> Iterator[None]:
        try:
            yield
        except Exception:
            self.failures.append(f"{what}: {traceback.format_exc(limit=-6)}")
            print(self.failures[-1], flush=True)

    def _row(self, what: str, ms: dict[str, float], work: Work) -> None:
        bytes_ms = 1e3 * work.bytes / self.rates["copy"]
        flops_ms = 1e3 * work.flops / self.rates[str(work.dtype)[6:]]
        peers = {name: t for name, t in ms.items() if name != "ours"}
        best = min((name for name in peers if not name.startswith("ours")), key=peers.get, default=None)
        row = {
            "what": what,
            "ms": ms["ours"],
            "% of roofline": 100 * max(bytes_ms, flops_ms) / ms["ours"],
            "bound by": "copies" if bytes_ms >= flops_ms else "products",
            "best peer": best,
            "peer / ours": peers[best] / ms["ours"] if best else None,
            "peers": peers,
            "bytes": work.bytes,
            "flops": work.flops,
        }
        assert all(math.isfinite(x) for x in (*ms.values(), row["% of roofline"]))
        self.rows.append(row)
        print(f"{what}: {row['ms']:.3f} ms, {row['% of roofline']:.0f} % of the roofline; {best}: {peers}", flush=True)


def assert_as_right_as(ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """At most twice as far from float64 as PyTorch in the same dtype; one rounding is free."""
    error, allowed = ((x.double() - exact).norm() for x in (ours, theirs))
    rounding = torch.finfo(ours.dtype).eps * exact.norm()
    assert error <= max(2 * allowed, rounding), f"error {error:.3e}, PyTorch's {allowed:.3e}"
