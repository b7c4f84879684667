"""``--require``: how many destinations must hold the backup for the run to count."""

from __future__ import annotations

from backhaul.errors import UsageError


def required_destinations(requirement: str, destinations: int) -> int:
    """Read ``all``, ``any`` or a number against the number of destinations.

    Raises:
        UsageError: it is none of these, or more than there are.
    """
    if requirement == "all":
        return destinations
    if requirement == "any":
        return 1
    if requirement.isascii() and requirement.isdigit() and 1 <= int(requirement) <= destinations:
        return int(requirement)
    raise UsageError(
        f"--require {requirement} can't be met",
        f"it takes 'all', 'any', or a number from 1 to the number of destinations, {destinations}",
        "Name more destinations, or require fewer.",
    )
