"""The verdicts for a monitoring system: one line and a status, as plugins of Nagios have it."""

from __future__ import annotations

from backhaul.model.verdict import FAILED, INCOMPLETE, NEVER_RUN, OVERDUE, STATES, Overview
from backhaul.reporting import words

# (https://nagios-plugins.org/doc/guidelines.html: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN)
_NAGIOS = {FAILED: 2, OVERDUE: 2, INCOMPLETE: 1, NEVER_RUN: 1}
_LABELS = ("OK", "WARNING", "CRITICAL", "UNKNOWN")


def nagios_status(overview: Overview) -> int:
    """Return the status of a plugin; no jobs at all are UNKNOWN: somebody meant to watch something."""
    return _NAGIOS.get(overview.state, 0) if overview.verdicts else 3


def nagios_text(overview: Overview) -> str:
    """Return the line of a plugin with its figures, and a line for each job that is not well."""
    counts = {state: sum(verdict.state == state for verdict in overview.verdicts) for state in STATES}
    figures = " ".join(f"'{state}'={count}" for state, count in counts.items())
    # A bar would begin the figures.
    head = words.subject(overview).replace("|", "/")
    lines = [f"BACKHAUL {_LABELS[nagios_status(overview)]} - {head} | {figures}"]
    lines += [words.headline(verdict).replace("|", "/") for verdict in overview.verdicts if verdict.state in _NAGIOS]
    # In full: the first line may be too short for them.
    lines += [f"PROBLEM {problem}".replace("|", "/") for problem in overview.problems]
    return "\n".join(lines) + "\n"


def exit_status(overview: Overview) -> int:
    """Return the status of ``check`` without a plugin's rules: 0 all well, 1 failed or overdue, 3 what is less."""
    if not overview.verdicts:
        return 3 if overview.problems else 0
    return {0: 0, 1: 3, 2: 1}[_NAGIOS.get(overview.state, 0)]
