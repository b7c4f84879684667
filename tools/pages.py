"""``make docs``: the pages that are made from the code: one for each command, and the exit codes.

A test compares what lies in docs/ with what this makes.
"""

from __future__ import annotations

from pathlib import Path

import click

from backhaul.cli.main import cli
from backhaul.errors import EXIT_CODES

DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "commands"


def pages() -> dict[str, str]:
    """Return every page's text by file name."""
    made = {}
    context = click.Context(cli, info_name="backhaul", terminal_width=100, **cli.context_settings)
    lines = ["# Commands", "", "```", cli.get_help(context), "```", ""]
    lines += ["| command | |", "| --- | --- |"]
    for name, command in cli.commands.items():
        lines.append(f"| [{name}]({name}.md) | {command.get_short_help_str(120)} |")
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100)
        made[f"{name}.md"] = f"# backhaul {name}\n\n```\n{command.get_help(inner)}\n```\n"
    lines += ["", "## Exit status", "", "| status | meaning |", "| ---: | --- |"]
    lines += [f"| {code} | {meaning} |" for code, meaning, _ in EXIT_CODES]
    made["README.md"] = "\n".join(lines) + "\n"
    return made


def main() -> None:
    """Write the pages."""
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()
