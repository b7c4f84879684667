"""``make demo``: the main job, on this machine alone, with the figures at the end.

Starts the SeaweedFS of the wheel, makes realistic data, pushes it to S3 and to a directory in one pass, lists,
verifies, pulls it back, compares, and takes everything away again. With ``--svg FILE`` the output becomes a
picture for the README.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from backhaul.formats.quantities import format_duration, format_size
from backhaul.testing.data import dump_text
from backhaul.testing.servers import SeaweedFS, seaweedfs

SIZE = 400_000_000
BUCKET = "acme"


class Demo:
    """Runs the commands, shows them as typed, and keeps the figures."""

    def __init__(self, console: Console, server: SeaweedFS, directory: Path) -> None:
        self.console = console
        self.directory = directory
        self.environment = {**os.environ, **server.environment}
        self.rows: list[tuple[str, str, str, str]] = []

    def run(self, *arguments: str, stdin: Path | None = None, stdout: Any = None, json_on: str = "stdout") -> Any:
        """Run ``backhaul`` with --json, as another process; return the object that it printed."""
        with open(stdin or os.devnull, "rb") as source:
            split = arguments.index("--") if "--" in arguments else len(arguments)
            command = [sys.executable, "-m", "backhaul", *arguments[:split], "--json", *arguments[split:]]
            done = subprocess.run(
                command,
                env=self.environment,
                cwd=self.directory,
                stdin=source,
                stdout=stdout or subprocess.PIPE,
                stderr=subprocess.PIPE,
                check=False,
            )
        if done.returncode:
            self.console.print(done.stderr.decode(), style="red")
            sys.exit(f"demo: backhaul {' '.join(arguments)} ended with status {done.returncode}")
        return json.loads(done.stderr if json_on == "stderr" else done.stdout)

    def say(self, command: str) -> None:
        """Show a command as a person types it."""
        self.console.print(f"\n[bold green]$[/] [bold]backhaul {command}[/]")

    def figure(self, what: str, size: int, seconds: float, note: str) -> None:
        """Keep a line of the closing table."""
        self.rows.append((what, format_duration(seconds), f"{format_size(size / seconds)}/s" if size else "", note))


def sha256(path: Path) -> str:
    """Hash a file, by another algorithm than Backhaul's own."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def play(demo: Demo, dump: Path) -> None:
    """The demo itself, once the server runs and the data is there."""
    console = demo.console
    s3_series, local_series = f"s3://{BUCKET}/db7/orders", "disk/orders"
    source = ["--", "cat", dump.name]

    demo.say(f"push {s3_series} {local_series} -- cat {dump.name}")
    pushed = demo.run("push", s3_series, local_series, *source)
    ratio = pushed["raw_size"] / pushed["stored_size"]
    console.print(
        f"[bold]{pushed['id']}[/]  {format_size(pushed['raw_size'])} in, "
        f"{format_size(pushed['stored_size'])} stored, ratio {ratio:.2f}, {format_duration(pushed['seconds'])}"
    )
    for destination in pushed["destinations"]:
        console.print(f"  [green]✓[/] {destination['series']}")
    demo.figure(
        "push to S3 and disk at once",
        pushed["raw_size"],
        pushed["seconds"],
        f"ratio {ratio:.2f}, in {format_size(pushed['peak_memory'])}",
    )

    demo.say(f"list {s3_series}")
    for backup in demo.run("list", s3_series)["backups"]:
        console.print(f"{backup['id']}  {format_size(backup['stored_size'])}  {', '.join(backup['streams'])}")

    demo.say(f"verify {s3_series}")
    shallow = demo.run("verify", s3_series)
    console.print("[green]nothing missing, shortened or replaced[/], and nothing downloaded to see it")
    demo.figure("verify", 0, shallow["seconds"], f"{len(shallow['checks'])} checks, 0 bytes read")
    demo.say(f"verify --deep {local_series}")
    deep = demo.run("verify", "--deep", local_series)
    console.print(f"[green]as it was pushed[/], {format_size(deep['bytes_read'])} read and compared")
    demo.figure("verify --deep", pushed["raw_size"], deep["seconds"], "every byte decoded and hashed")

    demo.say(f"pull {s3_series}@latest -o back.sql")
    pulled = demo.run("pull", f"{s3_series}@latest", "-o", "back.sql", json_on="stderr")
    same = sha256(demo.directory / "back.sql") == sha256(dump)
    console.print("[green]identical to what was pushed[/]" if same else "[red]NOT identical[/]")
    demo.figure(
        "pull to a file",
        pulled["raw_size"],
        pulled["seconds"],
        f"{pulled['requests']} requests, in {format_size(pulled['peak_memory'])}",
    )
    demo.say(f"pull {s3_series} -- wc -c")
    start = time.monotonic()
    with open(demo.directory / "count", "wb") as count:
        demo.run("pull", s3_series, "--", "wc", "-c", stdout=count, json_on="stderr")
    seconds = time.monotonic() - start
    counted = int((demo.directory / "count").read_text())
    console.print(str(counted))
    demo.figure("pull into a command", counted, seconds, "checked to the last byte")
    if not same or counted != dump.stat().st_size:
        sys.exit("demo: what came back is not what was pushed")


def main() -> None:
    """Run the demo."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--svg", help="also write the output as a picture")
    parser.add_argument("--size", type=int, default=SIZE, help="bytes of data")
    options = parser.parse_args()
    console = Console(record=options.svg is not None, highlight=False, width=104 if options.svg else None)
    directory = Path(tempfile.mkdtemp(prefix="backhaul-demo-"))
    try:
        with console.status("making data and starting an S3 store ...") as status:
            dump = directory / "orders.sql"
            with open(dump, "wb") as file:
                file.writelines(dump_text(options.size))
            with seaweedfs(directory / "s3") as server:
                client = server.client()
                client.create_bucket(Bucket=BUCKET)
                client.close()
                status.stop()
                console.print(
                    f"An S3 store (SeaweedFS) runs on this machine; [bold]{dump.name}[/] is "
                    f"{format_size(options.size)} of dump text."
                )
                demo = Demo(console, server, directory)
                play(demo, dump)
        table = Table(box=box.ROUNDED, title="\nwhat that took, client and store on one machine", title_style="bold")
        table.add_column("", style="bold")
        table.add_column("time", justify="right")
        table.add_column("rate", justify="right", style="cyan")
        table.add_column("")
        for row in demo.rows:
            table.add_row(*row)
        console.print(table)
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if options.svg:
        # Without the fonts that it would load from elsewhere: a reader's own monospace font does.
        svg = re.sub(r"@font-face \{.*?\}", "", console.export_svg(title="make demo"), flags=re.DOTALL)
        Path(options.svg).write_text(svg.replace("Fira Code", "monospace"))


if __name__ == "__main__":
    main()
