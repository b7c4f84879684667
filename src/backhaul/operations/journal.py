"""The durable record of an upload, for a later run to go on from: one file for each source and destination.

The journal is written ahead of what it records where that matters (the claim, the upload's id) and behind it where
only bytes are at stake (a part that was stored and not noted is sent again). The store has the last word:
``reconcile`` keeps only the parts that it still lists, with their size and ETag.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import threading
import time
from pathlib import Path

import msgspec
from blake3 import blake3

from backhaul.errors import ConfigurationError, LockBusyError, ObjectNotFoundError, PreconditionError
from backhaul.formats import journal as format_
from backhaul.formats.journal import BegunLine, ClaimLine, Header, JournalState, PartLine, RungLine
from backhaul.model.claim import Claim
from backhaul.model.objects import StoredObject, Upload, UploadedPart
from backhaul.operations.kept_key import KeptKey
from backhaul.stores.base import Store
from backhaul.transforms.digest import combine_crc64nvme, crc64nvme, encode_crc64nvme
from backhaul.transforms.encrypt import StreamKey

STATE_VARIABLE = "BACKHAUL_STATE"
# Parts are flushed to the disk this often: a power cut costs the parts since, which are then sent again.
_FLUSH_EVERY = 1.0


def state_directory() -> Path:
    """Return where this user's journals lie: ``BACKHAUL_STATE``, /var/lib/backhaul for root, else the XDG state."""
    named = os.environ.get(STATE_VARIABLE)
    if named:
        return Path(named)
    if os.geteuid() == 0:
        return Path("/var/lib/backhaul")
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "backhaul"


def machine() -> str:
    """Return what tells this host from others: its name, and its machine id where it has one."""
    try:
        identity = Path("/etc/machine-id").read_text().strip()
    except OSError:
        identity = ""
    return f"{socket.gethostname()} {blake3(identity.encode()).hexdigest()[:16]}"


class UploadJournal:
    """The journal of one source and one destination; a ``stores.multipart.Ledger``. Locked while it is open.

    Args:
        series: what the destination is, in a form that is the same for every spelling of it.
        path: the source's real path.
        stream: the stream's name.
        text: the destination as people write it, for messages.

    Raises:
        LockBusyError: another run uploads this source there.
        ConfigurationError: the state directory can't be written.
    """

    def __init__(self, series: str, path: str, stream: str, *, text: str = "") -> None:
        name = blake3("\0".join((series, path, stream)).encode(errors="surrogateescape")).hexdigest()[:32]
        self._path = state_directory() / "uploads" / f"{name}.journal"
        self._lock = threading.Lock()
        self._hashes: dict[tuple[int, int], str] = {}
        self._parts: dict[tuple[int, int], UploadedPart] = {}
        self._uploads: dict[int, Upload] = {}
        self._kept_key = KeptKey(name)
        self._flushed = 0.0
        self._descriptor = -1
        try:
            self._descriptor = self._open(path, text or series)
            content = self._path.read_bytes()
            self.state = format_.decode(content)
            # Whether its end was lost: then it may have said more.
            self.torn = self.state is not None and self.state.length < len(content)
            if self.state is not None:
                # A line that is torn would hide those that are written behind it.
                os.ftruncate(self._descriptor, self.state.length)
                if self.state.header.machine != machine():
                    self.state = None  # of the host that this one was copied from: its uploads are not ours
        except OSError as error:
            raise ConfigurationError(
                f"The journal of this upload can't be written: {self._path}",
                error.strerror or str(error),
                f"Make its directory writable, or name another with {STATE_VARIABLE}.",
            ) from error
        # Whether it is an earlier run's that has neither been gone on with nor given up yet.
        self.inherited = self.state is not None

    def _open(self, path: str, series: str) -> int:
        self._path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        while True:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                os.close(descriptor)
                raise LockBusyError(
                    f"{path} is being pushed to {series} already",
                    f"another run holds {self._path}",
                    "Wait for it to end, or end it; this one would send the same bytes.",
                ) from error
            # Its holder may have removed it between the opening and the lock: then this is a file without a name.
            with contextlib.suppress(FileNotFoundError):
                if os.stat(self._path).st_ino == os.fstat(descriptor).st_ino:
                    return descriptor
            os.close(descriptor)

    def take_over(self, claim: Claim) -> None:
        """Note the claim under which this run goes on with the backup. Durable on return."""
        assert self.state is not None
        self.state.claims.append(claim)
        self._append(ClaimLine(claim=claim), durable=True)

    def start(self, header: Header, key: StreamKey | None) -> None:
        """Begin anew: nothing of an earlier run counts any more. Durable on return.

        The key of an encrypted stream is kept beside it, as far as that is possible (``operations.kept_key``).
        """
        self._kept_key.drop()
        self.torn = False
        if key is not None:
            self._kept_key.keep(header.backup, key)
        self.state = JournalState(header=header, length=0, claims=[header.claim], uploads={}, parts={})
        self.inherited = False
        self._uploads.clear()
        self._parts.clear()
        os.ftruncate(self._descriptor, 0)
        self._append(header, durable=True)

    def recall_key(self) -> StreamKey | None:
        """Return the key that the interrupted upload was sealed with, if it is still there."""
        return self._kept_key.recall(self.state.header.backup) if self.state is not None else None

    def reconcile(self, store: Store) -> None:
        """Ask the store what it still holds of what the journal says.

        Raises:
            StoreError: it could not be asked.
        """
        assert self.state is not None
        for segment, begun in sorted(self.state.uploads.items()):
            upload = Upload(key=begun.key, token=begun.token)
            ours = {number: part for (place, number), part in self.state.parts.items() if place == segment}
            try:
                listed = {(part.number, part.size, part.etag) for part in store.uploaded_parts(upload)}
                kept = {number: part for number, part in ours.items() if (number, part.size, part.etag) in listed}
            except ObjectNotFoundError:
                # Completed, or gone. Completed, it is an object that these very parts make.
                found = store.stat(begun.key)
                if found is None:
                    store.abort(upload)  # nothing of it can be used; on a local disk its file goes
                    continue
                if not _makes(ours, found):
                    store.delete(begun.key)
                    continue
                kept = ours
            self._uploads[segment] = upload
            for number, part in kept.items():
                self._parts[segment, number] = UploadedPart(
                    number=number, size=part.size, etag=part.etag, crc64nvme=part.crc64nvme
                )

    def forsake(self, store: Store) -> None:
        """Take back the uploads that the journal names: they are of no use any more.

        Raises:
            StoreError: the store could not be told; ``clean`` will find them.
        """
        if self.state is not None:
            for begun in self.state.uploads.values():
                store.abort(Upload(key=begun.key, token=begun.token))

    def remove(self) -> None:
        """Forget all of it: there is nothing to resume. Closes the journal."""
        self._kept_key.drop()
        with contextlib.suppress(OSError):
            os.unlink(self._path)
        self.close()

    def close(self) -> None:
        """Unlock. What was written stays for the next run."""
        with self._lock:
            if self._descriptor >= 0:
                os.close(self._descriptor)
            self._descriptor = -1

    def chosen(self, frame: int, rung: int) -> None:
        """Note the rung of a frame, before anything of it is there to be sent; noted already, it is not again.

        A later run has to make the same frames again. Without the line that costs bytes, and of an encrypted stream its
        key: under one key a chunk is sealed once. So the key is not kept any more then, and that run begins anew.
        """
        assert self.state is not None
        known = self.state.rungs
        if frame < len(known) and known[frame] == rung + 1:
            return
        if not self._append(RungLine(frame=frame, rung=rung)):
            self._kept_key.drop()

    # -- as a ledger -------------------------------------------------------------------------------------

    def upload(self, segment: int, key: str) -> Upload | None:
        """See ``Ledger.upload``."""
        upload = self._uploads.get(segment)
        return upload if upload is not None and upload.key == key else None

    def begun(self, segment: int, key: str, upload: Upload) -> None:
        """See ``Ledger.begun``. Durable on return, so that no upload is left that nobody knows of."""
        self._append(BegunLine(segment=segment, key=key, token=upload.token), durable=True)

    def known(self, segment: int, number: int, body: memoryview) -> UploadedPart | None:
        """See ``Ledger.known``: the same size, CRC64NVME and BLAKE3."""
        digest = blake3(body).hexdigest()
        with self._lock:
            self._hashes[segment, number] = digest
        part = self._parts.get((segment, number))
        line = self.state.parts.get((segment, number)) if self.state is not None else None
        if self.state is not None and self.state.header.recipients and line is not None and line.blake3 != digest:
            # Under one key a chunk is sealed once: what seals two of them with the same nonce gives both away.
            raise PreconditionError(
                f"The upload of {self.state.header.source.path} can't be gone on with",
                f"part {number} has other bytes now than when the push was interrupted",
                "Run the same command again: it begins anew, under another key.",
            )
        if part is None or line is None or part.size != len(body) or line.blake3 != digest:
            return None
        return part if part.crc64nvme == crc64nvme(body) else None

    def acknowledged(self, segment: int, part: UploadedPart, body: memoryview) -> None:
        """See ``Ledger.acknowledged``."""
        with self._lock:
            digest = self._hashes.pop((segment, part.number), None) or blake3(body).hexdigest()
        self._append(
            PartLine(
                segment=segment,
                number=part.number,
                size=part.size,
                etag=part.etag,
                crc64nvme=part.crc64nvme,
                blake3=digest,
            )
        )

    def _append(self, line: format_.Line, *, durable: bool = False) -> bool:
        """Add a line; tell whether that went well. A part's line that is lost costs only that the part is sent again.

        Once it is closed nothing is sent any more that the next run would have to know of.

        Raises:
            ConfigurationError: it could not be written, and has to be there even after a power cut (``durable``).
        """
        with self._lock:
            if self._descriptor < 0:
                return True
            try:
                text = format_.encode_line(line)
                end = os.fstat(self._descriptor).st_size
                if os.write(self._descriptor, text) != len(text):
                    os.ftruncate(self._descriptor, end)
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if durable or time.monotonic() - self._flushed >= _FLUSH_EVERY:
                    self._flushed = time.monotonic()
                    os.fdatasync(self._descriptor)
            except OSError as error:
                if durable:
                    raise ConfigurationError(
                        f"The journal of this upload can't be written: {self._path}",
                        error.strerror or str(error),
                        f"Make room on its disk, or name another directory with {STATE_VARIABLE}.",
                    ) from error
                return False
            return True


def same_upload(state: JournalState, header: Header) -> bool:
    """Tell whether a journal is of the upload that the header describes, whatever its backup and claim."""
    return msgspec.structs.replace(state.header, backup=header.backup, claim=header.claim) == header


def _makes(parts: dict[int, PartLine], found: StoredObject) -> bool:
    """Tell whether these parts, and no others, make the object that is there."""
    numbers = sorted(parts)
    if numbers != list(range(1, len(numbers) + 1)) or sum(part.size for part in parts.values()) != found.size:
        return False
    combined = 0
    for number in numbers:
        combined = combine_crc64nvme(combined, parts[number].crc64nvme, parts[number].size)
    return found.checksum in (None, f"CRC64NVME:{encode_crc64nvme(combined)}")
