"""What tells a process from a later one of the same number: its start, and the boot that it belongs to."""

from __future__ import annotations

import os
from pathlib import Path


def boot_id() -> str:
    """Return what this boot of the host is called; empty where the kernel does not say."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def this_process() -> tuple[int, str]:
    """Return this process's number, and the word that makes it unique (``BOOT/START``)."""
    return os.getpid(), _word(os.getpid()) or ""


def is_alive(pid: int, word: str) -> bool:
    """Tell whether the process that ``this_process`` once named is still there."""
    return pid > 0 and bool(word) and _word(pid) == word


def _word(pid: int) -> str | None:
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        return None
    # Field 22 of proc(5)'s stat: the start in ticks since the boot. A zombie is gone but for its name.
    return None if fields[0] in (b"Z", b"X") else f"{boot_id()}/{int(fields[19])}"
