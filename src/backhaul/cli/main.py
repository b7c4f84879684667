"""The one command, ``backhaul``: its verbs, its signals, its exit status."""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

import click

from backhaul.cli.command import ExampleGroup, LaterCommands
from backhaul.cli.output import ReportedError, error_document, print_error, print_json
from backhaul.errors import BackhaulError, ConfigurationError, FailedError, InterruptedByUserError, UsageError
from backhaul.formats.redaction import redact_text
from backhaul.operations import handover
from backhaul.operations.places import CONFIG_VARIABLE
from backhaul.version import VERSION

# What a shell says of a program whose reader went away: no finding of ours is meant.
_BROKEN_PIPE = 128 + 13
_EPILOG = """\b
Examples:
  backhaul push s3://acme/db7/orders -- pg_dump -Fc -Z0 orders
  backhaul list s3://acme/db7/orders
  backhaul pull s3://acme/db7/orders -- pg_restore -d orders_copy

\b
A SERIES is a store path: s3://bucket/path, a directory, or NAME:path for a store of the
config. SERIES@WHEN is one of its backups: an id, 'latest' (the default), or a date or time (UTC).
S3 credentials come from the AWS environment or profile; AWS_ENDPOINT_URL names another
S3 store, and s3://bucket/path?endpoint=URL does so for one SERIES.

\b
Exit status: 0 complete, 1 failed, 2 usage, 3 finished but incomplete,
10 configuration or prerequisite, 11 lock busy, 75 the window ended, 130 interrupted."""


# In the order of a backup's life instead of the alphabet.
_COMMANDS = {
    "push": "backhaul.cli.push:push",
    "pull": "backhaul.cli.pull:pull",
    "restore": "backhaul.cli.restore:restore",
    "drill": "backhaul.cli.restore:drill",
    "list": "backhaul.cli.inspect:list_",
    "show": "backhaul.cli.inspect:show",
    "verify": "backhaul.cli.inspect:verify",
    "prune": "backhaul.cli.prune:prune",
    "clean": "backhaul.cli.inspect:clean",
    "sync": "backhaul.cli.mirror:sync",
    "plan": "backhaul.cli.mirror:plan",
    "apply": "backhaul.cli.mirror:apply",
    "undelete": "backhaul.cli.mirror:undelete",
    "send": "backhaul.cli.send:send",
    "receive": "backhaul.cli.receive:receive",
    "keygen": "backhaul.cli.keys:keygen",
    "keys": "backhaul.cli.fan_out_keys:keys",
    "run": "backhaul.cli.jobs:run",
    "exec": "backhaul.cli.jobs:exec_",
    "next": "backhaul.cli.jobs:next_",
    "schedule": "backhaul.cli.schedule:schedule",
    "hold": "backhaul.cli.jobs:hold",
    "report": "backhaul.cli.reports:report",
    "why": "backhaul.cli.jobs:why",
    "log": "backhaul.cli.jobs:log",
    "check": "backhaul.cli.reports:check",
    "metrics": "backhaul.cli.reports:metrics",
    "notify": "backhaul.cli.reports:notify",
    "init": "backhaul.cli.init:init",
    "config": "backhaul.cli.config:config",
    "doctor": "backhaul.cli.doctor:doctor",
}


@click.group(
    cls=ExampleGroup,
    commands=LaterCommands(_COMMANDS),
    epilog=_EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(VERSION, prog_name="backhaul")
@click.option(
    "--config",
    metavar="FILE",
    help="The config, instead of /etc/backhaul/config.toml, conf.d and ~/.config/backhaul/config.toml.",
)
@click.pass_context
def cli(ctx: click.Context, config: str | None) -> None:
    """Database backups off-site in one pass, back in parallel, and never half a backup that looks whole."""
    if config is not None:
        # (init makes one.)
        if not Path(config).is_file() and ctx.invoked_subcommand != "init":
            raise ConfigurationError(
                f"There is no config {config}", "it does not exist, or is no file", "Correct the path behind --config."
            )
        os.environ[CONFIG_VARIABLE] = config


def run(arguments: list[str]) -> int:
    """Run one command and return its exit status. Every expected failure is printed, none is raised."""
    handover.take_over()
    as_json = "--json" in (arguments[: arguments.index("--")] if "--" in arguments else arguments)
    try:
        # (What a command ended with by ``ctx.exit``, it returns.)
        status = cli.main(arguments, prog_name="backhaul", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except ReportedError as reported:
        handover.hand(handover.Handed(kind=handover.ERROR, document=error_document(reported.error)))
        print_error(reported.error)
        return reported.error.exit_code
    except BackhaulError as error:
        return _report(error, as_json=as_json, arguments=arguments)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.ctx.get_help(), err=True)
        return UsageError.exit_code
    except click.UsageError as error:
        command = error.ctx.command_path if error.ctx is not None else "backhaul"
        usage = UsageError(error.format_message(), "the command line does not fit", f"See: {command} --help")
        return _report(usage, as_json=as_json, arguments=arguments)
    except (KeyboardInterrupt, click.Abort) as error:
        # (click turns the one into the other.)
        name = str(error) or str(error.__cause__ or error.__context__ or "") or "SIGINT"
        interrupted = InterruptedByUserError("Interrupted", f"by {name}", "Run the command again.")
        return _report(interrupted, as_json=as_json, arguments=arguments)
    except BrokenPipeError:
        # The reader of our text went away (| head): nothing of the work was lost.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return _BROKEN_PIPE
    except Exception as error:
        if os.environ.get("BACKHAUL_TRACEBACK"):
            raise
        unexpected = FailedError(
            "Something unexpected happened",
            f"{type(error).__name__}: {redact_text(str(error))}",
            "This is a fault of Backhaul: run it again with BACKHAUL_TRACEBACK=1 and report what it prints.",
        )
        return _report(unexpected, as_json=as_json, arguments=arguments)


def _report(error: BackhaulError, *, as_json: bool, arguments: list[str]) -> int:
    handover.hand(handover.Handed(kind=handover.ERROR, document=error_document(error)))
    data_on_stdout = arguments[:1] == ["pull"]
    if as_json:
        print_json("error", error_document(error), file=sys.stderr if data_on_stdout else sys.stdout)
    if not (as_json and data_on_stdout):
        print_error(error)
    return error.exit_code


def _install_signal_handlers() -> None:
    """Turn the first signal into an orderly end, and the second into an immediate one."""
    seen = 0

    def handle(number: int, _frame: FrameType | None) -> None:
        nonlocal seen
        seen += 1
        if seen > 1:
            os.write(2, b"backhaul: interrupted again, leaving at once; backhaul clean collects what is left\n")
            os._exit(InterruptedByUserError.exit_code)
        raise KeyboardInterrupt(signal.Signals(number).name)

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup stays nohup
            signal.signal(number, handle)


def _open_standard_descriptors() -> None:
    """Have something behind descriptors 0, 1 and 2: what is opened next must not become one of them."""
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number: this one
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the ``backhaul`` command; never returns."""
    # Loading botocore makes a great many objects that stay: looking for garbage among them takes 40 ms.
    gc.set_threshold(50_000, 20, 20)
    _open_standard_descriptors()
    _install_signal_handlers()
    status: Any = 1
    try:
        status = run(sys.argv[1:] if arguments is None else arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        pass
    finally:
        sys.stderr.flush()
    # The interpreter looks for garbage once more before it ends, and the kernel takes everything back a moment later:
    # that was a fifth of the CPU time of a short command.
    gc.freeze()
    sys.exit(status)
