"""A few threads that do one kind of work beside each other, with no queue before them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from backhaul.pipeline.supervisor import StoppedError, Supervisor


class WorkerPool:
    """Runs callables in up to ``workers`` threads; ``submit`` waits until a thread is free.

    What is under way is also bounded by weight (bytes, say): at most ``max_weight`` together, or one alone.

    Its fate is its own: a failing callable makes the pool fail (later calls raise that failure) without
    stopping the group. Threads are made when first needed.
    """

    def __init__(self, group: Supervisor, workers: int, name: str, max_weight: int = 0) -> None:
        self._group = group
        self._workers = workers
        self._name = name
        self._threads = 0
        self._max_weight = max_weight
        self._waiting: deque[tuple[Callable[[], None], int]] = deque()
        self._busy = 0
        self._weight = 0
        self._closed = False
        self._failure: BaseException | None = None

    def submit(self, work: Callable[[], None], weight: int = 0) -> None:
        """Run ``work`` in a thread, as soon as one is free.

        Raises:
            BaseException: the first failure of earlier work.
        """
        condition = self._group.condition
        with condition:
            self._group.wait_for(
                lambda: (
                    self._failure is not None
                    or self._busy == 0
                    or (self._busy < self._workers and self._weight + weight <= self._max_weight)
                )
            )
            self._raise_failure()
            self._busy += 1
            self._weight += weight
            self._waiting.append((work, weight))
            condition.notify_all()
            needed = self._busy > self._threads
            if needed:
                self._threads += 1
        if needed:
            self._group.start(self._run, f"{self._name}-{self._threads}")

    def drain(self) -> None:
        """Wait until all submitted work is done.

        Raises:
            BaseException: the first failure.
        """
        with self._group.condition:
            self._group.wait_for(lambda: self._failure is not None or self._busy == 0)
            self._raise_failure()

    def close(self) -> None:
        """Let the threads end; work that did not begin is dropped."""
        with self._group.condition:
            self._closed = True
            self._busy -= len(self._waiting)
            self._waiting.clear()
            self._group.condition.notify_all()

    def wait_idle(self, timeout: float) -> bool:
        """Wait at most that long until no work is under way, whatever has failed; tell whether that is so."""
        with self._group.condition:
            return self._group.condition.wait_for(lambda: self._busy == 0, timeout)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _run(self) -> None:
        condition = self._group.condition
        while True:
            with condition:
                self._group.wait_for(lambda: bool(self._waiting) or self._closed)
                if not self._waiting:
                    return
                work, weight = self._waiting.popleft()
            failure: BaseException | None = None
            try:
                work()
            except BaseException as error:  # noqa: BLE001 - handed to whoever submits or drains
                failure = error
            del work
            with condition:
                self._busy -= 1
                self._weight -= weight
                if failure is not None and self._failure is None:
                    self._failure = StoppedError() if isinstance(failure, StoppedError) else failure
                condition.notify_all()
