"""What the studio promises and allows, in one place."""

from __future__ import annotations

KEEP_SECONDS = 3600
"""Uploads and results, on disk and in memory, are gone this long after they were last used."""

SWEEP_SECONDS = 60
"""How often the sweeper looks. What would get too old before its next round goes in this one."""

MAX_FILE_SIZE = "64 MB"
"""Larger uploads are refused."""

DISK_QUOTA = "2gb"
"""All uploads and results together; beyond it uploads are refused until older ones are deleted."""

MEMORY_QUOTA = 1_000_000_000
"""Bytes of all pictures and results that visitors have open; beyond it new ones are refused."""

LEAVE_SECONDS = 15
"""Work whose answer nobody has listened to for so long is stopped."""


def in_bytes(size: str | int) -> int:
    """ "64mb" -> 64,000,000. Raises `InputError` for anything else than a positive number and b, kb, mb, gb or tb."""
    from mmkit.errors import InputError

    text = str(size).strip().lower()
    number = text.rstrip("kmgtb ")
    unit = text[len(number) :].strip() or "b"
    factor = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}.get(unit)
    try:
        count = float(number) * (factor or 0)
    except ValueError:
        count = 0
    if not 1 <= count < 1e18:
        raise InputError(f"A size is a number and b, kb, mb, gb or tb, like 64mb; not {size!r}.")
    return int(count)


def of_bytes(count: float) -> str:
    """Bytes for people: "12 kB", "64 MB", "2.1 GB"."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.0f} bytes"


def promise() -> str:
    """What happens to a visitor's files, in the words of the pages."""
    return (
        f"Uploads and results are deleted {KEEP_SECONDS // 60} minutes after they were last used, and when the studio ends. "
        "Only the browser that brought them can read them."
    )
