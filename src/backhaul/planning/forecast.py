"""When a run will have ended, from its rate so far or from what its job usually takes; and what is usual."""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from statistics import median

from backhaul.model.job import INCOMPLETE, OK, RunRecord

# Of so many late runs the median is the usual; of fewer nothing is.
_LATE, _FEWEST = 7, 3
# A rate says nothing before so many seconds, nor before this share of the work.
_FIRST_SECONDS, _FIRST_SHARE = 30.0, 0.01


def usual_seconds(runs: Sequence[RunRecord]) -> float | None:
    """Return how long a good run of late took, the median; None where there was none."""
    late = [run.seconds for run in runs if run.state == OK][:_LATE]
    return median(late) if late else None


def usual_size(runs: Sequence[RunRecord]) -> float | None:
    """Return how large backups were of late, the median of their raw sizes; None where there are fewer than three.

    Args:
        runs: newest first.
    """
    late = [run.raw_size for run in runs if run.state in (OK, INCOMPLETE) and run.backups][:_LATE]
    return median(late) if len(late) >= _FEWEST else None


def forecast_end(
    now: dt.datetime, elapsed: float, *, done: int = 0, total: float = 0, usual: float | None = None
) -> dt.datetime | None:
    """Return when a run will have ended; None where nobody can say.

    Args:
        now: the present.
        elapsed: seconds since it began; 0 for one that has not begun.
        done, total: bytes so far, and in all; 0 where it is not known.
        usual: seconds that it usually takes.
    """
    if total > 0 and done >= total * _FIRST_SHARE and elapsed >= _FIRST_SECONDS:
        return now + dt.timedelta(seconds=max(total - done, 0) * elapsed / done)
    if usual is not None:
        # One that takes longer than usual ends soon, for all that is known: nothing is claimed then.
        return now + dt.timedelta(seconds=usual - elapsed) if usual > elapsed else None
    return None


def late_by(end: dt.datetime | None, closes: dt.datetime | None) -> float:
    """Return by how many seconds a run ends after its window; 0 for in time or not known."""
    if end is None or closes is None:
        return 0.0
    return max((end - closes).total_seconds(), 0.0)
