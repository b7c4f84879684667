"""``backhaul keys`` as people run it, what the openssl program says of what it makes, and deaths in the middle."""

from __future__ import annotations

import functools
import os
import re
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from backhaul.errors import ConfigurationError
from backhaul.network.authority import RECEIVE, ROLES, SEND, read_authority, read_bundle
from backhaul.network.credentials import Credentials, Peer, load_credentials
from backhaul.operations.fan_out_keys import make_keys
from tests.conftest import Cli
from tests.end_to_end.test_failures import assert_three_parts


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def connected(server: Credentials, client: Credentials) -> tuple[Peer, Peer]:
    """Return whom the server saw, and whom the client saw."""
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        socket.create_connection(listener.getsockname()) as near,
        listener.accept()[0] as far,
        ThreadPoolExecutor(1) as pool,
    ):
        there = pool.submit(server.secure, far, server_side=True, expect_role=SEND, timeout=30)
        here = client.secure(near, server_side=False, expect_role=RECEIVE, timeout=30)
        with there.result()[0], here[0]:
            return there.result()[1], here[1]


# -- keys of their own ---------------------------------------------------------------------------------------


def test_keys_for_hosts(local_cli: Cli, tmp_path: Path) -> None:
    result = local_cli.ok("keys", "fan", "--sender", "db1", "--receiver", "db2,10.0.0.5", "--both", "DB3.example.net")
    names = ["10.0.0.5", "db1", "db2", "db3.example.net"]
    assert result.out.decode().splitlines() == [
        f"scp fan/{name}.key {name}:/etc/backhaul/fan-out.key" for name in names
    ]
    assert "fan/ca.key stays here" in result.err
    assert "Nothing was sent" in result.err
    fan = tmp_path / "fan"
    assert mode(fan) == 0o700
    assert sorted(contents(fan)) == sorted(["ca.key", *(f"{name}.key" for name in names)])
    assert {mode(path) for path in fan.iterdir()} == {0o600}
    roles = {name: load_credentials(fan / f"{name}.key", name="").roles for name in names}
    assert roles == {"10.0.0.5": {RECEIVE}, "db1": {SEND}, "db2": {RECEIVE}, "db3.example.net": ROLES}
    server, client = (load_credentials(fan / f"{name}.key", name="") for name in ("db2", "db1"))
    assert [peer.name for peer in connected(server, client)] == ["db1", "db2"]


def test_the_commands_that_it_prints_copy_the_keys(local_cli: Cli, tmp_path: Path) -> None:
    """Run by a shell, with an scp that only notes what it was given, in directories of awkward names."""
    (tmp_path / "bin").mkdir()
    scp = tmp_path / "bin/scp"
    scp.write_text('#!/bin/sh\ntest -f "$1" || exit 1\nprintf "%s\\n%s\\n" "$1" "$2" >> seen\n')
    scp.chmod(0o755)
    for directory in ("a key's place", "host:dir", str(tmp_path / "whole:path"), "-dash"):
        words = (
            ("--receiver", "2001:DB8::7", "--", directory)
            if directory == "-dash"
            else (directory, "--receiver", "2001:DB8::7")
        )
        commands = local_cli.ok("keys", *words).out
        (tmp_path / "seen").unlink(missing_ok=True)
        path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
        subprocess.run(["sh", "-e"], input=commands, cwd=tmp_path, env={"PATH": path}, check=True, timeout=60)
        source, target = (tmp_path / "seen").read_text().splitlines()
        assert target == "[2001:db8::7]:/etc/backhaul/fan-out.key"
        assert (tmp_path / source).resolve() == (tmp_path / directory / "2001:db8::7.key").resolve()
        # What scp would take for a host, or for an option.
        assert ":" not in source.split("/")[0]
        assert not source.startswith("-")


def test_one_line_of_json(local_cli: Cli) -> None:
    found = local_cli.ok("keys", "fan", "--sender", "db1", "--receiver", "db1", "--json").json
    assert found["schema"] == "backhaul.keys/1"
    assert (found["kind"], found["authority"], found["authority_is_new"]) == ("certificate", "fan/ca.key", True)
    (key,) = found["keys"]
    assert key.pop("expires") < found["authority_expires"]
    assert key == {
        "host": "db1",
        "roles": ["send", "receive"],
        "path": "fan/db1.key",
        "renewed": False,
        "copy_with": "scp fan/db1.key db1:/etc/backhaul/fan-out.key",
    }
    again = local_cli.ok("keys", "fan", "--renew", "--sender", "db1", "--json").json
    assert again["authority_is_new"] is False
    assert again["keys"][0]["renewed"] is True


def test_a_host_that_comes_later(local_cli: Cli, tmp_path: Path) -> None:
    local_cli.ok("keys", "fan", "--sender", "db1")
    before = contents(tmp_path / "fan")
    result = local_cli.ok("keys", "fan", "--receiver", "db4")
    assert result.out == b"scp fan/db4.key db4:/etc/backhaul/fan-out.key\n"
    after = contents(tmp_path / "fan")
    assert sorted(after) == ["ca.key", "db1.key", "db4.key"]
    assert {name: after[name] for name in before} == before
    client, server = (load_credentials(tmp_path / f"fan/{name}.key", name="") for name in ("db1", "db4"))
    assert connected(server, client)[0].name == "db1"


def test_a_key_is_overwritten_only_when_that_was_asked_for(local_cli: Cli, tmp_path: Path) -> None:
    local_cli.ok("keys", "fan", "--sender", "db1", "--receiver", "db2")
    before = contents(tmp_path / "fan")
    result = local_cli("keys", "fan", "--sender", "DB1", "--receiver", "db2,db3")
    assert_three_parts(result, 10)
    assert "fan/db1.key and fan/db2.key are not overwritten" in result.err
    assert "(db3), or add --renew" in result.err
    assert result.out == b""
    assert contents(tmp_path / "fan") == before
    result = local_cli.ok("keys", "fan", "--renew", "--both", "db2")
    assert "db2 may send and receive" in result.err
    after = contents(tmp_path / "fan")
    assert [name for name in before if before[name] != after[name]] == ["db2.key"]
    assert sorted(after) == sorted(before)
    assert mode(tmp_path / "fan/db2.key") == 0o600
    assert read_bundle(after["db2.key"]).roles == ROLES


def test_the_mask_of_new_files_does_not_matter(tmp_path: Path) -> None:
    old = os.umask(0)
    try:
        make_keys(str(tmp_path / "fan"), {"db1": ROLES})
    finally:
        os.umask(old)
    assert mode(tmp_path / "fan") == 0o700
    assert {mode(path) for path in (tmp_path / "fan").iterdir()} == {0o600}


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, "neither DIR nor --shared"),
        (["fan"], 2, "No host is named"),
        (["fan", "--sender", "../db1"], 2, "'../db1' can't be a host's name"),
        (["fan", "--sender", "db1,"], 2, "A host has no name"),
        (["fan", "--sender", "CA"], 2, "ca.key, which is what makes the keys"),
        (["fan", "--shared", "a.key"], 2, "--shared makes one key"),
        (["--shared", "a.key", "--sender", "db1"], 2, "--shared makes one key"),
        (["--shared", "a.key", "--renew"], 2, "--shared makes one key"),
        (["--shared", "no/a.key"], 10, "No such file"),
        (["file", "--sender", "db1"], 10, "file is no directory"),
        (["open", "--sender", "db1"], 10, "chmod 700 open"),
        (["lost", "--sender", "db1"], 10, "lost has no ca.key"),
        (["damaged", "--sender", "db1"], 10, "damaged/ca.key can't be used"),
        (["swapped", "--sender", "db1"], 10, "swapped/ca.key can't be used"),
        (["readable", "--sender", "db1"], 10, "chmod 600 readable/ca.key"),
    ],
)
def test_what_is_refused(local_cli: Cli, tmp_path: Path, arguments: list[str], code: int, words: str) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o770)
    for name in ("lost", "damaged", "swapped", "readable"):
        make_keys(str(tmp_path / name), {"db9": ROLES})
    (tmp_path / "lost/ca.key").unlink()
    whole = (tmp_path / "damaged/ca.key").read_bytes()
    (tmp_path / "damaged/ca.key").write_bytes(whole[:-40])
    (tmp_path / "swapped/ca.key").write_bytes((tmp_path / "swapped/db9.key").read_bytes())
    (tmp_path / "readable/ca.key").chmod(0o644)
    before = sorted(tmp_path.rglob("*"))
    result = local_cli("keys", *arguments)
    assert_three_parts(result, code)
    assert words in result.err
    assert result.out == b""
    assert sorted(tmp_path.rglob("*")) == before


# -- one key for all -----------------------------------------------------------------------------------------


def test_a_shared_key(local_cli: Cli, tmp_path: Path) -> None:
    result = local_cli.ok("keys", "--shared", "a.key")
    assert result.out == b"scp a.key HOST:/etc/backhaul/fan-out.key\n"
    assert "every host" in result.err
    path = tmp_path / "a.key"
    assert mode(path) == 0o600
    (line,) = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert re.fullmatch(r"BACKHAUL-SHARED-KEY-1 [A-Za-z0-9+/]{43}=", line)
    assert line.split()[1] not in result.err
    server, client = (load_credentials(path, name=name) for name in ("db2", "db1"))
    assert [peer.name for peer in connected(server, client)] == ["db1", "db2"]
    before = path.read_bytes()
    result = local_cli("keys", "--shared", "a.key")
    assert_three_parts(result, 10)
    assert "a.key is not overwritten" in result.err
    assert path.read_bytes() == before
    local_cli.ok("keys", "--shared", "b.key")
    assert (tmp_path / "b.key").read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.key", "b.key"]


def test_json_of_a_shared_key_has_no_secret(local_cli: Cli, tmp_path: Path) -> None:
    result = local_cli.ok("keys", "--shared", "a.key", "--json")
    secret = (tmp_path / "a.key").read_text().split()[-1]
    assert secret not in result.out.decode() + result.err
    assert result.json["kind"] == "shared"
    assert result.json["authority"] is None
    (key,) = result.json["keys"]
    assert (key["host"], key["path"], key["expires"]) == (None, "a.key", None)


# -- another program's view ----------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("openssl") is None, reason="there is no openssl program here")
def test_openssl_takes_the_certificates(local_cli: Cli, tmp_path: Path) -> None:
    local_cli.ok("keys", "fan", "--sender", "db1", "--receiver", "10.0.0.5")
    local_cli.ok("keys", "other", "--sender", "db1")

    def openssl(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = ["openssl", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    for purpose in ("sslserver", "sslclient"):
        verify = ("verify", "-x509_strict", "-purpose", purpose, "-no-CApath", "-no-CAstore", "-CAfile")
        for name in ("db1", "10.0.0.5"):
            assert openssl(*verify, "fan/ca.key", f"fan/{name}.key").stdout == f"fan/{name}.key: OK\n"
        assert openssl(*verify, "other/ca.key", "fan/db1.key").returncode != 0
    plainly = ("verify", "-no-CApath", "-no-CAstore", "-CAfile", "fan/ca.key")
    assert openssl(*plainly, "-verify_hostname", "db1", "fan/db1.key").returncode == 0
    assert openssl(*plainly, "-verify_hostname", "db2", "fan/db1.key").returncode != 0
    assert openssl(*plainly, "-verify_ip", "10.0.0.5", "fan/10.0.0.5.key").returncode == 0
    text = openssl("x509", "-in", "fan/db1.key", "-noout", "-text").stdout
    assert "DNS:db1, URI:backhaul:send\n" in text
    assert "CA:FALSE" in text
    text = openssl("x509", "-in", "fan/ca.key", "-noout", "-text").stdout
    assert "CA:TRUE, pathlen:0" in text
    for name in ("ca", "db1"):
        assert openssl("pkey", "-in", f"fan/{name}.key", "-noout", "-check").returncode == 0


# -- a disk that is full, and deaths -------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount a small disk")
@pytest.mark.parametrize("there_before", [False, True])
def test_a_full_disk(local_cli: Cli, tmpfs: Path, there_before: bool) -> None:
    if there_before:
        local_cli.ok("keys", f"{tmpfs}/fan", "--sender", "db1")
    before = sorted(tmpfs.rglob("*"))
    with open(tmpfs / "filler", "wb") as filler, pytest.raises(OSError, match="No space"):
        while True:
            filler.write(bytes(1 << 16))
            filler.flush()
    # Room for two pages of three.
    os.truncate(tmpfs / "filler", (tmpfs / "filler").stat().st_size // 4096 * 4096 - 2 * 4096)
    result = local_cli("keys", f"{tmpfs}/fan", "--renew", "--receiver", "db1,db2,db3")
    assert_three_parts(result, 10)
    assert "No space left" in result.err
    (tmpfs / "filler").unlink()
    assert sorted(tmpfs.rglob("*")) == before
    local_cli.ok("keys", f"{tmpfs}/fan", "--renew", "--receiver", "db1,db2,db3")


STEPS = ("mkdir", "open", "fsync", "rename", "link", "unlink")


def dying(step: int, work: Callable[[], Any]) -> bool:
    """Do some work in a process that is gone before the step of that number; return whether there was one."""
    child = os.fork()
    if child == 0:
        count = 0

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count == step:
                    os._exit(9)
                return real(*arguments, **options)

            return call

        for name in STEPS:
            setattr(os, name, counted(getattr(os, name)))
        try:
            work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in {0, 9}
    return status == 9


def test_a_death_at_any_step_leaves_whole_files_only(tmp_path: Path) -> None:
    hosts = {"db1": ROLES, "db2": ROLES}
    seen = set()
    step = 0
    died = True
    while died:
        step += 1
        fan = tmp_path / str(step)
        died = dying(step, functools.partial(make_keys, str(fan), hosts))
        there = {path.name for path in fan.iterdir() if not path.name.startswith(".")} if fan.exists() else set()
        seen.add(frozenset(there))
        # What has its name is whole; and never without what made it.
        for name in there - {"ca.key"}:
            assert load_credentials(fan / name, name="").roles == ROLES
        if there:
            read_authority((fan / "ca.key").read_bytes())
        # And it can be gone on from: all hosts know each other.
        make_keys(str(fan), hosts, renew=True)
        server, client = (load_credentials(fan / f"{name}.key", name="") for name in hosts)
        connected(server, client)
    assert step > 20
    assert {frozenset(), frozenset({"ca.key"}), frozenset({"ca.key", "db1.key"})} < seen


def test_a_death_at_any_step_of_a_renewal_leaves_the_old_key_or_the_new(tmp_path: Path) -> None:
    fan = tmp_path / "fan"
    make_keys(str(fan), {"db1": frozenset({SEND})})
    roles = set()
    step = 0
    died = True
    while died:
        step += 1
        make_keys(str(fan), {"db1": frozenset({SEND})}, renew=True)
        died = dying(step, lambda: make_keys(str(fan), {"db1": ROLES}, renew=True))
        roles.add(load_credentials(fan / "db1.key", name="").roles)
    assert roles == {frozenset({SEND}), ROLES}


def test_an_authority_that_appears_between_two_looks_is_the_authority(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fan = tmp_path / "fan"
    make_keys(str(fan), {"db1": ROLES})
    looks: list[str] = []
    real = os.path.lexists

    def lexists(path: str | os.PathLike[str]) -> bool:
        looks.append(os.fspath(path))
        return real(path) and looks.count(str(fan / "ca.key")) != 1

    monkeypatch.setattr(os.path, "lexists", lexists)
    made = make_keys(str(fan), {"db2": ROLES})
    assert looks.count(str(fan / "ca.key")) == 2
    assert not made.authority_is_new
    connected(load_credentials(fan / "db1.key", name=""), load_credentials(fan / "db2.key", name=""))


def test_two_runs_at_once_have_one_authority(tmp_path: Path) -> None:
    """Of those that begin on one new directory, all that succeed made keys that know each other."""
    for turn in range(5):
        fan = tmp_path / str(turn)

        def one(number: int, fan: Path = fan) -> bool:
            try:
                make_keys(str(fan), {f"db{number}": ROLES})
            except ConfigurationError as error:
                assert "by another run" in error.why, error
                return False
            return True

        with ThreadPoolExecutor(4) as pool:
            done = list(pool.map(one, range(4)))
        assert any(done)
        keys = [load_credentials(fan / f"db{number}.key", name="") for number in range(4) if done[number]]
        for key in keys:
            connected(keys[0], key)
        assert not [path for path in fan.iterdir() if path.name.startswith(".")]
