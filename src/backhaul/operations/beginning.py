"""Step 1 of a push: an id that is this run's own in every destination, a new one or an interrupted run's.

A claim finds wrong credentials, missing buckets and stores that are away before the dump begins. Where the source is a
file that was not changed since, the backup that an interrupted push of it has begun is gone on with.
"""

from __future__ import annotations

import datetime as dt
import itertools
import time
from collections.abc import Callable, Sequence

from backhaul import version
from backhaul.errors import BackhaulError, FailedError, PreconditionError
from backhaul.formats import journal as journal_format
from backhaul.formats import names
from backhaul.formats.age_keys import Recipient, key_id
from backhaul.formats.journal import Header, SourceIdentity
from backhaul.model.claim import Claim
from backhaul.operations import memory, series
from backhaul.operations.destination import REWRITTEN, Destination
from backhaul.operations.encryption import fresh_key
from backhaul.operations.journal import machine, same_upload
from backhaul.transforms import compress
from backhaul.transforms.encrypt import StreamKey

_MAX_ID_TRIES = 120


class Beginning:
    """See the module.

    Args:
        destinations: all of the run; those that fail here are out of it.
        identity: of the file that is pushed; None for what can't be read again.
        stream: the name of the stream, or of the first one.
        codec: what the stream is stored as.
        setting: what ``--compress`` said.
        recipients: who shall open it; empty for a stream that is not encrypted.
        key: a new one for the stream, or for the first one; None where it is not encrypted.
        now: the clock.

    Attributes:
        id: the backup's, once it has begun.
        key: the one that was given, or an interrupted run's where that is gone on with.
        recorded: the rungs at which an interrupted run has made its frames, by number.
    """

    def __init__(
        self,
        destinations: Sequence[Destination],
        *,
        identity: SourceIdentity | None,
        stream: str,
        codec: str,
        setting: str,
        recipients: Sequence[Recipient],
        key: StreamKey | None,
        now: Callable[[], dt.datetime],
    ) -> None:
        self.id = ""
        self.key = key
        self.recorded = bytearray()
        self._destinations = destinations
        self._identity = identity
        self._stream = stream
        self._codec = codec
        self._setting = setting
        self._recipients = recipients
        self._now = now
        self._required = len(destinations)

    @property
    def living(self) -> list[Destination]:
        """Those that have not failed."""
        return [destination for destination in self._destinations if destination.failure is None]

    def begin(self, required: int) -> dt.datetime:
        """Make the id this run's own, and settle how each destination cuts the stream; return the backup's start.

        Args:
            required: how many destinations must be left.

        Raises:
            BackhaulError: fewer destinations are left than are required; the last one's failure.
        """
        self._required = required
        started = self._resume() or self._claim()
        self._plan()
        return started

    def _resume(self) -> dt.datetime | None:
        """Take over the backup that an interrupted push of this very file has begun, where there is one.

        Returns:
            Its start, or None if there is nothing to resume.
        """
        if self._identity is None:
            return None
        claim = series.new_claim(self._now())
        begun: dict[str, StreamKey | None] = {}
        rungs: dict[str, bytearray] = {}
        for destination in self._destinations:
            journal = destination.journal
            if journal is None or journal.state is None:
                continue
            try:
                key = journal.recall_key() if self.key is not None else None
                if not same_upload(journal.state, self._header(destination, "", claim)):
                    destination.remark = "the file or the settings have changed since an interrupted push: begun anew"
                    destination.forsake()
                elif self.key is not None and key is None:
                    destination.remark = (
                        REWRITTEN if destination.rewritten else "the key of an interrupted push is gone: begun anew"
                    )
                    destination.forsake()
                elif self.key is not None and journal.torn:
                    # (Frames whose rungs it said might be made otherwise now, and sealed under the same key.)
                    destination.remark = "the record of an interrupted push is damaged: begun anew"
                    destination.forsake()
                elif not _agree(journal.state.rungs, rungs.get(journal.state.header.backup, b"")):
                    destination.remark = (
                        "what an interrupted push has sent here is not what it sent elsewhere: begun anew"
                    )
                    destination.forsake()
                else:
                    begun[journal.state.header.backup] = key
                    known = rungs.get(journal.state.header.backup, b"")
                    rungs[journal.state.header.backup] = bytearray(
                        one or other for one, other in itertools.zip_longest(journal.state.rungs, known, fillvalue=0)
                    )
            except BackhaulError as error:
                self._fail_early(destination, error)
        if not begun:
            return None
        self.id = max(begun)
        self.key = begun[self.id] or self.key
        start = names.parse_backup_id(self.id)
        assert start is not None
        for destination in self.living:
            try:
                if not destination.resume(self.id, self._header(destination, self.id, claim), self.key):
                    raise PreconditionError(
                        f"{destination.text}/{self.id} is another run's",
                        "the interrupted backup can't be gone on with there",
                        "Wait for that run to end, or for clean to collect it.",
                    )
            except BackhaulError as error:
                self._fail_early(destination, error)
        if any(destination.needs_stream for destination in self.living):
            self.recorded = rungs[self.id]
            return start
        # It was committed everywhere before it was interrupted: this is a new one.
        for destination in self.living:
            destination.start_over()
        self.key = fresh_key(self._recipients)
        return None

    def _fail_early(self, destination: Destination, error: BackhaulError) -> None:
        destination.fail(error)
        if len(self.living) < self._required:
            raise error

    def _claim(self) -> dt.datetime:
        """Reserve one id in every destination that can be used, and return the start that it stands for."""
        for _ in range(_MAX_ID_TRIES):
            start = self._now().replace(microsecond=0)
            self.id = names.backup_id(start)
            if self._claim_everywhere(series.new_claim(start)):
                return start
            # Another run began in this second. Ids tell seconds apart, so this one begins in the next.
            time.sleep(1.0 - self._now().microsecond / 1e6)
        raise FailedError(
            "No id was free for this backup",
            f"other runs took {_MAX_ID_TRIES} seconds in a row",
            "See who else pushes to this series; this host's clock may stand still.",
        )

    def _claim_everywhere(self, claim: Claim) -> bool:
        for destination in self.living:
            try:
                if destination.journal is not None:  # ahead of what it names: no claim without a record of it
                    destination.start_journal(self._header(destination, self.id, claim), self.key)
                taken = destination.take_claim(self.id, claim)
            except BackhaulError as error:
                self._fail_early(destination, error)
                continue
            if not taken:
                for other in self.living:
                    other.give_claim_back()
                return False
        return True

    def _plan(self) -> None:
        """Settle how each destination cuts the stream: before its first byte."""
        for destination in self.living:
            try:
                destination.rules = destination.store.parts(self._at_most())
            except BackhaulError as error:
                self._fail_early(destination, error)

    def _header(self, destination: Destination, backup: str, claim: Claim) -> Header:
        """Return what the journal has to say for this run to be resumed."""
        assert self._identity is not None
        return Header(
            version=journal_format.VERSION,
            machine=machine(),
            series=destination.place,
            write=destination.write,
            backup=backup,
            stream=self._stream,
            codec=self._codec,
            setting=self._setting,
            frame_size=compress.FRAME_SIZE,
            layout=destination.store.parts(self._at_most()).layout,
            source=self._identity,
            claim=claim,
            recipients=tuple(key_id(recipient.text) for recipient in self._recipients),
            writer=f"backhaul {version.VERSION}, {compress.WRITER}",
        )

    def _at_most(self) -> int | None:
        """Return the stored bytes that the stream certainly does not exceed, where its length is known."""
        if self._identity is None:
            return None
        return memory.most_stored(self._identity.size, len(self.key.header) if self.key is not None else 0)


def _agree(one: bytes | bytearray, other: bytes | bytearray) -> bool:
    """Tell whether no frame has two rungs."""
    return all(not a or not b or a == b for a, b in zip(one, other, strict=False))
