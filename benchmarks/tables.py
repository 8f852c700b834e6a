"""Tables in Markdown."""

from collections.abc import Sequence


def as_markdown(columns: Sequence[str], rows: Sequence[Sequence]) -> str:
    """The lines of a table; without rows only its head."""
    shown = [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = ["| " + " | ".join(cells) + " |" for cells in [columns, *shown]]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])
