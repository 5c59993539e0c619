"""Quantities in words."""

from __future__ import annotations


def byte_size(nbytes: int) -> str:
    """A number of bytes with the unit that suits it.

    Example:
        >>> from memokern.util.text import byte_size
        >>> byte_size(12), byte_size(129384), byte_size(3 * 10**9)
        ('12 B', '129.4 kB', '3 GB')
    """
    size = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.4g} {unit}"
        size /= 1000
    return f"{size:.4g} TB"
