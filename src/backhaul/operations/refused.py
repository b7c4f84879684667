"""A plan that the guard refused, as an error: nothing was touched."""

from __future__ import annotations

import msgspec

from backhaul.errors import FailedError
from backhaul.formats.file_names import shown
from backhaul.model.mirror import Refusal

# Names that a refusal says in its text.
_NAMES_SAID = 20


class GuardError(FailedError):
    """The guard refused a plan. ``refusals`` say why, and what would have been deleted."""

    def __init__(self, refusals: tuple[Refusal, ...]) -> None:
        first = refusals[0]
        lines = [first.why, *(f"{refusal.what}: {refusal.why}" for refusal in refusals[1:])]
        if first.deletes:
            lines += ["It would have removed:", *map(shown, first.deletes[:_NAMES_SAID])]
            if len(first.deletes) > _NAMES_SAID:
                lines.append(f"... and {len(first.deletes) - _NAMES_SAID} more; --json names them")
        super().__init__(first.what, "\n".join(lines), first.todo)
        self.refusals = refusals
        self.details = {"refusals": msgspec.to_builtins(refusals)}
