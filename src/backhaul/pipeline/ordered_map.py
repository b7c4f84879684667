"""Work done in parallel, delivered in order, with a bounded number of items between."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

from backhaul.pipeline.supervisor import Supervisor

In = TypeVar("In")
Out = TypeVar("Out")


class OrderedMap(Generic[In, Out]):
    """Applies a function to items from an iterable in several threads; iterating gives results in order.

    One thread draws the items, ``workers`` threads work, and whoever iterates takes. At most ``window``
    items are anywhere between drawn and taken, so a slow taker slows the drawing, and memory is
    ``window`` items and results, whatever the speeds.

    Args:
        group: whose threads these are; its stop ends the iteration with ``StoppedError``.
        items: drawn one by one in a thread of its own; it may block.
        make_worker: called once in each worker's thread for the function that it applies (so that each has
            its own compressor or connection).
        workers: number of working threads.
        window: most items in flight.
        name: for the threads' names.
    """

    def __init__(
        self,
        group: Supervisor,
        items: Iterable[In],
        make_worker: Callable[[], Callable[[In], Out]],
        *,
        workers: int,
        window: int,
        name: str,
    ) -> None:
        self._group = group
        self._items = items
        self._make_worker = make_worker
        self._window = window
        self._todo: deque[tuple[int, In]] = deque()
        self._done: dict[int, Out] = {}
        self._drawn = 0
        self._taken = 0
        self._exhausted = False
        group.start(self._draw, f"{name}-feed")
        for number in range(workers):
            group.start(self._work, f"{name}-{number}")

    def _draw(self) -> None:
        condition = self._group.condition
        iterator = iter(self._items)
        while True:
            with condition:
                self._group.wait_for(lambda: self._drawn - self._taken < self._window)
            try:
                item = next(iterator)
            except StopIteration:
                break
            with condition:
                self._todo.append((self._drawn, item))
                self._drawn += 1
                condition.notify_all()
        with condition:
            self._exhausted = True
            condition.notify_all()

    def _work(self) -> None:
        function = self._make_worker()
        condition = self._group.condition
        while True:
            with condition:
                self._group.wait_for(lambda: bool(self._todo) or self._exhausted)
                if not self._todo:
                    return
                number, item = self._todo.popleft()
            result = function(item)
            del item
            with condition:
                self._done[number] = result
                condition.notify_all()

    def __iter__(self) -> Iterator[Out]:
        condition = self._group.condition
        while True:
            with condition:
                self._group.wait_for(
                    lambda: self._taken in self._done or (self._exhausted and self._taken == self._drawn)
                )
                if self._taken not in self._done:
                    return
                result = self._done.pop(self._taken)
            yield result
            del result
            with condition:
                self._taken += 1
                condition.notify_all()
