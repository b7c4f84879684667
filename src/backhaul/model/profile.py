"""What a store can do: its limits and abilities, as values. ``formats.profiles`` has the table of providers."""

from __future__ import annotations

import msgspec

# The orders in which stores list keys: by their bytes, as S3 says; as a tree is walked, where "a/x" comes before
# "a b/x"; or in none that could be relied on.
BY_KEY, BY_TREE, UNORDERED = "by key", "by tree", "unordered"


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider allows of a multipart upload. Sizes in bytes.

    Attributes:
        min_part: least size of every part but the last.
        max_part: largest size of a part.
        max_parts: most parts of an upload.
        max_object: largest object.
        equal_parts: whether all parts of an upload but the last must have the same size.
    """

    min_part: int = 5 << 20
    max_part: int = 5 << 30
    max_parts: int = 10_000
    max_object: int = 10_000 * (5 << 30)
    equal_parts: bool = False


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of store.

    Attributes:
        name: as it is set in a URL or the config.
        title: for people.
        limits: of its multipart uploads.
        checksums: whether it takes a CRC64NVME with every part, checks it, combines them into that of the
            whole object, and refuses a completion that asserts another one.
        md5_etags: whether a part's ETag is the MD5 of its bytes, and an upload's ETag the MD5 of those
            (not under SSE-KMS or SSE-C, which its replies tell).
        conditional_writes: whether ``If-None-Match: *`` is obeyed by PUT.
        conditional_completions: the same for the completion of an upload.
        conditional_deletes: whether ``If-Match`` is obeyed by DELETE.
        part_copies: whether ranges of objects can become parts of an upload (UploadPartCopy).
        lists_uploads: whether unfinished uploads can be listed.
        upload_days: days after which it drops unfinished uploads by itself; None if it keeps them.
        tags, object_lock: whether these may be asked for in a write.
        storage_classes: those that it has; None if it is not known which.
        aborts_safely: whether aborting an upload leaves a completed object of the same key alone.
        parallel: most parts under way at once.
        listing: the order in which it lists keys.
        unsafe_names: characters that it does not keep in a name.
    """

    name: str
    title: str
    limits: Limits = Limits()
    checksums: bool = False
    md5_etags: bool = True
    conditional_writes: bool = False
    conditional_completions: bool = False
    conditional_deletes: bool = False
    part_copies: bool = False
    lists_uploads: bool = True
    upload_days: int | None = None
    tags: bool = True
    object_lock: bool = True
    storage_classes: tuple[str, ...] | None = None
    aborts_safely: bool = True
    parallel: int = 12
    listing: str = BY_KEY
    unsafe_names: str = ""


# Abilities that ``doctor`` can compare with what a store really does, and what it costs to lack one.
ABILITIES: tuple[tuple[str, str, str], ...] = (
    (
        "checksums",
        "checks a CRC64NVME of every part and of the whole object",
        "damage on the way is found by MD5 instead, which costs CPU; verify can compare ETags only",
    ),
    (
        "md5_etags",
        "gives ETags that are MD5s",
        "without checksums either, damage on the way is found only by reading back (verify --deep)",
    ),
    (
        "conditional_writes",
        "creates objects only if absent",
        "two pushes of one series in the same second may take the same id; the later claim wins, the other fails",
    ),
    (
        "conditional_completions",
        "completes an upload only if the object is absent",
        "whether another run wrote there is asked a moment before; the claim keeps runs apart",
    ),
    (
        "conditional_deletes",
        "deletes an object only if it is the one that was seen",
        "a mirror's delete is checked a moment before instead, by asking",
    ),
    (
        "part_copies",
        "copies ranges of objects into uploads",
        "a mirrored file that changed is sent as a whole",
    ),
    (
        "lists_uploads",
        "lists unfinished uploads",
        "clean can't find what dead runs left; set a rule that aborts incomplete uploads",
    ),
)
