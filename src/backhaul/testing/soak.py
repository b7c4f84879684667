"""Backups through a bad line: operations against a store behind a fault proxy, and what came of each.

Every round pushes, lists, verifies and pulls through the proxy, and then looks, past the proxy, at what is really
there. A result counts as *wrong* if an operation ended well and its outcome is not true: a backup that is not
listed or not whole, bytes that are others, a problem that is none. An error is not wrong: it is said. Data counts
as *lost* if a backup that was committed can't be read back bit for bit.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from collections.abc import Callable
from typing import TypeVar

import msgspec

import backhaul
from backhaul.errors import BackhaulError
from backhaul.operations.pull import PullOptions, pull
from backhaul.operations.push import PushOptions, push
from backhaul.operations.verify import verify
from backhaul.testing.crashes import MemorySource, MemoryTarget
from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.faults import Fault, FaultPlan, FaultProxy

T = TypeVar("T")

# A store that is silent for longer than this is given up and tried again; a minute in the field.
TIMEOUT = "2s"
PATIENCE = 20.0

PLANS: dict[str, FaultPlan] = {
    "503 bursts": FaultPlan(throttle=Fault(probability=0.08, burst=3)),
    "lost replies (500 after the work)": FaultPlan(error=Fault(probability=0.2)),
    "resets in the middle of a part": FaultPlan(reset_request=Fault(probability=0.3)),
    "resets instead of a reply": FaultPlan(reset_reply=Fault(probability=0.2)),
    "stalls": FaultPlan(stall=Fault(probability=0.1, limit=4), stall_seconds=2.5),
    "truncated replies": FaultPlan(truncate=Fault(probability=0.3)),
    "bytes damaged on the way there": FaultPlan(corrupt_request=Fault(probability=0.3)),
    "bytes damaged on the way back": FaultPlan(corrupt_reply=Fault(probability=0.3)),
    "slow start": FaultPlan(slow=Fault(probability=0.3), slow_pieces=4, slow_pause=0.05),
    "all of them": FaultPlan(
        throttle=Fault(probability=0.05, burst=2),
        error=Fault(probability=0.05),
        reset_request=Fault(probability=0.05),
        reset_reply=Fault(probability=0.05),
        stall=Fault(probability=0.02, limit=2),
        truncate=Fault(probability=0.05),
        corrupt_request=Fault(probability=0.05),
        corrupt_reply=Fault(probability=0.05),
        slow=Fault(probability=0.05),
        stall_seconds=2.5,
    ),
}


class SoakReport(msgspec.Struct):
    """Counts. ``wrong`` and ``lost`` say what, and are empty when all is well."""

    faults: Counter[str] = msgspec.field(default_factory=Counter)
    operations: int = 0
    failed: int = 0
    retries: int = 0
    wrong: list[str] = []
    lost: list[str] = []


def soak(endpoint: str, bucket: str, plan: FaultPlan, rounds: int, *, size: int = 12_000_000) -> SoakReport:
    """Run rounds of operations through a fault proxy.

    Args:
        endpoint: the real store's; credentials come from the environment.
        bucket: an existing bucket; a series of its own is made there.
        plan: the faults.
        rounds: how many times to push, list, verify and pull.
        size: bytes of a backup; every second one does not compress.
    """
    report = SoakReport()
    committed: dict[str, bytes] = {}
    clock = dt.datetime.now(dt.UTC)

    def attempt(operation: Callable[[], T]) -> T | None:
        report.operations += 1
        try:
            return operation()
        except BackhaulError:
            report.failed += 1
            return None

    with FaultProxy(endpoint, plan) as proxy:
        series = f"s3://{bucket}/soak-{proxy.port}"
        direct = f"{series}?endpoint={endpoint}"
        through = f"{series}?endpoint={proxy.endpoint}&timeout={TIMEOUT}"
        for number in range(rounds):
            clock += dt.timedelta(seconds=1)
            content = b"".join((dump_text if number % 2 else random_bytes)(size, seed=number + 1))
            source, now = MemorySource(content), clock
            pushed = attempt(
                lambda: push([through], source, PushOptions(patience=PATIENCE), now=lambda: now)  # noqa: B023
            )
            if pushed is not None:
                report.retries += sum(destination.retries for destination in pushed.destinations)
            listed = attempt(lambda: [backup.id for backup in backhaul.list(through).backups])
            # What is really there: an error during the commit may have left the backup whole.
            there = {backup.id for backup in backhaul.list(direct).backups}
            for backup in there - set(committed):
                committed[backup] = content
            if pushed is not None and pushed.id not in there:
                report.wrong.append(f"round {number}: a push ended well and its backup is not there")
            if listed is not None and set(listed) != there:
                report.wrong.append(f"round {number}: list shows {listed}, and there are {sorted(there)}")
            newest = max(there, default=None)
            if newest is None:
                continue
            for deep in (False, True):
                checked = attempt(lambda: verify(f"{through}@{newest}", deep=deep, patience=PATIENCE))  # noqa: B023
                if checked is not None and not checked.ok:
                    report.wrong.append(f"round {number}: verify finds {checked.checks} in a backup that is whole")
            target = MemoryTarget()
            pulled = attempt(lambda: pull(f"{through}@{newest}", target, PullOptions(patience=PATIENCE)))  # noqa: B023
            if pulled is not None and target.content != committed[newest]:
                report.wrong.append(f"round {number}: a pull ended well with other bytes")
        report.faults.update(proxy.injected)
        for backup, content in committed.items():
            target = MemoryTarget()
            try:
                pull(f"{direct}@{backup}", target)
            except BackhaulError as error:
                report.lost.append(f"{backup}: {error}")
            if target.content is not None and target.content != content:
                report.lost.append(f"{backup}: it holds other bytes")
        backhaul.clean(direct, older_than=0.0)
        left = backhaul.clean(direct, older_than=0.0)
        if left.removed or left.kept:
            report.wrong.append(f"clean left {left}")
    return report
