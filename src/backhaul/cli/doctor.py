"""``backhaul doctor``."""

from __future__ import annotations

import sys

import click

from backhaul.cli.command import option_json
from backhaul.cli.output import ReportedError, console, print_json
from backhaul.errors import ConfigurationError
from backhaul.formats.quantities import format_duration, format_size
from backhaul.formats.store_settings import SETTING_HELP
from backhaul.model.results import Diagnosis

_SETTINGS = "\n".join(f"  {key:<14} {words}" for key, words in SETTING_HELP)
_EPILOG = f"""\b
Examples:
  backhaul doctor s3://acme/db7
  backhaul doctor 's3://acme/db7?endpoint=https://s3.example.com&provider=ceph'
  backhaul doctor /mnt/usb

\b
Settings of an S3 store, in its URL (?key=value&...) or in [stores.NAME] of the config:
{_SETTINGS}"""


@click.command(epilog=_EPILOG, short_help="Try what a store really does.")
@click.argument("store")
@option_json("Print the result as one JSON object on stdout.")
def doctor(store: str, as_json: bool) -> None:
    """Try what STORE really does, compare it with what is known of its provider, and say what is missing.

    Writes some objects of its own under STORE (about 17 MB to an S3 store) and removes them again. Ends with status
    10 if backups there would fail or could not be trusted.
    """
    from backhaul.operations.doctor import doctor as operation

    out = console(sys.stdout)

    def show(diagnosis: Diagnosis) -> None:
        from rich.text import Text

        mark, style = {"ok": ("✓", "green"), "note": ("-", "yellow"), "problem": ("✗", "bold red")}[diagnosis.state]
        line = Text("  ").append(mark, style).append(f" {diagnosis.name}", "bold").append(f": {diagnosis.detail}")
        out.print(line)
        for text in (diagnosis.cost, diagnosis.todo):
            if text:
                out.print(Text(f"      {text}", "dim"))

    result = operation(store, on_finding=(lambda diagnosis: None) if as_json else show)
    if as_json:
        print_json("doctor", result)
    else:
        limits = result.limits
        parts = "equal parts" if limits["equal_parts"] else "growing parts"
        out.print(
            f"{result.store}: {result.title} (profile {result.profile})"
            + (
                f", uploads of up to {limits['max_parts']} {parts}"
                f" and {format_size(limits['max_object'])}; these limits were not tried"
                if result.bytes_sent
                else ""
            ),
            markup=False,
        )
        sent = f"{format_size(result.bytes_sent)} sent in" if result.bytes_sent else "took"
        removed = "all removed again" if not result.left else "not all of it could be removed again:"
        out.print(f"{sent} {format_duration(result.seconds)}, {removed}")
        for line in result.left:
            out.print(f"  {line}", markup=False)
    problems = [diagnosis for diagnosis in result.diagnoses if diagnosis.state == "problem"]
    if problems:
        error = ConfigurationError(
            f"{store} does not do what backups there would rely on",
            "; ".join(f"{each.name}: {each.detail}" for each in problems),
            " ".join(dict.fromkeys(each.todo for each in problems if each.todo)),
        )
        raise ReportedError(error) if as_json else error
