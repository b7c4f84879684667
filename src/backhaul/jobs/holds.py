"""Holds: pauses with an end, a small file each, so that a damaged database never lets a job run into a groom."""

from __future__ import annotations

import contextlib
import datetime as dt
import getpass
import os
import secrets
from collections.abc import Callable
from pathlib import Path

import msgspec

from backhaul.errors import ConfigurationError, FormatError
from backhaul.formats import run_record
from backhaul.formats.names import backup_id
from backhaul.jobs.history import jobs_directory
from backhaul.model.job import Hold
from backhaul.operations.atomic_file import write_atomically
from backhaul.operations.journal import STATE_VARIABLE
from backhaul.processes.identity import is_alive, this_process

# Holds that are over are remembered for so long: a run that they kept away is not missing.
_REMEMBERED = dt.timedelta(days=40)


class Holds:
    """The holds of this host.

    Args:
        directory: of the state of jobs.
        alive: tells whether the process that a hold lasts as long as is still there.
        now: the clock.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        alive: Callable[[int, str], bool] = is_alive,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
    ) -> None:
        self._directory = (directory or jobs_directory()) / "holds"
        self._alive = alive
        self._now = now
        self.problems: list[str] = []

    def all(self) -> list[Hold]:
        """Return the holds, those that are over too, the newest first. One whose process is gone is over."""
        found = []
        for path in sorted(self._directory.glob("*.json"), reverse=True) if self._directory.is_dir() else ():
            try:
                hold = run_record.decode(path.read_bytes(), Hold, where=str(path))
            except FileNotFoundError:
                continue
            except (OSError, FormatError) as error:
                # Nobody knows whom it holds: better nothing runs than into an ALTER TABLE; but not for ever.
                hold = self._unreadable(path, str(error))
            if hold.pid and not self._alive(hold.pid, hold.boot):
                ended = min(self._now(), dt.datetime.fromisoformat(hold.until))
                hold = msgspec.structs.replace(hold, until=_iso(ended), pid=0)
                with contextlib.suppress(OSError):
                    self._write(hold)
            found.append(hold)
        return found

    def in_force(self) -> list[Hold]:
        """Return the holds that are not over."""
        now = self._now()
        return [hold for hold in self.all() if dt.datetime.fromisoformat(hold.until) > now]

    def add(self, job: str, until: dt.datetime, reason: str, *, with_process: bool = False) -> Hold:
        """Begin a hold.

        Args:
            job: whose runs wait, or ``all``.
            until: when it ends (aware).
            reason: why.
            with_process: it ends with this process, too.

        Raises:
            ConfigurationError: it can't be kept.
        """
        pid, boot = this_process() if with_process else (0, "")
        now = self._now()
        hold = Hold(
            id=f"{backup_id(now)}-{secrets.token_hex(2)}",
            job=job,
            since=_iso(now),
            until=_iso(until),
            reason=reason,
            by=_who(),
            pid=pid,
            boot=boot,
        )
        try:
            self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._write(hold)
            self._forget()
        except OSError as error:
            raise ConfigurationError(
                f"The hold can't be kept in {self._directory}",
                error.strerror or str(error),
                f"Make room, make it writable for this account, or name another directory with {STATE_VARIABLE}.",
            ) from error
        return hold

    def release(self, job: str | None = None, *, id_: str = "") -> list[Hold]:
        """End holds: those on a job (``all`` means those on all jobs), one by its id, or every one; return them.

        Raises:
            ConfigurationError: one can't be ended.
        """
        ended = []
        for hold in self.in_force():
            if (id_ and hold.id != id_) or (job is not None and hold.job != job):
                continue
            over = msgspec.structs.replace(hold, until=_iso(self._now()), pid=0, boot="")
            try:
                self._write(over)
            except OSError as error:
                raise ConfigurationError(
                    f"The hold {hold.id} can't be ended", error.strerror or str(error), "Release it as who set it."
                ) from error
            ended.append(over)
        return ended

    def _unreadable(self, path: Path, why: str) -> Hold:
        self.problems.append(f"the hold {path} can't be read ({why}): all jobs are held until it is a day old")
        since = self._now()
        with contextlib.suppress(OSError):
            since = min(since, dt.datetime.fromtimestamp(path.stat().st_mtime, dt.UTC))
        return Hold(
            id=path.stem, job="all", since=_iso(since), until=_iso(since + dt.timedelta(days=1)), reason="unreadable"
        )

    def _write(self, hold: Hold) -> None:
        write_atomically(self._directory / f"{hold.id}.json", run_record.encode(hold))

    def _forget(self) -> None:
        for hold in self.all():
            if dt.datetime.fromisoformat(hold.until) < self._now() - _REMEMBERED:
                with contextlib.suppress(OSError):
                    (self._directory / f"{hold.id}.json").unlink()


def _iso(time: dt.datetime) -> str:
    return time.astimezone(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _who() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())
