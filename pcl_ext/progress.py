"""Progress on stderr: a bar where that is a terminal, and where it is none a line for the log each minute."""

from __future__ import annotations

import logging
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tqdm import tqdm

_LOG = logging.getLogger(__name__)
_SECONDS = 60.0  # between two lines


class Lines:
    """A bar's part where nobody sees one: what is done so far, said once a minute."""

    def __init__(self, what: str, total: int, unit: str, done: int):
        self.what, self.total, self.unit, self.done = what, total, unit, done
        self.said = time.monotonic()

    def update(self, count: int = 1) -> None:
        self.done += count
        if time.monotonic() - self.said >= _SECONDS:
            self.said = time.monotonic()
            _LOG.info("%s: %s of %s%s", self.what, f"{self.done:,}", f"{self.total:,}", self.unit)

    def __enter__(self) -> Lines:
        return self

    def __exit__(self, *error) -> None:
        return None


def progress(what: str, total: int, unit: str = " users", done: int = 0) -> tqdm | Lines:
    """Something to call .update(n) on inside a `with`; what ends within a second shows no bar. Without tqdm, of the
    extra `cli`, there are lines alone."""
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm
        except ImportError:
            return Lines(what, total, unit, done)
        return tqdm(total=total, desc=what, unit=unit, initial=done, leave=False, delay=1.0)
    return Lines(what, total, unit, done)
