"""Histories as JSON, one a line: what `pcl predict` reads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, BinaryIO

LINES = 512
READ_BYTES = 1 << 20
_ANSWER = {"scores", "class", "label", "probabilities", "probability", "value"}  # and items, the history itself


def read_lines(stdin: BinaryIO, kinds: tuple[type, ...]) -> Iterator[list[tuple[dict[str, Any], list]]]:
    """Chunks of (keys of the caller's own, history), one a line: what has come, at most LINES. Waits only where nothing
    has.

    A line is a list of item ids, each of one of the types `kinds`, or an object with such a list as its `items`, whose
    other keys are the caller's own; a blank one is skipped. ValueError, after the lines before it, names one that is
    neither.
    """
    first = 1
    for lines in _lines_that_came(stdin):
        for start in range(0, len(lines), LINES):
            asked, wrong = [], None
            for number, line in enumerate(lines[start : start + LINES], first + start):
                try:
                    if line.strip():
                        asked.append(_parse(line, number, kinds))
                except ValueError as error:
                    wrong = error
                    break
            if asked:
                yield asked
            if wrong is not None:  # after the answers of the lines before it
                raise wrong
        first += len(lines)


def _lines_that_came(stdin: BinaryIO) -> Iterator[list[bytes]]:
    begun = []  # pieces of a line whose end has not come
    while data := stdin.read1(READ_BYTES):
        *ends, rest = data.split(b"\n")
        if ends:
            yield [b"".join([*begun, ends[0]]), *ends[1:]]
            begun = []
        begun.append(rest)
    if last := b"".join(begun):
        yield [last]


def _parse(line: bytes, number: int, kinds: tuple[type, ...]) -> tuple[dict[str, Any], list]:
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        values = None
    own = values if isinstance(values, dict) else {}
    history = own.pop("items", None) if own else values
    if not isinstance(history, list) or not all(_is_id(item, kinds) for item in history):
        text = line[:80].decode(errors="replace").strip()
        rule = 'a JSON list of item ids, or an object with such a list as its "items"'
        own_ids = str not in kinds and isinstance(history, list) and any(isinstance(item, str) for item in history)
        hint = "; the ids of a log need --item-ids, the items.parquet of the dataset" if own_ids else ""
        raise ValueError(f"line {number} must be {rule}, got {text!r:.60}{hint}")
    if taken := sorted(own.keys() & _ANSWER):
        raise ValueError(f"line {number}: the key {taken[0]!r} is one of an answer; give it another name")
    return own, history


def _is_id(item: Any, kinds: tuple[type, ...]) -> bool:
    return type(item) in kinds and (str in kinds or abs(item) < 2**63)  # a log's own ids may be larger
