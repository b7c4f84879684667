"""A job: what runs, when, what is expected of it, and what was recorded of its runs."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from backhaul.model.schedule import Window

PUSH, MIRROR, DRILL, PRUNE, COMMAND = "push", "mirror", "drill", "prune", "command"
KINDS = (PUSH, MIRROR, DRILL, PRUNE, COMMAND)

# How a run ended, or that it has not. ``died``: it was killed, or its host went down, and nobody could write an end.
# ``stopped``: a hold or the window's end asked it to end after its part.
RUNNING, OK, INCOMPLETE, STOPPED, FAILED, INTERRUPTED, DIED, SKIPPED = (
    "running",
    "ok",
    "incomplete",
    "stopped",
    "failed",
    "interrupted",
    "died",
    "skipped",
)
RUN_STATES = (RUNNING, OK, INCOMPLETE, STOPPED, FAILED, INTERRUPTED, DIED, SKIPPED)
# How a run was begun.
SCHEDULED, BY_HAND, EXEC = "scheduled", "by hand", "exec"


class Expectations(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What a job must do for all to be well. None: nothing is expected.

    Attributes:
        max_age: seconds since the last good run began.
        max_duration: seconds that a run may take.
        least, most: how much of the usual size a backup must have, and may (1.0 is the usual, the median of late ones).
        max_drill_age: seconds since the last proof that a backup of it restores.
        grace: seconds after which a run that was to begin counts as missing.
    """

    max_age: float | None = None
    max_duration: float | None = None
    least: float | None = None
    most: float | None = None
    max_drill_age: float | None = None
    grace: float = 3600.0


class JobCard(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What others must know of a job to judge it: it lies beside its backups, and here for jobs out of the config.

    Attributes:
        name: the job's; ``host``: where it runs.
        kind: one of ``KINDS``.
        what: what it does, in a line, without secrets.
        window: when it runs; None for a job that nobody schedules.
        expectations: what is expected.
        known_since: when it was first seen with this window (ISO, UTC): nothing is missing from before.
        places: the series and mirrors that it writes, as people write them.
        jitter_of: what its jitter is made of.
        retired: it is in the config no more: nothing is expected of it.
    """

    name: str
    host: str
    kind: str
    what: str = ""
    window: Window | None = None
    expectations: Expectations = Expectations()
    known_since: str = ""
    places: tuple[str, ...] = ()
    jitter_of: str = ""
    retired: bool = False


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A job, ready to run.

    Attributes:
        card: who it is and what is expected of it.
        stages: the programs, each feeding the next; no shell.
        environment: for its programs, besides what there is.
        time_limit: seconds after which it is ended; None for no limit.
        retries: how often it is tried again when it fails; ``backoff`` seconds later, each time twice as long.
        lock: a file that is locked while it runs, shared with other programs; None for none.
        notify: the channels that are told, in order; ``notify_all``: all of them, not only the first that can be.
        pings: the channels that hear of each beginning and end.
        keep_runs: how many runs' logs are kept.
        log_size: most bytes of a run's log.
        watched: whether reports tell of it, though no config has it.
        alone: whether one run of it is at work at a time.
        own: whether the programs are Backhaul's own (one stage): they can be asked to end after their part.
    """

    card: JobCard
    stages: tuple[tuple[str, ...], ...]
    environment: Mapping[str, str] = {}
    time_limit: float | None = None
    retries: int = 0
    backoff: float = 60.0
    lock: str | None = None
    notify: tuple[str, ...] = ()
    notify_all: bool = True
    pings: tuple[str, ...] = ()
    keep_runs: int = 100
    log_size: int = 16 << 20
    watched: bool = False
    alone: bool = True
    own: bool = False


class StageRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How one program of a run ended: ``exit_status``, or ``signal`` (its name), or ``error`` (it never started)."""

    command: tuple[str, ...]
    exit_status: int | None = None
    signal: str = ""
    error: str = ""


class RunRecord(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One run of a job: written when it begins, and again when it ends.

    Attributes:
        format, version: of this record.
        id: its start in UTC and a word that tells two of one second apart.
        job, kind, host: whose it is.
        trigger: ``scheduled``, ``by hand`` or ``exec``.
        watched: of ``exec``: whether it was given a name, so that reports tell of it.
        occurrence: which opening of the window it is of; empty for none.
        started, finished: ISO with the zone of this host.
        seconds: between the two, by a clock that nobody sets.
        state: one of ``RUN_STATES``.
        why: of what is not ok.
        exit_status: what the command that ran it ended with.
        attempts: how often its programs were started.
        stages: how each program ended at the last attempt.
        backups: ids of the backups that it made.
        raw_size, stored_size: bytes in and out, where they are known.
        proved: for a drill: whether the backup was proved.
        proved_at: when a backup of the series was last known to be proved to restore (ISO, UTC).
        removed: for a prune: backups that it removed.
        lines, log_size: of what its programs said, all of it; ``cut``: the log does not hold all of it.
        closes: when its window closes (ISO, UTC); empty for none.
        forecast: when it is expected to end (ISO, UTC), while it runs and as it was last said.
        done, total: progress in bytes, while it runs; ``total`` is 0 where nobody knows.
        seen: when the run last said that it goes on (ISO, UTC), while it runs.
        pid, boot: the process that runs it, and since which boot: what tells whether it still does.
        last_words: the last lines that its programs said, secrets masked.
        remarks: what its operator may want to know.
    """

    format: str
    version: str
    id: str
    job: str
    kind: str
    host: str
    trigger: str
    started: str
    state: str
    occurrence: str = ""
    watched: bool = False
    finished: str = ""
    seconds: float = 0.0
    why: str = ""
    exit_status: int | None = None
    attempts: int = 0
    stages: tuple[StageRecord, ...] = ()
    backups: tuple[str, ...] = ()
    raw_size: int = 0
    stored_size: int = 0
    proved: bool | None = None
    proved_at: str = ""
    removed: int = 0
    lines: int = 0
    log_size: int = 0
    cut: bool = False
    closes: str = ""
    forecast: str = ""
    done: int = 0
    total: int = 0
    seen: str = ""
    pid: int = 0
    boot: str = ""
    last_words: str = ""
    remarks: tuple[str, ...] = ()


class Hold(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A pause with an end.

    Attributes:
        id: its file's name.
        job: whose runs wait, or ``all``.
        since, until: ISO, UTC; it is over at ``until`` whoever forgets it.
        reason, by: why, and who set it.
        pid, boot: the process that it lasts as long as; 0 for one that only time ends.
    """

    id: str
    job: str
    since: str
    until: str
    reason: str = ""
    by: str = ""
    pid: int = 0
    boot: str = ""


ALL_JOBS = "all"
