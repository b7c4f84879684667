"""``make docs``: the pages that are made from the code: one for each command, the exit codes, the providers' table.

A test compares what lies in docs/ with what this makes.
"""

from __future__ import annotations

from pathlib import Path

import click

from backhaul.cli.main import cli
from backhaul.errors import EXIT_CODES
from backhaul.formats.profiles import GENERIC, PROFILES, S3_PROVIDERS
from backhaul.formats.quantities import format_size

DOCS = Path(__file__).resolve().parent.parent / "docs"
DIRECTORY = DOCS / "commands"
PROVIDERS = DOCS / "PROVIDERS.md"


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


def providers_page(text: str) -> str:
    """Return the page of the providers with the table as the code has it."""
    columns = "provider, parts, largest object, checksums, MD5 ETags, if absent, part copies, drops uploads, tags, lock"
    lines = ["| " + columns.replace(", ", " | ") + " |", "| --- " * 10 + "|"]
    for name in S3_PROVIDERS:
        p = PROFILES[name]
        yes = {True: "yes", False: "no"}
        parts = f"{p.limits.max_parts}{', equal' if p.limits.equal_parts else ''}"
        absent = f"{yes[p.conditional_writes]} / {yes[p.conditional_completions]}"
        cells = [
            f"`{name}` {p.title}",
            parts,
            format_size(p.limits.max_object),
            yes[p.checksums],
            "as seen" if name == GENERIC else yes[p.md5_etags],
            absent,
            yes[p.part_copies],
            f"{p.upload_days} d" if p.upload_days else "no",
            yes[p.tags],
            yes[p.object_lock],
        ]
        lines.append("| " + " | ".join(cells) + " |")
    before, after = text.partition("<!-- table -->")[0], text.partition("<!-- end -->")[2]
    return before + "<!-- table -->\n" + "\n".join(lines) + "\n<!-- end -->" + after


def main() -> None:
    """Write the pages."""
    PROVIDERS.write_text(providers_page(PROVIDERS.read_text()))
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()
