"""What is in a local file: read once, and known from then on as long as the file stays as it is."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from backhaul.model.mirror import LocalFile
from backhaul.operations.mirror.state import Content, MirrorState
from backhaul.sources.tree import OpenFile, Tree
from backhaul.transforms.chunks import Chunker
from backhaul.transforms.digest import StreamDigest

# Files below this are sent as a whole: a part of an upload has 5 MiB at least.
SMALLEST_WITH_CHUNKS = 12 << 20
_PIECE = 4 << 20


class ChangedError(Exception):
    """A file changed while it was read. Raised and caught within the mirror."""


class ContentReader:
    """Reads files for their hashes and chunks; notes both in the state. ``bytes_read`` counts."""

    def __init__(self, tree: Tree, state: MirrorState, *, check: Callable[[], None]) -> None:
        self._tree = tree
        self._state = state
        self._check = check
        self.bytes_read = 0

    def content(self, file: LocalFile, *, md5: bool = False, chunks: bool = False) -> Content:
        """Return a file's hashes, reading it only if it was not read in this state before.

        Args:
            file: as the scan saw it.
            md5: the MD5, too.
            chunks: note its signature, too, where the file is large enough for one.

        Raises:
            ChangedError: it is another file now, or changed while it was read.
            OSError: it can't be read.
        """
        chunks = chunks and file.identity.size >= SMALLEST_WITH_CHUNKS
        known = self._state.content(file.identity)
        enough = known is not None and (known.md5 or not md5)
        if known is not None and enough and (not chunks or self._state.signature(known.blake3) is not None):
            return known
        with self._tree.open(file.key) as opened:
            if opened.identity != file.identity:
                raise ChangedError
            content = self._read(opened, md5=md5, chunks=chunks)
            if not opened.unchanged():
                raise ChangedError
        self._state.note_content(file.identity, content)
        return content

    def _read(self, opened: OpenFile, *, md5: bool, chunks: bool) -> Content:
        chunker = Chunker() if chunks else None
        digest = chunker.digest if chunker is not None else StreamDigest()
        checksum = hashlib.md5(usedforsecurity=False) if md5 else None
        buffer = memoryview(bytearray(min(_PIECE, max(1, opened.identity.size))))
        offset = 0
        while True:
            self._check()
            count = opened.read_into(offset, buffer)
            if count == 0:
                break
            piece = buffer[:count]
            if chunker is not None:
                chunker.feed(piece)
            else:
                digest.feed(piece)
            if checksum is not None:
                checksum.update(piece)
            offset += count
            self.bytes_read += count
        if chunker is not None:
            self._state.note_signature(digest.blake3, chunker.finish(), published=False)
        return Content(digest.blake3, digest.crc64nvme, checksum.hexdigest() if checksum is not None else "")
