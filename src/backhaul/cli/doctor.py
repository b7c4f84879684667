"""``backhaul doctor``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

from backhaul.cli.command import option_json
from backhaul.cli.output import ReportedError, console, print_json
from backhaul.errors import ConfigurationError
from backhaul.formats.quantities import format_duration, format_size
from backhaul.formats.redaction import redact_text
from backhaul.formats.store_settings import SETTING_HELP
from backhaul.model.results import Diagnosis

_SETTINGS = "\n".join(f"  {key:<16} {words}" for key, words in SETTING_HELP)
_EPILOG = f"""\b
Examples:
  backhaul doctor s3://acme/db7
  backhaul doctor 's3://acme/db7?endpoint=https://s3.example.com&provider=ceph'
  backhaul doctor /mnt/usb
  backhaul doctor postgresql:///orders
  backhaul doctor mariadb+physical://root@/

\b
Settings of an S3 store, in its URL (?key=value&...) or in [stores.NAME] of the config:
{_SETTINGS}"""


@click.command(epilog=_EPILOG, short_help="Try what a store really does, or whether a database can be backed up.")
@click.argument("store", metavar="STORE|URL")
@option_json("Print the result as one JSON object on stdout.")
def doctor(store: str, as_json: bool) -> None:
    """Try what STORE really does, compare it with what is known of its provider, and say what is missing; or look
    whether the database at URL (as for push --from) can be backed up, restored and drilled here.

    Writes some objects of its own under STORE (about 17 MB to an S3 store) and removes them again. Ends with status
    10 if backups there would fail or could not be trusted.
    """
    from backhaul.formats.source_url import is_source_url
    from backhaul.operations.doctor import doctor as operation
    from backhaul.operations.doctor_source import doctor_source

    out = console(sys.stdout)

    def show(diagnosis: Diagnosis) -> None:
        from rich.text import Text

        mark, style = {"ok": ("✓", "green"), "note": ("-", "yellow"), "problem": ("✗", "bold red")}[diagnosis.state]
        line = Text("  ").append(mark, style).append(f" {diagnosis.name}", "bold").append(f": {diagnosis.detail}")
        out.print(line)
        for text in (diagnosis.cost, diagnosis.todo):
            if text:
                out.print(Text(f"      {text}", "dim"))

    if is_source_url(store):
        source = doctor_source(store, on_finding=(lambda diagnosis: None) if as_json else show)
        if as_json:
            print_json("doctor", source)
        _end(store, source.diagnoses, "can't be backed up as it is", as_json=as_json)
        return
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
    _end(store, result.diagnoses, "does not do what backups there would rely on", as_json=as_json)


def _end(what: str, diagnoses: Sequence[Diagnosis], words: str, *, as_json: bool) -> None:
    problems = [diagnosis for diagnosis in diagnoses if diagnosis.state == "problem"]
    if problems:
        error = ConfigurationError(
            f"{redact_text(what)} {words}",
            "\n".join(f"{each.name}: {each.detail}" for each in problems),
            "\n".join(dict.fromkeys(each.todo for each in problems if each.todo)),
        )
        raise ReportedError(error) if as_json else error
