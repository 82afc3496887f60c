"""Sizes in bytes, read and written for people."""

from __future__ import annotations

from jaxinfer.errors import ConfigError

_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_UNITS |= {"KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_bytes(name: str, value: int | str | None) -> int | None:
    """A size in bytes: a number, or a string such as ``"2GB"`` or ``"1.5 GiB"``; None stays None.

    Args:
        name: of the option, for the error.
        value: what was given.

    Raises:
        ConfigError: it is something else.
    """
    if value is None:
        return None
    if isinstance(value, str):
        text = value.strip()
        number = text.rstrip("BbIiKkMmGgTt ")
        unit = text[len(number) :].strip().upper()
        try:
            size = float(number) * _UNITS[unit]
        except (KeyError, ValueError):
            size = -1.0
        if 1 <= size < 2**62:
            return int(size)
    elif isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    raise ConfigError(f"{name}: expected bytes such as 2000000000 or '2GB', got {value!r}")


def size(count: float) -> str:
    """Write a number of bytes for people."""
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"
