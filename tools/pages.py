"""``make docs``: the pages that are made from the code: one for each command, the exit codes, tables of
providers and of the config.

A test compares what lies in docs/ with what this makes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from backhaul.cli.main import cli
from backhaul.errors import EXIT_CODES
from backhaul.formats.channel_settings import CHANNEL_HELP, CHANNEL_SETTINGS
from backhaul.formats.job_settings import COMMON, OWN, WINDOW_FORMS
from backhaul.formats.profiles import GENERIC, PROFILES, S3_PROVIDERS
from backhaul.formats.quantities import format_size
from backhaul.formats.store_settings import SETTING_HELP
from backhaul.model.job import KINDS

DOCS = Path(__file__).resolve().parent.parent / "docs"
DIRECTORY = DOCS / "commands"
PROVIDERS = DOCS / "PROVIDERS.md"
CONFIG = DOCS / "CONFIG.md"


def pages() -> dict[str, str]:
    """Return every page's text by file name."""
    made = {}
    context = click.Context(cli, info_name="backhaul", terminal_width=100, **cli.context_settings)
    lines = ["# Commands", "", "```", cli.get_help(context), "```", ""]
    lines += ["| command | |", "| --- | --- |"]
    for name, command in cli.commands.items():
        lines.append(f"| [{name}]({name}.md) | {command.get_short_help_str(120)} |")
        inner = click.Context(command, info_name=name, parent=context, terminal_width=100)
        text = f"# backhaul {name}\n\n```\n{command.get_help(inner)}\n```\n"
        for verb, below in getattr(command, "commands", {}).items():
            deeper = click.Context(below, info_name=verb, parent=inner, terminal_width=100)
            text += f"\n## backhaul {name} {verb}\n\n```\n{below.get_help(deeper)}\n```\n"
        made[f"{name}.md"] = text
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


def config_page(text: str) -> str:
    """Return the page of the config with its tables as the code has them."""
    tables = {
        "common": _settings_table([(s.key, s.form.word, s.help, s.default) for s in COMMON]),
        "window": _settings_table([(key, form.word, words, "") for key, (words, form) in WINDOW_FORMS.items()]),
        "stores": _settings_table(
            [("url", "text", "the store path", ""), *((k, "text", w, "") for k, w in SETTING_HELP)]
        ),
    }
    for kind in KINDS:
        own = [s for s in OWN if kind in s.kinds]
        tables[kind] = _settings_table([(s.key, s.form.word, s.help, "") for s in own])
    lines = []
    for kind, settings in CHANNEL_SETTINGS.items():
        lines += ["", f"**`{kind}`**: {CHANNEL_HELP[kind]}", ""]
        rows = []
        for key, each in settings.items():
            default = "" if each.default is None else f"{each.default}"
            rows.append(
                (key, "secret" if each.secret else each.type.words, each.words + _needed(each.required), default)
            )
        lines.append(_settings_table(rows))
    tables["channels"] = "\n".join(lines).strip()
    for name, table in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->")
        text = before + f"<!-- {name} -->\n" + table + "\n<!-- end -->" + rest.partition("<!-- end -->")[2]
    return text


def _needed(required: bool) -> str:
    return " (needed)" if required else ""


def _settings_table(rows: Sequence[tuple[str, str, str, str]]) -> str:
    lines = ["| key | value | |", "| --- | --- | --- |"]
    for key, word, words, default in rows:
        text = words.replace("|", "\\|") + (f" (default {default})" if default else "")
        lines.append(f"| `{key}` | {word.replace('|', chr(92) + '|')} | {text} |")
    return "\n".join(lines)


def main() -> None:
    """Write the pages."""
    CONFIG.write_text(config_page(CONFIG.read_text()))
    PROVIDERS.write_text(providers_page(PROVIDERS.read_text()))
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (DIRECTORY / name).write_text(text)


if __name__ == "__main__":
    main()
