"""plan, apply and sync as whole operations: locks, stores, limits and threads around ``plan`` and ``apply``."""

from __future__ import annotations

import contextlib
import datetime as dt
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import BinaryIO

import msgspec

from backhaul.errors import (
    ConfigurationError,
    FailedError,
    UsageError,
)
from backhaul.formats import catalog, names
from backhaul.formats.mirror_plan import PlanReader, PlanWriter
from backhaul.formats.timetable import Timetable
from backhaul.model.location import Location
from backhaul.model.mirror import FILE, RECYCLE, SENDING, TOMBSTONE, PlanSummary
from backhaul.model.results import MirrorResult
from backhaul.operations import memory
from backhaul.operations.journal import machine, state_directory
from backhaul.operations.locks import locked
from backhaul.operations.mirror.apply import Applier, ApplyOptions
from backhaul.operations.mirror.plan import Planner, PlanOptions
from backhaul.operations.mirror.records import Records
from backhaul.operations.mirror.state import MirrorState
from backhaul.operations.pacing import rate_limit
from backhaul.operations.places import place_of, series_at
from backhaul.operations.progress import MirrorProgress
from backhaul.operations.refused import GuardError
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.tree import Tree
from backhaul.stores.base import Store
from backhaul.stores.open import DEFAULT_PATIENCE, open_store
from backhaul.stores.retry import RetryPolicy

Now = Callable[[], dt.datetime]


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class RunOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What plan and apply have in common.

    Attributes:
        limit: bytes a second over all connections, by the time of day; None for no limit.
        lock: a file that is locked while the run lasts, shared with other programs (flock).
        patience: seconds for which a store that is ill or away is tried again.
    """

    limit: Timetable | None = None
    lock: str | None = None
    patience: float = DEFAULT_PATIENCE


class _Session:
    """A directory, a mirror, and what is known of both; locked."""

    def __init__(self, stack: contextlib.ExitStack, directory: str, mirror: str, options: RunOptions) -> None:
        self.location = series_at(mirror)
        self.tree = Tree(directory)
        _refuse_inside(self.tree, self.location)
        if options.lock is not None:
            stack.enter_context(locked(options.lock, "Correct --lock."))
        self.place = place_of(self.location)
        self.state = MirrorState(f"{self.place}\0{self.tree.path}", mirror)
        stack.callback(self.state.close)
        self.group = Supervisor("mirror", grace=3.0)
        self.policy = RetryPolicy(options.patience, sleep=self.group.sleep)
        limit = rate_limit(options.limit, self.group) if options.limit is not None else None
        self.store: Store = open_store(self.location, policy=self.policy, limit=limit)
        stack.callback(self.store.close)
        self.records = Records(self.store, self.state)
        self.kind: tuple[str, ...] = ()
        memory.settle_allocator()

    def remarks(self) -> tuple[str, ...]:
        """Return what there is to say of the records, here and there."""
        return (*((self.state.remark,) if self.state.remark else ()), *self.records.remarks, *self.kind)

    def planner(self, options: PlanOptions, now: dt.datetime, ended: Callable[[], bool] = lambda: False) -> Planner:
        """Load the records and return a planner; the group's block has been entered."""
        record = self.records.load()
        if record is None:
            _refuse_series(self.store, self.location.text)
            self.kind = ("this is a new mirror",)
        elif record.building is not None or options.anew:
            self.kind = ("this is about the second copy; the first one counts until that one is whole",)
        return Planner(self.tree, self.store, self.records, self.state, self.group, options, now, ended)


def make_plan(
    directory: str,
    mirror: str,
    output: str,
    options: PlanOptions = PlanOptions(),  # noqa: B008 - frozen
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
    *,
    progress: MirrorProgress | None = None,
    now: Now = _now,
) -> PlanSummary:
    """Write what a mirror run would do into a file.

    Args:
        directory: what is mirrored.
        mirror: MIRROR, as on the command line.
        output: the plan's path; it gets its name when it is whole. A plan that the guard refuses is written too, for
            people to read; ``apply`` does not take it.

    Raises:
        UsageError, ConfigurationError, SourceError, StoreError: nothing was written.
        LockBusyError: another run works on this mirror.
    """
    with contextlib.ExitStack() as stack:
        session = _Session(stack, directory, mirror, run)
        if output == "-" or f"{os.path.realpath(output)}/".startswith(f"{session.tree.path}/"):
            raise UsageError(
                f"The plan can't be written to {output}",
                "it would be a file of the directory that it is of" if output != "-" else "a plan is a file",
                "Name a file elsewhere: -o /tmp/plan.json",
            )
        temporary = f"{output}.{os.getpid()}.partial"
        try:
            with open(temporary, "wb") as file:
                summary = _planned(session, file, options, now, progress)
                os.fsync(file.fileno())
            os.rename(temporary, output)
        except OSError as error:
            raise FailedError(
                f"Could not write {output}", error.strerror or str(error), "Name another file."
            ) from error
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
        return msgspec.structs.replace(summary, path=output)


def sync(
    directory: str,
    mirror: str,
    options: PlanOptions = PlanOptions(),  # noqa: B008 - frozen
    apply_options: ApplyOptions = ApplyOptions(),  # noqa: B008 - frozen
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
    *,
    progress: MirrorProgress | None = None,
    now: Now = _now,
) -> MirrorResult:
    """Plan, and apply what the guard approves, in one go.

    Raises:
        GuardError: the guard refused; nothing was touched.
        UsageError, ConfigurationError, SourceError, StoreError, LockBusyError: as of ``make_plan`` and ``apply_plan``.
    """
    counters = progress or MirrorProgress()
    began = time.monotonic()
    length = apply_options.length

    def ended() -> bool:
        return apply_options.stop() or (length is not None and time.monotonic() - began >= length)

    with contextlib.ExitStack() as stack:
        session = _Session(stack, directory, mirror, run)
        file = stack.enter_context(_nameless())
        with session.group:
            planner = session.planner(options, now(), ended)
            head = planner.head(session.place, mirror, machine())
            tail = planner.write(PlanWriter(file, head), head, _prefix(session.location))
            if tail.refusals:
                raise GuardError(tail.refusals)
            counters.read = planner.reader.bytes_read
            plan = PlanReader(file, "the plan")
            return _applied(session, plan, apply_options, counters, now, began)


def apply_plan(
    path: str,
    options: ApplyOptions = ApplyOptions(),  # noqa: B008 - frozen
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
    *,
    progress: MirrorProgress | None = None,
    now: Now = _now,
) -> MirrorResult:
    """Apply an approved plan, once, if the directory and the mirror are as the plan saw them.

    Args:
        path: the plan's file.

    Raises:
        FormatError: it is no plan, or was changed.
        FailedError: it was refused by the guard, was applied before, or is stale. Nothing was touched.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise UsageError(f"Could not read {path}", error.strerror or str(error), "Name a plan's file.") from error
        plan = PlanReader(file, path)
        if plan.tail.refusals:
            raise GuardError(plan.tail.refusals)
        session = _Session(stack, plan.head.directory, plan.head.mirror, run)
        again = f"Make a new one: backhaul plan {plan.head.directory} {plan.head.mirror} -o {path}"
        if session.place != plan.head.place:
            raise FailedError(f"{path} is of another mirror", f"{plan.head.mirror} means another place now", again)
        if session.state.get("applied " + plan.head.id):
            raise FailedError(f"{path} was applied before", "a plan is applied once", again)
        with session.group:
            record = session.records.load()
            stale = _stale(session, plan, record == plan.head.record)
            if stale:
                raise FailedError(f"{path} is stale: nothing was done", stale, again)
            session.state.set("applied " + plan.head.id, "begun")
            return _applied(session, plan, options, progress or MirrorProgress(), now)


def dry_run(
    directory: str,
    mirror: str,
    options: PlanOptions = PlanOptions(),  # noqa: B008 - frozen
    run: RunOptions = RunOptions(),  # noqa: B008 - frozen
    *,
    progress: MirrorProgress | None = None,
    now: Now = _now,
) -> tuple[PlanSummary, Iterator[str]]:
    """Return what a run would do: in numbers, and as lines for people. Nothing is written but local hashes."""
    stack = contextlib.ExitStack()
    with contextlib.ExitStack() as inner:
        session = _Session(inner, directory, mirror, run)
        file = stack.enter_context(_nameless())
        summary = _planned(session, file, options, now, progress)
    return summary, plan_lines(stack, file)


def plan_lines(stack: contextlib.ExitStack, file: BinaryIO) -> Iterator[str]:
    """Yield a plan's actions as lines; the file is closed at the end."""
    with stack:
        for _, action in PlanReader(file, "the plan").actions():
            yield msgspec.json.encode(action).decode()


# -- inside ----------------------------------------------------------------------------------------------


def _planned(
    session: _Session, file: BinaryIO, options: PlanOptions, now: Now, progress: MirrorProgress | None
) -> PlanSummary:
    with session.group:
        planner = session.planner(options, now())
        head = planner.head(session.place, session.location.text, machine())
        tail = planner.write(PlanWriter(file, head), head, _prefix(session.location))
    return PlanSummary(
        id=head.id,
        directory=head.directory,
        mirror=head.mirror,
        root=head.root,
        totals=tail.totals,
        refusals=tail.refusals,
        bytes_read=planner.reader.bytes_read,
        remarks=session.remarks(),
    )


def _applied(
    session: _Session,
    plan: PlanReader,
    options: ApplyOptions,
    progress: MirrorProgress,
    now: Now,
    began: float | None = None,
) -> MirrorResult:
    applier = Applier(
        plan,
        session.tree,
        session.store,
        session.records,
        session.state,
        session.group,
        options,
        progress,
        now,
        began=began,
    )
    result = applier.run()
    remarks = (*result.remarks, *session.remarks())
    return msgspec.structs.replace(result, requests_again=session.policy.retries, remarks=remarks)


def _stale(session: _Session, plan: PlanReader, record_is_same: bool) -> str:
    """Return what has moved on since the plan was made; nothing if all is as it was."""
    if not record_is_same:
        return "the mirror was worked on since the plan was made"
    root = plan.head.root
    wanted: dict[str, str] = {}
    for _, action in plan.actions():
        if action.identity is not None:
            there = session.tree.look(action.key)
            if there is None or there.identity != action.identity:
                return f"{action.key} has changed here since the plan was made"
        elif action.kind in (TOMBSTONE, RECYCLE) and not action.source:
            back = session.tree.look(action.key)
            if back is not None and back.kind == FILE:
                return f"{action.key} is back here since the plan was made"
        if action.kind in SENDING or action.etag:
            key = action.key if action.source == "/" else root + action.key
            wanted[key] = action.etag
    if wanted:
        for entry in session.store.list(root if all(key.startswith(root) for key in wanted) else ""):
            etag = wanted.pop(entry.key, None)
            if etag is not None and etag != entry.etag:
                return f"{entry.key} is another object in the mirror since the plan was made"
    lost = next((key for key, etag in wanted.items() if etag), None)
    return f"{lost} is gone from the mirror since the plan was made" if lost is not None else ""


def _prefix(location: Location) -> str:
    return f"{location.path}/" if location.kind == "s3" and location.path else ""


def _refuse_inside(tree: Tree, location: Location) -> None:
    if tree.look(catalog.RECORD) is not None:
        raise UsageError(
            f"{tree.name} is a mirror itself",
            f"it holds {catalog.RECORD}",
            "DIR comes first, and MIRROR second. To bring a mirror back: backhaul pull MIRROR -o DIR",
        )
    if location.kind != "local":
        return
    target = os.path.realpath(location.path)
    if target == tree.path or target.startswith(f"{tree.path}/") or tree.path.startswith(f"{target}/"):
        raise UsageError(
            f"{location.text} and {tree.name} lie in each other",
            "a mirror that holds its own source, or lies in it, never ends",
            "Name a mirror elsewhere.",
        )


def _refuse_series(store: Store, text: str) -> None:
    """Refuse to make a mirror of what is a series of backups."""
    for number, entry in enumerate(store.list()):
        found = names.parse_key(entry.key)
        if found is not None and found.kind == "manifest":
            raise UsageError(
                f"{text} is a series of backups, and no mirror",
                f"it holds {entry.key}",
                "Name a path of its own for the mirror.",
            )
        if number > 2000:
            return


@contextlib.contextmanager
def _nameless() -> Iterator[BinaryIO]:
    """Yield a file without a name beside the state: a plan is as long as its mirror has changes."""
    directory = state_directory() / "mirrors"
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=directory, buffering=1 << 20)  # noqa: SIM115 - below, behind the error
    except OSError as error:
        raise ConfigurationError(
            f"Could not write into {directory}", error.strerror or str(error), "Make room, or make it writable."
        ) from error
    with file:
        yield file  # type: ignore[misc]
