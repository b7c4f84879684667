"""What a directory's file system really does: the probes of ``doctor`` for local stores."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from backhaul.formats.quantities import format_size
from backhaul.model.results import Finding
from backhaul.stores.local import LocalStore
from backhaul.transforms.digest import crc64nvme

_CONTENT = b"backhaul doctor\n"


def probe_directory(path: str) -> Iterator[Finding]:
    """Yield what a directory on a disk can do; files of its own, removed again.

    Raises:
        StoreError: it can't be written.
    """
    root = Path(path).absolute()
    name = f".backhaul-doctor-{secrets.token_hex(6)}"
    store = LocalStore(path)
    there = root.is_dir()
    yield Finding(
        name="the directory",
        found=there,
        detail="it exists" if there else "it does not exist: a push would make it",
    )
    try:
        store.put(f"{name}/a", _CONTENT, crc64nvme(_CONTENT))
        content = bytearray(len(_CONTENT))
        store.read_into(f"{name}/a", 0, memoryview(content))
        good = bytes(content) == _CONTENT
        yield Finding(name="access", found=good, detail="writes, flushes and reads back" if good else "it reads others")
        try:
            os.link(root / name / "a", root / name / "b")
            yield Finding(
                name="hard links", found=True, detail="a name is never given twice", ability="conditional_writes"
            )
        except OSError as error:
            yield Finding(
                name="hard links",
                found=False,
                detail=f"{error.strerror}: a name is looked for before it is given",
                ability="conditional_writes",
            )
        free = shutil.disk_usage(root).free
        yield Finding(name="room", found=free > 0, detail=f"{format_size(free)} free")
        own = os.stat(root).st_dev != os.stat("/").st_dev
        yield Finding(
            name="a disk of its own",
            found=own,
            detail="it is on another file system than /"
            if own
            else "it is on the root file system: so is a disk that is not mounted",
        )
    finally:
        for each in ("a", "b"):
            with contextlib.suppress(Exception):
                store.delete(f"{name}/{each}")
        store.close()
