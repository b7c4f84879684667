"""A mirror's run that dies at every effect, by enumeration, in memory."""

from __future__ import annotations

import datetime as dt
import os
import random
import shutil
from pathlib import Path

import pytest

from backhaul.operations.mirror import apply as apply_module
from backhaul.operations.mirror import content as content_module
from backhaul.operations.mirror import plan as plan_module
from backhaul.operations.mirror import records as records_module
from backhaul.operations.mirror import upload as upload_module
from backhaul.operations.mirror.apply import ApplyOptions
from backhaul.operations.mirror.plan import PlanOptions
from backhaul.operations.mirror.sync import RunOptions, sync
from backhaul.planning.guard import MaxDelete
from backhaul.testing.crashes import World
from backhaul.testing.mirrors import MirrorCase, enumerate_mirror_crashes, small_parts, tree_contents
from backhaul.transforms import chunks

RUN = RunOptions(patience=5.0)
DAY = dt.timedelta(days=1)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kilobytes where there are megabytes, so that little data has all the shapes."""
    monkeypatch.setattr(upload_module, "LARGEST_PUT", 16 << 10)
    monkeypatch.setattr(apply_module, "LARGEST_PUT", 16 << 10)
    for module in (plan_module, apply_module):
        monkeypatch.setattr(module, "PART_SIZE", 16 << 10)
    monkeypatch.setattr(plan_module, "_SMALLEST_COPY", 1000)
    for module in (content_module, upload_module, plan_module):
        monkeypatch.setattr(module, "SMALLEST_WITH_CHUNKS", 24 << 10)
    for name, size in (("AVERAGE", 2048), ("SMALLEST", 512), ("LARGEST", 8192)):
        monkeypatch.setattr(chunks, name, size)
    monkeypatch.setattr(records_module, "MOST_SEGMENTS", 2)
    # The world has a clock of its own.
    monkeypatch.setattr(apply_module, "MOST_SKEW", 10.0**9)


class Night(MirrorCase):
    """A second night: everything that can happen to a file has happened."""

    options = PlanOptions(recycle_after=20 * 86400.0, max_delete=MaxDelete(percent=100.0))
    start = dt.datetime(2026, 11, 21, 2, tzinfo=dt.UTC)

    def run(self, world: World) -> None:
        sync(str(self.directory), self.mirror, self.options, ApplyOptions(streams=2), RUN, now=world.now)

    def prepare(self, state: Path) -> World:
        """Sync twice, with a month between, and change the directory after each."""
        rng = random.Random(7)
        here = self.directory
        (here / "d").mkdir(parents=True)
        big, other = rng.randbytes(120_000), rng.randbytes(70_000)
        for name, content in (
            ("d/big", big),
            ("d/other", other),
            ("small", b"small"),
            ("moved-from", rng.randbytes(50_000)),
            ("gone long", rng.randbytes(20_000)),
            ("gone now", b"now"),
            ("empty", b""),
        ):
            (here / name).write_bytes(content)
        world = World(state)
        with world.process():
            world._store("world", "mirror")
            small_parts(world, 4096)
            world._clock = self.start
            self.run(world)
            self.older = tree_contents(here)
            os.unlink(here / "gone long")
            self.run(world)
        world._clock = self.start + 30 * DAY
        # Inserted, removed and overwritten inside; appended; moved; new; gone.
        (here / "d/big").write_bytes(big[:30_000] + rng.randbytes(9_000) + big[30_000:80_000] + big[90_000:])
        (here / "d/other").write_bytes(other + rng.randbytes(10_000))
        os.rename(here / "moved-from", here / "d/moved-to")
        (here / "small").write_bytes(b"changed")
        (here / "new").write_bytes(rng.randbytes(40_000))
        os.symlink("small", here / "link")
        os.unlink(here / "gone now")
        self.recycled = {"gone long"}
        return world


def test_death_at_every_effect_of_a_night(tmp_path: Path) -> None:
    case = Night(tmp_path / "directory")
    origin = case.prepare(tmp_path / "state")
    report = enumerate_mirror_crashes(case, origin, tmp_path / "runs")
    names = " ".join(report.effects)
    for expected in ("begin d/big", "copied part", "copy moved-from to d/moved-to", "delete gone long", "-base-0001"):
        assert expected in names, report.effects
    assert report.runs > 60


def test_death_at_every_effect_with_the_host(tmp_path: Path) -> None:
    """The local state is lost too: what is in the mirror is recognised, and nothing is deleted that should not be."""
    case = Night(tmp_path / "directory")
    origin = case.prepare(tmp_path / "state")
    report = enumerate_mirror_crashes(case, origin, tmp_path / "runs", ["after"], lose_state=True)
    assert report.runs > 20


class Anew(Night):
    """A second copy is built beside the first one, and takes its place."""

    def run(self, world: World) -> None:
        (store,) = world.stores.values()
        building = any(key.startswith(".backhaul/copies/") for key in store.objects)
        options = PlanOptions(max_delete=MaxDelete(percent=100.0), anew=not building)
        sync(str(self.directory), self.mirror, options, ApplyOptions(streams=2), RUN, now=world.now)


def test_death_at_every_effect_of_starting_over(tmp_path: Path) -> None:
    """The old copy is whole all the time, and one of the two always counts."""
    case = Anew(tmp_path / "directory")
    case.directory.mkdir()
    for number in range(3):
        (case.directory / f"file {number}").write_bytes(random.Random(number).randbytes(20_000 * number))
    world = World(tmp_path / "state")
    world._store("world", "mirror")
    small_parts(world, 4096)
    with world.process():
        sync(str(case.directory), case.mirror, PlanOptions(), ApplyOptions(streams=2), RUN, now=world.now)
    case.older = tree_contents(case.directory)
    report = enumerate_mirror_crashes(case, world, tmp_path / "runs")
    assert sum("copies/" in effect for effect in report.effects) >= 4
    shutil.rmtree(tmp_path / "runs")
