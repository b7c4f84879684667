"""When a fan-out may begin, and how many receivers must be complete in the end. Pure."""

from __future__ import annotations

from backhaul.errors import UsageError

WAIT, BEGIN, GIVE_UP = "wait", "begin", "give up"


def required(setting: str, expected: int) -> int:
    """Return how many receivers must be complete.

    Args:
        setting: ``all`` or a number.
        expected: how many are asked for.

    Raises:
        UsageError: it is neither, or more than there are.
    """
    if setting == "all":
        return expected
    if not setting.isdecimal() or not 1 <= int(setting) <= expected:
        raise UsageError(
            f"--require {setting} does not fit", f"it takes 'all' or 1 to {expected}", "Correct the number."
        )
    return int(setting)


def may_begin(
    *,
    ready: int,
    expected: int,
    required: int,
    named: bool,
    waited: float,
    since_first: float,
    min_wait: float,
    max_wait: float,
) -> str:
    """Tell whether to wait, to begin, or to give up.

    Args:
        ready: how many are ready.
        expected: how many there should be.
        required: how many there must be.
        named: whether it is known who they are, so that nobody else is to be waited for.
        waited: seconds since the waiting began.
        since_first: seconds since the first one came.
        min_wait: seconds to wait for more even if there are enough; of no use where all who may come are there.
        max_wait: seconds after which it begins without those who are missing, if enough are there.
    """
    if ready >= expected and (named or since_first >= min_wait):
        return BEGIN
    if waited >= max_wait:
        return BEGIN if ready >= required else GIVE_UP
    return WAIT
