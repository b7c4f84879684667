"""``backhaul config``: whether it is right, what holds and where that comes from, and its schema."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from backhaul.cli.command import ExampleGroup, option_json
from backhaul.cli.output import console, print_json


@click.group(
    cls=ExampleGroup,
    short_help="Check and show the config, and its JSON Schema.",
    epilog="""\b
Examples:
  backhaul config check
  backhaul config show --origin
  backhaul config schema > backhaul.schema.json""",
)
def config() -> None:
    """Look at the config: /etc/backhaul/config.toml, conf.d/*.toml, ~/.config/backhaul/config.toml, or --config."""


@config.command("check")
@option_json("Print one JSON object on stdout.")
def check_(as_json: bool) -> None:
    """Say everything that is wrong with it, with file and key, at once. Exit status 10 if something is."""
    from backhaul.jobs.config import check_config, warnings_of

    found = check_config()
    warnings = warnings_of(found)
    if as_json:
        print_json("config", {"files": found.files, "jobs": sorted(found.jobs), "warnings": warnings})
        return
    out = console(sys.stdout)
    out.print(f"{', '.join(found.files)}: right", style="green")
    for kind, names in (("store", found.stores), ("channel", found.channels), ("job", found.jobs)):
        if names:
            out.print(f"  {len(names)} {kind}{'s' * (len(names) != 1)}: {', '.join(sorted(names))}", markup=False)
    for warning in warnings:
        out.print(f"  {warning}", style="yellow", markup=False)


@config.command()
@click.argument("job", required=False)
@click.option("--origin", is_flag=True, help="Say which file each value comes from.")
@option_json("Print one JSON object on stdout.")
def show(job: str | None, origin: bool, as_json: bool) -> None:
    """Print what holds, the defaults worked in; of one JOB or of all. Secrets are shown as where they are kept."""
    from backhaul.jobs.config import check_config, settings_of_job, shown_settings

    found = check_config()
    names = [job] if job is not None else list(found.jobs)
    shown = {name: shown_settings(settings_of_job(found, name)) for name in names}
    if as_json:
        document: dict[str, Any] = {
            name: {key: {"value": value, "origin": where} for key, (value, where) in values.items()}
            for name, values in shown.items()
        }
        print_json("config", {"files": found.files, "jobs": document})
        return
    for name, values in shown.items():
        print(f"[jobs.{name}]")  # noqa: T201
        for key, (value, where) in values.items():
            print(f"{key} = {value}" + (f"    # {where}" if origin and where else ""))  # noqa: T201
        print()  # noqa: T201


@config.command()
def schema() -> None:
    """Print the JSON Schema of the config, for editors."""
    from backhaul.formats.config_schema import config_schema

    print(json.dumps(config_schema(), indent=2))  # noqa: T201
