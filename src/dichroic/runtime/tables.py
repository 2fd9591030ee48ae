"""Plain-text tables."""

from collections.abc import Sequence
from typing import Any


def text_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Columns padded to their widest cell; numbers (and headers above them) to the right."""
    cells = [[str(c) for c in row] for row in rows]
    widths = [max(len(r[i]) for r in [list(header), *cells]) for i in range(len(header))]
    right = [bool(cells) and all(_numeric(r[i]) for r in cells) for i in range(len(header))]
    pad = lambda row: "  ".join(
        c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, right, strict=True)
    ).rstrip()
    rule = "  ".join("─" * w for w in widths)
    return "\n".join([pad(list(header)), rule, *map(pad, cells)])


def _numeric(cell: str) -> bool:
    return (
        cell.replace(".", "").replace(",", "").replace("-", "").replace("%", "").strip().isdigit()
    )


def duration(seconds: float) -> str:
    """`seconds` as one reads them: in seconds, minutes or hours."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 100 else f"{minutes} min {rest} s"
