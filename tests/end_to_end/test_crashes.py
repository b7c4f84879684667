"""Death at every effect, by enumeration, in memory; and by SIGKILL at random moments, against SeaweedFS."""

from __future__ import annotations

import datetime as dt
import os
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from backhaul.formats.location import parse_location
from backhaul.formats.part_sizes import PartLayout
from backhaul.operations.clean import clean
from backhaul.operations.push import PushOptions, push
from backhaul.sources.file import FileSource
from backhaul.stores.base import PartRules
from backhaul.stores.open import open_store
from backhaul.testing.crashes import (
    MODES,
    Died,
    Fuse,
    MemorySource,
    Operation,
    UnsoundError,
    World,
    enumerate_crashes,
)
from backhaul.testing.data import dump_text, random_bytes
from backhaul.transforms.digest import crc64nvme
from tests.conftest import Cli, keys, open_uploads

# Parts of a megabyte, and segments of five, which hold a frame each: two objects of several parts.
SMALL = PartLayout(
    first=1 << 20,
    step=0,
    growing_segments=False,
    largest=1 << 20,
    max_parts=5,
    max_object=1 << 40,
    numbered=True,
)
RULES = PartRules(buffered=True, parallel=3, layout=SMALL)
NOISE = b"".join(random_bytes(5_400_000))
PATIENT = PushOptions(patience=5.0)


class PushToOne(Operation):
    series: tuple[str, ...] = ("s3://world/app",)
    content = NOISE
    rules: PartRules | None = RULES

    def run(self, world: World) -> None:
        push(self.series, MemorySource(self.content), PATIENT, now=world.now)


class PushToTwo(PushToOne):
    series = ("s3://world/app", "s3://elsewhere/app")


class PushSomethingSmall(PushToOne):
    content = b"a single request"


class PushOfAFile(PushToOne):
    """Each run of it resumes what the one before left."""

    def __init__(self, file: Path, series: tuple[str, ...]) -> None:
        self.file = file
        self.series = series

    def run(self, world: World) -> None:
        push(self.series, FileSource(str(self.file)), PATIENT, now=world.now)


class Clean(Operation):
    """Of a series in which pushes have died everywhere."""

    series = ("s3://world/app",)
    content = NOISE
    rules = RULES

    def prepare(self, world: World) -> None:
        super().prepare(world)
        with world.process() as fuse:
            PushToOne().run(world)
        for at in range(1, len(fuse.effects) + 1, 2):
            with pytest.raises(Died), world.process(Fuse(at, "after")):
                PushToOne().run(world)

    def run(self, world: World) -> None:
        clean(self.series[0], older_than=3600.0, now=lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=2))

    def expects_new(self) -> bool:
        return False


@pytest.mark.parametrize(
    "operation", [PushToOne(), PushToTwo(), PushSomethingSmall(), Clean()], ids=lambda o: type(o).__name__
)
def test_death_at_every_effect(operation: Operation, tmp_path: Path) -> None:
    report = enumerate_crashes(operation, tmp_path)
    assert report.runs == 3 * len(report.effects)
    # Losing a reply must never cost the run.
    assert report.survived == len(report.effects)


@pytest.mark.parametrize("series", [("s3://world/app",), ("s3://world/app", "s3://elsewhere/app")], ids=["one", "two"])
def test_death_at_every_effect_of_a_push_that_is_resumed(tmp_path: Path, series: tuple[str, ...]) -> None:
    file = tmp_path / "dump"
    file.write_bytes(NOISE)
    report = enumerate_crashes(PushOfAFile(file, series), tmp_path / "worlds")
    assert report.runs == 3 * len(report.effects)
    assert report.survived == len(report.effects)


def test_death_at_every_effect_of_a_push_of_a_small_file(tmp_path: Path) -> None:
    """One request: there is nothing to resume, and nothing of it may be in the way of the next run."""
    file = tmp_path / "dump"
    file.write_bytes(b"a single request")
    operation = PushOfAFile(file, ("s3://world/app",))
    operation.content = b"a single request"
    operation.rules = None
    report = enumerate_crashes(operation, tmp_path / "worlds")
    assert report.runs == 3 * len(report.effects)


def test_the_enumerator_finds_a_wrong_order(tmp_path: Path) -> None:
    """An operation that writes its manifest before its data is caught, or the enumerator is worth nothing."""

    class ManifestFirst(PushToOne):
        rules = None
        content = b"small"

        def run(self, world: World) -> None:
            scratch = World(tmp_path / f"scratch-{time.monotonic_ns()}")
            scratch._clock = world.now()
            with scratch.process():
                push(self.series, MemorySource(self.content), PATIENT, now=scratch.now)
            store = open_store(parse_location(self.series[0]))
            (made,) = scratch.stores.values()
            for key in sorted(made.objects, reverse=True):  # manifest.json before data.zst
                content = made.objects[key][0]
                store.put(key, content, crc64nvme(content))

    with pytest.raises(UnsoundError, match=r"(before effect 2|after effect 1) "):
        enumerate_crashes(ManifestFirst(), tmp_path / "worlds", modes=MODES[:2])


# -- real processes, a real store ----------------------------------------------------------------------------


def test_sigkill_at_random_moments(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    """Whatever was going on: the older backup comes back, the new one is whole or absent, cleaning and pushing work."""
    series = [f"s3://{bucket}/app", str(tmp_path / "disk")]
    content = b"".join(dump_text(60_000_000))
    older = b"".join(dump_text(3_000_000, seed=2))
    cli.ok("push", *series, "-q", input=older)
    first = {place: cli.ok("list", place, "--json").json["backups"][0]["id"] for place in series}
    generator = random.Random(20261121)
    killed = 0
    (tmp_path / "dump").write_bytes(content)
    for _ in range(5):
        process = cli.start("push", *series, "-q", "--limit", "15M", "--", "cat", str(tmp_path / "dump"))
        time.sleep(generator.uniform(0.3, 2.5))
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        killed += process.returncode == -signal.SIGKILL
        for place in series:
            assert cli.ok("pull", "-q", f"{place}@{first[place]}").out == older
            for backup in cli.ok("list", place, "--json").json["backups"]:
                if backup["id"] != first[place]:
                    assert cli.ok("pull", "-q", f"{place}@{backup['id']}").out == content
    assert killed >= 2
    cli.ok("push", *series, "-q", "--", "cat", str(tmp_path / "dump"))
    for place in series:
        assert cli.ok("pull", "-q", place).out == content
        cli.ok("clean", "--older-than", "0s", place)
    assert open_uploads(s3, bucket) == []
    listed = len(cli.ok("list", series[0], "--json").json["backups"])
    assert len(keys(s3, bucket)) == 2 * listed
    assert [path.name for path in (tmp_path / "disk").rglob("*.partial")] == []


def test_sigkill_of_a_push_that_is_resumed(cli: Cli, s3: Any, bucket: str, tmp_path: Path) -> None:
    """Killed again and again, a push of a file gets there, and what was sent is not sent again."""
    series = f"s3://{bucket}/files"
    file = tmp_path / "file"
    content = b"".join(random_bytes(120_000_000))
    file.write_bytes(content)
    environment = {"BACKHAUL_STATE": str(tmp_path / "state")}
    generator = random.Random(7)
    killed = 0
    for number in range(12):
        process = cli.start("push", series, "-q", "--limit", "60M", "--from", str(file), env=environment)
        # Later each time, so that one has begun to send by then however slow the machine is.
        time.sleep(generator.uniform(0.7, 1.6) + 0.15 * number)
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=30)
        killed += process.returncode == -signal.SIGKILL
        if process.returncode == 0:
            break
    result = cli.ok("push", series, "--json", "--from", str(file), env=environment).json
    assert killed >= 2
    assert cli.ok("pull", "-q", series).out == content
    assert os.listdir(tmp_path / "state" / "uploads") == []
    if killed < 12:
        return
    (destination,) = result["destinations"]
    assert destination["reused"] + destination["sent"] == result["stored_size"]
    assert destination["reused"] > 0
