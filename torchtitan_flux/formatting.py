"""Sizes and lists of names, as messages show them."""

import math
from collections.abc import Iterable


def format_bytes(size: int | float) -> str:
    """A size in the largest unit of which it is at least one: "12 B", "1.8 MiB", "22.2 GiB"."""
    if abs(size) < 1024:
        return f"{size:.0f} B"
    units = ("KiB", "MiB", "GiB", "TiB")
    exponent = min(int(math.log(abs(size), 1024)), len(units))
    return f"{size / 1024**exponent:.1f} {units[exponent - 1]}"


def listed(names: Iterable[object], limit: int = 8) -> str:
    """Names with commas, the first `limit` of them: "a, b and 3 more"."""
    shown = [str(name) for name in names]
    more = len(shown) - limit
    return ", ".join(shown[:limit]) + (f" and {more:,} more" if more > 0 else "")
