"""What the operations return, and what ``--json`` prints. Sizes are bytes, times seconds."""

from __future__ import annotations

import msgspec

from backhaul.model.backup_hold import BackupHold
from backhaul.model.drill import DrillRecord
from backhaul.model.fan_out import FanOutResult
from backhaul.model.manifest import Manifest, SourceRecord
from backhaul.model.memory import MemoryBound
from backhaul.model.mirror import Count, Refusal


class KeygenResult(msgspec.Struct, frozen=True, kw_only=True):
    """A new key: the file that holds its secret half, and its public half."""

    path: str
    recipient: str
    key_id: str


class DestinationResult(msgspec.Struct, frozen=True, kw_only=True):
    """The fate of one destination of a push. ``state`` is ``committed``, ``failed``, or ``resumable``.

    ``sent`` bytes went out in this run, ``reused`` were there from an interrupted one; ``retries`` requests were
    made again, ``hedges`` parts were sent twice because the first try was slow.
    """

    series: str
    state: str
    stored_size: int = 0
    objects: int = 0
    sent: int = 0
    reused: int = 0
    retries: int = 0
    hedges: int = 0
    remark: str | None = None
    manifest: str | None = None
    error_what: str | None = None
    error_why: str | None = None
    error_next: str | None = None


class PushedStream(msgspec.Struct, frozen=True, kw_only=True):
    """One stream of a push; ``seconds`` is its producer's time."""

    name: str
    raw_size: int
    stored_size: int
    seconds: float


class CompressionUse(msgspec.Struct, frozen=True, kw_only=True):
    """How ``--compress auto`` has spent its time.

    ``rungs`` are the frames at each rung of its ladder, from fast to dense; ``passed`` those that did not compress.
    """

    setting: str
    rungs: tuple[int, ...]
    passed: int


class PushResult(msgspec.Struct, frozen=True, kw_only=True):
    """A push that ended with at least its required destinations committed.

    ``stream`` and ``raw_blake3`` are those of a single stream, None where there are several; ``source`` is what was
    backed up, where that is known.
    ``recipients`` are the key ids that it is encrypted for; ``remark`` says what its operator may want to know, or is
    None. ``fan_out`` is what became of the receivers, where there were any. ``compression`` is there with ``auto``.
    """

    id: str
    stream: str | None
    raw_size: int
    stored_size: int
    seconds: float
    frames: int
    raw_blake3: str | None
    streams: tuple[PushedStream, ...] = ()
    source: SourceRecord | None = None
    destinations: tuple[DestinationResult, ...]
    required: int
    memory: MemoryBound
    peak_memory: int
    recipients: tuple[str, ...] = ()
    remark: str | None = None
    fan_out: FanOutResult | None = None
    compression: CompressionUse | None = None

    @property
    def complete(self) -> bool:
        """Whether every destination holds the backup, and every receiver has it."""
        stored = all(destination.state == "committed" for destination in self.destinations)
        return stored and (self.fan_out is None or self.fan_out.complete)


class PullResult(msgspec.Struct, frozen=True, kw_only=True):
    """A pull whose every byte was checked."""

    series: str
    id: str
    stream: str
    raw_size: int
    stored_size: int
    seconds: float
    requests: int
    rereads: int
    memory: MemoryBound
    peak_memory: int


class RestoreResult(msgspec.Struct, frozen=True, kw_only=True):
    """A restore that was finished.

    ``fetched`` bytes came from the store; ``phases`` are seconds by what went on, in order; ``remarks`` say what its
    operator may want to know, ``shortfalls`` what could not be brought back.
    """

    series: str
    id: str
    into: str
    streams: tuple[str, ...]
    raw_size: int
    fetched: int
    seconds: float
    phases: dict[str, float]
    jobs: int
    remarks: tuple[str, ...]
    memory: MemoryBound
    peak_memory: int
    shortfalls: tuple[str, ...] = ()


class DrillResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a drill found; ``kept`` is the URL of its record beside the backup, or None."""

    series: str
    record: DrillRecord
    kept: str | None = None


class FoundSource(msgspec.Struct, frozen=True, kw_only=True):
    """A database of this host that ``init`` found, and the commands that it proposes; ``problem`` is why none."""

    kind: str
    url: str
    label: str
    server: str = ""
    size: int = 0
    problem: str = ""
    commands: tuple[str, ...] = ()


class InitResult(msgspec.Struct, frozen=True, kw_only=True):
    """Everything that ``init`` found."""

    store: str
    found: tuple[FoundSource, ...]


class BackupSummary(msgspec.Struct, frozen=True, kw_only=True):
    """One committed backup as a listing shows it: from object names and sizes alone.

    ``streams`` are the names of its stream objects, ``encrypted`` whether all of them are; ``drill`` is the result of
    the last drill, ``drilled`` its time; ``raw_size`` and ``seconds``
    are known only when the manifests were read too.
    """

    id: str
    started: str
    streams: tuple[str, ...]
    stored_size: int
    encrypted: bool = False
    drill: str | None = None
    drilled: str | None = None
    raw_size: int | None = None
    seconds: float | None = None
    problem: str | None = None


class ListResult(msgspec.Struct, frozen=True, kw_only=True):
    """The committed backups of a series, newest last."""

    series: str
    backups: tuple[BackupSummary, ...]


class ShowResult(msgspec.Struct, frozen=True, kw_only=True):
    """One backup, from its manifest; what its drills found, newest last; and its holds, oldest first.

    ``unreadable_holds`` names records of holds that can't be read: they keep the backup from being pruned all the same.
    """

    series: str
    manifest: Manifest
    drills: tuple[DrillRecord, ...] = ()
    holds: tuple[BackupHold, ...] = ()
    unreadable_holds: tuple[str, ...] = ()


# Checks that tell another object from the one that was stored; its content may be the same all the same.
SAME_OBJECT_CHECKS = ("unchanged", "etag")


class Check(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that ``verify`` looked at. ``state`` is ``ok``, ``problem`` or ``unverifiable``."""

    object: str
    check: str
    state: str
    detail: str = ""


class VerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """Every check of one backup. ``bytes_read`` is what had to be downloaded for it; ``drill`` is the last one."""

    series: str
    id: str
    deep: bool
    checks: tuple[Check, ...]
    bytes_read: int
    seconds: float
    drill: DrillRecord | None = None

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return all(check.state != "problem" for check in self.checks)

    @property
    def content_may_be_right(self) -> bool:
        """Whether all that is wrong is that the object is not the same one: a copy would look like that."""
        return all(check.check in SAME_OBJECT_CHECKS for check in self.checks if check.state == "problem")


class CleanAction(msgspec.Struct, frozen=True, kw_only=True):
    """One leftover. ``kind`` is ``upload`` or ``object``; ``token`` names the upload within its store."""

    kind: str
    key: str
    size: int
    age_seconds: float
    reason: str
    token: str = ""


class CleanResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``clean`` removed (or, as a dry run, would remove) and what it left alone, with reasons."""

    series: str
    dry_run: bool
    removed: tuple[CleanAction, ...]
    kept: tuple[CleanAction, ...]

    @property
    def removed_size(self) -> int:
        """Bytes freed."""
        return sum(action.size for action in self.removed)


class PrunedBackup(msgspec.Struct, frozen=True, kw_only=True):
    """One backup as ``prune`` judged it.

    Attributes:
        id: which one.
        size: stored bytes, of all its objects.
        reasons: why it stays or goes, all of them.
        protected: whether it would stay whatever the rules say.
        problem: why it is not a good one; empty for a good one.
    """

    id: str
    size: int
    reasons: tuple[str, ...]
    protected: bool = False
    problem: str = ""


class PruneResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``prune`` removed (or, as a dry run, would remove) from a series and what stays, oldest first.

    Attributes:
        series: as it was given.
        dry_run: whether nothing was done.
        removed, kept: the backups.
        freed: bytes of what was removed.
        free: bytes that are free on the disk now (as a dry run: that would be); None where --keep-free was not asked.
        refusals: why the guard does not let it pass (of a dry run; else it is an error).
        problems: what was not done, and why: the run is incomplete.
        remarks: what its operator may want to know.
    """

    series: str
    dry_run: bool
    removed: tuple[PrunedBackup, ...]
    kept: tuple[PrunedBackup, ...]
    freed: int
    free: int | None = None
    refusals: tuple[Refusal, ...] = ()
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything was done that was to be done."""
        return (bool(self.kept) or bool(self.removed)) and not self.problems and not self.refusals


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """What ``doctor`` found out by trying. ``ability`` is a field of ``model.profile.Profile``, or empty.

    ``found`` is True (it does), False (it does not) or None (it could not be found out); ``detail`` in the
    store's own words.
    """

    name: str
    found: bool | None
    detail: str
    ability: str = ""


class Diagnosis(msgspec.Struct, frozen=True, kw_only=True):
    """A finding, compared with what the store's profile says.

    ``state`` is ``ok``, ``note`` (it can do more than the profile uses, or lacks what the profile knows it lacks)
    or ``problem``; ``cost`` says what lacking it costs, ``todo`` what to do about it.
    """

    name: str
    state: str
    detail: str
    cost: str = ""
    todo: str = ""


class SourceDoctorResult(msgspec.Struct, frozen=True, kw_only=True):
    """What ``doctor`` found out about a source."""

    source: str
    diagnoses: tuple[Diagnosis, ...]
    seconds: float


class DoctorResult(msgspec.Struct, frozen=True, kw_only=True):
    """How a store stands to its profile. ``left`` names what the store did not let be removed again."""

    store: str
    profile: str
    title: str
    limits: dict[str, int | bool]
    diagnoses: tuple[Diagnosis, ...]
    bytes_sent: int
    seconds: float
    left: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way of backups."""
        return all(diagnosis.state != "problem" for diagnosis in self.diagnoses)


class Skipped(msgspec.Struct, frozen=True):
    """A name that is not in the mirror as it is in the directory, and why."""

    name: str
    reason: str


class MirrorResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a mirror run has done.

    Attributes:
        mirror, directory: as they were given.
        plan: the plan's id.
        state: ``complete``, ``incomplete`` (something was skipped or failed) or ``cut`` (the window ended).
        sent: files that were uploaded, whole or in part; bytes are those files' sizes.
        sent_bytes: bytes of files that went over the line.
        reused_bytes: bytes that the store had from an interrupted run.
        record_bytes: bytes of the mirror's own records that were written.
        saved: bytes that did not have to be sent, since the store had them (renames and deltas).
        renamed, composed: files that were copied within the store, and those of which only what is new was sent.
        kept: files that were there as they are.
        recorded: names of which only the records have changed.
        tombstones: files that are gone since this run.
        waiting: files in the recycler.
        recycled: files that were deleted for good.
        held: files whose time has come, and that were not deleted since this run was not clean.
        foreign: objects that are not the mirror's.
        excluded: files of the directory that were left alone.
        skipped: what could not be mirrored; at most some of them.
        skipped_count: all of them.
        failed: what went wrong; at most some of them.
        failed_count: all of them.
        left: files that the next run has to send, and their bytes.
        nights: about how many more runs like this one they take; 0 if nobody can say.
        root: the copy that was worked on.
        building: whether that is a second copy in the making.
        switched: whether the second copy has become the one that counts.
        seconds: how long it took.
        requests_again: requests that were made again.
        memory: the bound.
        peak_memory: the most that was used.
        remarks: what else there is to say.
    """

    mirror: str
    directory: str
    plan: str
    state: str
    sent: Count = msgspec.field(default_factory=Count)
    sent_bytes: int = 0
    reused_bytes: int = 0
    record_bytes: int = 0
    saved: int = 0
    renamed: Count = msgspec.field(default_factory=Count)
    composed: Count = msgspec.field(default_factory=Count)
    kept: Count = msgspec.field(default_factory=Count)
    recorded: int = 0
    tombstones: Count = msgspec.field(default_factory=Count)
    waiting: Count = msgspec.field(default_factory=Count)
    recycled: Count = msgspec.field(default_factory=Count)
    held: Count = msgspec.field(default_factory=Count)
    foreign: Count = msgspec.field(default_factory=Count)
    excluded: Count = msgspec.field(default_factory=Count)
    skipped: tuple[Skipped, ...] = ()
    skipped_count: int = 0
    failed: tuple[Skipped, ...] = ()
    failed_count: int = 0
    left: Count = msgspec.field(default_factory=Count)
    nights: int = 0
    root: str = ""
    building: bool = False
    switched: bool = False
    seconds: float = 0.0
    requests_again: int = 0
    memory: MemoryBound | None = None
    peak_memory: int = 0
    remarks: tuple[str, ...] = ()


class MirrorPullResult(msgspec.Struct, frozen=True, kw_only=True):
    """Files that were brought back.

    ``kept`` were there as they are; ``problems`` are names that are not as they should be; ``verified`` is whether all
    hashes could be compared (a mirror that another tool made has none).
    """

    mirror: str
    directory: str
    files: int
    bytes: int
    kept: int
    problems: tuple[Skipped, ...]
    verified: bool
    seconds: float
    peak_memory: int


class RecycledFile(msgspec.Struct, frozen=True, kw_only=True):
    """A file in the recycler; ``gone`` since when (ISO, UTC)."""

    name: str
    size: int
    gone: str


class RecyclerResult(msgspec.Struct, frozen=True, kw_only=True):
    """What a mirror's recycler holds, oldest first."""

    mirror: str
    files: tuple[RecycledFile, ...]


class MirrorVerifyResult(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a mirror. ``bytes_read`` is what had to be downloaded for it."""

    mirror: str
    directory: str | None
    deep: bool
    files: int
    bytes: int
    bytes_read: int
    problems: tuple[Skipped, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether nothing was found wrong."""
        return not self.problems
