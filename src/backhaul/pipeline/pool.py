"""Threads that do one thing after the other, and a bound on the memory that waits for them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from backhaul.pipeline.supervisor import Supervisor

T = TypeVar("T")


class WorkerPool:
    """``workers`` threads of a group; what they were given is done in order of submission.

    A piece of work that fails gives its failure to its future, and to nobody else. After a stop of the group nothing
    that waits is begun.
    """

    def __init__(self, group: Supervisor, workers: int, name: str) -> None:
        self._group = group
        self._waiting: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._closed = False
        for number in range(workers):
            group.start(self._work, f"{name}-{number}")

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Have something done."""
        future: Future[T] = Future()
        with self._group.condition:
            self._group.check()
            if self._closed:
                raise RuntimeError("the pool is closed")
            self._waiting.append((work, future))
            self._group.condition.notify_all()
        return future

    def close(self) -> None:
        """Let the threads end when nothing is left to do."""
        with self._group.condition:
            self._closed = True
            self._group.condition.notify_all()

    def _work(self) -> None:
        condition = self._group.condition
        while True:
            with condition:
                self._group.wait_for(lambda: bool(self._waiting) or self._closed)
                if not self._waiting:
                    return
                work, future = self._waiting.popleft()
            try:
                future.set_result(work())
            except BaseException as error:  # noqa: BLE001 - handed to whoever waits
                future.set_exception(error)
            del work, future
            with condition:
                condition.notify_all()


class BufferBudget:
    """Buffers of any size, of which at most ``limit`` bytes are out at once (or a single one, if it is larger)."""

    def __init__(self, group: Supervisor, limit: int) -> None:
        self._group = group
        self._limit = limit
        self._out = 0
        self._spare: list[bytearray] = []

    def take(self, size: int) -> bytearray:
        """Wait for room, and return a buffer of at least that size."""
        with self._group.condition:
            self._group.wait_for(lambda: self._out == 0 or self._out + size <= self._limit)
            self._out += size
            while self._spare:
                buffer = self._spare.pop()
                if len(buffer) == size:
                    return buffer
        return bytearray(size)

    def give(self, buffer: bytearray) -> None:
        """Take a buffer back."""
        with self._group.condition:
            self._out -= len(buffer)
            if len(buffer) + sum(map(len, self._spare)) + self._out <= self._limit:
                self._spare.append(buffer)
            self._group.condition.notify_all()
