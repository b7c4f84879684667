"""The whole error tree, with the exit status that each class ends the command with.

Every error that people see says three things: *what* failed (with the object, file or command named),
*why* (in the store's or program's own words), and *what to do next*. The command line prints them; the
Python API carries them as attributes.
"""

from __future__ import annotations

from typing import ClassVar


class BackhaulError(Exception):
    """Base of all errors that Backhaul raises on purpose.

    Attributes:
        what: what failed, with the thing named.
        why: the reason, in the words of whoever refused.
        todo: what the reader can do about it.
        details: facts for programs, printed with ``--json``.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, why: str = "", todo: str = "") -> None:
        super().__init__(what if not why else f"{what}: {why}")
        self.what = what
        self.why = why
        self.todo = todo
        self.details: dict[str, object] = {}


class FailedError(BackhaulError):
    """The operation failed; nothing was half done that looks whole."""


class UsageError(BackhaulError):
    """The call's words are off: an unknown option, a malformed location, two things that exclude each other."""

    exit_code = 2


class IncompleteError(BackhaulError):
    """Finished, but not everywhere: what was required holds, something that was asked for does not."""

    exit_code = 3


class ConfigurationError(BackhaulError):
    """Something that must be in place before any work is not: credentials, a bucket, a permission, a program."""

    exit_code = 10


class IdentityError(ConfigurationError):
    """An identity is missing, or is not one of those that the backup was encrypted for."""


class LockBusyError(BackhaulError):
    """Another run holds the lock."""

    exit_code = 11


class SkippedError(BackhaulError):
    """Nothing was done, and that is right: the window is closed, or a hold is in force."""

    exit_code = 75


class InterruptedByUserError(BackhaulError):
    """A signal ended the run."""

    exit_code = 130


class SourceError(FailedError):
    """The producer of a stream failed, was killed, never started, or did not show its completion marker."""


class TargetError(FailedError):
    """The consumer of a stream failed, or the file could not be written."""


class IntegrityError(FailedError):
    """Stored bytes are not the bytes that were pushed."""


class BackupNotFoundError(FailedError):
    """The series holds no committed backup that was asked for."""


class FormatError(FailedError):
    """Bytes that should follow one of the formats do not."""


class PeerError(FailedError):
    """Who answered is not who it must be, or never said: ``details`` has ``peer`` and ``reason``."""


class NotifyError(FailedError):
    """A message could not be delivered, or not to everybody: ``details`` has ``refused`` and ``delivered`` then."""


class StoreError(FailedError):
    """A store refused, or could not be reached.

    Attributes:
        transient: whether the same request may succeed later, unchanged.
    """

    transient: ClassVar[bool] = False


class StoreUnavailableError(StoreError):
    """The store did not answer, broke off, or asked to be left alone for a while."""

    transient = True


class StoreThrottledError(StoreUnavailableError):
    """The store asked for fewer requests (503 SlowDown, 429)."""


class StoreUnreachableError(StoreUnavailableError):
    """No connection came about at all: nothing is known of the store, not even whether it exists."""


class StoreStalledError(StoreError):
    """The store took nothing for so long, while the stream waited for it, that it was given up."""


class StoreFullError(StoreError):
    """There is no room left."""


class ObjectNotFoundError(StoreError):
    """No object of that name."""


class PreconditionError(StoreError):
    """The object exists already, or is not the one that was meant."""


class StoreRefusedError(StoreError, ConfigurationError):
    """Credentials, permission or bucket are not as they must be: trying again will not help."""

    exit_code = 10


# One table for docs/commands/README.md and the tests: (status, meaning, the classes that lead to it).
EXIT_CODES: tuple[tuple[int, str, tuple[type[BackhaulError], ...]], ...] = (
    (0, "complete", ()),
    (1, "failed", (FailedError,)),
    (2, "usage", (UsageError,)),
    (
        3,
        "finished but incomplete: some destination or file failed, the required ones did not",
        (IncompleteError,),
    ),
    (10, "configuration or prerequisite", (ConfigurationError,)),
    (11, "lock busy", (LockBusyError,)),
    (75, "skipped: window closed, or held", (SkippedError,)),
    (130, "interrupted", (InterruptedByUserError,)),
)
