"""Times, sizes and counts for reading."""

from datetime import datetime, timezone


def when(seconds: float) -> str:
    """A time, in UTC."""
    return datetime.fromtimestamp(seconds, timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size_text(size: int) -> str:
    """Bytes, powers of 1024."""
    for scale, unit in ((2**40, "TiB"), (2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size} B"


def plural(count: int, what: str) -> str:
    """A count of things: 1 step, 2 steps."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
