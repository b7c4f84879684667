"""``backhaul schedule``: what begins jobs on this host."""

from __future__ import annotations

import datetime as dt
import os
import sys

import click

from backhaul.cli.command import ExampleGroup, option_json
from backhaul.cli.output import console, print_json
from backhaul.errors import IncompleteError

_JSON_HELP = "Print one JSON object on stdout."
_HOW = click.option(
    "--with",
    "how",
    type=click.Choice(["auto", "systemd", "cron"]),
    default="auto",
    show_default=True,
    help="What is to begin them.",
)


@click.group(
    cls=ExampleGroup,
    short_help="Install, show and remove what begins jobs on this host.",
    epilog="""\b
Examples:
  backhaul schedule install --dry-run
  backhaul schedule install
  backhaul schedule show
  backhaul schedule run          (in a container, instead of timers)""",
)
def schedule() -> None:
    """Have jobs begin at their times: by timers of systemd, by a crontab, or by a process that stays."""


@schedule.command()
@_HOW
@click.option("--dry-run", is_flag=True, help="Only say what would be written.")
@option_json(_JSON_HELP)
def install(how: str, dry_run: bool, as_json: bool) -> None:
    """Write a timer, or a line of the crontab, for each job with a window; and one that catches up and tells people
    every ten minutes. What was installed for jobs that are gone is removed."""
    from backhaul.jobs.host import JobHost
    from backhaul.jobs.own_schedule import plan_of
    from backhaul.jobs.schedule import describe, this_host
    from backhaul.jobs.schedule import install as operation

    with JobHost() as host:
        plan = plan_of(host, how)
    if not dry_run:
        operation(plan, this_host())
    if as_json:
        print_json("schedule", {"dry_run": dry_run, "plan": plan})
        return
    out = console(sys.stdout)
    for line in describe(plan):
        out.print(line, markup=False)
    if dry_run:
        for change in (*plan.changes, *(() if plan.crontab is None else (plan.crontab,))):
            if change.action == "write":
                out.print(f"\n{change.path}:", style="bold")
                out.print(change.after, markup=False)
    else:
        out.print("Installed. See: backhaul schedule show", style="green")


@schedule.command()
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@option_json(_JSON_HELP)
def remove(dry_run: bool, as_json: bool) -> None:
    """Remove all timers and lines that install has written; jobs, config and history stay."""
    from backhaul.jobs.schedule import describe, plan_removal, this_host
    from backhaul.jobs.schedule import remove as operation

    plan = plan_removal(this_host()) if dry_run else operation(this_host())
    if as_json:
        print_json("schedule", {"dry_run": dry_run, "plan": plan})
        return
    out = console(sys.stdout)
    lines = describe(plan)
    for line in lines:
        out.print(line, markup=False)
    if not lines:
        out.print("Nothing was installed.", style="dim")


@schedule.command()
@option_json(_JSON_HELP)
def show(as_json: bool) -> None:
    """Say for each job when it begins next, and whether what begins it is installed as it should be.

    Exit status 3 if something is missing or differs.
    """
    from rich.text import Text

    from backhaul.jobs.host import JobHost
    from backhaul.jobs.own_schedule import state_of

    with JobHost() as host:
        state = state_of(host)
    if as_json:
        print_json("schedule", {"state": state, "as_planned": state.as_planned})
    else:
        out = console(sys.stdout)
        width = max((len(each.job) for each in state.jobs), default=4)
        for each in state.jobs:
            line = Text(f"{each.job:<{width}}", "bold")
            line.append(f"  {each.state}", "green" if each.state in ("installed", "by the tick") else "yellow")
            begins = f"{each.next.begins.astimezone():%a %Y-%m-%d %H:%M %Z}" if each.next is not None else "never"
            out.print(line.append(f"  next {begins}").append(f"  {each.window}", "dim"))
        out.print(f"{'tick':<{width}}  {state.tick}  every ten minutes: catches up, and tells people", style="dim")
        for name in state.gone:
            out.print(f"{name} is installed for a job that is gone", style="yellow", markup=False)
        for remark in state.remarks:
            out.print(remark, style="yellow", markup=False)
    if not state.as_planned:
        error = IncompleteError(
            "The schedule is not installed as the config says",
            f"installed is {state.how or 'nothing'}",
            "Install it: backhaul schedule install",
        )
        from backhaul.cli.output import ReportedError

        raise ReportedError(error) if as_json else error


@schedule.command("run")
def run_() -> None:
    """Stay, and begin jobs at their times: for containers, instead of timers. SIGTERM ends it and its jobs."""
    from backhaul.jobs.scheduler import ForegroundScheduler

    def say(text: str) -> None:
        click.echo(f"{dt.datetime.now().astimezone().isoformat(timespec='seconds')} {text}", err=True)

    try:
        ForegroundScheduler(say).run()
    except KeyboardInterrupt as interrupt:
        # The way in which it is meant to end.
        say(f"ended by {str(interrupt) or 'SIGINT'}")


@schedule.command()
@click.option("--via", type=click.Choice(["cron", "systemd"]), default="cron", help="What is to begin a job.")
def tick(via: str) -> None:
    """What timers call every ten minutes: begin what is due and was not begun, and tell people what is wrong."""
    from backhaul.jobs.host import JobHost
    from backhaul.jobs.scheduler import start_by_systemd, start_detached
    from backhaul.jobs.scheduler import tick as operation

    start = start_by_systemd(os.geteuid() != 0) if via == "systemd" else start_detached
    with JobHost(last_config=True) as host:
        operation(host, start, click.echo)
        for problem in (*([host.config_problem] if host.config_problem else []), *host.history.problems):
            click.echo(f"backhaul: {problem}", err=True)
