"""How everything is measured: the ways alternate, round by round, so that a noisy neighbour hits all of them.

A way that fails is tried again in the next round, and its failure is kept; the others go on.
"""

from __future__ import annotations

import datetime as dt
import functools
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec

from backhaul.testing.servers import PostgreSQL, ServerError, tool
from bench.results import Line, Run

Measure = Callable[[], Run]

_ONCE = Path(__file__).with_name("once.py")
# How programs say what they are, where it is not ``--version``; of those that don't, Debian knows.
_VERSION = {"pgbackrest": "version", "s5cmd": "version", "rclone": "version", "weed": "version", "socat": "-V"}
_DEBIAN = {"udp-sender": "udpcast", "uftp": "uftp", "mbuffer": "mbuffer"}


class FailedError(Exception):
    """A run that does not count: something failed, or did not do what was asked."""


class _Told(msgspec.Struct):
    status: int
    run: Run


def measured(command: str, environment: Mapping[str, str] | None = None) -> Run:
    """Run a pipeline of the shell.

    Raises:
        FailedError: a stage of it failed; with its last words.
    """
    reading, writing = os.pipe()
    with tempfile.TemporaryFile() as words:
        process = subprocess.Popen(
            [sys.executable, "-S", str(_ONCE), str(writing), command],
            env=None if environment is None else dict(environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=words,
            pass_fds=[writing],
        )
        os.close(writing)
        with open(reading, "rb") as pipe:
            answer = pipe.read()
        process.wait()
        told = msgspec.json.decode(answer, type=_Told) if answer else _Told(process.returncode, Run(0, 0))
        if told.status or process.returncode:
            words.seek(max(0, words.seek(0, os.SEEK_END) - 2000))
            said = words.read().decode(errors="replace").strip()
            raise FailedError(f"status {told.status or process.returncode}: {said or 'no word'}\n{command}")
    return told.run


def shell(commands: Mapping[str, str], environment: Mapping[str, str] | None = None) -> dict[str, Measure]:
    """Return what measures each command."""
    return {name: functools.partial(measured, command, environment) for name, command in commands.items()}


def alternate(
    ways: Mapping[str, Measure], rounds: int, *, once: Iterable[str] = (), limits: Iterable[str] = ()
) -> list[Line]:
    """Run every way once a round (those of ``once`` in the first round only).

    ``limits`` names the ways that are not peers but bounds.
    """
    lines = {name: Line(name, [], limit=name in set(limits)) for name in ways}
    rarely = set(once)
    for number in range(rounds):
        for name, measure in ways.items():
            if not number or name not in rarely:
                attempt(lines[name], measure, f"round {number + 1}")
    return list(lines.values())


def attempt(line: Line, measure: Measure, when: str) -> None:
    """Measure a way once more, and keep what came of it."""
    try:
        run = measure()
    except FailedError as error:
        line.failure = str(error).partition("\n")[0][:160]
        line.failed += 1
        print(f"  {when}: {line.label} failed: {error}", file=sys.stderr)
        return
    # A thousandth of a second is as much as there is to tell.
    line.runs.append(msgspec.structs.replace(run, wall=round(run.wall, 3), cpu=round(run.cpu, 3)))
    print(f"  {when}: {line.label}: {run.wall:.2f} s", file=sys.stderr)


def machine() -> str:
    """Say what this was measured on."""
    with open("/proc/cpuinfo") as file:
        model = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), "unknown CPU")
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}"


def today() -> str:
    """Return the day, in UTC."""
    return f"{dt.datetime.now(dt.UTC):%Y-%m-%d}"


def versions(*programs: str) -> dict[str, str]:
    """Return the version of each program; one that is not there has none."""
    return {program: found for program in programs if (found := _version(program))}


def _version(program: str) -> str:
    try:
        path = PostgreSQL.program(program) if program.startswith("pg_") else tool(program)
    except ServerError:
        return ""
    command = [path, _VERSION.get(program, "--version")]
    if program in _DEBIAN:
        command = ["dpkg-query", "-W", "-f", "${Version}", _DEBIAN[program]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    found = re.search(r"(?<![\w.])v?(\d+\.[\d.]+|\d{8})", done.stdout + done.stderr)
    return found[1].rstrip(".") if found else ""
