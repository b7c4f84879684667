"""Mirrors under test: what one must hold, looked at from outside, and every death of a run by enumeration."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from backhaul.formats import catalog
from backhaul.operations.mirror.verify import verify_mirror
from backhaul.testing.crashes import MODES, Died, Fuse, Mode, Report, UnsoundError, World

Contents = dict[str, bytes]


def tree_contents(directory: Path) -> Contents:
    """Return the regular files of a directory, by relative path."""
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.is_symlink()
    }


class MirrorCase:
    """A mirror's run that is killed at every effect. Subclasses say what happens.

    Attributes:
        mirror: where it is.
        directory: what it is of; must not change while it is enumerated.
        keeps: contents that may have a name besides the new one: an older state of each file.
        recycled: names that may be gone from the store.
    """

    mirror = "s3://world/mirror"

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.older: Contents = {}
        self.recycled: set[str] = set()

    def run(self, world: World) -> None:
        """Run it once, as one process."""
        raise NotImplementedError


def objects_of(world: World) -> Contents:
    """Return the mirrored objects of a world's only store, without the mirror's records."""
    (store,) = world.stores.values()
    return {key: content for key, (content, _) in store.objects.items() if not key.startswith(catalog.DIRECTORY)}


def check_mirror(world: World, case: MirrorCase, what: str, *, complete: bool) -> None:
    """Check a world: every object is an old or the new content of its name, none that must stay is gone.

    Raises:
        UnsoundError: it is not as promised.
    """
    here, there = tree_contents(case.directory), objects_of(world)
    for name, content in there.items():
        if content not in (here.get(name), case.older.get(name)):
            raise UnsoundError(f"{what}: {name} holds neither its old nor its new content")
    for name in case.older:
        if name not in there and name not in case.recycled:
            raise UnsoundError(f"{what}: {name} is gone from the store")
    if not complete:
        return
    for name, content in here.items():
        if there.get(name) != content:
            raise UnsoundError(f"{what}: {name} is not in the mirror as it is in the directory")
    if left := [name for name in case.recycled if name in there]:
        raise UnsoundError(f"{what}: {left} should have been deleted")
    (store,) = world.stores.values()
    if store.uploads:
        raise UnsoundError(f"{what}: uploads are left: {[pending.key for pending in store.uploads.values()]}")
    with world.process():
        problems = verify_mirror(case.mirror, str(case.directory), deep=True).problems
    if problems:
        raise UnsoundError(f"{what}: verify says {problems}")


def enumerate_mirror_crashes(
    case: MirrorCase, origin: World, directory: Path, modes: Sequence[Mode] = MODES, *, lose_state: bool = False
) -> Report:
    """Run a case with every fault at every effect; check the world after each, and after running it again.

    Args:
        case: what to run.
        origin: the world before.
        directory: for state directories.
        modes: the faults.
        lose_state: also lose what the host knew of the mirror before running again.

    Raises:
        UnsoundError: with the fault and the effect that it hit.
    """
    report = Report()
    whole = origin.copied(directory / "whole")
    with whole.process() as fuse:
        case.run(whole)
    report.effects = list(fuse.effects)
    check_mirror(whole, case, "no fault", complete=True)
    for mode, at in _faults(modes, len(report.effects)):
        what = f"{mode} effect {at} ({report.effects[at - 1]})"
        place = directory / f"{mode}-{at}"
        world = origin.copied(place)
        ended = _run(case, world, Fuse(at, mode), what, mode)
        report.runs += 1
        report.survived += ended
        check_mirror(world, case, what, complete=False)
        if lose_state:
            shutil.rmtree(world.state)
            world.state.mkdir()
        for _ in range(2):  # the second one tidies up what the first one, with other things to do, left
            with world.process():
                case.run(world)
        check_mirror(world, case, f"{what}, run again", complete=not lose_state)
        shutil.rmtree(place)
    return report


def _faults(modes: Sequence[Mode], effects: int) -> Iterator[tuple[Mode, int]]:
    for mode in modes:
        for at in range(1, effects + 1):
            yield mode, at


def _run(case: MirrorCase, world: World, fuse: Fuse, what: str, mode: Mode) -> bool:
    try:
        with world.process(fuse):
            case.run(world)
    except Died:
        return False
    except Exception as error:
        if mode != "lost":
            raise UnsoundError(f"{what}: {error!r}") from error
        return False
    if fuse.blown and mode != "lost":
        raise UnsoundError(f"{what}: it ended well although it died")
    return True


def small_parts(world: World, least: int) -> None:
    """Have a world's stores take parts from that size on, so that little data has many effects."""
    for store in world.stores.values():
        limits = msgspec.structs.replace(store.profile.limits, min_part=least)
        store.profile = msgspec.structs.replace(store.profile, limits=limits)
