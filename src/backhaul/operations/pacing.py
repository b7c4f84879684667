"""The rate limit of a run: one for all its connections, and one of its own for what is sent again."""

from __future__ import annotations

import datetime as dt

from backhaul.formats.timetable import Timetable
from backhaul.pipeline.supervisor import Supervisor
from backhaul.pipeline.token_bucket import TokenBucket
from backhaul.stores.throttle import RateLimit

# A limited body goes out in pieces of this many seconds, so that a slow limit is even.
_PIECE_SECONDS = 0.02
_LARGEST_PIECE = 64 << 10


def rate_limit(table: Timetable, group: Supervisor) -> RateLimit:
    """Return the limit that a timetable sets; a stop of the group ends all waiting for it."""

    def rate() -> int | None:
        return table.rate_at(dt.datetime.now())  # noqa: DTZ005 - the operator's clock on the wall

    fresh, again = (TokenBucket(rate, sleep=group.sleep).take for _ in range(2))
    piece = min(_LARGEST_PIECE, int((table.slowest or _LARGEST_PIECE / _PIECE_SECONDS) * _PIECE_SECONDS))
    return RateLimit(fresh, again, piece)
