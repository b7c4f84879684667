"""Several targets of one stream, each with its own fate: a command that fails does not cost the file beside it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from backhaul.errors import TargetError
from backhaul.pipeline.supervisor import Supervisor
from backhaul.targets.base import Target


class SeveralTargets:
    """See the module, and ``Target``: an error is raised when the last one has failed.

    Attributes:
        failed: those that did, and why.
    """

    def __init__(self, targets: Sequence[Target]) -> None:
        self.name = " and ".join(target.name for target in targets)
        self.failed: list[tuple[Target, TargetError]] = []
        self._targets = targets
        self._living = list(targets)

    @property
    def living(self) -> list[Target]:
        """Those that have not failed."""
        return list(self._living)

    def start(self, raw_size: int, group: Supervisor) -> None:
        """See ``Target.start``. None is left begun if one can't be."""
        begun: list[Target] = []
        try:
            for target in self._targets:
                begun.append(target)
                target.start(raw_size, group)
        except BaseException:
            for target in begun:
                target.abort()
            raise

    def write(self, data: memoryview) -> None:
        """See ``Target.write``."""
        self._each(lambda target: target.write(data))

    def commit(self) -> None:
        """See ``Target.commit``."""
        self._each(lambda target: target.commit())

    def abort(self) -> None:
        """See ``Target.abort``."""
        for target in self._targets:
            target.abort()

    def _each(self, step: Callable[[Target], None]) -> None:
        for target in self.living:
            try:
                step(target)
            except TargetError as error:
                target.abort()
                self._living.remove(target)
                self.failed.append((target, error))
        if not self._living:
            raise self.failed[0][1]
