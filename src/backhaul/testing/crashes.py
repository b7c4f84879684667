"""The crash enumerator: an operation dies before, and after, each of its effects on the stores, one after the other.

An operation runs once to count its N effects (requests that change a store). Then it runs N times dying before one
of them, N times dying after it, and N times living on although the reply to it was lost. After each of these runs
the world must be sound::

    class PushOne(Operation):
        series = ("s3://world/app",)

        def run(self, world: World) -> None:
            push(self.series, MemorySource(self.content), now=world.now)

    assert enumerate_crashes(PushOne(), tmp_path).runs > 20

Soundness (``Operation.check``): every backup that was there before is read back bit for bit; a new one is absent or
whole; ``clean`` leaves nothing else; running again works, before cleaning and after it.
"""

from __future__ import annotations

import contextlib
import copy
import datetime as dt
import os
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec

import backhaul
from backhaul.errors import StoreUnavailableError
from backhaul.formats import names
from backhaul.formats.age_keys import Identity
from backhaul.formats.location import parse_location
from backhaul.model.location import Location
from backhaul.model.manifest import ProducerRecord
from backhaul.model.objects import NO_METADATA, Metadata, StoredObject, UnfinishedUpload, Upload, UploadedPart
from backhaul.model.profile import Profile
from backhaul.operations.clean import clean
from backhaul.operations.journal import STATE_VARIABLE
from backhaul.operations.pull import PullOptions
from backhaul.operations.push import push
from backhaul.pipeline.supervisor import Supervisor
from backhaul.stores import open as open_module
from backhaul.stores import retry as retry_module
from backhaul.stores.base import Kind, PartRules, Store
from backhaul.stores.body import Body
from backhaul.stores.wrapper import StoreWrapper
from backhaul.testing.memory_store import MemoryStore

T = TypeVar("T")
Mode = Literal["before", "after", "lost"]
MODES: tuple[Mode, ...] = ("before", "after", "lost")


class Died(BaseException):
    """The process is gone: nothing that it does from here on reaches the world."""


class Fuse:
    """Counts effects, and at one of them ends the process or loses the reply."""

    def __init__(self, at: int | None = None, mode: Mode = "before") -> None:
        self.effects: list[str] = []
        self.blown = False
        self._at = at
        self._mode = mode
        self._dead = False
        self._lock = threading.Lock()

    def check(self) -> None:
        """Raise ``Died`` if the process is gone."""
        if self._dead:
            raise Died

    def effect(self, name: str, act: Callable[[], T]) -> T:
        """Do something to a store, or die of it."""
        with self._lock:
            self.check()
            self.effects.append(name)
            here = len(self.effects) == self._at
            self.blown = self.blown or here
            if here and self._mode == "before":
                self._dead = True
                raise Died
            # Under the lock: what was begun before the death is done, and nothing is after it.
            try:
                return act()
            finally:
                if here and self._mode == "after":
                    self._dead = True
                    raise Died
                if here and self._mode == "lost":
                    raise StoreUnavailableError(f"{name}: the reply was lost", "reset by peer", "Try again.")


class MortalStore(StoreWrapper):
    """A store as one process sees it: every change burns the fuse."""

    def __init__(self, inner: Store, fuse: Fuse) -> None:
        super().__init__(inner)
        self._fuse = fuse

    @property
    def profile(self) -> Profile:
        """See ``Store.profile``."""
        self._fuse.check()
        return self.inner.profile

    def put(
        self,
        key: str,
        body: Body,
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
        kind: Kind = "record",
        metadata: Metadata = NO_METADATA,
    ) -> StoredObject:
        """See ``Store.put``."""
        return self._fuse.effect(
            f"put {key}",
            lambda: self.inner.put(
                key, body, crc64nvme, if_absent=if_absent, replaces=replaces, kind=kind, metadata=metadata
            ),
        )

    def begin(self, key: str, *, metadata: Metadata = NO_METADATA) -> Upload:
        """See ``Store.begin``."""
        return self._fuse.effect(f"begin {key}", lambda: self.inner.begin(key, metadata=metadata))

    def put_part(self, upload: Upload, number: int, offset: int, body: Body, crc64nvme: int) -> UploadedPart:
        """See ``Store.put_part``."""
        return self._fuse.effect(
            f"part {number} of {upload.key}", lambda: self.inner.put_part(upload, number, offset, body, crc64nvme)
        )

    def copy_part(
        self, upload: Upload, number: int, source: str, etag: str, offset: int, size: int, crc64nvme: int
    ) -> UploadedPart:
        """See ``Store.copy_part``."""
        return self._fuse.effect(
            f"copied part {number} of {upload.key}",
            lambda: self.inner.copy_part(upload, number, source, etag, offset, size, crc64nvme),
        )

    def copy(self, source: StoredObject, key: str, *, metadata: Metadata = NO_METADATA) -> StoredObject:
        """See ``Store.copy``."""
        return self._fuse.effect(f"copy {source.key} to {key}", lambda: self.inner.copy(source, key, metadata=metadata))

    def uploaded_parts(self, upload: Upload) -> Sequence[UploadedPart]:
        """See ``Store.uploaded_parts``."""
        self._fuse.check()
        return self.inner.uploaded_parts(upload)

    def complete(
        self,
        upload: Upload,
        parts: Sequence[UploadedPart],
        crc64nvme: int,
        *,
        if_absent: bool = True,
        replaces: str | None = None,
    ) -> StoredObject:
        """See ``Store.complete``."""
        return self._fuse.effect(
            f"complete {upload.key}",
            lambda: self.inner.complete(upload, parts, crc64nvme, if_absent=if_absent, replaces=replaces),
        )

    def abort(self, upload: Upload) -> None:
        """See ``Store.abort``."""
        self._fuse.effect(f"abort {upload.key}", lambda: self.inner.abort(upload))

    def unfinished(self) -> Iterator[UnfinishedUpload]:
        """See ``Store.unfinished``."""
        self._fuse.check()
        return self.inner.unfinished()

    def read_into(self, key: str, offset: int, out: memoryview, *, etag: str | None = None) -> None:
        """See ``Store.read_into``."""
        self._fuse.check()
        self.inner.read_into(key, offset, out, etag=etag)

    def stat(self, key: str) -> StoredObject | None:
        """See ``Store.stat``."""
        self._fuse.check()
        return self.inner.stat(key)

    def list(self, prefix: str = "", *, after: str = "", until: str | None = None) -> Iterator[StoredObject]:
        """See ``Store.list``."""
        self._fuse.check()
        return self.inner.list(prefix, after=after, until=until)

    def delete(self, key: str, *, etag: str | None = None) -> None:
        """See ``Store.delete``."""
        self._fuse.effect(f"delete {key}", lambda: self.inner.delete(key, etag=etag))


class World:
    """What outlives a process: stores in memory, by location, and the state directory on the disk.

    ``now`` is a clock for ids that moves on by ten seconds at every look. ``rules`` make small parts, so that
    little data has many effects.
    """

    def __init__(self, state: Path, rules: PartRules | None = None) -> None:
        self.stores: dict[tuple[str, str], MemoryStore] = {}
        self.state = state
        self.state.mkdir(parents=True)
        self._rules = rules
        self._clock = dt.datetime(2026, 11, 21, 2, tzinfo=dt.UTC)

    def now(self) -> dt.datetime:
        """Return the time, ten seconds after the last one."""
        self._clock += dt.timedelta(seconds=10)
        return self._clock

    def copied(self, state: Path) -> World:
        """Return the same world once more, with its state in another directory."""
        twin = World(state / "state", self._rules)
        shutil.rmtree(twin.state)
        shutil.copytree(self.state, twin.state)
        twin._clock = self._clock
        for place, store in self.stores.items():
            other = twin._store(*place)
            other.profile = store.profile
            other.objects.update(store.objects)
            other.uploads.update(copy.deepcopy(store.uploads))
        return twin

    def objects_of(self, series: str, backup: str) -> dict[str, bytes]:
        """Return the content of each object of a backup, by key."""
        location = parse_location(series)
        objects = self._store(location.bucket, location.path).objects
        return {key: content for key, (content, _) in objects.items() if key.startswith(f"{backup}/")}

    def _store(self, bucket: str, path: str) -> MemoryStore:
        url = f"s3://{bucket}/{path}"
        return self.stores.setdefault((bucket, path), MemoryStore(url, parts=self._rules))

    @contextlib.contextmanager
    def process(self, fuse: Fuse | None = None) -> Iterator[Fuse]:
        """Be a process in this world: operations open its stores. The fuse may end it.

        Within the block pauses between retries are short, and threads that die with the process are silent.
        """
        burning = fuse or Fuse()

        def bare_store(location: Location) -> Store:
            return MortalStore(self._store(location.bucket, location.path), burning)

        def hook(args: threading.ExceptHookArgs) -> None:
            if args.exc_type is not Died:
                old_hook(args)

        old_store, old_pause, old_hook = open_module.bare_store, retry_module.FIRST_PAUSE, threading.excepthook
        old_state = os.environ.get(STATE_VARIABLE)
        open_module.bare_store, retry_module.FIRST_PAUSE = bare_store, 0.001
        threading.excepthook = hook
        os.environ[STATE_VARIABLE] = str(self.state)
        try:
            yield burning
        finally:
            open_module.bare_store, retry_module.FIRST_PAUSE = old_store, old_pause
            threading.excepthook = old_hook
            if old_state is None:
                del os.environ[STATE_VARIABLE]
            else:
                os.environ[STATE_VARIABLE] = old_state


class MemorySource:
    """A stream out of memory; see ``sources.base.Source``."""

    def __init__(self, content: bytes) -> None:
        self.name = "memory"
        self._rest = memoryview(content)

    def check(self) -> None:
        """See ``Source.check``."""

    def start(self, group: Supervisor) -> None:
        """See ``Source.start``."""

    def read_into(self, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        count = min(len(buffer), len(self._rest))
        buffer[:count] = self._rest[:count]
        self._rest = self._rest[count:]
        return count

    def finish(self) -> ProducerRecord:
        """See ``Source.finish``."""
        return ProducerRecord(kind="memory", seconds=0.0)

    def abort(self) -> None:
        """See ``Source.abort``."""


class MemoryTarget:
    """A stream into memory; see ``targets.base.Target``. ``content`` is None unless it came whole."""

    def __init__(self) -> None:
        self.name = "memory"
        self.content: bytes | None = None
        self._pieces: list[bytes] = []

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``."""

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        self._pieces.append(bytes(data))

    def commit(self) -> None:
        """See ``Target.commit``."""
        self.content = b"".join(self._pieces)

    def abort(self) -> None:
        """See ``Target.abort``."""


class Operation:
    """Something that changes stores. Subclasses name the series that it touches, and run it.

    Attributes:
        series: every series that is looked at afterwards.
        content: what a new backup must hold.
        rules: the layout of parts, or None for the usual one.
        identities: whose secrets open what is encrypted of the backups.
    """

    series: tuple[str, ...] = ()
    content: bytes = b""
    rules: PartRules | None = None
    identities: tuple[Identity, ...] = ()

    def prepare(self, world: World) -> None:
        """Make what is there before: by default one older backup in every series."""
        for series in self.series:
            push([series], MemorySource(b"older backup of " + series.encode()), now=world.now)

    def run(self, world: World) -> None:
        """Do it once, as one process."""
        raise NotImplementedError

    def expects_new(self) -> bool:
        """Tell whether a run that ends well leaves a new backup in every series."""
        return True

    def may_go(self, series: str, older: Sequence[str]) -> Sequence[str]:
        """Return which of the backups that are there before the run may be gone after it, whole; by default none."""
        return ()

    def check_end(self, backups: Mapping[str, Mapping[str, bytes]]) -> None:
        """Raise ``UnsoundError`` if these are not the backups, by series and id, that a run which ended well leaves."""


class Report(msgspec.Struct):
    """What was enumerated: effects of a whole run, runs made, those that ended well in spite of the fault.

    ``pulled`` has the content of backups by series and id, with the objects that it was pulled from.
    """

    effects: list[str] = []
    runs: int = 0
    survived: int = 0
    pulls: int = 0
    pulled: dict[tuple[str, str], tuple[dict[str, bytes], bytes]] = {}


class UnsoundError(AssertionError):
    """The world is not as promised after a crash."""


def enumerate_crashes(operation: Operation, directory: Path, modes: Sequence[Mode] = MODES) -> Report:
    """Run the operation with every fault at every effect, and check the world after each.

    Args:
        operation: what to run.
        directory: for state directories.
        modes: the faults.

    Raises:
        UnsoundError: with the fault and the effect that it hit.
    """
    report = Report()
    origin = World(directory / "origin" / "state", operation.rules)
    with origin.process():
        operation.prepare(origin)
    before = _contents(origin, operation, report)
    whole = origin.copied(directory / "whole")
    with whole.process() as fuse:
        operation.run(whole)
    report.effects = list(fuse.effects)
    _check(whole, operation, before, report, ended=True)
    for mode in modes:
        for at in range(1, len(report.effects) + 1):
            place = directory / f"{mode}-{at}"
            world = origin.copied(place)
            fuse = Fuse(at, mode)
            what = f"{mode} effect {at} ({report.effects[at - 1]})"
            ended = False
            try:
                with world.process(fuse):
                    operation.run(world)
                ended = True
            except Died:
                pass
            except Exception as error:
                if mode != "lost":
                    raise UnsoundError(f"{what}: {error!r}") from error
            report.runs += 1
            report.survived += ended
            if fuse.blown and ended and mode != "lost":
                raise UnsoundError(f"{what}: it ended well although it died")
            try:
                again = world.copied(place / "again")
                _check(world, operation, before, report, ended=ended)
                _clean(world, operation)
                _run_again(world, operation, before, report)
                _run_again(again, operation, before, report)
                _clean(again, operation)
                _check(again, operation, before, report, ended=True)
            except Exception as error:
                raise UnsoundError(f"{what}: {error!r}") from error
            shutil.rmtree(place)
    return report


def _run_again(world: World, operation: Operation, before: dict[str, dict[str, bytes]], report: Report) -> None:
    with world.process():
        operation.run(world)
    _check(world, operation, before, report, ended=True)


def _contents(world: World, operation: Operation, report: Report) -> dict[str, dict[str, bytes]]:
    """Pull every backup that is listed; each must be whole. One that lies there as it did when it was pulled is."""
    contents: dict[str, dict[str, bytes]] = {}
    with world.process():
        for series in operation.series:
            contents[series] = {}
            for summary in backhaul.list(series).backups:
                objects = world.objects_of(series, summary.id)
                known, content = report.pulled.get((series, summary.id), ({}, b""))
                # (Worlds that were copied have the same bytes in common, not only equal ones.)
                if known and known.keys() == objects.keys() and all(known[key] is objects[key] for key in known):
                    contents[series][summary.id] = content
                    continue
                target = MemoryTarget()
                reference = f"{series}@{summary.id}"
                encrypted = any(stream.encryption for stream in backhaul.show(reference).manifest.streams)
                options = PullOptions(identities=operation.identities if encrypted else ())
                backhaul.pull(reference, target, options)
                assert target.content is not None
                contents[series][summary.id] = target.content
                report.pulled[series, summary.id] = objects, target.content
                report.pulls += 1
    return contents


def _check(
    world: World,
    operation: Operation,
    before: dict[str, dict[str, bytes]],
    report: Report,
    *,
    ended: bool,
) -> None:
    found = _contents(world, operation, report)
    if ended:
        operation.check_end(found)
    for series, backups in found.items():
        older = {backup: content for backup, content in backups.items() if backup in before[series]}
        newer = [content for backup, content in backups.items() if backup not in before[series]]
        gone = set(before[series]) - set(older)
        if {**before[series], **older} != before[series] or not gone <= {
            *operation.may_go(series, list(before[series]))
        }:
            raise UnsoundError(f"{series}: older backups were {sorted(before[series])}, now {sorted(older)}")
        if any(content != operation.content for content in newer):
            raise UnsoundError(f"{series}: a new backup holds something else")
        if ended and operation.expects_new() and not newer:
            raise UnsoundError(f"{series}: it ended well and there is no new backup")


def _clean(world: World, operation: Operation) -> None:
    """Clean, and look with one's own eyes at what is left: committed backups and nothing else."""
    with world.process():
        for series in operation.series:
            clean(series, older_than=3600.0, now=lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=2))
    for store in world.stores.values():
        parsed: dict[str, Any] = {key: names.parse_key(key) for key in store.objects}
        committed = {name.id for name in parsed.values() if name is not None and name.kind == "manifest"}
        rest = [key for key, name in parsed.items() if name is None or name.id not in committed or name.kind == "claim"]
        if rest or store.uploads:
            left = [*rest, *(pending.key for pending in store.uploads.values())]
            raise UnsoundError(f"{store.url}: clean left {left}")
