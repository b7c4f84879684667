"""``backhaul init``: from nothing to a first good backup, an installed schedule and a tested alert."""

from __future__ import annotations

import os
import pty
import re
import select
import shlex
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from backhaul.model.results import FoundSource
from backhaul.testing.notify_servers import HttpSink, MailServer
from backhaul.testing.servers import ACCESS_KEY, SECRET_KEY, PostgreSQL

from ..conftest import Cli, keys

# A crontab that is a file: nothing here may ever reach the one of this machine.
_CRONTAB = """#!/bin/sh
case "$1" in
-l) [ -f {file} ] && exec cat {file}; echo "no crontab for tests" >&2; exit 1 ;;
-r) exec rm -f {file} ;;
-) exec cat > {file} ;;
*) echo "usage: crontab [-l | -r | -]" >&2; exit 1 ;;
esac
"""
PASSWORD = "geheim"


class Site:
    """A host of its own for init: home, state, config, crontab and mail server."""

    def __init__(self, directory: Path, environment: dict[str, str], mail: MailServer) -> None:
        self.directory = directory
        self.config = directory / "etc" / "backhaul.toml"
        self.crontab = directory / "crontab.txt"
        self.mail = mail
        programs = directory / "programs"
        programs.mkdir()
        script = programs / "crontab"
        script.write_text(_CRONTAB.format(file=shlex.quote(str(self.crontab))))
        script.chmod(0o755)
        self.path = f"{programs}:/usr/bin:/bin:/usr/sbin"
        self.environment = {
            **environment,
            "PATH": self.path,
            "BACKHAUL_STATE": str(directory / "state"),
            "BACKHAUL_CONFIG": str(self.config),
        }

    @property
    def flags(self) -> tuple[str, ...]:
        """Whom to tell, by this site's mail server."""
        return ("--notify", "dba@example.com", "--smtp-host", f"127.0.0.1:{self.mail.port}")

    @property
    def written(self) -> list[Path]:
        """Everything that lies where the config does."""
        return sorted(self.config.parent.rglob("*")) if self.config.parent.exists() else []

    @property
    def subjects(self) -> list[str]:
        return [str(mail.message["Subject"]) for mail in self.mail.mails]


@pytest.fixture
def mail() -> Iterator[MailServer]:
    with MailServer() as server:
        yield server


@pytest.fixture
def site(local_cli: Cli, mail: MailServer, tmp_path: Path) -> Site:
    return Site(tmp_path, local_cli.environment, mail)


@pytest.fixture
def here(local_cli: Cli, site: Site) -> Cli:
    """The command line on that host, with no S3."""
    return Cli(site.environment, local_cli.directory)


@pytest.fixture
def there(cli: Cli, site: Site) -> Cli:
    """The command line on that host, with the keys of S3 in its environment."""
    s3 = {name: value for name, value in cli.environment.items() if name.startswith("AWS_")}
    return Cli({**site.environment, **s3}, cli.directory)


@pytest.fixture
def database(tmp_path: Path) -> str:
    path = tmp_path / "shop.db"
    with sqlite3.connect(path) as connection:
        connection.executescript("create table t (a); insert into t values (1), (2);")
    connection.close()
    return f"sqlite://{path}"


def the_calls(site: Site) -> dict[str, str]:
    """Return what the crontab calls, by job."""
    calls = {}
    for line in site.crontab.read_text().splitlines():
        if not line.startswith("#"):
            command = line.split(None, 5)[5]
            calls[command.split()[-1]] = command
    return calls


def as_cron(site: Site, command: str) -> subprocess.CompletedProcess[str]:
    """Run a line's command with as little as cron gives it."""
    return subprocess.run(
        ["env", "-i", f"HOME={site.directory}", "PATH=/usr/bin:/bin", "/bin/sh", "-c", command],
        check=False,
        capture_output=True,
        text=True,
        timeout=120,
        cwd="/",
    )


def as_cron_now(site: Site, command: str) -> subprocess.CompletedProcess[str]:
    """Run it outside its window."""
    assert "run --scheduled --quiet" in command
    return as_cron(site, command.replace("run --scheduled --quiet", "run --now"))


def secret_files(site: Site) -> list[Path]:
    return [path for path in site.written if path.is_file() and path != site.config]


@pytest.mark.first
def test_from_nothing_to_a_backup_that_cron_makes_again(
    there: Cli, site: Site, postgres: PostgreSQL, s3: Any, bucket: str
) -> None:
    postgres.sql("create database first_orders")
    postgres.sql("create table t as select * from generate_series(1, 1000) n", "first_orders")
    environment = {**postgres.environment, "PGPASSWORD": PASSWORD}
    store = f"s3://{bucket}/db7"
    arguments = ("init", "--from", "postgresql:///first_orders", "--to", store, *site.flags, "--schedule", "cron")
    result = there(*arguments, "--at", "01:30", "--yes", env=environment)
    assert result.code == 0, result.err
    assert result.out.decode().startswith("OK: all 3 jobs")
    assert "✗" not in result.err and result.err.count("✓") >= 6

    backups = there.ok("list", f"{store}/first_orders", "--json").json["backups"]
    assert len(backups) == 1
    assert there("check").code == 0
    assert any(subject.startswith("FAILED a-test: this is a test") for subject in site.subjects)
    assert there("schedule", "show").code == 0

    # What only the shell had is kept, and only where it belongs.
    text = site.config.read_text()
    assert site.config.stat().st_mode & 0o777 == 0o600
    everything = text + result.err + result.out.decode() + site.crontab.read_text()
    assert SECRET_KEY not in everything and PASSWORD not in everything
    assert ACCESS_KEY not in text
    assert {path.name for path in secret_files(site)} == {"aws-credentials", "PGPASSWORD"}
    for path in secret_files(site):
        assert path.stat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
    assert there("config", "check").code == 0

    calls = the_calls(site)
    assert set(calls) == {"first_orders", "prune-first_orders", "drill-first_orders", "tick"}
    for job in ("first_orders", "prune-first_orders", "drill-first_orders"):
        done = as_cron_now(site, calls[job])
        assert done.returncode == 0, done.stderr
        assert "could not be" not in done.stderr
    quiet = as_cron(site, calls["tick"])
    assert quiet.returncode == 0, quiet.stderr
    listed = there.ok("list", f"{store}/first_orders", "--json").json["backups"]
    assert len(listed) == 2
    # The runner itself reached the store too, with nothing of this shell.
    assert len([key for key in keys(s3, bucket, "db7/first_orders/.backhaul/") if "/first_orders/" in key]) >= 3
    bare = as_cron(site, f"{calls['tick'].rpartition(' schedule tick')[0]} check --store backups:first_orders")
    assert bare.returncode == 0, bare.stdout + bare.stderr

    # Again: nothing is asked, nothing is made twice.
    again = there.ok("init", "--yes", env=environment)
    assert "done before" in again.err and site.config.read_text() == text
    assert len(there.ok("list", f"{store}/first_orders", "--json").json["backups"]) == 2


def test_no_secret_is_in_the_list_of_processes(there: Cli, site: Site, bucket: str, database: str) -> None:
    arguments = ("init", "--from", database, "--to", f"s3://{bucket}/p", *site.flags, "--schedule", "none", "--yes")
    there.cold = True  # others see how it was called
    process = there.start(*arguments)
    seen = set()
    while process.poll() is None:
        # (A pattern with a file behind it would look whether that is there, and fail where a process has just ended.)
        for path in Path("/proc").glob("[0-9]*"):
            try:
                seen.add((path / "cmdline").read_bytes())
            except OSError:
                continue
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err.decode()
    assert any(b"push" in line and b"backups:shop" in line for line in seen)
    assert not any(SECRET_KEY.encode() in line for line in seen)


def test_keys_that_expire_are_refused(there: Cli, site: Site, bucket: str, database: str) -> None:
    arguments = ("init", "--from", database, "--to", f"s3://{bucket}/p", "--notify", "nobody", "--yes", "--dry-run")
    refused = there(*arguments, env={"AWS_SESSION_TOKEN": "token"})
    assert refused.code == 10 and "AWS_SESSION_TOKEN" in refused.err and "next:" in refused.err
    assert site.written == []
    good = there(*arguments)
    assert good.code == 0, good.err
    assert SECRET_KEY not in good.out.decode() + good.err and "credentials-file" in good.out.decode()


def test_an_alert_that_does_not_arrive_is_told_and_mended(here: Cli, site: Site, database: str) -> None:
    site.mail.refused = {"dba@example.com": "550 no such user"}
    arguments = ("init", "--from", database, "--to", "store", *site.flags, "--schedule", "cron")
    result = here(*arguments, "--yes")
    assert result.code == 3, result.err
    assert "no such user" in result.err and "backhaul init --yes" in result.err
    # All the rest is there all the same.
    assert len(here.ok("list", "backups:shop", "--json").json["backups"]) == 1
    assert "shop" in the_calls(site)
    site.mail.refused = {}
    mended = here("init", "--yes")
    assert mended.code == 0, mended.err
    assert len(here.ok("list", "backups:shop", "--json").json["backups"]) == 1
    assert here("check").code == 0


def test_a_first_backup_that_fails_is_told_and_made_later(here: Cli, site: Site, tmp_path: Path) -> None:
    path = tmp_path / "dump.bin"
    path.write_bytes(b"x")
    arguments = ("init", "--from", str(path), "--to", "store", *site.flags, "--schedule", "none")
    dry = here("init", *arguments[1:], "--yes", "--dry-run")
    assert dry.code == 0 and site.written == []
    # Between the look and the backup it becomes empty, which a push refuses.
    path.write_bytes(b"")
    failed = here(*arguments, "--yes")
    assert failed.code == 1, failed.err
    assert site.config.exists() and "backhaul init --yes" in failed.err
    assert any("FAILED dump" in subject for subject in site.subjects), "the real failure was told, too"
    path.write_bytes(b"content")
    again = here("init", "--yes")
    assert again.code == 0, again.err
    assert "schedule: none, as was asked for" in again.err and not site.crontab.exists()
    # It can't be drilled, and says so.
    assert "drill-dump" not in site.config.read_text() and "can't be drilled" in site.config.read_text()


def test_it_refuses_before_anything_is_written(here: Cli, site: Site, database: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    whole = {"--from": database, "--to": str(tmp_path / "store"), "--notify": "nobody", "--schedule": "none"}

    def refused(code: int, words: str, *more: str, **changes: str | None) -> None:
        flags = {**whole, **{f"--{name}": value for name, value in changes.items()}}
        given = [word for flag, value in flags.items() if value is not None for word in (flag, value)]
        result = here("init", "--yes", *given, *more)
        assert result.code == code, (changes, result.err)
        assert words in result.err and "why:" in result.err and "next:" in result.err, result.err
        assert site.written == [] and not (tmp_path / "store").exists() and not site.crontab.exists()

    refused(10, "Not a directory", to=str(tmp_path / "file" / "store"))
    refused(10, "no store named 'nothing'", to="nothing:there")
    refused(10, "no such", **{"from": "sqlite:///no such.db"})
    refused(10, "Connection refused", **{"from": "postgresql://postgres@127.0.0.1:1/app"})
    refused(2, "--to is missing", to=None)
    refused(2, "--notify is missing", notify=None)
    refused(2, "nobody stands beside", "--notify", "dba@example.com")
    refused(2, "neither a mail address", notify="who is that")
    refused(2, "time of the day", "--at", "25:00")
    refused(2, "can't be a name", "--name", "../x")
    refused(10, "systemd", schedule="systemd") if not Path("/run/systemd/system").is_dir() else None


def test_a_config_of_somebody_else_is_left_alone(here: Cli, site: Site, database: str) -> None:
    site.config.parent.mkdir()
    site.config.write_text('[stores.mine]\nurl = "/mine"\n')
    arguments = ("init", "--from", database, "--to", "store", "--notify", "nobody", "--schedule", "none", "--yes")
    refused = here(*arguments)
    assert refused.code == 10 and "was not touched" in refused.err
    assert site.config.read_text() == '[stores.mine]\nurl = "/mine"\n' and site.written == [site.config]
    # One that is named need not exist.
    other = site.config.parent / "other.toml"
    assert here("--config", str(other), *arguments).code == 0
    assert other.exists()
    # And one that init made, for other things, is not changed either.
    differs = here("--config", str(other), *arguments, "--at", "05:00")
    assert differs.code == 10 and "05:00" in differs.err
    assert here("--config", str(other), *arguments).code == 0


def test_root_gets_a_config_beside_the_one_that_there_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    from backhaul.errors import ConfigurationError
    from backhaul.jobs import first
    from backhaul.operations import places

    monkeypatch.delenv("BACKHAUL_CONFIG", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(places, "SYSTEM", tmp_path / "etc")
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    answers = first.Answers(sources=(database,), store=str(tmp_path / "store"), tell=("nobody",))

    def made(name: str | None) -> Path:
        place = first.place_of_config(name)
        assert place.text is None
        first.write(first.draft_of(answers, place, lambda step: None), lambda step: None)
        return place.path

    assert made(None) == tmp_path / "etc/config.toml"
    assert first.place_of_config(None).text is not None
    # Another set-up has names of its own, and the first keeps what it has.
    assert made("second") == tmp_path / "etc/conf.d/second.toml"
    text = (tmp_path / "etc/conf.d/second.toml").read_text()
    assert "[jobs.shop-2]" in text and "[stores.second]" in text
    (tmp_path / "etc/conf.d/backups.toml").write_text("")
    (tmp_path / "etc/config.toml").write_text("")
    with pytest.raises(ConfigurationError):
        first.place_of_config(None)
    # Who made one meanwhile keeps it.
    place = first.Place(path=tmp_path / "etc/config.toml", name="backups")
    with pytest.raises(ConfigurationError):
        first.write(first.Draft(path=place.path, text="x"), lambda step: None)
    assert place.path.read_text() == ""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert first.place_of_config(None).path == tmp_path / "home/backhaul/config.toml"


def test_a_death_leaves_no_config_or_a_whole_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from backhaul.jobs import first
    from backhaul.operations import places

    monkeypatch.setattr(places, "SYSTEM", tmp_path / "none")

    class DiedError(BaseException):
        pass

    text = "# whole\n" * 1000
    outcomes = set()
    for point in range(40):
        directory = tmp_path / str(point)
        draft = first.Draft(path=directory / "c.toml", text=text, secrets={str(directory / "c.secrets/k"): "geheim"})
        left = [point]

        def dying(real: Any, left: list[int] = left) -> Any:
            def call(*arguments: Any, **options: Any) -> Any:
                if left[0] == 0:
                    raise DiedError
                left[0] -= 1
                return real(*arguments, **options)

            return call

        with monkeypatch.context() as patch:
            for name in ("open", "fchmod", "fsync", "rename", "link", "mkdir", "close", "unlink"):
                patch.setattr(os, name, dying(getattr(os, name)))
            try:
                first.write(draft, lambda step: None)
                finished = True
            except DiedError:
                finished = False
        there = draft.path.exists()
        outcomes.add(there)
        if there:
            assert draft.path.read_text() == text
            assert (directory / "c.secrets/k").read_text() == "geheim"
        if finished:
            assert there and {path.name for path in directory.iterdir()} == {"c.toml", "c.secrets"}
            break
        if not there:
            first.write(draft, lambda step: None)  # once more
    else:
        pytest.fail("it never came to its end")
    assert outcomes == {True, False}


def test_urls_are_kept_like_secrets_and_a_check_is_well_again(
    here: Cli, site: Site, database: str, tmp_path: Path
) -> None:
    with HttpSink() as sink:
        base = sink.url.rstrip("/")
        (tmp_path / "hook").write_text(f"{base}/hooks/geheim1\n")
        whom = ("--notify", f"@{tmp_path / 'hook'}", "--notify", f"{base}/ping/geheim2")
        result = here("init", "--from", database, "--to", "store", *whom, "--schedule", "none", "--yes")
        assert result.code == 0, result.err
        paths = [request.path for request in sink.requests]
    assert paths == ["/hooks/geheim1", "/ping/geheim2/fail", "/ping/geheim2"]
    assert "geheim" not in site.config.read_text() + result.err + result.out.decode()
    assert sorted(path.name for path in secret_files(site)) == ["healthchecks", "slack"]
    assert all(path.stat().st_mode & 0o777 == 0o600 for path in secret_files(site))


def test_a_server_that_is_copied_whole_is_not_dumped_too() -> None:
    from backhaul.cli.init import _default_sources

    def found(kind: str, url: str, problem: str = "") -> FoundSource:
        return FoundSource(kind=kind, url=url, label="x", problem=problem)

    large = found("postgresql+physical", "postgresql+physical:///?host=/a&port=1")
    inside = found("postgresql", "postgresql:///app?host=/a&port=1")
    other = found("postgresql", "postgresql:///app?host=/a&port=2")
    away = found("mariadb", "mariadb:///", "refused")
    assert _default_sources([large, inside, other, away]) == [large, other]


def test_a_file_of_keys_that_is_not_there_is_told(there: Cli, bucket: str, tmp_path: Path) -> None:
    """Although the environment has keys: those were not asked for."""
    refused = there("list", f"s3://{bucket}/p?credentials-file={tmp_path}/none")
    assert refused.code == 10 and f"{tmp_path}/none: No such file" in refused.err and "next:" in refused.err
    assert there("list", f"s3://{bucket}/p?credentials-file=none").code == 2
    (tmp_path / "keys").write_text("[default]\naws_access_key_id = wrong\naws_secret_access_key = wrong\n")
    wrong = there("list", f"s3://{bucket}/p?credentials-file={tmp_path}/keys")
    assert wrong.code == 10, wrong.err


def test_json(here: Cli, site: Site, database: str) -> None:
    arguments = ("init", "--from", database, "--to", "store", *site.flags, "--schedule", "cron", "--json")
    dry = here.ok(*arguments, "--dry-run").json
    assert dry["schema"] == "backhaul.init/1" and dry["dry_run"] and dry["schedule"] == "cron"
    assert dry["text"].startswith("# Made by: backhaul init") and site.written == []
    done = here.ok(*arguments)
    assert done.err == ""
    document = done.json
    assert document["config"] == str(site.config) and document["report"]["state"] == "ok"
    assert {step["state"] for step in document["steps"]} <= {"ok", "note"}
    site.mail.refused = {"dba@example.com": "550 no"}
    failed = here("init", "--yes", "--json")
    assert failed.code == 3 and any(step["state"] == "problem" for step in failed.json["steps"])


def test_without_a_terminal_and_answers_it_proposes(here: Cli, site: Site) -> None:
    for arguments in ((), ("--to", "/backups"), ("--dry-run",), ("--notify", "nobody")):
        result = here("init", *arguments, env={"PGHOST": "/nonexistent"})
        assert result.code == 0, result.err
        assert site.written == [] and b"# " in result.out
    document = here.ok("init", "--to", "/backups", "--json", env={"PGHOST": "/nonexistent"}).json
    assert document["store"] == "/backups" and "found" in document


# -- questions -------------------------------------------------------------------------------------------


class Terminal:
    """``backhaul init`` on a terminal of its own."""

    def __init__(self, cli: Cli, *arguments: str, env: dict[str, str] | None = None) -> None:
        self.shown = ""
        self.pid, self._master = pty.fork()
        if self.pid == 0:
            os.chdir(cli.directory)
            environment = {**cli.environment, **(env or {}), "TERM": "dumb", "COLUMNS": "200"}
            os.execve(sys.executable, [sys.executable, "-m", "backhaul", "init", *arguments], environment)

    def until(self, pattern: str, seconds: float = 60) -> None:
        """Read until something new is shown."""
        start, end = len(self.shown), time.monotonic() + seconds
        while not re.search(pattern, self.shown[start:]):
            assert time.monotonic() < end, self.shown
            assert self._read(end - time.monotonic()), self.shown

    def _read(self, seconds: float) -> bool:
        if not select.select([self._master], [], [], max(seconds, 0))[0]:
            return True
        try:
            data = os.read(self._master, 1 << 16)
        except OSError:  # the other side is closed
            return False
        self.shown += data.decode(errors="replace").replace("\r\n", "\n")
        return bool(data)

    def type(self, text: str) -> None:
        os.write(self._master, f"{text}\n".encode())

    def interrupt(self) -> None:
        """Press Ctrl-C until it is heard: Python is deaf between showing a prompt and waiting for its answer."""
        for _ in range(20):
            os.write(self._master, b"\x03")
            wait = time.monotonic() + 2.0
            while time.monotonic() < wait:
                if "Interrupted" in self.shown or not self._read(wait - time.monotonic()):
                    return
        pytest.fail(self.shown)

    def end(self, seconds: float = 60) -> int:
        end = time.monotonic() + seconds
        while self._read(end - time.monotonic()):
            assert time.monotonic() < end, self.shown
        os.close(self._master)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


QUESTIONS = (r"1\. What to back up[^\n]*: ", r"2\. Where to[^\n]*: ", r"3\. Whom to tell[^\n]*: ", r"4\. When [^\n]*: ")


def test_four_questions_and_their_defaults(here: Cli, site: Site, postgres: PostgreSQL, tmp_path: Path) -> None:
    postgres.sql("create database first_asked")
    smtp = ("--smtp-host", f"127.0.0.1:{site.mail.port}", "--schedule", "cron")
    terminal = Terminal(here, *smtp, env=postgres.environment)
    terminal.until(QUESTIONS[0])
    number = re.search(r"(\d+)  first_asked: postgresql", terminal.shown)
    assert number is not None and "[all]" in terminal.shown
    terminal.type("999")
    terminal.until(r"Error: There is no 999")
    terminal.type(number[1])
    terminal.until(QUESTIONS[1])
    terminal.type(str(tmp_path / "my backups"))
    terminal.until(QUESTIONS[2])
    terminal.type("dba@example.com")
    terminal.until(QUESTIONS[3])
    assert "[02:00]" in terminal.shown
    terminal.type("")
    assert terminal.end() == 0, terminal.shown
    assert len(set(re.findall(r"^(\d)\. ", terminal.shown, re.MULTILINE))) == 4
    assert "✓ alert by mail" in terminal.shown and "OK: all 3 jobs" in terminal.shown
    assert len(here.ok("list", "backups:first_asked", "--json").json["backups"]) == 1
    assert (tmp_path / "my backups/first_asked").is_dir()
    assert 'start = "02:00"' in site.config.read_text()
    # A second time nothing is asked.
    again = Terminal(here, *smtp, env=postgres.environment)
    assert again.end() == 0, again.shown
    assert "What to back up" not in again.shown and "done before" in again.shown


def test_flags_take_questions_away(here: Cli, site: Site, database: str) -> None:
    terminal = Terminal(here, "--from", database, "--to", "store", "--at", "3:00", "--schedule", "none")
    terminal.until(QUESTIONS[2])
    # Nobody is told only where somebody says so.
    terminal.type("")
    terminal.until(QUESTIONS[2])
    terminal.type("https://")
    terminal.until("Error: [^\n]*whole http")
    terminal.type("nobody")
    assert terminal.end() == 0, terminal.shown
    assert "What to back up" not in terminal.shown and "Where to" not in terminal.shown
    assert 'start = "03:00"' in site.config.read_text()


@pytest.mark.parametrize("question", range(4))
def test_an_interrupt_at_a_question_leaves_nothing(
    here: Cli, site: Site, database: str, tmp_path: Path, question: int
) -> None:
    before = {path for path in tmp_path.rglob("*") if "state" not in path.parts}
    terminal = Terminal(here, "--schedule", "none", env={"PGHOST": "/nonexistent"})
    for number, answer in enumerate((database, str(tmp_path / "store"), "nobody", "02:00")):
        terminal.until(QUESTIONS[number])
        if number == question:
            terminal.interrupt()
            break
        terminal.type(answer)
    assert terminal.end() == 130, terminal.shown
    assert site.written == [] and not site.crontab.exists()
    assert {path for path in tmp_path.rglob("*") if "state" not in path.parts} == before
