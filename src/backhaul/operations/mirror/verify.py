"""verify of a mirror: is what the store has what was put there, and is that what the directory has?"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

from backhaul.formats.file_names import shown
from backhaul.model.mirror import FILE, SPECIAL, UNREADABLE, Entry, LocalFile
from backhaul.model.objects import StoredObject
from backhaul.model.results import MirrorVerifyResult, Skipped
from backhaul.operations.mirror.content import ChangedError, ContentReader
from backhaul.operations.mirror.fetch import fetch
from backhaul.operations.mirror.listing import listing
from backhaul.operations.mirror.restore import MirrorReader
from backhaul.operations.mirror.state import MirrorState
from backhaul.operations.places import place_of, series_at
from backhaul.operations.progress import MirrorProgress
from backhaul.planning.mirror_diff import excluded, in_order, sort_key
from backhaul.sources.tree import Tree
from backhaul.transforms.digest import StreamDigest


def verify_mirror(
    mirror: str, directory: str | None, *, deep: bool = False, progress: MirrorProgress | None = None
) -> MirrorVerifyResult:
    """Compare a mirror's objects with its records, and with a directory; nothing is downloaded unless ``deep``.

    Args:
        mirror: MIRROR.
        directory: what it is a mirror of; None to look at the mirror alone. Its files are read, unless they were read
            before in the state that they are in.
        deep: read every object and compare its hash.
        progress: counters to keep up to date.

    Raises:
        BackupNotFoundError: there is no mirror.
        SourceError: the directory can't be read.
        StoreError: the store can't be read.
    """
    began = time.monotonic()
    counters = progress or MirrorProgress()
    problems: list[Skipped] = []
    files = size = read = 0
    with contextlib.ExitStack() as stack:
        reader = MirrorReader(stack, mirror)
        record = reader.must_be_mirror()
        problems += reader.unfinished()
        order, root = reader.records.order, reader.root
        is_excluded = excluded(record.exclude)
        tree = Tree(directory) if directory is not None else None
        state = reader.state
        if tree is not None:
            state = MirrorState(f"{place_of(series_at(mirror))}\0{tree.path}", mirror)
            stack.callback(state.close)
        with reader.group:
            content = ContentReader(tree, state, check=reader.group.check) if tree is not None else None
            local: Iterator[tuple[bytes, LocalFile]] = iter(())
            if tree is not None:
                local = ((place, file) for place, file in tree.scan(order) if not is_excluded(file.key))
            here = next(local, None)
            stored = in_order(listing(reader.store, reader.state, root, reader.group), order, mirror, strip=root)
            there = next(stored, None)
            hidden: bytes | None = None  # the place of a directory that can't be read
            for entry in reader.entries():
                name = reader.name(entry)
                place = sort_key(name, entry.kind, order)
                while here is not None and here[0] < place:
                    problems += _not_there(here[1])
                    here = next(local, None)
                if hidden is not None and place.startswith(hidden):
                    continue
                file = here[1] if here is not None and here[0] == place else None
                if file is not None and file.kind == UNREADABLE:
                    hidden = place
                    problems += _not_there(file)
                    here = next(local, None)
                    continue
                if file is not None:
                    here = next(local, None)
                while there is not None and there[0] < place:
                    there = next(stored, None)  # not the mirror's
                thing = there[1] if there is not None and there[0] == place else None
                if entry.kind != FILE:
                    if tree is not None and not is_excluded(name) and (file is None or file.detail != entry.target):
                        words = "gone" if file is None else "another one"
                        problems.append(Skipped(shown(name), f"the {entry.kind} is {words} here"))
                    continue
                if not entry.gone:
                    files, size = files + 1, size + entry.size
                wrong = _stored_wrong(entry, thing)
                if is_excluded(name):
                    pass
                elif not wrong and content is not None and not entry.gone:
                    wrong = _local_wrong(entry, file, content)
                elif not wrong and entry.gone and file is not None:
                    wrong = "it is back here, and has a tombstone in the mirror: sync it"
                if wrong:
                    problems.append(Skipped(shown(name), wrong))
            while here is not None:
                problems += _not_there(here[1])
                here = next(local, None)
            if deep:
                bad = {problem.name for problem in problems}
                entries = (e for e in reader.entries() if e.kind == FILE and shown(reader.name(e)) not in bad)
                counters.files, counters.total = files, size
                damaged = fetch(reader.store, entries, _Nowhere(), reader.group, counters)
                problems += [Skipped(shown(problem.name[len(root) :]), problem.reason) for problem in damaged]
                read = counters.sent
    return MirrorVerifyResult(
        mirror=mirror,
        directory=directory,
        deep=deep,
        files=files,
        bytes=size,
        bytes_read=read,
        problems=tuple(problems),
        seconds=time.monotonic() - began,
    )


class _Nowhere:
    """Takes files for their hashes alone (``fetch.Receiver``)."""

    def wants(self, entry: Entry) -> int | None:
        return 0

    def begin(self, entry: Entry, start: int, digest: StreamDigest) -> None:
        pass

    def write(self, data: memoryview) -> None:
        pass

    def finish(self, entry: Entry) -> None:
        pass

    def fail(self, entry: Entry) -> None:
        pass


def _not_there(file: LocalFile) -> list[Skipped]:
    if file.kind in (SPECIAL, UNREADABLE):
        return [Skipped(shown(file.key), f"it can't be mirrored: {file.detail}")]
    return [Skipped(shown(file.key), "it is not in the mirror")]


def _stored_wrong(entry: Entry, thing: StoredObject | None) -> str:
    if thing is None:
        return "the store has lost it"
    if thing.size != entry.size:
        return f"the object has {thing.size} bytes, and had {entry.size} when it was sent"
    if thing.etag != entry.etag:
        return "the object is another one than was put there"
    return ""


def _local_wrong(entry: Entry, file: LocalFile | None, content: ContentReader) -> str:
    if file is None or file.kind != FILE:
        return "it is gone here"
    if file.identity.size != entry.size:
        return f"it has {file.identity.size} bytes here, and {entry.size} in the mirror"
    if not entry.blake3:
        return "" if file.identity.modified == entry.modified else "it was written to since it was sent"
    try:
        return "" if content.content(file).blake3 == entry.blake3 else "it has other content here than in the mirror"
    except ChangedError:
        return "it changes while it is looked at"
    except OSError as error:
        return f"it can't be read here: {error.strerror or error}"
