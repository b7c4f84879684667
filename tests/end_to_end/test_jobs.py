"""Jobs as people run them: real processes, real stores, real servers, and what is left when something dies."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from backhaul.formats import run_record
from backhaul.model.job import RunRecord
from backhaul.processes.identity import is_alive, this_process
from backhaul.testing.notify_servers import HttpSink, MailServer
from tests.conftest import Cli

STAMPED = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}[+-]\d\d:\d\d [OEB] .*")
# Open now, whatever the clock says.
OPEN = 'window = { start = "*:00", length = "1h" }'


class Host:
    """A config, a state directory, and the command line."""

    def __init__(self, cli: Cli, directory: Path) -> None:
        self.config = directory / "config.toml"
        self.config.write_text("")
        self.state = directory / "state"
        self.directory = directory
        self.cli = Cli(
            {**cli.environment, "BACKHAUL_CONFIG": str(self.config), "BACKHAUL_STATE": str(self.state)}, directory
        )

    def __call__(self, *arguments: str, **options: Any) -> Any:
        return self.cli(*arguments, **options)

    def configure(self, text: str) -> None:
        self.config.write_text(text)

    def runs(self, job: str) -> list[dict[str, Any]]:
        return list(self("log", job, "--runs", "--json").json.get("runs", []))  # (none before its first)

    def last(self, job: str) -> dict[str, Any]:
        return self.runs(job)[0]

    def log(self, job: str) -> list[str]:
        return list(self("log", job).out.decode().splitlines())

    def verdict(self, job: str) -> dict[str, Any]:
        found = self("report", job, "--json").json["verdicts"]
        assert len(found) == 1
        return dict(found[0])


@pytest.fixture
def host(local_cli: Cli, tmp_path: Path) -> Iterator[Host]:
    host = Host(local_cli, tmp_path)
    yield host
    host.cli.kill_all()


@pytest.fixture
def s3_host(cli: Cli, tmp_path: Path) -> Iterator[Host]:
    host = Host(cli, tmp_path)
    yield host
    host.cli.kill_all()


def wait_for(condition: Callable[[], Any], seconds: float = 60) -> Any:
    deadline = time.monotonic() + seconds
    while True:
        found = condition()
        if found:
            return found
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.05)


def shell(text: str) -> str:
    return json.dumps(["sh", "-c", text])


# -- what a run keeps --------------------------------------------------------------------------------------


def test_every_line_is_stamped_and_kept(host: Host) -> None:
    result = host("exec", "--name", "lines", "--", "sh", "-c", "echo one; echo two >&2; printf three; exit 7")
    assert result.code == 7
    lines = host.log("lines")
    assert all(STAMPED.fullmatch(line) for line in lines)
    said = sorted(line.split(" ", 1)[1] for line in lines)
    assert said == ["B failed: sh exited with status 7", "E two", "O one", "O three"]
    # Passed on as it is kept: stdout to stdout, the rest to stderr.
    assert [line.split(" ", 1)[1] for line in result.out.decode().splitlines()] == ["O one", "O three"]
    record = host.last("lines")
    assert (record["state"], record["exit_status"], record["stages"][0]["exit_status"]) == ("failed", 7, 7)
    assert record["last_words"] == "two"


def test_quiet_as_cron_likes_it(host: Host) -> None:
    good = host("exec", "--quiet", "--", "sh", "-c", "echo one; echo two >&2")
    assert (good.code, good.out, good.err) == (0, b"", "")
    bad = host("exec", "--quiet", "--", "sh", "-c", "echo one; echo two >&2; exit 3")
    assert (bad.code, bad.out) == (3, b"")
    assert " E two" in bad.err
    assert " O one" in bad.err


@pytest.mark.parametrize(
    ("command", "status"), [("exit 0", 0), ("exit 75", 75), ("kill -9 $$", 137), ("kill -15 $$", 143)]
)
def test_the_exit_status_is_kept(host: Host, command: str, status: int) -> None:
    assert host("exec", "-q", "--", "sh", "-c", command).code == status


def test_a_program_that_is_not_there(host: Host) -> None:
    result = host("exec", "-q", "--", "no-such-program")
    assert result.code == 127
    assert "could not be started" in result.err


def test_a_pipeline_whose_first_stage_fails_is_a_failure(host: Host, tmp_path: Path) -> None:
    end = tmp_path / "end"
    result = host(
        "exec", "--name", "pipe", "--", "sh", "-c", "echo data; exit 4", "|", "cat", "|", "sh", "-c",
        f"cat; echo reached > {end}",
    )  # fmt: skip
    assert result.code == 4
    record = host.last("pipe")
    assert record["state"] == "failed"
    assert [stage.get("exit_status") for stage in record["stages"]] == [4, None, None]
    assert [stage.get("signal") for stage in record["stages"]][1:] == ["SIGKILL", "SIGKILL"]
    assert not end.exists(), "the last stage took what it had for the whole"


def test_a_pipeline_that_goes_well(host: Host) -> None:
    result = host("exec", "--name", "pipe", "--", "seq", "1000", "|", "cat", "|", "wc", "-l")
    assert result.code == 0
    assert result.out.decode().split()[-1] == "1000"
    assert [stage["exit_status"] for stage in host.last("pipe")["stages"]] == [0, 0, 0]
    # A reader that needs no more ends its feeder, and that is the feeder's failure, as in a shell with pipefail.
    result = host("exec", "--name", "head", "--", "yes", "|", "head", "-1")
    assert result.code == 141
    # A reader that fails ends a feeder that would go on for ever.
    result = host("exec", "--name", "bad", "--", "sh", "-c", "sleep 1000", "|", "sh", "-c", "exit 6")
    assert result.code == 6


def test_what_a_program_left_running_holds_nothing_up(host: Host) -> None:
    result = host("exec", "--name", "left", "--", "sh", "-c", "(sleep 60; echo late) & echo done", timeout=30)
    assert result.code == 0
    assert b"O done" in result.out


def test_a_gigabyte_on_stderr_stays_bounded(host: Host) -> None:
    script = (
        "import os\nblock = b''.join(b'line %06d of what nobody reads\\n' % n for n in range(20000))\n"
        "os.write(2, b'the first line\\n')\n"
        "for _ in range(1 + 10**9 // len(block)):\n    view = memoryview(block)\n"
        "    while view:\n        view = view[os.write(2, view):]\n"
        "os.write(2, b'the last line\\n')\n"
    )
    host.cli.cold = True  # its memory is measured
    process = host.cli.start(
        "exec", "--quiet", "--name", "loud", "--log-size", "4Mi", "--", sys.executable, "-c", script,
        env={"BACKHAUL_TRACEBACK": "1"},
    )  # fmt: skip
    peak = 0
    while process.poll() is None:
        try:
            text = Path(f"/proc/{process.pid}/status").read_text()
        except FileNotFoundError:
            break
        if found := re.search(r"VmHWM:\s+(\d+) kB", text):
            peak = max(peak, int(found[1]) * 1024)
        time.sleep(0.05)
    _, err = process.communicate(timeout=200)
    assert process.returncode == 0, err.decode()
    record = host.last("loud")
    assert record["log_size"] > 10**9
    assert record["cut"] is True
    path = Path(host("log", "loud", "--json").json["path"])
    assert path.stat().st_size <= (4 << 20) + 1000
    assert [each.name for each in path.parent.iterdir() if each.name.startswith("log")] == ["log"]
    lines = path.read_text().splitlines()
    assert lines[0].endswith("E the first line")
    assert lines[-1].endswith("E the last line")
    assert sum("bytes were left out here" in line for line in lines) == 1
    assert all(STAMPED.fullmatch(line) for line in lines)
    assert 0 < peak < 150e6


def test_secrets_are_masked_wherever_they_appear(host: Host, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("hunter2-hunter2\n")
    host.configure(
        f'[jobs.app]\nkind = "command"\ncommand = {shell("echo $PGPASSWORD; echo --password=swordfish >&2; exit 1")}\n'
        f'environment = {{ PGPASSWORD = {{ file = "{secret}" }} }}\n'
    )
    result = host("run", "app")
    everything = result.out.decode() + result.err + "".join(host.log("app")) + json.dumps(host.last("app"))
    everything += host("report", "--json").out.decode() + host("config", "show").out.decode()
    assert "***" in everything
    for text in ("hunter2", "swordfish"):
        assert text not in everything
    assert str(secret) in host("config", "show").out.decode()


def test_a_time_limit(host: Host) -> None:
    result = host("exec", "--name", "slow", "--time-limit", "1s", "--", "sh", "-c", "sleep 1000 & wait", timeout=60)
    assert result.code == 1
    assert host.last("slow")["why"] == "it took longer than 1.0 s and was ended"


def test_retries(host: Host, tmp_path: Path) -> None:
    count = tmp_path / "count"
    command = f'echo x >> {count}; test "$(wc -l < {count})" = 3'
    result = host("exec", "--name", "flaky", "--retries", "5", "--backoff", "1s", "--", "sh", "-c", command)
    assert result.code == 0
    record = host.last("flaky")
    assert (record["state"], record["attempts"]) == ("ok", 3)
    assert [line.split(" B ")[1] for line in host.log("flaky") if " B attempt" in line] == [
        "attempt 2 of 6",
        "attempt 3 of 6",
    ]


def test_one_run_at_a_time(host: Host, tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    first = host.cli.start("exec", "--name", "one", "--", "cat", str(fifo))
    wait_for(lambda: host("log", "one", "--runs", "--json").json["runs"] if (host.state / "jobs").exists() else None)
    second = host("exec", "--name", "one", "--", "true")
    assert second.code == 11
    assert str(first.pid) in second.err
    with open(fifo, "w") as file:
        file.write("end\n")
    out, _ = first.communicate(timeout=30)
    assert b"O end" in out
    assert host("exec", "--name", "one", "--", "true").code == 0


def test_an_abort_is_no_end(host: Host, tmp_path: Path) -> None:
    """Whatever a feeder says of itself when it is told to end, its reader never takes what it has for the whole."""
    flag = tmp_path / "flag"
    feeder = "trap 'exit 0' TERM; echo some; while :; do sleep 0.05; done"
    reader = f"trap '' TERM; cat > {tmp_path / 'out'}; echo COMMITTED > {flag}"
    result = host("exec", "--time-limit", "1s", "--name", "a", "--", "sh", "-c", feeder, "|", "sh", "-c", reader)
    assert result.code == 1
    assert not flag.exists()
    last = "sleep 0.5; exit 9"
    result = host("exec", "--name", "b", "--", "sh", "-c", feeder, "|", "sh", "-c", reader, "|", "sh", "-c", last)
    assert result.code == 9
    assert not flag.exists()
    process = host.cli.start("exec", "--name", "c", "--", "sh", "-c", feeder, "|", "sh", "-c", reader)
    wait_for(lambda: (tmp_path / "out").exists() and host("log", "c", "--runs").code == 0)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not flag.exists()


def test_a_reader_that_stalls_holds_no_limit_up(host: Host) -> None:
    process = host.cli.start("exec", "--time-limit", "2s", "--name", "yes", "--", "yes", "x" * 70)
    # Nobody reads its output, which fills the pipe; its limit ends it all the same.
    wait_for(lambda: [run for run in host.runs("yes") if run["state"] == "failed"])
    assert "took longer" in host.last("yes")["why"]
    process.communicate(timeout=60)
    assert process.returncode == 1


def test_the_log_of_a_run_that_was_killed_has_its_end(host: Host, tmp_path: Path) -> None:
    ready = tmp_path / "ready"
    script = f"seq 200000; echo the end; touch {ready}; exec sleep 1000"
    process = host.cli.start(
        "exec", "--quiet", "--name", "long", "--log-size", "400K", "--", "sh", "-c", script
    )  # fmt: skip
    wait_for(ready.exists)
    wait_for(lambda: host.log("long")[-1].endswith("O the end"))
    process.kill()
    process.communicate(timeout=30)
    lines = host.log("long")
    assert lines[0].endswith("O 1")
    assert lines[-1].endswith("O the end")


def test_a_lock_that_is_shared_with_other_programs(host: Host, tmp_path: Path) -> None:
    lock = tmp_path / "groom.lock"
    with subprocess.Popen(
        ["flock", str(lock), "sh", "-c", "echo locked; read x"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as groom:
        assert groom.stdout is not None
        assert groom.stdout.readline() == b"locked\n"
        assert host("exec", "--lock", str(lock), "--", "true").code == 11
        groom.communicate(b"\n", timeout=10)
    assert host("exec", "--lock", str(lock), "--", "true").code == 0


# -- how a run dies ----------------------------------------------------------------------------------------


def test_an_interrupted_run_says_so(host: Host, tmp_path: Path) -> None:
    started = tmp_path / "started"
    process = host.cli.start("exec", "--name", "long", "--", "sh", "-c", f"echo x > {started}; exec sleep 1000")
    wait_for(started.exists)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    record = host.last("long")
    assert (record["state"], record["why"]) == ("interrupted", "it was ended by SIGTERM")


def test_a_killed_run_is_noticed_and_takes_its_programs_along(host: Host, tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    process = host.cli.start("exec", "--name", "long", "--", "sh", "-c", f"echo $$ > {pid_file}; exec sleep 1000")
    pid = int(wait_for(lambda: pid_file.exists() and pid_file.read_text().strip()))
    process.kill()
    process.communicate(timeout=30)
    wait_for(lambda: not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2])
    record = host.last("long")
    assert record["state"] == "died"
    assert host.verdict("long")["state"] == "failed"
    # Running again works: the lock ended with its holder.
    assert host("exec", "--name", "long", "--", "true").code == 0


def test_a_process_is_told_from_a_later_one_of_its_number() -> None:
    pid, word = this_process()
    assert is_alive(pid, word)
    assert not is_alive(pid, word + "1")
    assert not is_alive(pid, "another boot/" + word.partition("/")[2])
    assert not is_alive(0, word)
    assert not is_alive(pid, "")


def test_a_damaged_database_is_set_aside_and_made_anew(host: Host) -> None:
    for number in range(3):
        assert host("exec", "-q", "--name", f"job{number}", "--", "true").code == 0
    database = host.state / "jobs" / "history.sqlite"
    for suffix in ("-wal", "-shm"):
        Path(f"{database}{suffix}").unlink(missing_ok=True)
    data = bytearray(database.read_bytes())
    data[100:4096] = os.urandom(3996)
    database.write_bytes(data)
    result = host("report", "--json")
    found = result.json
    assert {each["card"]["name"] for each in found["verdicts"]} == {"job0", "job1", "job2"}
    assert len(found["problems"]) == 1
    assert "was damaged" in found["problems"][0]
    (aside,) = database.parent.glob("history.sqlite.damaged-*")
    assert aside.read_bytes() == bytes(data)
    assert host("report", "--json").json["problems"] == []


def test_a_database_that_is_no_database(host: Host) -> None:
    assert host("exec", "-q", "--name", "job", "--", "true").code == 0
    database = host.state / "jobs" / "history.sqlite"
    database.write_text("not a database at all" * 100)
    assert host("exec", "-q", "--name", "job", "--", "true").code == 0
    assert len(host.runs("job")) == 2


def test_a_full_state_disk_stops_no_job(host: Host, tmpfs: Path, tmp_path: Path) -> None:
    state = {"BACKHAUL_STATE": str(tmpfs / "state")}
    proof = tmp_path / "proof"
    store = tmp_path / "store"
    host.configure(
        f'[stores.disk]\nurl = "{store}"\n[jobs.app]\nkind = "push"\nto = "disk:app"\n'
        f"command = {shell(f'date > {proof}; seq 100000')}\n"
    )
    assert host("run", "-q", "app", env=state).code == 0
    (tmpfs / "filler").write_bytes(b"x" * (tmpfs.stat().st_blksize * 0 + 1))
    with open(tmpfs / "filler", "wb", buffering=0) as file, pytest.raises(OSError, match="No space"):
        while True:
            file.write(b"x" * 4096)
    proof.unlink()
    result = host("run", "-q", "app", env=state)
    # The backup is what counts: it was made, and what could not be kept is said.
    assert proof.exists()
    assert len(host("list", str(store / "app"), "--json").json["backups"]) == 2
    assert re.search("No space left on device|database or disk is full", result.err)
    # Nothing is lost: the record lies beside the backup.
    found = host("report", "--store", str(store), "--json", env=state).json["verdicts"]
    assert [each["state"] for each in found] == ["ok"]
    # What a disk does not take is not forgotten: a timer that comes again begins nothing, and nobody is told twice.
    all_day = 'window = { start = "00:00", length = "24h", timezone = "UTC" }'
    host.configure(host.config.read_text() + all_day + "\n")
    assert host("run", "--scheduled", "-q", "app", env=state).code == 0
    proof.unlink()
    codes = {host("run", "--scheduled", "-q", "app", env=state).code for _ in range(2)}
    assert codes == {75}
    assert not proof.exists()
    (tmpfs / "filler").unlink()
    assert host("run", "-q", "app", env=state).code == 0
    assert host("schedule", "tick", env=state).code == 0
    assert host("check", env=state).code == 0
    assert len(host("log", "app", "--runs", "--json", env=state).json["runs"]) >= 4


def test_a_clock_that_was_set_back(host: Host) -> None:
    assert host("exec", "-q", "--name", "job", "--", "true").code == 0
    path = next((host.state / "jobs" / "runs" / "job").glob("*/record.json"))
    record = run_record.decode(path.read_bytes(), RunRecord, where="here")
    later = (dt.datetime.fromisoformat(record.started) + dt.timedelta(days=2)).isoformat()
    import msgspec

    changed = msgspec.structs.replace(record, started=later, finished=later)
    with sqlite3.connect(host.state / "jobs" / "history.sqlite") as database:
        database.execute(
            "UPDATE runs SET started = ?, document = ?",
            (dt.datetime.fromisoformat(later).timestamp(), msgspec.json.encode(changed)),
        )
    database.close()
    verdict = host.verdict("job")
    assert verdict["state"] == "incomplete"
    assert "clock set back" in verdict["reasons"][0][1]
    assert host("check").code == 3


def test_a_hold_that_can_not_be_read_holds_everything(host: Host) -> None:
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = ["true"]\n{OPEN}\n')
    assert host("hold", "app", "--for", "1h").code == 0
    (path,) = (host.state / "jobs" / "holds").glob("*.json")
    path.write_bytes(path.read_bytes()[:20])
    result = host("run", "app")
    assert result.code == 75
    assert "can't be read" in host("report").out.decode()


# -- windows and holds -------------------------------------------------------------------------------------


def closed_window() -> str:
    """A window that is not open now, nor within the next hours."""
    hour = (dt.datetime.now(dt.UTC).hour + 12) % 24
    return f'window = {{ start = "{hour:02d}:00", length = "1h", timezone = "UTC" }}'


def test_a_closed_window(host: Host) -> None:
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = ["true"]\n{closed_window()}\n')
    result = host("run", "app")
    assert result.code == 75
    assert "its window is closed, and opens at" in result.err
    assert host("run", "--scheduled", "--quiet", "app").code == 75
    assert host("run", "--now", "app").code == 0
    assert [run["trigger"] for run in host.runs("app")] == ["by hand"]


def test_once_in_each_opening(host: Host) -> None:
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = ["true"]\n{OPEN}\n')
    codes = [host("run", "--scheduled", "--quiet", "app").code for _ in range(3)]
    # (At a full hour the next opening begins.)
    assert codes[0] == 0
    assert codes.count(75) >= 1
    occurrences = [run["occurrence"] for run in host.runs("app")]
    assert len(occurrences) == len(set(occurrences)) == codes.count(0)


def test_what_a_person_tried_is_not_the_run_of_the_night(host: Host, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.touch()
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = {shell(f"test ! -e {broken}")}\n{OPEN}\n')
    assert host("run", "-q", "app").code == 1
    broken.unlink()
    assert host("run", "--scheduled", "--quiet", "app").code == 0


def test_the_name_of_a_job_is_not_for_others(host: Host) -> None:
    host.configure('[jobs.app]\nkind = "command"\ncommand = ["false"]\n')
    assert host("exec", "--name", "app", "--", "true").code == 2
    assert host("exec", "--name", "all", "--", "true").code == 2
    assert host("check", "nobody").code == 2


def test_many_timers_at_once_begin_one_run(host: Host, tmp_path: Path) -> None:
    count = tmp_path / "count"
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = {shell(f"echo x >> {count}; sleep 1")}\n{OPEN}\n')
    processes = [host.cli.start("run", "--scheduled", "--quiet", "app") for _ in range(5)]
    codes = sorted(process.wait(60) for process in processes)
    for process in processes:
        process.communicate()
    assert codes.count(0) == len(count.read_text().split()) <= 2
    assert set(codes) <= {0, 11, 75}


def test_holds(host: Host) -> None:
    host.configure(
        f'[jobs.app]\nkind = "command"\ncommand = ["true"]\n{OPEN}\n[jobs.other]\nkind = "command"\ncommand = ["true"]\n'
    )
    assert "no end" in host("hold", "app").err
    assert host("hold", "nobody", "--for", "1h").code == 2
    assert host("hold", "app", "--for", "1h", "--reason", "ALTER TABLE").code == 0
    result = host("run", "app")
    assert result.code == 75
    assert "ALTER TABLE" in result.err
    assert host("run", "other").code == 0
    assert host("run", "--despite-hold", "app").code == 0
    assert host.verdict("app")["state"] == "held"
    assert "held until" in host("why", "app").out.decode()
    assert host("hold", "--release", "app").code == 0
    assert host.verdict("app")["state"] == "ok"
    assert host("hold", "--release", "app").code == 1


def test_a_hold_around_a_command(host: Host, tmp_path: Path) -> None:
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = ["true"]\n{OPEN}\n')
    inside = tmp_path / "inside"
    program = f"{sys.executable} -m backhaul run app; echo $? > {inside}; exit 9"
    result = host("hold", "with", "all", "--reason", "groom", "--", "sh", "-c", program)
    assert result.code == 9
    assert inside.read_text().strip() == "75"
    assert host("run", "app").code == 0
    # One that is killed holds nothing any more.
    process = host.cli.start("hold", "with", "app", "--", "sleep", "1000")
    wait_for(lambda: host("hold", "--json").json["holds"])
    process.kill()
    process.communicate(timeout=30)
    assert host("hold", "--json").json["holds"] == []
    assert host("run", "app").code == 0


def test_a_hold_waits_for_what_runs(host: Host, tmp_path: Path) -> None:
    fifo, order = tmp_path / "fifo", tmp_path / "order"
    os.mkfifo(fifo)
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = {shell(f"cat {fifo}; echo job >> {order}")}\n')
    job = host.cli.start("run", "-q", "app")
    wait_for(lambda: host("report", "--json").json["verdicts"][0]["state"] == "running")
    groom = host.cli.start("hold", "with", "app", "--", "sh", "-c", f"echo groom >> {order}")
    assert groom.stderr is not None
    assert b"waiting for app" in groom.stderr.readline()
    with open(fifo, "w") as file:
        file.write("end\n")
    groom.communicate(timeout=60)
    job.communicate(timeout=60)
    assert order.read_text().split() == ["job", "groom"]


def mirror_config(host: Host, files: int, limit: str, window: str) -> None:
    source = host.directory / "source"
    source.mkdir()
    for number in range(files):
        (source / f"{number:03d}").write_bytes(os.urandom(500_000))
    host.configure(
        f'[stores.disk]\nurl = "{host.directory / "store"}"\n[jobs.chunks]\nkind = "mirror"\n'
        f'directory = "{source}"\nto = "disk:chunks"\nlimit = "{limit}"\nstreams = 1\n{window}\n'
    )


def test_a_mirror_finishes_its_part_when_it_is_held(host: Host) -> None:
    mirror_config(host, 60, "2M", OPEN.replace("}", ', at_end = "stop-new" }'))
    job = host.cli.start("run", "--scheduled", "chunks")
    store = host.directory / "store" / "chunks"
    wait_for(lambda: len(list(store.glob("0*"))) > 2)
    assert host("hold", "chunks", "--for", "1h", "--reason", "groom").code == 0
    _, err = job.communicate(timeout=60)
    assert job.returncode == 75, err.decode()
    record = host.last("chunks")
    assert record["state"] == "stopped"
    assert "groom" in record["why"]
    there = len(list(store.glob("0*")))
    assert 2 < there < 60
    # Each file that is there is whole; released, the same night goes on.
    for path in store.glob("0*"):
        assert path.read_bytes() == (host.directory / "source" / path.name).read_bytes()
    assert host("hold", "--release").code == 0
    host.configure(host.config.read_text().replace('limit = "2M"', 'limit = "off"'))
    assert host("run", "--scheduled", "chunks").code == 0
    assert len(list(store.glob("0*"))) == 60


@pytest.mark.first
def test_the_end_of_a_window(host: Host) -> None:
    """Opens this minute, and is open for one: at its end a mirror begins nothing more, and another job is ended."""
    now = dt.datetime.now(dt.UTC)
    if now.second > 10:
        time.sleep(61 - now.second)
        now = dt.datetime.now(dt.UTC)
    window = f'window = {{ start = "{now:%H:%M}", length = "1m", timezone = "UTC", at_end = "%s" }}'
    mirror_config(host, 200, "400K", window % "stop-new")
    with open(host.config, "a") as file:
        file.write(f'[jobs.slow]\nkind = "command"\ncommand = ["sleep", "1000"]\n{window % "abort"}\n')
        file.write(f'[jobs.patient]\nkind = "command"\ncommand = ["sleep", "65"]\n{window % "finish"}\n')
    started = {name: host.cli.start("run", "--scheduled", "--quiet", name) for name in ("chunks", "slow", "patient")}
    codes = {name: (process.communicate(timeout=120), process.returncode)[1] for name, process in started.items()}
    assert codes == {"chunks": 75, "slow": 1, "patient": 0}
    assert "its window closed" in host.last("chunks")["why"]
    assert host.last("slow")["why"] == "its window closed, and it was ended"
    assert host.last("patient")["state"] == "ok"
    # At this rate it would have taken hours: that was said while it ran.
    assert any(" B forecast: at this rate it ends at" in line for line in host.log("chunks"))


# -- beside the backups ------------------------------------------------------------------------------------


def test_the_nights_of_a_database_in_s3(s3_host: Host, bucket: str, postgres: Any) -> None:
    host = s3_host
    postgres.sql("CREATE DATABASE nights")
    postgres.sql("CREATE TABLE t AS SELECT generate_series(1, 1000) AS n", "nights")
    url = postgres.url("nights")
    with HttpSink() as sink:
        host.configure(
            f'[stores.off]\nurl = "s3://{bucket}/db7"\n'
            f'[notify.ops]\nkind = "webhook"\nurl = "{sink.url}/alerts"\n'
            f'[notify.beat]\nkind = "healthchecks"\nurl = "{sink.url}/ping"\n'
            '[defaults]\nnotify = "ops"\npings = "beat"\n'
            f'[jobs.nights]\nkind = "push"\nfrom = "{url}"\nto = "off:nights"\nmax_drill_age = "1w"\n{OPEN}\n'
            '[jobs.prove]\nkind = "drill"\nseries = "off:nights"\ncheck = [["SELECT count(*) FROM t", "1000"]]\n'
            '[jobs.keep]\nkind = "prune"\nseries = "off:nights"\nkeep_last = 1\n'
        )
        assert host("config", "check").code == 0
        result = host("run", "nights", "prove", "nights", "keep", "--now")
        assert result.code == 0, result.err
        record = host.last("nights")
        assert record["backups"]
        assert record["raw_size"] > 0
        assert host.last("prove")["proved"] is True
        assert record["proved_at"] == host.last("prove")["proved_at"] != ""
        # keep_last = 1 would leave the newest alone; but the older one is proved, and the newest is not.
        assert host.last("keep").get("removed", 0) == 0
        assert host("schedule", "tick").code == 0
        assert host("check").code == 0
        # From another host, with no state and no config of this one.
        judged = host("check", "--store", f"s3://{bucket}/db7/nights", "--json", env={"BACKHAUL_STATE": "/nonexistent"})
        assert judged.code == 0, judged.err
        assert {each["card"]["name"] for each in judged.json["verdicts"]} == {"nights", "prove", "keep"}
        above = host("check", "--store", f"s3://{bucket}", "--json").json["verdicts"]
        assert {each["card"]["name"] for each in above} == {"nights", "prove", "keep"}
        # The backups themselves are not in the way of the records, nor they in theirs.
        assert len(host("list", "off:nights", "--json").json["backups"]) == 2
        result = host("clean", "off:nights", "--older-than", "0s", "--json")
        assert result.code == 0, result.out.decode() + result.err
        cleaned = result.json
        assert cleaned["removed"] == cleaned["kept"] == [], cleaned
        # It was told of each beginning and end.
        pings = [request.path for request in sink.requests if request.path.startswith("/ping")]
        assert pings.count("/ping/start") == 4
        assert pings.count("/ping") == 4
        # It breaks, people hear of it once; it is mended, they hear of that.
        postgres.sql("ALTER DATABASE nights RENAME TO days")
        for _ in range(2):
            assert host("run", "nights", "--now").code != 0
        postgres.sql("ALTER DATABASE days RENAME TO nights")
        assert host("run", "nights", "--now").code == 0
        sent = [json.loads(request.body) for request in sink.requests if request.path == "/alerts"]
        # (The first tick sent the sign of life.)
        assert [alert["reason"] for alert in sent].count("sign of life") == 1
        alerts = [alert for alert in sent if alert["reason"] != "sign of life"]
        assert [alert["subject"].split(":")[0] for alert in alerts] == [
            "FAILED nights",
            "FAILED nights",
            "RECOVERED nights",
        ]
    postgres.sql("DROP DATABASE nights")


def test_a_host_that_lost_its_state_takes_it_from_the_store(s3_host: Host, bucket: str) -> None:
    host = s3_host
    host.configure(f'[jobs.app]\nkind = "push"\ncommand = ["seq", "10000"]\nto = "s3://{bucket}/app"\n')
    assert host("run", "-q", "app").code == 0
    first = host.last("app")["id"]
    subprocess.run(["rm", "-r", str(host.state)], check=True)
    assert host("run", "-q", "app").code == 0
    assert [run["id"] for run in host.runs("app")][1] == first


def test_a_record_in_a_store_leads_nowhere(host: Host) -> None:
    """Whoever can write to a store must not be able to remove, or stop, anything here."""
    store, victim = host.directory / "store", host.directory / "victim"
    victim.mkdir()
    host.configure(f'[jobs.app]\nkind = "push"\ncommand = ["seq", "9"]\nto = "{store}/app"\nkeep_runs = 1\n')
    assert host("run", "-q", "app").code == 0
    (directory,) = (store / "app" / ".backhaul" / "jobs").glob("*/app")
    real = next(path for path in directory.iterdir() if path.name != "card.json")
    record = json.loads(real.read_text())
    for number, changes in enumerate(
        (
            {"id": "../../../../victim"},
            {"started": ""},
            {"started": "2020-01-01"},
            {"proved_at": "yesterday"},
            {"job": "../other"},
            {"state": "splendid"},
            {},  # of another id than its name says
        )
    ):
        name = f"20200101T00000{number}Z-0000"
        (directory / f"{name}.json").write_text(
            json.dumps({**record, "started": "2020-01-01T00:00:00+00:00", **changes})
        )
    (directory / "20200101T000009Z-0000.json").write_text("no JSON")
    subprocess.run(["rm", "-r", str(host.state)], check=True)
    for _ in range(2):
        assert host("run", "-q", "app").code == 0
    assert victim.exists()
    assert host("check").code == 0
    assert host("schedule", "tick").code == 0
    judged = host("check", "--store", str(store), "--json").json
    assert judged["verdicts"][0]["state"] == "ok"
    assert len(judged["problems"]) == 8
    card = json.loads((directory / "card.json").read_text())
    card["window"] = {"starts": [60], "length": 3600, "timezone": "Mars/Base"}
    (directory / "card.json").write_text(json.dumps(card))
    result = host("check", "--store", str(store), "--nagios")
    assert result.code == 3
    assert result.out.startswith(b"BACKHAUL UNKNOWN - PROBLEM: ")
    assert b"Mars/Base" in result.out


def test_several_places_of_a_job_make_one_judgement(host: Host) -> None:
    fresh, stale = host.directory / "fresh", host.directory / "stale"
    text = '[jobs.app]\nkind = "push"\ncommand = ["seq", "9"]\nto = ["%s/app", "%s/app"]\nrequire = "any"\n'
    host.configure(text % (fresh, stale))
    assert host("run", "-q", "app").code == 0
    # One of the two is away for a while: its records are old, and so is its card.
    stale.rename(host.directory / "away")
    (host.directory / "stale").write_text("not a directory")
    assert host("run", "-q", "app").code == 3
    assert host("run", "-q", "app").code == 3
    stale.unlink()
    (host.directory / "away").rename(stale)
    for place in (host.directory, fresh, stale):
        verdicts = host("check", "--store", str(place), "--json").json["verdicts"]
        assert len(verdicts) == 1
    assert host("check", "--store", str(host.directory), "--json").json["verdicts"][0]["state"] == "incomplete"


def test_a_job_that_left_the_config_is_not_missed_elsewhere(host: Host) -> None:
    store = host.directory / "store"
    text = f'[jobs.%s]\nkind = "push"\ncommand = ["seq", "9"]\nto = "{store}/app"\nmax_age = "1s"\n'
    host.configure(text % "old")
    assert host("run", "-q", "old").code == 0
    host.configure(text % "new")
    assert host("run", "-q", "new").code == 0
    host("schedule", "tick")
    verdicts = host("check", "--store", str(store), "--json").json["verdicts"]
    assert [verdict["card"]["name"] for verdict in verdicts] == ["new"]


def test_a_dead_server_is_noticed_from_another_host(host: Host) -> None:
    store = host.directory / "store"
    host.configure(f'[jobs.app]\nkind = "push"\ncommand = ["seq", "1000"]\nto = "{store}/app"\nmax_age = "1s"\n')
    assert host("run", "-q", "app").code == 0
    time.sleep(1.1)
    other = {"BACKHAUL_STATE": str(host.directory / "other"), "BACKHAUL_CONFIG": "/dev/null"}
    result = host("check", "--store", str(store), "--nagios", env=other)
    assert result.code == 2
    assert result.out.startswith(b"BACKHAUL CRITICAL - OVERDUE app: the last good run is")
    nothing = host("check", "--store", str(host.directory), "--nagios", env=other)
    assert nothing.code == 2  # found below it
    empty = host.directory / "empty"
    empty.mkdir()
    assert host("check", "--store", str(empty), env=other).code == 1
    assert host("check", "--store", str(empty), "--nagios", env=other).code == 3


# -- who is told -------------------------------------------------------------------------------------------


def test_the_next_channel_is_tried_and_what_nobody_took_is_shown(host: Host) -> None:
    with MailServer() as mail, socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))  # and never listens: the port is nobody else's either
        text = (
            f'[notify.hook]\nkind = "webhook"\nurl = "http://127.0.0.1:{nobody.getsockname()[1]}/x"\ntimeout = "5s"\n'
            f'[notify.mail]\nkind = "mail"\nhost = "127.0.0.1"\nport = {mail.port}\ntls = "none"\n'
            'from = "backhaul@db7.example.com"\nto = "ops@example.com"\n'
            '[defaults]\nnotify = ["hook", "mail"]\nnotify_mode = "first"\n'
            '[jobs.app]\nkind = "command"\ncommand = ["false"]\n'
        )
        host.configure(text)
        assert host("run", "-q", "app").code == 1
        (message,) = mail.mails
        assert message.message["Subject"].startswith("FAILED app: false exited with status 1")
        assert "UNDELIVERED" not in host("report").out.decode()
        deliveries = host("notify", "log", "--json").json["deliveries"]
        assert [(each["channel"], bool(each.get("error"))) for each in deliveries] == [("mail", False), ("hook", True)]
        # Nobody can be told: that is shown, and tried again until somebody is.
        host.configure(text.replace('notify = ["hook", "mail"]', 'notify = ["hook"]'))
        assert host("run", "-q", "app").code == 1
        assert "UNDELIVERED" in host("report").out.decode()
        host.configure(text)
        assert host("schedule", "tick").code == 0
        assert len(mail.mails) >= 2
        assert "UNDELIVERED" not in host("report").out.decode()


def test_the_test_of_the_alerts_goes_the_real_way(host: Host) -> None:
    with MailServer() as mail:
        host.configure(
            f'[notify.mail]\nkind = "mail"\nhost = "127.0.0.1"\nport = {mail.port}\ntls = "none"\n'
            'from = "backhaul@db7.example.com"\nto = "ops@example.com"\n'
        )
        assert host("notify", "test", "--as-failure").code == 0
        (message,) = mail.mails
        assert message.message["Subject"].startswith("FAILED a-test: this is a test")
        assert {part.get_content_type() for part in message.message.walk()} >= {"text/plain", "text/html"}
    result = host("notify", "test")
    assert result.code == 1
    assert host("notify", "test", "nobody").code == 2


# -- the schedule ------------------------------------------------------------------------------------------


def test_a_tick_begins_what_is_due(host: Host, tmp_path: Path) -> None:
    done = tmp_path / "done"
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = {shell(f"echo x >> {done}")}\n{OPEN}\n')
    assert b"app is begun" in host("schedule", "tick").out
    wait_for(done.exists)
    wait_for(lambda: host.runs("app")[0]["state"] == "ok")
    host("schedule", "tick")
    occurrences = [run["occurrence"] for run in host.runs("app")]
    assert len(occurrences) == len(set(occurrences))


def test_the_scheduler_for_containers(host: Host, tmp_path: Path) -> None:
    done, pid_file = tmp_path / "done", tmp_path / "pid"
    host.configure(
        f'[jobs.app]\nkind = "command"\ncommand = {shell(f"echo x >> {done}")}\n{OPEN}\n'
        f'[jobs.long]\nkind = "command"\ncommand = {shell(f"echo $$ > {pid_file}; exec sleep 1000")}\n{OPEN}\n'
    )
    process = host.cli.start("schedule", "run")
    wait_for(lambda: pid_file.exists() and pid_file.read_text().strip())
    wait_for(lambda: [run["state"] for run in host.runs("app")] == ["ok"])
    pid = int(pid_file.read_text())
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=90)
    assert b"long was ended" in err
    assert not Path(f"/proc/{pid}").exists()
    assert host.last("app")["state"] == "ok"
    assert host.last("long")["state"] == "interrupted"
    assert len(done.read_text().split()) == 1


def test_jobs_that_nothing_begins_are_a_problem(host: Host) -> None:
    host.configure(f'[jobs.app]\nkind = "command"\ncommand = ["true"]\n{OPEN}\n')
    assert host("run", "-q", "app").code == 0
    result = host("check")
    assert result.code == 3
    assert b"nothing on this host has looked yet what is to begin" in result.out
    assert host("schedule", "tick").code == 0
    assert host("check").code == 0
    assert b"backhaul_looked_timestamp_seconds" in host("metrics").out


def test_a_config_that_broke_silences_nothing(host: Host, tmp_path: Path) -> None:
    done = tmp_path / "done"
    with HttpSink() as sink:
        good = (
            f'[notify.ops]\nkind = "webhook"\nurl = "{sink.url}/"\n[defaults]\nnotify = "ops"\n'
            f'[jobs.app]\nkind = "command"\ncommand = {shell(f"echo x >> {done}")}\n{OPEN}\n'
        )
        host.configure(good)
        assert host("schedule", "tick").code == 0
        wait_for(lambda: [run["state"] for run in host.runs("app")] == ["ok"])
        host.configure(good + '[jobs.typo]\nknid = "x"\n')
        for _ in range(2):
            assert host("schedule", "tick").code == 0
        assert host("run", "--scheduled", "-q", "app").code in (0, 75)
        assert host("run", "app").code == 10  # a person hears of it at once
        host.config.unlink()
        assert host("schedule", "tick").code == 0
        host.configure(good)
        assert host("schedule", "tick").code == 0
        subjects = [json.loads(request.body)["subject"] for request in sink.requests]
        problems = [subject for subject in subjects if "config" in subject]
        assert len(problems) == 3, subjects
        assert problems[0].startswith(
            "PROBLEM: the config is not right, and the last one that was goes on: [jobs.typo]"
        )
        assert "can't be read" in problems[1] or "there is none any more" in problems[1]
        assert problems[2].startswith("RECOVERED: the config is right again")


def test_what_nobody_named_is_no_job(host: Host, tmp_path: Path) -> None:
    """Two commands of one program at once are no second run of anything, and a hold on all jobs is not on them."""
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    first = host.cli.start("exec", "--", "sh", "-c", f"cat {fifo}")
    wait_for(lambda: host.runs("sh"))
    assert host("exec", "-q", "--", "sh", "-c", "true").code == 0
    assert host("hold", "all", "--for", "1h").code == 0
    assert host("exec", "-q", "--", "sh", "-c", "true").code == 0
    assert host("exec", "-q", "--name", "named", "--", "true").code == 75
    with open(fifo, "w") as file:
        file.write("end\n")
    first.communicate(timeout=30)
    assert first.returncode == 0


def test_what_nobody_named_is_recorded_and_not_watched(host: Host) -> None:
    assert host("exec", "-q", "--", "false").code == 1
    assert [run["state"] for run in host.runs("false")] == ["failed"]
    assert host("check").code == 0
    assert host("exec", "-q", "--name", "billing", "--", "false").code == 1
    assert host("check").code == 1
    assert host("log", "billing", "--forget").code == 0
    assert host("check").code == 0
    assert host("log", "billing").code != 0


def test_next(host: Host) -> None:
    host.configure('[jobs.app]\nkind = "command"\ncommand = ["true"]\nwindow = { start = "22:00", days = "sun" }\n')
    rows = host("next", "--days", "14", "--json").json["openings"]
    assert len(rows) == 2
    assert all(dt.datetime.fromisoformat(row["begins"]).weekday() == 6 for row in rows)
    assert host("next", "nobody").code == 2


def test_metrics_into_a_file_and_a_gateway(host: Host, tmp_path: Path) -> None:
    assert host("exec", "-q", "--name", "app", "--", "true").code == 0
    assert host("metrics", "-o", "backhaul.prom").code == 0
    text = (tmp_path / "backhaul.prom").read_text()
    assert 'state="ok"} 1' in text
    with HttpSink() as sink:
        assert host("metrics", "--push", f"{sink.url}/metrics/job/backhaul").code == 0
        (request,) = sink.requests
        assert (request.method, request.path) == ("PUT", "/metrics/job/backhaul")
        assert b"backhaul_job_state{" in request.body
    assert host("metrics", "-o", "/nonexistent/x").code == 1
