"""Threads that live and die together: the first failure wins, stops its siblings, and is raised whole.

Every blocking wait in this package goes through ``Supervisor.wait_for``, so that a stop reaches it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from types import TracebackType


class StoppedError(Exception):
    """Raised inside a thread whose supervisor stopped; it carries no news and is never shown."""


class _Condition(threading.Condition):
    """A condition that leaves those asleep for whom nothing has changed.

    A dozen threads wait for one or the other thing under one lock. Were each woken by every change, each frame would
    cost some hundred switches between threads that look, and sleep again. So whoever changes something asks their
    predicates, which is cheap, and wakes those that hold.
    """

    def __init__(self) -> None:
        self._shared = threading.RLock()
        super().__init__(self._shared)
        self._asleep: dict[threading.Condition, Callable[[], bool]] = {}

    def sleep_until(self, predicate: Callable[[], bool]) -> None:
        """Sleep until somebody notifies and the predicate holds, or ``wake_all`` is called; the lock is held."""
        own = threading.Condition(self._shared)
        self._asleep[own] = predicate
        try:
            own.wait()
        finally:
            self._asleep.pop(own, None)

    def notify_all(self) -> None:
        """Wake those whose predicate holds now, and all that wait without one."""
        super().notify_all()
        for own, predicate in list(self._asleep.items()):
            try:
                wake = predicate()
            except Exception:  # noqa: BLE001 - it is for the one who waits: it asks again, and fails
                wake = True
            if wake:
                own.notify()  # (First: an interrupt between the two must lose nobody.)
                self._asleep.pop(own, None)

    def wake_all(self) -> None:
        """Wake everybody, whatever their predicates say."""
        super().notify_all()
        for own in self._asleep:
            own.notify()
        self._asleep.clear()


class Supervisor:
    """A group of threads with one fate.

    ``with Supervisor() as group:`` starts threads by ``group.start``; leaving the block waits for all of
    them. A failure in any thread (or in the block) stops the group: waits raise ``StoppedError``, the
    descriptor becomes readable, and the first failure is raised from the block's end.

    Threads are daemons and leaving waits at most ``grace`` seconds for them after a stop: a thread stuck in
    a system call (a read from a terminal, a dead server) can't keep the process from ending.
    """

    def __init__(self, name: str = "backhaul", *, grace: float = 5.0) -> None:
        self.condition = _Condition()
        self._name = name
        self._grace = grace
        self._threads: list[threading.Thread] = []
        self._failure: BaseException | None = None
        self._stopped = False
        self._stop_reader = self._stop_writer = -1

    @property
    def stopped(self) -> bool:
        """Whether the group was stopped."""
        return self._stopped

    def fileno(self) -> int:
        """Return a descriptor that becomes readable at a stop, for ``poll`` beside another one."""
        return self._stop_reader

    def start(self, work: Callable[[], None], name: str) -> threading.Thread:
        """Run ``work`` in a thread of the group."""

        def run() -> None:
            try:
                work()
            except StoppedError:
                pass
            except BaseException as error:  # noqa: BLE001 - a thread's failure is the group's
                self.stop(error)
            finally:
                with self.condition:
                    self.condition.notify_all()

        thread = threading.Thread(target=run, name=f"{self._name}-{name}", daemon=True)
        thread.start()
        self._threads.append(thread)
        return thread

    def stop(self, failure: BaseException | None = None) -> None:
        """Stop the group, for that reason; only the first reason counts."""
        with self.condition:
            if not self._stopped:
                self._failure = failure
            self._stopped = True
            self.condition.wake_all()
            if self._stop_writer >= 0:
                with contextlib.suppress(BlockingIOError):  # full, and so readable already
                    os.write(self._stop_writer, b"\0")

    def check(self) -> None:
        """Raise ``StoppedError`` if the group was stopped."""
        if self._stopped:
            raise StoppedError

    def wait_for(self, predicate: Callable[[], bool]) -> None:
        """Wait until the predicate holds; call it with ``condition`` held.

        Raises:
            StoppedError: the group was stopped first.
        """
        while not predicate():
            self.check()
            self.condition.sleep_until(predicate)
        self.check()

    def sleep(self, seconds: float) -> None:
        """Sleep, but wake for a stop.

        Raises:
            StoppedError: the group was stopped.
        """
        deadline = time.monotonic() + seconds
        with self.condition:
            while (left := deadline - time.monotonic()) > 0:
                self.check()
                self.condition.wait(left)
        self.check()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for every thread; tell whether all ended in time."""
        deadline = None if timeout is None else time.monotonic() + timeout
        for thread in self._threads:
            thread.join(None if deadline is None else max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def __enter__(self) -> Supervisor:
        self._stop_reader, self._stop_writer = os.pipe()
        os.set_blocking(self._stop_writer, False)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.stop(None if isinstance(error, StoppedError) else error)
        try:
            # Without a timeout while all is well: the threads end when the work does. A stop, from
            # wherever it comes, ends the waiting after the grace.
            with self.condition:
                while not self._stopped and any(thread.is_alive() for thread in self._threads):
                    self.condition.wait(0.5)
        except BaseException as interruption:
            self.stop(interruption)
            if self.join(self._grace):
                self._close()
            raise
        ended = self.join(self._grace if self._stopped else None)
        if ended:
            self._close()
        if self._failure is not None and self._failure is not error:
            raise self._failure

    def _close(self) -> None:
        """Close the pipe; only when no thread is left that may poll it (a closed number is soon another file)."""
        with self.condition:
            os.close(self._stop_reader)
            os.close(self._stop_writer)
            self._stop_reader = self._stop_writer = -1
