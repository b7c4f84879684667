"""A click command that ends at ``--``: what follows belongs to the user's own command."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping
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


class LaterCommands(MutableMapping[str, click.Command]):
    """Commands by name whose modules are imported when they are asked for: a push does not wait for the others.

    ``places`` says where each one is, ``module:attribute`` by its name.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places
        self._loaded: dict[str, click.Command] = {}

    def __getitem__(self, name: str) -> click.Command:
        if name not in self._loaded:
            module, _, attribute = self._places[name].partition(":")
            self._loaded[name] = getattr(importlib.import_module(module), attribute)
        return self._loaded[name]

    def __setitem__(self, name: str, command: click.Command) -> None:
        self._places = {**self._places, name: ""}
        self._loaded[name] = command

    def __delitem__(self, name: str) -> None:
        self._places = {other: place for other, place in self._places.items() if other != name}
        self._loaded.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


Decorated = TypeVar("Decorated", bound=Callable[..., Any])


def option_json(help_text: str) -> Callable[[Decorated], Decorated]:
    """Return the ``--json`` option, the same for every command."""
    return click.option("--json", "as_json", is_flag=True, help=help_text)
