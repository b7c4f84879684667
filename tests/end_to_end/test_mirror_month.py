"""A month of nights on SeaweedFS: appends, weekly grooms, windows that cut runs short, deaths at random points.

The test keeps its own account of what the mirror must hold, and looks at the store with a plain client.
"""

from __future__ import annotations

import datetime as dt
import os
import random
from pathlib import Path
from typing import Any

import pytest

from backhaul.formats import catalog
from backhaul.model.location import Location
from backhaul.operations.journal import STATE_VARIABLE
from backhaul.operations.mirror import apply as apply_module
from backhaul.operations.mirror.apply import ApplyOptions
from backhaul.operations.mirror.plan import PlanOptions
from backhaul.operations.mirror.restore import pull_mirror, recycler
from backhaul.operations.mirror.sync import RunOptions, sync
from backhaul.operations.mirror.verify import verify_mirror
from backhaul.planning.guard import MaxDelete
from backhaul.stores import open as open_module
from backhaul.stores.base import Store
from backhaul.testing.crashes import Died, Fuse, MortalStore
from backhaul.testing.mirrors import tree_contents
from tests.conftest import keys, open_uploads

NIGHTS = 30
RECYCLE_DAYS = 6
CHUNK = 14_000_000
DAY = dt.timedelta(days=1)


class BackupSet:
    """A directory of opaque chunks, as a deduplicating backup program keeps it."""

    def __init__(self, directory: Path, rng: random.Random) -> None:
        self.directory, self.rng = directory, rng
        self.number = 0
        (directory / "data").mkdir(parents=True)
        for _ in range(4):
            self.new_chunk(CHUNK)

    def chunks(self) -> list[Path]:
        return sorted((self.directory / "data").iterdir())

    def new_chunk(self, size: int, content: bytes | None = None) -> None:
        self.number += 1
        path = self.directory / "data" / f"chunk {self.number:04d}"
        path.write_bytes(content if content is not None else self.rng.randbytes(size))

    def night(self) -> None:
        """Append to the newest chunk, write the index anew."""
        with open(self.chunks()[-1], "ab") as file:
            file.write(self.rng.randbytes(self.rng.randrange(100_000, 3_000_000)))
        (self.directory / "index").write_bytes(self.rng.randbytes(5000))
        (self.directory / f"log-{self.rng.randrange(5)}").write_bytes(self.rng.randbytes(300))

    def groom(self) -> None:
        """Rewrite inside a chunk, shrink one, rename one, merge and drop others."""
        chunks = self.chunks()
        self.rng.shuffle(chunks)
        content = bytearray(chunks[0].read_bytes())
        at = self.rng.randrange(len(content) // 2)
        content[at : at + 800_000] = self.rng.randbytes(1_000_000)
        chunks[0].write_bytes(content)
        content = bytearray(chunks[1].read_bytes())
        del content[1_000_000:2_500_000]
        chunks[1].write_bytes(content)
        self.number += 1
        os.rename(chunks[2], self.directory / "data" / f"chunk {self.number:04d}")
        # What lives on of two chunks goes into a new one.
        first, second = chunks[3].read_bytes(), chunks[0].read_bytes()
        self.new_chunk(0, first[: len(first) * 2 // 3] + second[: len(second) // 3])
        os.unlink(chunks[3])
        if len(chunks) > 5:
            os.unlink(chunks[4])


@pytest.mark.first
@pytest.mark.timeout(600)
def test_a_month_of_nights(
    s3: Any, bucket: str, s3_environment: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(20261121)
    monkeypatch.setenv(STATE_VARIABLE, str(tmp_path / "state"))
    mirror = f"s3://{bucket}/mirror"
    backups = BackupSet(tmp_path / "backups", rng)
    directory = str(backups.directory)
    monkeypatch.setattr(apply_module, "MOST_SKEW", 10.0**9)  # the nights are simulated
    real_store = open_module.bare_store
    fuse = Fuse()

    def mortal(location: Location) -> Store:
        return MortalStore(real_store(location), fuse)

    monkeypatch.setattr(open_module, "bare_store", mortal)
    now = dt.datetime(2026, 11, 1, 2, tzinfo=dt.UTC)
    options = PlanOptions(recycle_after=RECYCLE_DAYS * 86400.0, max_delete=MaxDelete(percent=100.0))
    stored: dict[str, bytes] = {}  # what the mirror held after the last night, tombstones too
    gone: dict[str, dt.datetime] = {}  # since when a name is gone, as a complete or begun run has seen it
    outcomes = {"complete": 0, "cut": 0, "died": 0}
    deleted = 0
    for night in range(NIGHTS):
        now += DAY
        backups.night()
        if night % 7 == 6:
            backups.groom()
        here = tree_contents(backups.directory)
        bad = rng.random()
        length = rng.choice([0.0, 0.0, 0.2]) if bad < 0.35 else None
        fuse = Fuse(rng.randrange(1, 14), rng.choice(["before", "after"])) if bad > 0.75 else Fuse()
        try:
            result = sync(
                directory,
                mirror,
                options,
                ApplyOptions(length=length, streams=4),
                RunOptions(patience=20.0),
                now=lambda now=now: now,  # type: ignore[misc]
            )
            outcome = result.state
            assert outcome in ("complete", "cut"), result
            assert (outcome == "cut") == (result.left.files > 0)
        except Died:
            outcome = "died"
        outcomes[outcome] += 1
        there = {
            key.removeprefix("mirror/"): s3.get_object(Bucket=bucket, Key=key)["Body"].read()
            for key in keys(s3, bucket, "mirror/")
            if not key.startswith(f"mirror/{catalog.DIRECTORY}")
        }
        # Nothing is lost that had not waited, and nothing holds anything but its old or its new content.
        for name in stored:
            if name not in there:
                assert name not in here
                assert now - gone[name] >= RECYCLE_DAYS * DAY
                assert outcome != "cut"
                deleted += 1
        for name, content in there.items():
            assert content in (here.get(name), stored.get(name)), (night, outcome, name)
        for name in list(gone):
            if name in here or name not in there:
                del gone[name]
        for name in there:
            if name not in here:
                gone.setdefault(name, now)
        if outcome == "complete":
            assert {name: there.get(name) for name in here} == here
            fuse = Fuse()
            assert {file.name: file.gone for file in recycler(mirror).files}.keys() == there.keys() - here.keys()
            assert not [name for name, since in gone.items() if now - since > (RECYCLE_DAYS + 8) * DAY]
            assert verify_mirror(mirror, directory).problems == ()
        stored = there
    assert min(outcomes.values()) >= 3, outcomes
    assert deleted >= 2
    fuse = Fuse()
    now += DAY
    sync(directory, mirror, options, ApplyOptions(), RunOptions(patience=20.0), now=lambda: now)
    assert verify_mirror(mirror, directory, deep=True).problems == ()
    assert pull_mirror(mirror, str(tmp_path / "back")).problems == ()
    assert tree_contents(tmp_path / "back") == tree_contents(backups.directory)
    assert open_uploads(s3, bucket) == []
