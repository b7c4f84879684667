"""The table of providers, and which one an endpoint belongs to.

Limits and abilities are from each provider's documentation or source; what could be run here (SeaweedFS, rclone,
moto) was run. ``backhaul doctor STORE`` asks a store itself and says where it differs from its row.
docs/PROVIDERS.md shows the table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from backhaul.errors import UsageError
from backhaul.model.profile import BY_TREE, UNORDERED, Limits, Profile

_TIB = 1 << 40

GENERIC = "generic"

# Providers whose limits are given in powers of ten.
_DECIMAL = Limits(min_part=5 << 20, max_part=5 * 10**9, max_object=5 * 10**12)

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="aws",
            title="Amazon S3",
            checksums=True,
            conditional_writes=True,
            conditional_completions=True,
            conditional_deletes=True,
            part_copies=True,
        ),
        Profile(
            name="r2",
            title="Cloudflare R2",
            # 5 GiB and 5 TiB, less the 5 MiB and 5 GiB that its documentation takes off.
            limits=Limits(equal_parts=True, max_part=(5 << 30) - (5 << 20), max_object=5 * _TIB - (5 << 30)),
            checksums=True,
            conditional_writes=True,
            part_copies=True,
            upload_days=7,
            tags=False,
            object_lock=False,
            storage_classes=("STANDARD", "STANDARD_IA"),
        ),
        Profile(
            name="b2",
            title="Backblaze B2",
            limits=Limits(max_part=5 * 10**9, max_object=10 * 10**12),
            md5_etags=False,
            part_copies=True,
            tags=False,
            storage_classes=("STANDARD",),
        ),
        Profile(
            name="wasabi",
            title="Wasabi",
            limits=_DECIMAL,
            part_copies=True,
            storage_classes=("STANDARD",),
        ),
        Profile(
            name="minio",
            title="MinIO",
            limits=Limits(max_object=5 * _TIB),
            checksums=True,
            conditional_writes=True,
            conditional_completions=True,
            part_copies=True,
            # It lists the uploads of one exact key only, and drops them after a day by itself.
            lists_uploads=False,
            upload_days=1,
        ),
        Profile(name="ceph", title="Ceph RGW", part_copies=True),
        Profile(
            name="seaweedfs",
            title="SeaweedFS",
            listing=BY_TREE,
            unsafe_names="\\",  # it takes a backslash for a slash
            checksums=True,
            conditional_writes=True,
            conditional_completions=True,
            conditional_deletes=True,
            part_copies=True,
            # Until its answer tells a version that does not; see below.
            aborts_safely=False,
        ),
        Profile(
            name="gcs",
            title="Google Cloud Storage (XML interoperability)",
            limits=Limits(max_object=5 * _TIB),
            md5_etags=False,
            tags=False,
            object_lock=False,
        ),
        Profile(
            name="scaleway",
            title="Scaleway Object Storage",
            limits=Limits(max_part=5 * 10**9, max_parts=1000, max_object=5 * 10**12),
            checksums=True,
            conditional_writes=True,
            conditional_completions=True,
            part_copies=True,
            storage_classes=("STANDARD", "ONEZONE_IA", "GLACIER"),
        ),
        Profile(
            name="rclone",
            title="rclone serve s3",
            listing=UNORDERED,
            limits=Limits(max_object=5 * _TIB),
            md5_etags=False,  # of parts they are; of a completed upload it is the MD5 of all, or another
            upload_days=1,
            tags=False,
            object_lock=False,
            storage_classes=("STANDARD",),
        ),
        # The most careful reading of S3: what is not certain is done without.
        Profile(
            name=GENERIC,
            title="an S3 store that is not known",
            listing=UNORDERED,
            limits=Limits(max_part=5 * 10**9, max_parts=1000, max_object=5 * 10**12, equal_parts=True),
            upload_days=1,
        ),
        # Not S3; they have rows so that every store has a profile.
        Profile(
            name="local",
            title="a local directory",
            md5_etags=False,
            conditional_writes=True,
            conditional_completions=True,
            parallel=1,
        ),
        Profile(
            name="memory",
            title="a store in memory, for tests",
            checksums=True,
            md5_etags=False,
            conditional_writes=True,
            conditional_completions=True,
            conditional_deletes=True,
            part_copies=True,
            parallel=4,
        ),
    )
}
S3_PROVIDERS = tuple(name for name in PROFILES if name not in ("local", "memory"))

_HOSTS: tuple[tuple[str, str], ...] = (
    (r"(.+\.)?amazonaws\.com(\.cn)?|(.+\.)?api\.aws", "aws"),
    (r".+\.r2\.cloudflarestorage\.com", "r2"),
    (r"(.+\.)?backblazeb2\.com", "b2"),
    (r"(.+\.)?wasabisys\.com", "wasabi"),
    (r"(.+\.)?storage\.googleapis\.com", "gcs"),
    (r"(.+\.)?scw\.cloud", "scaleway"),
)
_SERVERS: tuple[tuple[str, str], ...] = (
    (r"MinIO\b.*", "minio"),
    (r"SeaweedFS\b.*", "seaweedfs"),
    (r"Ceph Object Gateway.*", "ceph"),
)


def provider_of_host(host: str) -> str | None:
    """Return the provider that a host name belongs to, or None."""
    for pattern, name in _HOSTS:
        if re.fullmatch(pattern, host, re.IGNORECASE):
            return name
    return None


# Up to here, aborting an upload whose directory had outlived its completion removed the completed object's data.
_SEAWEEDFS_SAFE = (4, 48)


def profile_of_reply(headers: Mapping[str, str]) -> Profile:
    """Return the profile of the provider that an answer's headers give away, else ``generic``.

    Args:
        headers: names in lower case.
    """
    server = headers.get("server", "")
    name = "ceph" if any(header.startswith("x-rgw-") for header in headers) else GENERIC
    if "x-amz-meta-filename" in headers.get("access-control-allow-headers", ""):
        name = "rclone"  # it calls itself AmazonS3
    for pattern, known in _SERVERS:
        if re.fullmatch(pattern, server, re.IGNORECASE):
            name = known
    profile = PROFILES[name]
    if name == "seaweedfs":
        version = re.search(r"\b(\d+)\.(\d+)$", server)
        safe = version is not None and (int(version[1]), int(version[2])) >= _SEAWEEDFS_SAFE
        profile = msgspec.structs.replace(profile, aborts_safely=safe)
    return profile


def check_provider(name: str) -> str:
    """Return the name if it is a provider's.

    Raises:
        UsageError: it is not, with those that are.
    """
    if name not in S3_PROVIDERS:
        raise UsageError(
            f"There is no provider {name!r}", "known are " + ", ".join(S3_PROVIDERS), "Name one of these, or none."
        )
    return name


def with_limits(profile: Profile, *, max_parts: int | None) -> Profile:
    """Return the profile with the operator's own knowledge of the provider's limits."""
    if max_parts is None:
        return profile
    return msgspec.structs.replace(
        profile, limits=msgspec.structs.replace(profile.limits, max_parts=min(max_parts, profile.limits.max_parts))
    )
