"""Backhaul: database backups off-site in one pass, back in parallel, and never half a backup that looks whole.

The verbs of the command line, as functions::

    import backhaul

    result = backhaul.push("s3://acme/db7/orders", backhaul.CommandSource(["pg_dump", "-Fc", "-Z0", "orders"]))
    backhaul.list("s3://acme/db7/orders").backups
    backhaul.verify(f"s3://acme/db7/orders@{result.id}", deep=True).ok
    backhaul.pull("s3://acme/db7/orders@latest", backhaul.FileTarget("orders.dump"))
    with backhaul.open("s3://acme/db7/orders@latest") as file:
        file.seek(-4096, 2)

Verbs: ``push``, ``pull``, ``restore``, ``drill``, ``list``, ``show``, ``verify``, ``prune``, ``clean``,
``hold_backup``, ``release_backup``, ``doctor``, ``doctor_source``, ``init``, ``open``, ``keygen``; of mirrors ``sync``,
``plan``, ``apply``, ``undelete``, ``pull_mirror``, ``verify_mirror``. Options: ``PushOptions``, ``SourceOptions``,
``PullOptions``, ``RestoreOptions``, ``DrillOptions``, ``PruneOptions``, ``PlanOptions``, ``ApplyOptions``,
``RunOptions``. Keys: ``read_identities``, ``read_recipients``.
Streams come from a ``CommandSource``, ``FileSource`` or ``StreamSource``, or from a database (``source_of(URL)``); they
go to a ``CommandTarget``, ``FileTarget`` or ``StreamTarget``. Errors are ``backhaul.errors.BackhaulError`` and its
subclasses. All but ``push`` load on first use: ``help(backhaul.pull)`` shows the rest.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from backhaul import errors as errors
from backhaul.version import VERSION as __version__

if TYPE_CHECKING:
    from backhaul.formats.age_keys import Identity as Identity
    from backhaul.model.backup_hold import BackupHold as BackupHold
    from backhaul.model.drill import DrillRecord as DrillRecord
    from backhaul.model.manifest import Manifest as Manifest
    from backhaul.model.results import CleanResult as CleanResult
    from backhaul.model.results import DoctorResult as DoctorResult
    from backhaul.model.results import DrillResult as DrillResult
    from backhaul.model.results import InitResult as InitResult
    from backhaul.model.results import KeygenResult as KeygenResult
    from backhaul.model.results import ListResult as ListResult
    from backhaul.model.results import PruneResult as PruneResult
    from backhaul.model.results import PullResult as PullResult
    from backhaul.model.results import PushResult as PushResult
    from backhaul.model.results import RestoreResult as RestoreResult
    from backhaul.model.results import ShowResult as ShowResult
    from backhaul.model.results import VerifyResult as VerifyResult
    from backhaul.operations.backup_hold import hold_backup as hold_backup
    from backhaul.operations.backup_hold import release_backup as release_backup
    from backhaul.operations.clean import clean as clean
    from backhaul.operations.databases import SourceOptions as SourceOptions
    from backhaul.operations.databases import source_of as source_of
    from backhaul.operations.doctor import doctor as doctor
    from backhaul.operations.doctor_source import doctor_source as doctor_source
    from backhaul.operations.drill import DrillOptions as DrillOptions
    from backhaul.operations.drill import drill as drill
    from backhaul.operations.init import init as init
    from backhaul.operations.inspect import list_backups as list
    from backhaul.operations.inspect import show_backup as show
    from backhaul.operations.keys import keygen as keygen
    from backhaul.operations.keys import read_identities as read_identities
    from backhaul.operations.keys import read_recipients as read_recipients
    from backhaul.operations.mirror.apply import ApplyOptions as ApplyOptions
    from backhaul.operations.mirror.plan import PlanOptions as PlanOptions
    from backhaul.operations.mirror.restore import pull_mirror as pull_mirror
    from backhaul.operations.mirror.restore import undelete as undelete
    from backhaul.operations.mirror.sync import RunOptions as RunOptions
    from backhaul.operations.mirror.sync import apply_plan as apply
    from backhaul.operations.mirror.sync import make_plan as plan
    from backhaul.operations.mirror.sync import sync as sync
    from backhaul.operations.mirror.verify import verify_mirror as verify_mirror
    from backhaul.operations.prune import PruneOptions as PruneOptions
    from backhaul.operations.prune import prune as prune
    from backhaul.operations.pull import PullOptions as PullOptions
    from backhaul.operations.pull import pull as pull
    from backhaul.operations.push import PushOptions as PushOptions
    from backhaul.operations.reader import open_stream as open
    from backhaul.operations.restore import RestoreOptions as RestoreOptions
    from backhaul.operations.restore import restore as restore
    from backhaul.operations.verify import verify as verify
    from backhaul.sources.base import Source as Source
    from backhaul.sources.base import SourceSet as SourceSet
    from backhaul.sources.command import CommandSource as CommandSource
    from backhaul.sources.file import FileSource as FileSource
    from backhaul.sources.stream import StreamSource as StreamSource
    from backhaul.targets.base import Target as Target
    from backhaul.targets.command import CommandTarget as CommandTarget
    from backhaul.targets.file import FileTarget as FileTarget
    from backhaul.targets.stream import StreamTarget as StreamTarget

_EXPORTS = {
    "Manifest": ("backhaul.model.manifest", "Manifest"),
    "CleanResult": ("backhaul.model.results", "CleanResult"),
    "DoctorResult": ("backhaul.model.results", "DoctorResult"),
    "Identity": ("backhaul.formats.age_keys", "Identity"),
    "KeygenResult": ("backhaul.model.results", "KeygenResult"),
    "ListResult": ("backhaul.model.results", "ListResult"),
    "PruneOptions": ("backhaul.operations.prune", "PruneOptions"),
    "PruneResult": ("backhaul.model.results", "PruneResult"),
    "prune": ("backhaul.operations.prune", "prune"),
    "BackupHold": ("backhaul.model.backup_hold", "BackupHold"),
    "hold_backup": ("backhaul.operations.backup_hold", "hold_backup"),
    "release_backup": ("backhaul.operations.backup_hold", "release_backup"),
    "PullResult": ("backhaul.model.results", "PullResult"),
    "PushResult": ("backhaul.model.results", "PushResult"),
    "ShowResult": ("backhaul.model.results", "ShowResult"),
    "VerifyResult": ("backhaul.model.results", "VerifyResult"),
    "clean": ("backhaul.operations.clean", "clean"),
    "doctor": ("backhaul.operations.doctor", "doctor"),
    "keygen": ("backhaul.operations.keys", "keygen"),
    "read_identities": ("backhaul.operations.keys", "read_identities"),
    "read_recipients": ("backhaul.operations.keys", "read_recipients"),
    "list": ("backhaul.operations.inspect", "list_backups"),
    "show": ("backhaul.operations.inspect", "show_backup"),
    "PullOptions": ("backhaul.operations.pull", "PullOptions"),
    "pull": ("backhaul.operations.pull", "pull"),
    "PushOptions": ("backhaul.operations.push", "PushOptions"),
    "ApplyOptions": ("backhaul.operations.mirror.apply", "ApplyOptions"),
    "PlanOptions": ("backhaul.operations.mirror.plan", "PlanOptions"),
    "RunOptions": ("backhaul.operations.mirror.sync", "RunOptions"),
    "apply": ("backhaul.operations.mirror.sync", "apply_plan"),
    "plan": ("backhaul.operations.mirror.sync", "make_plan"),
    "pull_mirror": ("backhaul.operations.mirror.restore", "pull_mirror"),
    "sync": ("backhaul.operations.mirror.sync", "sync"),
    "undelete": ("backhaul.operations.mirror.restore", "undelete"),
    "verify_mirror": ("backhaul.operations.mirror.verify", "verify_mirror"),
    "open": ("backhaul.operations.reader", "open_stream"),
    "verify": ("backhaul.operations.verify", "verify"),
    "DrillRecord": ("backhaul.model.drill", "DrillRecord"),
    "DrillResult": ("backhaul.model.results", "DrillResult"),
    "InitResult": ("backhaul.model.results", "InitResult"),
    "RestoreResult": ("backhaul.model.results", "RestoreResult"),
    "SourceOptions": ("backhaul.operations.databases", "SourceOptions"),
    "source_of": ("backhaul.operations.databases", "source_of"),
    "doctor_source": ("backhaul.operations.doctor_source", "doctor_source"),
    "DrillOptions": ("backhaul.operations.drill", "DrillOptions"),
    "drill": ("backhaul.operations.drill", "drill"),
    "init": ("backhaul.operations.init", "init"),
    "RestoreOptions": ("backhaul.operations.restore", "RestoreOptions"),
    "restore": ("backhaul.operations.restore", "restore"),
    "SourceSet": ("backhaul.sources.base", "SourceSet"),
    "Source": ("backhaul.sources.base", "Source"),
    "CommandSource": ("backhaul.sources.command", "CommandSource"),
    "FileSource": ("backhaul.sources.file", "FileSource"),
    "StreamSource": ("backhaul.sources.stream", "StreamSource"),
    "Target": ("backhaul.targets.base", "Target"),
    "CommandTarget": ("backhaul.targets.command", "CommandTarget"),
    "FileTarget": ("backhaul.targets.file", "FileTarget"),
    "StreamTarget": ("backhaul.targets.stream", "StreamTarget"),
}


__all__ = [
    "ApplyOptions",
    "BackupHold",
    "CleanResult",
    "CommandSource",
    "CommandTarget",
    "DoctorResult",
    "DrillOptions",
    "DrillRecord",
    "DrillResult",
    "FileSource",
    "FileTarget",
    "Identity",
    "InitResult",
    "KeygenResult",
    "ListResult",
    "Manifest",
    "PlanOptions",
    "PruneOptions",
    "PruneResult",
    "PullOptions",
    "PullResult",
    "PushOptions",
    "PushResult",
    "RestoreOptions",
    "RestoreResult",
    "RunOptions",
    "ShowResult",
    "Source",
    "SourceOptions",
    "SourceSet",
    "StreamSource",
    "StreamTarget",
    "Target",
    "VerifyResult",
    "__version__",
    "apply",
    "clean",
    "doctor",
    "doctor_source",
    "drill",
    "errors",
    "hold_backup",
    "init",
    "keygen",
    "list",
    "open",
    "plan",
    "prune",
    "pull",
    "pull_mirror",
    "push",
    "read_identities",
    "read_recipients",
    "release_backup",
    "restore",
    "show",
    "source_of",
    "sync",
    "undelete",
    "verify",
    "verify_mirror",
]


def push(series: str | Sequence[str], source: Source | SourceSet, options: PushOptions | None = None) -> PushResult:
    """Make one backup from one stream or a set of them, in one SERIES or in several at once.

    See ``backhaul.operations.push.push`` for the options, the result and the errors.
    """
    from backhaul.operations import push as operation

    destinations = [series] if isinstance(series, str) else series
    return operation.push(destinations, source, options or operation.PushOptions())


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'backhaul' has no attribute {name!r}")
    module, attribute = _EXPORTS[name]
    value = getattr(importlib.import_module(module), attribute)
    globals()[name] = value
    return value
