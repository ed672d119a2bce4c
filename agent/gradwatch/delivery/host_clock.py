"""Tells whose clock a document was made by: the server corrects an attempt's number by that clock and no other."""

import platform
import zlib
from functools import cache
from pathlib import Path


@cache
def clock_id() -> int:
    """Return a number from 1 to 2**31 - 1 that processes with the same clock have in common: those of one boot."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        boot = platform.node()
    return zlib.crc32(boot.encode()) % (2**31 - 1) + 1
