"""What begins jobs when their time has come: a look around every ten minutes, or a process that stays."""

from __future__ import annotations

import contextlib
import datetime as dt
import signal
import subprocess
import time
from collections.abc import Callable, Sequence

from backhaul.errors import BackhaulError
from backhaul.formats.systemd import unit_name
from backhaul.jobs.config import backhaul_command, load_config
from backhaul.jobs.host import JobHost
from backhaul.model.schedule import Occurrence
from backhaul.operations.places import config_files
from backhaul.planning import windows

# The foreground scheduler looks as often for what is due, and judges and tells as often.
_LOOK = 20.0
_WATCH = 600.0
# So long its jobs may take to end when it is ended.
_PATIENCE = 60.0

Say = Callable[[str], None]


def run_command(name: str) -> list[str]:
    """Return the command that runs a job as the schedule does."""
    return [*backhaul_command(), "run", "--scheduled", "--quiet", name]


def start_detached(name: str) -> None:
    """Begin a job in a session of its own: it outlives whoever has looked around.

    Raises:
        OSError: no process can be started.
    """
    subprocess.Popen(
        run_command(name),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def tick(host: JobHost, start: Callable[[str], None], say: Say) -> None:
    """Begin what is due, and tell people what there is to tell.

    Args:
        host: whose jobs.
        start: begins a job, and does not wait for it.
        say: told what is begun, and what goes wrong.
    """
    # Looked at first: after a week without power nobody would hear of the nights that are missing, once one is good.
    try:
        host.watch()
    except Exception as error:  # noqa: BLE001 - whatever is wrong with judging and telling, what is due begins
        say(f"the jobs could not be judged: {type(error).__name__}: {error}")
    for name in host.due():
        try:
            start(name)
            say(f"{name} is begun")
        except (OSError, subprocess.SubprocessError) as error:
            say(f"{name} could not be begun: {error}")


class ForegroundScheduler:
    """Stays, and begins jobs when their time has come: for containers, which have no timers.

    Args:
        say: told what happens.
        now, clock, sleep: the clocks.
        start: begins a job; returns its process.
    """

    def __init__(
        self,
        say: Say,
        *,
        now: Callable[[], dt.datetime] = lambda: dt.datetime.now(dt.UTC),
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        start: Callable[[str], subprocess.Popen[bytes]] | None = None,
    ) -> None:
        self._say = say
        self._now = now
        self._clock = clock
        self._sleep = sleep
        self._start = start or (lambda name: subprocess.Popen(run_command(name), stdin=subprocess.DEVNULL))
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._config = load_config()
        self._seen = self._stamps()

    def run(self) -> None:
        """Stay until a signal comes; then end the jobs that are at work.

        Raises:
            KeyboardInterrupt: the signal.
        """
        watched: float | None = None
        self._say(f"{len(self._config.jobs)} jobs; SIGTERM ends this, and SIGHUP is not needed: the config is watched")
        try:
            while True:
                self._reload()
                try:
                    with JobHost(self._config, now=self._now) as host:
                        if watched is None or self._clock() - watched >= _WATCH:
                            watched = self._clock()
                            host.watch()
                        self._begin(host)
                except BackhaulError as error:
                    self._say(f"{error.what}: {error.why}")
                self._sleep(_LOOK)
                self._reap()
        finally:
            self._end()

    def _begin(self, host: JobHost) -> None:
        for name in host.due():
            if name in self._running:
                continue
            try:
                self._running[name] = self._start(name)
                self._say(f"{name} is begun")
            except OSError as error:
                self._say(f"{name} could not be begun: {error}")

    def _reap(self) -> None:
        for name, process in list(self._running.items()):
            status = process.poll()
            if status is not None:
                del self._running[name]
                self._say(f"{name} ended with status {status}")

    def _reload(self) -> None:
        stamps = self._stamps()
        if stamps == self._seen:
            return
        self._seen = stamps
        try:
            self._config = load_config()
            self._say(f"the config was read again: {len(self._config.jobs)} jobs")
        except BackhaulError as error:
            self._say(f"the config is not right, and the old one goes on: {error.why}")

    @staticmethod
    def _stamps() -> tuple[tuple[str, int, int], ...]:
        found = []
        for path in config_files():
            with contextlib.suppress(OSError):
                status = path.stat()
                found.append((str(path), status.st_mtime_ns, status.st_size))
        return tuple(found)

    def _end(self) -> None:
        old = signal.getsignal(signal.SIGTERM)
        with contextlib.suppress(ValueError):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        deadline = time.monotonic() + _PATIENCE
        for name, process in self._running.items():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            self._say(f"{name} was ended")
        with contextlib.suppress(ValueError, TypeError):
            signal.signal(signal.SIGTERM, old)


def start_by_systemd(user: bool) -> Callable[[str], None]:
    """Return what begins a job as a unit of its own, under systemd."""

    def start(name: str) -> None:
        unit = f"{unit_name(name)}.service"
        command = ["systemctl", *(["--user"] if user else []), "start", "--no-block", "--", unit]
        done = subprocess.run(command, check=False, stdin=subprocess.DEVNULL, capture_output=True, timeout=60)
        if done.returncode:
            raise OSError(done.stderr.decode(errors="replace").strip() or f"systemctl ended with {done.returncode}")

    return start


def coming(host: JobHost, days: int, names: Sequence[str] = ()) -> list[tuple[str, Occurrence]]:
    """Return the openings of the next days, in order, each with its job.

    Raises:
        UsageError: a name is of no job.
    """
    now = host.now()
    found = []
    for name in names or host.config.jobs:
        card = host.job(name).card
        if card.window is None:
            continue
        until = now + dt.timedelta(days=days)
        there = windows.occurrences(card.window, card.jitter_of, now - dt.timedelta(days=1), until)
        found += [(name, each) for each in there if each.closes > now]
    return sorted(found, key=lambda item: (item[1].begins, item[0]))
