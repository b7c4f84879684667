"""doctor: what a store really does, compared with what its profile says, and what that costs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

from backhaul.formats.profiles import PROFILES
from backhaul.model.profile import ABILITIES, Profile
from backhaul.model.results import Diagnosis, DoctorResult, Finding
from backhaul.operations.places import store_at

_WORDS = {ability: (words, cost) for ability, words, cost in ABILITIES}
# What must hold whatever the profile says: (finding, what it costs, what to do).
_NEEDED = {
    "access": ("backups can't be relied on there", "Look for another program that writes to the same place."),
    "clock": ("S3 refuses requests of a wrong time", "Set this host's clock: timedatectl set-ntp true"),
    "aborts uploads": ("failed pushes keep their bytes", "Set a rule that aborts incomplete uploads."),
    "room": ("no backup fits", "Make room."),
    "settings of writes": ("every push would fail", "Take the setting out, or allow it in the store."),
}
_ADVISED = {
    "the directory": "a name that is mistyped, or a disk that is not mounted, looks the same",
    "reads one version of an object (If-Match)": "a backup that is replaced while it is read is found by its hash only",
    "checks Content-MD5": "damage on the way is found by the ETag, if at all",
    "a disk of its own": "make the mount point read-only for all but root, so that a push fails when it is not mounted",
}


def doctor(text: str, *, on_finding: Callable[[Diagnosis], None] = lambda diagnosis: None) -> DoctorResult:
    """Try a store.

    Args:
        text: STORE; what is written there lies under a name of its own and is removed again.
        on_finding: told each diagnosis as it is made.

    Raises:
        StoreError: it can't be reached or written at all.
    """
    clock = time.monotonic()
    location = store_at(text)
    diagnoses: list[Diagnosis] = []

    def note(finding: Finding, profile: Profile) -> None:
        diagnoses.append(_diagnosed(finding, profile))
        on_finding(diagnoses[-1])

    sent = 0
    left: list[str] = []
    if location.kind == "s3":
        from backhaul.stores.s3.probe import S3Probe  # botocore takes a while to load
        from backhaul.stores.s3.store import S3Store

        store = S3Store(location)
        try:
            probe = S3Probe(store)
            profile = store.profile
            for finding in probe.run():
                note(finding, profile)
            sent = probe.bytes_sent
            left = probe.left
        finally:
            store.close()
    else:
        profile = PROFILES["local"]
        for finding in _local(location.path):
            note(finding, profile)
    limits = profile.limits
    return DoctorResult(
        store=text,
        profile=profile.name,
        title=profile.title,
        limits={name: getattr(limits, name) for name in limits.__struct_fields__},
        diagnoses=tuple(diagnoses),
        bytes_sent=sent,
        left=tuple(left),
        seconds=time.monotonic() - clock,
    )


def _local(path: str) -> Iterator[Finding]:
    from backhaul.stores.local_probe import probe_directory

    return probe_directory(path)


def _diagnosed(finding: Finding, profile: Profile) -> Diagnosis:
    """Compare a finding with the profile."""
    if finding.ability == "limits.equal_parts":
        return _of_equal_parts(finding, profile)
    words, cost = _WORDS.get(finding.ability, (finding.name, ""))
    name = words if finding.name == finding.ability else finding.name
    if finding.ability:
        expected = bool(getattr(profile, finding.ability))
        if finding.found is None:
            return Diagnosis(name=name, state="note", detail=finding.detail)
        if finding.found and not expected:
            return Diagnosis(
                name=name, state="note", detail=finding.detail, cost=f"{profile.title} is not known to: it is not used"
            )
        if not finding.found and expected:
            return Diagnosis(
                name=name,
                state="problem",
                detail=finding.detail,
                cost=cost,
                todo=f"The profile {profile.name} relies on it: name another with provider=, such as provider=generic.",
            )
        return Diagnosis(
            name=name,
            state="ok" if finding.found else "note",
            detail=finding.detail,
            cost="" if finding.found else cost,
        )
    if finding.found:
        return Diagnosis(name=name, state="ok", detail=finding.detail)
    if finding.name in _NEEDED and finding.found is False:
        cost, todo = _NEEDED[finding.name]
        return Diagnosis(name=name, state="problem", detail=finding.detail, cost=cost, todo=todo)
    return Diagnosis(name=name, state="note", detail=finding.detail, cost=_ADVISED.get(finding.name, ""))


def _of_equal_parts(finding: Finding, profile: Profile) -> Diagnosis:
    if not finding.found and not profile.limits.equal_parts:
        return Diagnosis(
            name=finding.name,
            state="problem",
            detail=finding.detail,
            cost="large backups would fail at their end",
            todo="Name a profile with equal parts: provider=r2, or provider=generic.",
        )
    if finding.found:
        return Diagnosis(name=finding.name, state="ok", detail=finding.detail)
    return Diagnosis(
        name=finding.name, state="note", detail=finding.detail, cost="large streams are several objects (segments)"
    )
