"""A proxy that injects faults of the network, and of a store under load, into the traffic with a real server.

Which requests are hit, and where, is drawn from a seeded generator in the order in which requests come: the same
requests one after another get the same faults; those of several threads get as many, in another order.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Literal, TypeAlias, get_args

import msgspec

from backhaul.testing.s3_proxy import BreakConnection, S3Proxy, S3Refusal, S3Request
from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY

Kind: TypeAlias = Literal[
    "throttle",
    "reset_request",
    "stall",
    "corrupt_request",
    "error",
    "reset_reply",
    "truncate",
    "corrupt_reply",
    "slow",
]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
_READS: Final = ("GetObject", "ListObjectsV2", "ListParts", "ListMultipartUploads")
_WRITES: Final = ("PutObject", "UploadPart")


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """How often a kind of fault happens, and to which requests.

    Attributes:
        probability: that a request is hit.
        burst: how many requests in a row a hit takes.
        limit: how many requests are hit at most.
        only: which requests may be hit; all that this kind can happen to, if None.
        place: where in the request or the reply, from 0 (the beginning) up to 1; drawn if None.
    """

    probability: float = 1.0
    burst: int = 1
    limit: int | None = None
    only: Callable[[S3Request], bool] | None = None
    place: float | None = None


class FaultPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The faults to inject: at most one a request, the first kind that is drawn in this order.

    Attributes:
        seed: of the generator.
        only: which requests may be hit by any kind.
        throttle: 503 SlowDown; the request is not passed on.
        reset_request: the connection is reset when a part of the request's body was read; the server gets no
            whole request. Happens to requests with a body.
        stall: no byte moves for ``stall_seconds``, then the connection is reset. In the first half of ``place``
            that is in the middle of the request's body, if there is one, and the server gets no whole request;
            else it is in the reply, after the server did the work, as with ``reset_reply``.
        corrupt_request: a byte of the data of a PutObject or UploadPart is changed.
        error: 500 InternalError, after the server did the work.
        reset_reply: the connection is reset after the server did the work: in the first half of ``place`` before
            the reply, in the second in its body, if it has one.
        truncate: the connection is closed, in order, before the end of the reply's body. Happens to reads.
        corrupt_reply: a byte of the data of a GetObject is changed.
        slow: the body of the request or, if it has none, of the reply begins with ``slow_pieces`` pieces of
            ``slow_bytes`` bytes and ``slow_pause`` seconds before each; all of it arrives.
        stall_seconds: see ``stall``.
        slow_pieces: see ``slow``.
        slow_bytes: see ``slow``.
        slow_pause: see ``slow``.
    """

    seed: int = 0
    only: Callable[[S3Request], bool] | None = None
    throttle: Fault | None = None
    reset_request: Fault | None = None
    stall: Fault | None = None
    corrupt_request: Fault | None = None
    error: Fault | None = None
    reset_reply: Fault | None = None
    truncate: Fault | None = None
    corrupt_reply: Fault | None = None
    slow: Fault | None = None
    stall_seconds: float = 30.0
    slow_pieces: int = 8
    slow_bytes: int = 1024
    slow_pause: float = 0.01


class _Drawn(msgspec.Struct):
    """The fault of the request at hand. ``done`` once it was injected."""

    kind: Kind
    place: float
    plan: FaultPlan
    done: bool = False


class FaultProxy(S3Proxy):
    """Injects the faults of a plan, and counts them by kind in ``injected``."""

    def __init__(
        self,
        upstream: str,
        plan: FaultPlan | None = None,
        *,
        access_key: str = ACCESS_KEY,
        secret_key: str = SECRET_KEY,
        region: str = "us-east-1",
    ) -> None:
        super().__init__(upstream, access_key=access_key, secret_key=secret_key, region=region)
        self.injected: Counter[str] = Counter()
        self._lock = threading.Lock()
        # A request is handled by one thread from beginning to end: its fault is the thread's.
        self._at_hand = threading.local()
        self._out = False
        self.use(plan or FaultPlan())

    def use(self, plan: FaultPlan) -> None:
        """Go over to another plan, from its beginning, with the next request. Counts stay."""
        with self._lock:
            self._plan = plan
            self._random = random.Random(plan.seed)
            self._bursts: Counter[Kind] = Counter()
            self._hits: Counter[Kind] = Counter()

    def outage(self, on: bool) -> None:
        """Begin or end an outage: while it lasts every connection, old or new, is reset at once."""
        with self._lock:
            self._out = on
        if on:
            broken = self.break_connections()
            with self._lock:
                self.injected["outage"] += broken

    # -- hooks -----------------------------------------------------------------------------------------

    def accepts(self) -> bool:
        """See ``S3Proxy.accepts``."""
        with self._lock:
            if self._out:
                self.injected["outage"] += 1
            return not self._out

    def refuse(self, request: S3Request, body_length: int) -> S3Refusal | None:
        """See ``S3Proxy.refuse``."""
        drawn = self._at_hand.drawn = self._draw(request, body_length)
        if drawn is not None and drawn.kind == "throttle":
            self._inject(drawn)
            return S3Refusal(503, "SlowDown", "Please reduce your request rate.")
        return None

    def request_body(self, request: S3Request, length: int, pieces: Iterator[bytes]) -> Iterator[bytes]:
        """See ``S3Proxy.request_body``."""
        drawn = self._drawn()
        if drawn is None:
            return pieces
        match drawn.kind:
            case "reset_request":
                return self._broken(drawn, pieces, int(drawn.place * length))
            case "stall" if drawn.place < 0.5:
                return self._broken(drawn, pieces, int(drawn.place * 2 * length))
            case "corrupt_request":
                return self._corrupted(drawn, pieces, int(drawn.place * length))
            case "slow":
                return self._slowed(drawn, pieces)
            case _:
                return pieces

    def answer(self, request: S3Request, status: int, headers: Mapping[str, str]) -> S3Refusal | None:
        """See ``S3Proxy.answer``."""
        drawn = self._drawn()
        if drawn is None:
            return None
        if drawn.kind == "error":
            self._inject(drawn)
            return S3Refusal(500, "InternalError", "We encountered an internal error. Please try again.")
        if drawn.kind in ("reset_reply", "stall") and (
            drawn.place < 0.5 or request.method == "HEAD" or headers.get("content-length", "") == "0" or status == 204
        ):
            self._break(drawn)
        if status in (204, 304):
            self._give_back(drawn)
        return None

    def reply_body(
        self, request: S3Request, status: int, length: int | None, pieces: Iterator[bytes]
    ) -> Iterator[bytes]:
        """See ``S3Proxy.reply_body``."""
        drawn = self._drawn()
        if drawn is None:
            return pieces
        if length is None:  # in chunks: these are the small replies, with lists
            content = b"".join(pieces)
            length, pieces = len(content), iter([content])
        match drawn.kind:
            case "reset_reply" | "stall":
                return self._broken(drawn, pieces, int((drawn.place * 2 - 1) * length))
            case "truncate" if length:
                return self._truncated(drawn, pieces, int(drawn.place * length))
            case "corrupt_reply" if length and status in (200, 206):
                return self._corrupted(drawn, pieces, int(drawn.place * length))
            case "slow" if length:
                return self._slowed(drawn, pieces)
            case _:
                self._give_back(drawn)
                return pieces

    # -- draws -----------------------------------------------------------------------------------------

    def _draw(self, request: S3Request, body_length: int) -> _Drawn | None:
        with self._lock:
            plan = self._plan
            if plan.only is not None and not plan.only(request):
                return None
            for kind in KINDS:
                fault: Fault | None = getattr(plan, kind)
                if fault is None or not _possible(kind, request, body_length):
                    continue
                if fault.only is not None and not fault.only(request):
                    continue
                if fault.limit is not None and self._hits[kind] >= fault.limit:
                    continue
                if self._bursts[kind]:
                    self._bursts[kind] -= 1
                elif self._random.random() < fault.probability:
                    self._bursts[kind] = fault.burst - 1
                else:
                    continue
                self._hits[kind] += 1
                place = self._random.random() if fault.place is None else min(fault.place, 1 - 2**-53)
                return _Drawn(kind, place, plan)
            return None

    def _give_back(self, drawn: _Drawn) -> None:
        """Count a hit as none: there was nothing to damage."""
        if not drawn.done:
            with self._lock:
                self._hits[drawn.kind] -= 1
            drawn.done = True

    def _drawn(self) -> _Drawn | None:
        """Return the fault of the request at hand, if it is still to be injected."""
        drawn: _Drawn | None = self._at_hand.drawn
        return None if drawn is None or drawn.done else drawn

    def _inject(self, drawn: _Drawn) -> None:
        drawn.done = True
        with self._lock:
            self.injected[drawn.kind] += 1

    # -- damage ----------------------------------------------------------------------------------------

    def _break(self, drawn: _Drawn) -> None:
        self._inject(drawn)
        if drawn.kind == "stall":
            self.pause(drawn.plan.stall_seconds)
        raise BreakConnection

    def _broken(self, drawn: _Drawn, pieces: Iterator[bytes], place: int) -> Iterator[bytes]:
        yield from _up_to(pieces, place)
        self._break(drawn)

    def _truncated(self, drawn: _Drawn, pieces: Iterator[bytes], place: int) -> Iterator[bytes]:
        yield from _up_to(pieces, place)
        self._inject(drawn)

    def _corrupted(self, drawn: _Drawn, pieces: Iterator[bytes], place: int) -> Iterator[bytes]:
        for piece in pieces:
            if 0 <= place < len(piece):
                self._inject(drawn)
                yield piece[:place] + bytes([piece[place] ^ 1]) + piece[place + 1 :]
            else:
                yield piece
            place -= len(piece)

    def _slowed(self, drawn: _Drawn, pieces: Iterator[bytes]) -> Iterator[bytes]:
        plan = drawn.plan
        self._inject(drawn)
        left = plan.slow_pieces
        for piece in pieces:
            done = 0
            while left and done < len(piece):
                self.pause(plan.slow_pause)
                yield piece[done : done + plan.slow_bytes]
                done += plan.slow_bytes
                left -= 1
            if done < len(piece):
                yield piece[done:]


def _possible(kind: Kind, request: S3Request, body_length: int) -> bool:
    """Tell whether a request can be hit by a kind of fault."""
    match kind:
        case "reset_request":
            return body_length > 0
        case "corrupt_request":
            return body_length > 0 and request.operation in _WRITES
        case "truncate":
            return request.operation in _READS
        case "corrupt_reply":
            return request.operation == "GetObject"
        case "slow":
            return body_length > 0 or request.operation in _READS
        case _:
            return True


def _up_to(pieces: Iterator[bytes], place: int) -> Iterator[bytes]:
    """Yield the first bytes, fewer than there are, and read no more than the piece where they end."""
    for piece in pieces:
        if place < len(piece):
            yield piece[:place]
            return
        yield piece
        place -= len(piece)
