"""A click command that ends at ``--``: what follows belongs to the user's own command."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

TAIL = "backhaul.tail"


class TailCommand(click.Command):
    """Keeps everything behind the first ``--`` apart, untouched, as ``ctx.meta[TAIL]`` (None without one)."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Split at the first ``--``, and parse what is before it."""
        ctx.meta[TAIL] = None
        if "--" in args:
            at = args.index("--")
            ctx.meta[TAIL] = args[at + 1 :]
            args = args[:at]
        return super().parse_args(ctx, args)

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        """Show the command's place in the usage line."""
        return [*super().collect_usage_pieces(ctx), "[-- COMMAND...]"]


class ExampleGroup(click.Group):
    """A group that lists its commands in the order of a backup's life instead of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order in which they were added."""
        return list(self.commands)


Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def option_json(help_text: str) -> Callable[[Decorated], Decorated]:
    """Return the ``--json`` option, the same for every command."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)
