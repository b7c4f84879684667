"""Encrypted backups: with the ``age`` program, with keys of every kind, and against who can write to the store."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyrage
import pytest
from blake3 import blake3
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import backhaul
from backhaul.errors import BackhaulError, IdentityError, IntegrityError
from backhaul.formats import age, bech32
from backhaul.formats.age import SEALED_CHUNK_SIZE
from backhaul.formats.age_keys import parse_identities, parse_recipient
from backhaul.operations import kept_key
from backhaul.operations.push import push
from backhaul.pipeline.supervisor import Supervisor
from backhaul.sources.file import FileSource
from backhaul.testing.crashes import MemorySource, World, enumerate_crashes
from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.faults import Fault, FaultPlan
from backhaul.testing.servers import tool
from backhaul.transforms.encrypt import Batch, StreamKey, new_key, open_key
from tests.conftest import Cli, Files, Result, keys
from tests.end_to_end.test_crashes import NOISE, PushOfAFile, PushToOne
from tests.end_to_end.test_failures import Stored, assert_three_parts, flipped
from tests.end_to_end.test_resume import PART

# Thirty-two zeros: what is shared with it is zero whatever the secret.
LOW_ORDER = bech32.encode("age", bytes(32))
FAKE = b"<what somebody else wrote>"
DUMP = b"".join(dump_text(21_000_000))


class Key:
    """A key file and its recipient, as ``keygen`` makes them."""

    def __init__(self, cli: Cli, path: Path) -> None:
        self.path = str(path)
        self.recipient = cli.ok("keygen", "-o", self.path).out.decode().strip()
        (self.identity,) = parse_identities(path.read_text())

    @property
    def secret(self) -> str:
        (line,) = re.findall("AGE-SECRET-KEY-1.*", Path(self.path).read_text())
        return str(line)


@pytest.fixture
def key(local_cli: Cli, tmp_path: Path) -> Key:
    return Key(local_cli, tmp_path / "a.key")


@pytest.fixture
def other(local_cli: Cli, tmp_path: Path) -> Key:
    return Key(local_cli, tmp_path / "b.key")


class Recording:
    """A target that keeps all that it is given, and whether it was told that this is all."""

    name = "a recording"

    def __init__(self) -> None:
        self.content = b""
        self.committed = False

    def start(self, raw_size: int, group: Supervisor) -> None:
        pass

    def write(self, data: memoryview) -> None:
        self.content += data

    def commit(self) -> None:
        self.committed = True

    def abort(self) -> None:
        pass


def raw_hash(content: bytes) -> str:
    return blake3(content).hexdigest()


def by_age(content: bytes, key_file: str) -> bytes:
    """Decode a stored stream with other people's programs alone."""
    script = '"$0" -d -i "$1" | "$2" -q -d'
    command = ["sh", "-c", script, tool("age"), key_file, tool("zstd")]
    return subprocess.run(command, input=content, stdout=subprocess.PIPE, check=True).stdout


# -- there and back --------------------------------------------------------------------------------------------


def test_to_two_stores_for_two_people_and_every_way_back(
    cli: Cli, s3: Any, bucket: str, tmp_path: Path, key: Key, other: Key
) -> None:
    places = [f"s3://{bucket}/enc", str(tmp_path / "disk")]
    (tmp_path / "team").write_text(f"# the team\n{other.recipient}\n")
    to = ["--encrypt-to", key.recipient, "--encrypt-to-file", str(tmp_path / "team")]
    backup = cli.ok("push", *places, *to, "--json", input=DUMP).json["id"]
    stored = s3.get_object(Bucket=bucket, Key=f"enc/{backup}/data.zst.age")["Body"].read()
    assert (tmp_path / "disk" / backup / "data.zst.age").read_bytes() == stored
    for held in (key, other):
        assert by_age(stored, held.path) == DUMP
        for place in places:
            assert cli.ok("pull", "-q", place, "--identity", held.path).out == DUMP
            verified = cli.ok("verify", "--deep", "--identity", held.path, place, "--json").json
            assert verified["bytes_read"] >= len(stored)
            assert {check["check"] for check in verified["checks"]} >= {"authentic", "content"}
        assert cli.ok("verify", "--identity", held.path, places[0]).out.count(b"authentic") == 1
    # Nobody can tell from what is there what was pushed, even if he guesses it.
    assert raw_hash(DUMP) not in cli.ok("show", places[0], "--json").out.decode()
    checks = cli.ok("verify", places[0], "--json").json["checks"]
    assert [check["state"] for check in checks if check["check"] == "authentic"] == ["unverifiable"]
    # Nobody needs a key to see what there is, and that nothing is missing.
    for place in places:
        assert cli.ok("list", "--long", place, "--json").json["backups"][0]["raw_size"] == len(DUMP)
        cli.ok("verify", place)
        (stream,) = cli.ok("show", place, "--json").json["manifest"]["streams"]
        assert len(stream["encryption"]["recipients"]) == 2
        assert stream["encryption"]["format"] == "age-encryption.org/v1"
    shown = cli.ok("show", places[0]).out.decode()
    assert "age -d -i KEYFILE data.zst.age | zstd -d" in shown
    assert key.recipient not in shown


@pytest.mark.parametrize("setting", ["auto", "none"])
@pytest.mark.parametrize(
    "size", [0, 1, 65_535, 65_536, 65_537, (1 << 19), (1 << 19) + 1, (4 << 20) + 1, 9 << 20, 37_748_737]
)
def test_every_size_comes_back(tmp_path: Path, key: Key, setting: str, size: int) -> None:
    data = b"".join(random_bytes(size)) if size else b""
    series = str(tmp_path / "s")
    options = backhaul.PushOptions(compress=setting, encrypt_to=(key.recipient,), allow_empty=True)
    backhaul.push(series, MemorySource(data), options)
    (stored,) = (tmp_path / "s").rglob("data*")
    assert stored.name == ("data.age" if setting == "none" else "data.zst.age")
    plain = subprocess.run([tool("age"), "-d", "-i", key.path, stored], stdout=subprocess.PIPE, check=True).stdout
    assert setting != "none" or plain == data
    target = Recording()
    backhaul.pull(series, target, backhaul.PullOptions(identities=(key.identity,)))
    assert target.committed and target.content == data
    assert backhaul.verify(series, deep=True, identities=[key.identity]).ok
    with backhaul.open(series, identities=[key.identity]) as file:
        assert file.read() == data
        for at in {0, size // 2, max(0, size - 70_000), max(0, size - 1)}:
            file.seek(at)
            assert file.read(66_000) == data[at : at + 66_000]


def test_a_range_is_read_alone(
    s3_environment: None, bucket: str, tmp_path: Path, key: Key, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes in the middle cost the header, the seek table and one frame, not the stream."""
    (tmp_path / "dump").write_bytes(NOISE * 8)
    series = f"s3://{bucket}/ranges"
    options = backhaul.PushOptions(encrypt_to=(key.recipient,))
    backhaul.push(series, backhaul.CommandSource(["cat", str(tmp_path / "dump")]), options)
    fetched: list[int] = []
    with backhaul.open(series, identities=[key.identity]) as file:
        raw: Any = file.raw
        fetch = raw._stream.fetch

        def counted(offset: int, out: memoryview) -> None:
            fetched.append(len(out))
            fetch(offset, out)

        monkeypatch.setattr(raw._stream, "fetch", counted)
        file.seek(20_000_000)
        assert file.read(100) == (NOISE * 8)[20_000_000:20_000_100]
        assert 4 << 20 <= sum(fetched) <= (4 << 20) + 3 * SEALED_CHUNK_SIZE


def test_in_segments(cli: Cli, s3: Any, bucket: str, key: Key) -> None:
    data = b"".join(random_bytes(40_000_000))
    series = f"s3://{bucket}/narrow?provider=r2&max-part=5Mi"
    cli.ok("push", series, "--encrypt-to", key.recipient, input=data)
    names = [name for name in keys(s3, bucket) if "/data" in name]
    content = b"".join(s3.get_object(Bucket=bucket, Key=name)["Body"].read() for name in sorted(names))
    assert by_age(content, key.path) == data
    assert cli.ok("pull", "-q", series, "--identity", key.path).out == data
    cli.ok("verify", "--deep", series, "--identity", key.path)


def test_an_ssh_key(cli: Cli, tmp_path: Path, key: Key) -> None:
    private = Ed25519PrivateKey.generate()
    openssh = serialization.PrivateFormat.OpenSSH
    pem = private.private_bytes(serialization.Encoding.PEM, openssh, serialization.NoEncryption())
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (tmp_path / "id").write_bytes(pem)
    (tmp_path / "id").chmod(0o600)
    (tmp_path / "id.pub").write_bytes(public + b" me@here\n")
    series = str(tmp_path / "s")
    cli.ok("push", series, "--encrypt-to-file", str(tmp_path / "id.pub"), input=DUMP)
    assert cli.ok("pull", "-q", series, "--identity", str(tmp_path / "id")).out == DUMP
    (stored,) = (tmp_path / "s").rglob("data.zst.age")
    assert by_age(stored.read_bytes(), str(tmp_path / "id")) == DUMP
    assert "me@here" not in next((tmp_path / "s").rglob("manifest.json")).read_text()


@pytest.mark.parametrize("encrypted", [True, False])
def test_a_disk_is_filled_within_the_memory_formula(cli: Cli, tmp_path: Path, key: Key, encrypted: bool) -> None:
    """Of data that does not compress, whose frames are large, and go to the disk as they are."""
    cli.cold = True  # its memory is measured
    to = ("--encrypt-to", key.recipient) if encrypted else ()
    block = tmp_path / "block"
    block.write_bytes(b"".join(random_bytes(32_000_000)))
    script = f"i=0; while [ $i -lt 20 ]; do cat '{block}'; i=$((i+1)); done"
    series = str(tmp_path / "s")
    pushed = cli.ok("push", series, "--json", *to, "--", "sh", "-c", script).json
    assert pushed["raw_size"] == 20 * 32_000_000
    assert ("sealing" in pushed["memory"]["terms"]) == encrypted
    assert pushed["peak_memory"] <= pushed["memory"]["total"]
    opener = ("--identity", key.path) if encrypted else ()
    pulled = cli.ok("pull", series, "--json", *opener, "--", "sh", "-c", "cat > /dev/null")
    document = json.loads(pulled.err)
    assert document["peak_memory"] <= document["memory"]["total"]


def test_what_is_encrypted_already_does_not_pay_twice(cli: Cli, tmp_path: Path, key: Key) -> None:
    """It passes through as it is; and who encrypts it all the same is told."""
    inside = pyrage.encrypt(DUMP, [pyrage.x25519.Recipient.from_str(key.recipient)])
    plain = cli.ok("push", str(tmp_path / "s"), "--json", input=inside).json
    assert plain["remark"] is None and plain["stored_size"] < len(inside) * 1.001
    twice = cli("push", str(tmp_path / "s"), "--encrypt-to", key.recipient, input=inside)
    assert "encrypted already (age)" in twice.err
    assert cli.ok("pull", "-q", str(tmp_path / "s"), "--identity", key.path).out == inside


# -- keys --------------------------------------------------------------------------------------------------------


def test_keygen(cli: Cli, tmp_path: Path, tmpfs: Path) -> None:
    path = tmp_path / "new.key"
    process = cli.start("keygen", "-o", str(path), preexec_fn=lambda: os.umask(0))
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert path.stat().st_mode & 0o777 == 0o600
    recipient = out.decode().strip()
    theirs = subprocess.run([tool("age-keygen"), "-y", str(path)], stdout=subprocess.PIPE, check=True, text=True)
    assert theirs.stdout.strip() == recipient
    assert f"# recipient: {recipient}" in path.read_text()
    before = path.read_bytes()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for there in (path, tmp_path / "link", tmp_path):
        assert_three_parts(cli("keygen", "-o", str(there)), 10)
    assert path.read_bytes() == before and not (tmp_path / "nowhere").exists()
    assert_three_parts(cli("keygen", "-o", str(tmp_path / "no" / "such" / "directory")), 10)
    assert_three_parts(cli("keygen", "-o", "-"), 2)
    document = cli.ok("keygen", "-o", str(tmp_path / "third"), "--json").json
    assert document["schema"] == "backhaul.keygen/1" and document["recipient"].startswith("age1")
    # A disk that is full leaves no half of a key, whose recipient somebody might use.
    (tmpfs / "filler").write_bytes(b"")
    with contextlib.suppress(OSError), open(tmpfs / "filler", "wb") as file:
        while True:
            file.write(bytes(1 << 16))
            file.flush()
    full = cli("keygen", "-o", str(tmpfs / "k"))
    assert_three_parts(full, 10)
    assert full.out == b"" and not (tmpfs / "k").exists()


def on_terminal(cli: Cli, arguments: list[str], answer: str) -> tuple[int, str]:
    """Run a command with a terminal of its own, but not as its stdin or stdout; return its status and the screen."""
    pid, master = pty.fork()
    if pid == 0:
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 0)
        os.dup2(null, 1)
        os.chdir(cli.directory)
        import sys

        os.execve(sys.executable, [sys.executable, "-m", "backhaul", *arguments], cli.environment)
    screen = b""
    answered = False
    while True:
        if not select.select([master], [], [], 60)[0]:
            os.kill(pid, signal.SIGKILL)
            break
        try:
            piece = os.read(master, 4096)
        except OSError:
            break
        if not piece:
            break
        screen += piece
        if b"assphrase for" in screen and not answered:
            time.sleep(0.2)  # until the echo is off
            os.write(master, answer.encode() + b"\n")
            answered = True
    _, status = os.waitpid(pid, 0)
    os.close(master)
    return os.waitstatus_to_exitcode(status), screen.decode()


@pytest.mark.parametrize("armored", [False, True])
def test_an_identity_with_a_passphrase(cli: Cli, tmp_path: Path, key: Key, armored: bool) -> None:
    content = pyrage.passphrase.encrypt(Path(key.path).read_bytes(), "correct horse")
    if armored:
        text = base64.encodebytes(content).replace(b"\n", b"")
        lines = b"\n".join(text[at : at + 64] for at in range(0, len(text), 64))
        content = b"-----BEGIN AGE ENCRYPTED FILE-----\n" + lines + b"\n-----END AGE ENCRYPTED FILE-----\n"
    locked = tmp_path / "locked.age"
    locked.write_bytes(content)
    series, out = str(tmp_path / "s"), tmp_path / "out"
    cli.ok("push", series, "--encrypt-to", key.recipient, input=DUMP)
    arguments = ["pull", series, "--identity", str(locked), "-o", str(out)]
    code, screen = on_terminal(cli, arguments, "correct horse")
    assert code == 0, screen
    assert out.read_bytes() == DUMP
    assert "horse" not in screen
    out.unlink()
    if armored:
        return
    code, screen = on_terminal(cli, arguments, "wrong battery")
    assert code == 10
    assert "passphrase is wrong" in screen and "battery" not in screen and not out.exists()
    # Without a terminal nobody waits for an answer that can't come.
    process = cli.start(*arguments, start_new_session=True)
    _, err = process.communicate(timeout=30)
    assert_three_parts(Result(process.returncode, b"", err.decode()), 10)
    # And the way round it, which the error names.
    plain = Path(key.path).read_bytes()
    assert cli.ok("pull", "-q", series, "--identity", "-", input=plain).out == DUMP


def test_wrong_missing_and_useless_identities(cli: Cli, tmp_path: Path, key: Key, other: Key) -> None:
    series, out = str(tmp_path / "s"), str(tmp_path / "out")
    cli.ok("push", series, "--encrypt-to", key.recipient, input=DUMP)
    (tmp_path / "text").write_text("no key at all\n")
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    (tmp_path / "cut").write_text(key.secret[:-4])
    (tmp_path / "plugin").write_text("AGE-PLUGIN-YUBIKEY-1QQPQQQQ\n")
    wrong: list[tuple[list[str], int, str]] = [
        ([], 10, "no identity was given"),
        (["--identity", other.path], 10, "No identity opens"),
        (["--identity", str(tmp_path / "nowhere")], 10, "can't be read"),
        (["--identity", str(tmp_path / "text")], 10, "no identity"),
        (["--identity", str(tmp_path / "binary")], 10, "no identity file"),
        (["--identity", str(tmp_path / "cut")], 10, "mistyped or cut"),
        (["--identity", str(tmp_path / "plugin")], 10, "age program"),
        (["--identity", key.secret], 2, "takes a file"),
    ]
    touched = tmp_path / "touched"
    for identity, code, words in wrong:
        for arguments in (
            ["pull", series, *identity],
            ["pull", series, *identity, "-o", out],
            ["pull", series, *identity, "--", "touch", str(touched)],
            ["verify", "--deep", series, *identity],
        ):
            result = cli(*arguments)
            assert_three_parts(result, code)
            assert words in result.err and result.out == b""
            assert key.secret[20:60] not in result.err
    assert not touched.exists() and not Path(out).exists()
    # Several may be given; one that fits is enough.
    assert cli.ok("pull", "-q", series, "--identity", other.path, "--identity", key.path).out == DUMP


def test_what_is_no_recipient_is_refused_before_anything_happens(
    cli: Cli, tmp_path: Path, key: Key, other: Key
) -> None:
    touched = tmp_path / "touched"
    mark = "PRIVATE KEY-----"
    ssh_secret = f"-----BEGIN OPENSSH {mark}\n{key.secret[16:]}\n-----END OPENSSH {mark}"
    (tmp_path / "empty").write_text("# none yet\n")
    (tmp_path / "variable").write_text(f"KEY={key.secret}\n")
    crowd = (bech32.encode("age", number.to_bytes(32, "big")) for number in range(10_000, 21_000))
    (tmp_path / "crowd").write_text("\n".join(crowd))
    for arguments, code in (
        (["--encrypt-to", "age1nonsense"], 2),
        (["--encrypt-to", ""], 2),
        (["--encrypt-to", key.path], 2),
        (["--encrypt-to", key.secret], 2),
        (["--encrypt-to-file", str(tmp_path / "nowhere")], 10),
        (["--encrypt-to-file", str(tmp_path / "empty")], 10),
        (["--encrypt-to-file", key.path], 10),
        (["--encrypt-to-file", "-"], 2),
        (["--encrypt-to-file", key.secret], 2),
        (["--encrypt-to-file", str(tmp_path / "variable")], 10),
        (["--encrypt-to", f"KEY={key.secret}"], 2),
        (["--encrypt-to", key.secret[1:]], 2),
        (["--encrypt-to", key.secret[16:]], 2),
        (["--encrypt-to", f"{key.recipient} {key.recipient}"], 2),
        (["--encrypt-to", key.recipient, other.recipient], 2),
        (["--encrypt-to", key.recipient, key.secret], 2),
        (["--encrypt-to", ssh_secret], 2),
        (["--encrypt-to-file", ssh_secret], 2),
        (["--encrypt-to", LOW_ORDER], 2),
        (["--encrypt-to-file", str(tmp_path / "crowd")], 2),
    ):
        result = cli("push", str(tmp_path / "s"), *arguments, "--", "touch", str(touched))
        assert_three_parts(result, code)
        assert key.secret[20:60] not in result.err
    assert not touched.exists() and not (tmp_path / "s").exists()


def test_an_identity_asks_for_encryption(cli: Cli, tmp_path: Path, key: Key) -> None:
    """Who can write to the store must not get a plain backup believed in the place of an encrypted one."""
    series = str(tmp_path / "s")
    cli.ok("push", series, input=b"plain")
    for verb in (["pull"], ["verify", "--deep"], ["verify"]):
        result = cli(*verb, series, "--identity", key.path)
        assert_three_parts(result, 1)
        assert "not encrypted" in result.err and b"plain" not in result.out
    assert cli.ok("pull", "-q", series).out == b"plain"


# -- who can write to the store ------------------------------------------------------------------------------------


class Sealed(Stored):
    """An encrypted backup, and the means to tamper with it."""

    def __init__(self, cli: Cli, s3: Any, series: str, bucket: str | None, key: Key) -> None:
        super().__init__(cli, s3, series, bucket, DUMP, "--encrypt-to", key.recipient)
        self.key = key


@pytest.fixture(params=["s3", "local"])
def sealed(request: pytest.FixtureRequest, cli: Cli, s3: Any, bucket: str, tmp_path: Path, key: Key) -> Sealed:
    if request.param == "s3":
        return Sealed(cli, s3, f"s3://{bucket}/app", bucket, key)
    return Sealed(cli, s3, str(tmp_path / "series"), None, key)


def chunks_of(content: bytes) -> tuple[bytes, list[bytes]]:
    start = age.parse_header(content)[1] + age.NONCE_SIZE
    return content[:start], [
        content[at : at + SEALED_CHUNK_SIZE] for at in range(start, len(content), SEALED_CHUNK_SIZE)
    ]


def rearranged(change: Callable[[list[bytes]], list[bytes]]) -> Callable[[bytes], bytes]:
    def apply(content: bytes) -> bytes:
        head, chunks = chunks_of(content)
        return head + b"".join(change(chunks))

    return apply


TAMPERING: dict[str, Callable[[bytes], bytes]] = {
    "header: the version": lambda c: flipped(c, 3),
    "header: the share": lambda c: flipped(c, 40),
    "header: the wrapped key": lambda c: flipped(c, 90),
    "header: the MAC": lambda c: c.replace(b"--- ", b"--- A", 1),
    "header: another stanza": lambda c: c.replace(b"\n---", b"\n-> grease x\nAAAA\n---", 1),
    "the nonce": lambda c: flipped(c, len(chunks_of(c)[0]) - 1),
    "the first chunk": rearranged(lambda c: [flipped(c[0], 0), *c[1:]]),
    "a chunk in the middle": rearranged(lambda c: [*c[:20], flipped(c[20], 7), *c[21:]]),
    "the last chunk": rearranged(lambda c: [*c[:-1], flipped(c[-1], len(c[-1]) - 1)]),
    "truncated at a chunk": rearranged(lambda c: c[:-1]),
    "truncated to one chunk": rearranged(lambda c: c[:1]),
    "truncated within a chunk": lambda c: c[:-1],
    "chunks swapped": rearranged(lambda c: [*c[:10], c[11], c[10], *c[12:]]),
    "a chunk twice": rearranged(lambda c: [*c[:11], c[10], *c[12:]]),
    "trailing bytes": lambda c: c + b"trailing",
    "a trailing chunk": lambda c: c + bytes(SEALED_CHUNK_SIZE),
    "all zeros": lambda c: bytes(len(c)),
}


@pytest.mark.parametrize("tampering", TAMPERING)
def test_a_tampered_object(cli: Cli, s3: Any, tmp_path: Path, key: Key, tampering: str) -> None:
    sealed = Sealed(cli, s3, str(tmp_path / "series"), None, key)
    sealed.write("data.zst.age", TAMPERING[tampering](sealed.read("data.zst.age")))
    target = Recording()
    options = backhaul.PullOptions(identities=(key.identity,))
    with pytest.raises(IntegrityError) as caught:
        backhaul.pull(sealed.series, target, options)
    assert f"{sealed.id}/" in caught.value.what and caught.value.why and caught.value.todo
    with pytest.raises(IntegrityError):
        backhaul.pull(sealed.series, backhaul.FileTarget(str(tmp_path / "file")), options)
    assert not backhaul.verify(sealed.series, deep=True, identities=[key.identity]).ok
    # What has come out was sealed: the beginning of what was pushed, and nothing else.
    assert not target.committed and DUMP.startswith(target.content)
    if not tampering.startswith(("the first", "a chunk", "the last", "chunks")):
        assert target.content == b"", "of a stream that is wrong at its ends nothing is read"
    assert not (tmp_path / "file").exists() and list(tmp_path.glob(".file*")) == []


@pytest.mark.parametrize("tampering", ["a chunk in the middle", "truncated at a chunk", "header: the wrapped key"])
def test_what_the_command_line_makes_of_tampering(sealed: Sealed, tmp_path: Path, tampering: str) -> None:
    cli, series, identity = sealed.cli, sealed.series, ("--identity", sealed.key.path)
    sealed.write("data.zst.age", TAMPERING[tampering](sealed.read("data.zst.age")))
    seen, ended = tmp_path / "seen", tmp_path / "ended"
    to_command = cli("pull", series, *identity, "--", "sh", "-c", f"cat > '{seen}'; touch '{ended}'")
    to_stdout = cli("pull", "-q", series, *identity)
    to_file = cli("pull", series, *identity, "-o", str(tmp_path / "file"))
    deep = cli("verify", "--deep", series, *identity)
    for result in (to_command, to_stdout, to_file, deep):
        assert_three_parts(result, 1)
        assert f"{sealed.id}/" in result.err
    assert DUMP.startswith(to_stdout.out)
    assert DUMP.startswith(seen.read_bytes() if seen.exists() else b"")
    time.sleep(0.1)
    assert not ended.exists()
    assert not (tmp_path / "file").exists() and list(tmp_path.glob(".file*")) == []


def forged(sealed: Sealed, change: Callable[[dict[str, Any]], None]) -> None:
    """Rewrite the manifest as somebody would who knows the format and has no key."""
    document = json.loads(sealed.read("manifest.json"))
    change(document)
    sealed.write("manifest.json", json.dumps(document, indent=2).encode())


def _plain(sealed: Sealed) -> None:
    """Put a backup that is not encrypted in the place of the encrypted one, under a manifest that is in order."""
    fake = Stored(sealed.cli, sealed.s3, sealed.series + "-fake", sealed.bucket, FAKE)
    sealed.write("data.zst", fake.read("data.zst"))
    sealed.write("manifest.json", fake.read("manifest.json").replace(fake.id.encode(), sealed.id.encode()))


def _own(sealed: Sealed) -> None:
    """Encrypt something to a key of one's own, for want of the recipient."""
    stranger = new_key([parse_recipient(pyrage.x25519.Identity.generate().to_public().__str__())])
    content = stranger.header + stranger.cipher().seal(Batch(0, [FAKE], last=True))
    sealed.write("data.zst.age", content)

    def change(document: dict[str, Any]) -> None:
        stream = document["streams"][0]
        stream["stored"]["size"] = len(content)
        stream["encryption"]["header_size"] = len(stranger.header)
        stream["encryption"]["payload_size"] = len(FAKE)
        stream["encryption"]["recipients"] = ["0123456789abcdef"]

    forged(sealed, change)


def _set(*path: str | int, value: Any) -> Callable[[Sealed], None]:
    def change(document: dict[str, Any]) -> None:
        place: Any = document
        for step in path[:-1]:
            place = place[step]
        place[path[-1]] = value

    return lambda sealed: forged(sealed, change)


STREAM = ("streams", 0)
FORGERIES: dict[str, Callable[[Sealed], None]] = {
    "another host": _set("host", value="elsewhere"),
    "only white space": lambda s: s.write("manifest.json", s.read("manifest.json") + b"\n"),
    "another time": _set("started", value="2020-01-01T00:00:00Z"),
    "another command": _set("producers", 0, "kind", value="command"),
    "an unknown key": _set("more", value="than there was"),
    "another raw hash": _set(*STREAM, "raw", "blake3", value="00" * 32),
    "another raw size": _set(*STREAM, "raw", "size", value=7),
    "fewer frames": _set(*STREAM, "frames", value=1),
    "another codec": _set(*STREAM, "codec", "name", value="none"),
    "another object": _set(*STREAM, "object", value="../other/data.zst.age"),
    "another segment": _set(*STREAM, "segments", value=[]),
    "no MAC": _set(*STREAM, "encryption", "mac", value=""),
    "a MAC of zeros": _set(*STREAM, "encryption", "mac", value="0" * 64),
    "another recipient": _set(*STREAM, "encryption", "recipients", value=["0123456789abcdef"]),
    "no recipient": _set(*STREAM, "encryption", "recipients", value=[]),
    "a header of nothing": _set(*STREAM, "encryption", "header_size", value=0),
    "an endless header": _set(*STREAM, "encryption", "header_size", value=1 << 60),
    "a longer header": _set(*STREAM, "encryption", "header_size", value=300),
    "a shorter payload": _set(*STREAM, "encryption", "payload_size", value=65536),
    "no streams": _set("streams", value=[]),
    "an object elsewhere": _set(*STREAM, "object", value="../../../../../../../etc/hostname"),
    "an object with a zero": _set(*STREAM, "object", value="data.zst\0.age"),
    "another format": _set(*STREAM, "encryption", "format", value="rot13"),
    "no encryption": _set(*STREAM, "encryption", value=None),
    "a plain backup instead": _plain,
    "one of one's own instead": _own,
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_manifest(cli: Cli, s3: Any, tmp_path: Path, key: Key, forgery: str) -> None:
    sealed = Sealed(cli, s3, str(tmp_path / "series"), None, key)
    FORGERIES[forgery](sealed)
    target = Recording()
    # (To somebody's own key it is simply not encrypted for us.)
    expected = IdentityError if forgery == "one of one's own instead" else IntegrityError
    with pytest.raises(expected) as caught:
        backhaul.pull(sealed.series, target, backhaul.PullOptions(identities=(key.identity,)))
    assert caught.value.why and caught.value.todo
    assert target.content == b"" and not target.committed
    for deep in (True, False):
        try:
            assert not backhaul.verify(sealed.series, deep=deep, identities=[key.identity]).ok
        except BackhaulError as error:
            assert isinstance(error, expected)
    with pytest.raises(expected):
        backhaul.open(sealed.series, identities=[key.identity])


@pytest.mark.parametrize("forgery", ["another raw hash", "a plain backup instead"])
def test_what_the_command_line_makes_of_a_forgery(cli: Cli, s3: Any, tmp_path: Path, key: Key, forgery: str) -> None:
    sealed = Sealed(cli, s3, str(tmp_path / "series"), None, key)
    FORGERIES[forgery](sealed)
    identity = ("--identity", key.path)
    touched = tmp_path / "touched"
    for arguments in (
        ["pull", "-q", sealed.series, *identity],
        ["pull", sealed.series, *identity, "--", "touch", str(touched)],
        ["pull", sealed.series, *identity, "-o", str(tmp_path / "file")],
        ["verify", "--deep", sealed.series, *identity],
    ):
        result = cli(*arguments)
        assert_three_parts(result, 1)
        assert FAKE not in result.out
        assert arguments[0] == "verify" or result.out == b""
    assert not touched.exists() and not (tmp_path / "file").exists()


def test_a_backup_in_the_place_of_another(cli: Cli, tmp_path: Path, key: Key) -> None:
    """An old backup under a new id: the manifest says which one it is, and can't be made to say otherwise."""
    series = tmp_path / "s"
    old, new = (
        cli.ok("push", str(series), "--json", "--encrypt-to", key.recipient, input=content).json["id"]
        for content in (b"monday", b"tuesday")
    )
    for name in ("manifest.json", "data.zst.age"):
        (series / new / name).write_bytes((series / old / name).read_bytes())
    assert_three_parts(cli("pull", str(series), "--identity", key.path), 1)
    text = (series / new / "manifest.json").read_text()
    (series / new / "manifest.json").write_text(text.replace(old, new))
    result = cli("pull", str(series), "--identity", key.path)
    assert_three_parts(result, 1)
    assert "MAC" in result.err and result.out == b""
    # And a stream of one under the manifest of the other.
    (series / old / "manifest.json").write_text(text)
    cli.ok("pull", f"{series}@{old}", "--identity", key.path)


# -- secrets ---------------------------------------------------------------------------------------------------------


class Watch:
    """Collects the command lines of every process there is, while it is on."""

    def __init__(self) -> None:
        self.seen: set[bytes] = set()
        self._on = True
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        while self._on:
            for path in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    self.seen.add((path / "cmdline").read_bytes())
            time.sleep(0.01)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._on = False
        self._thread.join()


def test_no_key_anywhere(cli: Cli, tmp_path: Path, key: Key, other: Key) -> None:
    """Neither the identity nor a file key is in what is said, written or shown to other processes."""
    series = str(tmp_path / "s")
    file = tmp_path / "file"
    file.write_bytes(DUMP)
    environment = {"BACKHAUL_STATE": str(tmp_path / "state"), "BACKHAUL_TRACEBACK": "1"}
    said: list[bytes] = []
    cli.cold = True  # others see how it was called
    with Watch() as watch:
        for arguments in (
            ["push", series, "--encrypt-to", key.recipient, "--json", "--from", str(file)],
            ["pull", series, "--identity", key.path, "--json", "--", "sleep", "0.2"],
            ["pull", series, "--identity", key.path, "--json", "-o", str(tmp_path / "out")],
            ["pull", series, "--identity", other.path, "--json"],
            ["verify", "--deep", series, "--identity", key.path, "--json"],
            ["show", series],
            ["push", series, "--encrypt-to", key.secret, "--", "true"],
            ["pull", series, "--identity", key.secret],
            ["pull", series, "--identity", Path(key.path).read_text()],
            ["pull", series, key.secret],
            ["pull", series, "--stream", key.secret],
            ["verify", series, key.secret],
            ["keygen", "-o", key.secret],
            ["push", series, "--encrypt-to-file", key.secret, "--json", "--", "true"],
            # A secret where it does not belong: the operator's own command line.
            ["push", str(tmp_path / "t"), "--", "sh", "-c", f"echo {key.secret}; exit 3"],
            ["push", str(tmp_path / "t"), "--allow-empty", "--", "true", key.secret],
        ):
            result = cli(*arguments, env=environment)
            said += [result.out, result.err.encode()]
    (stored,) = (tmp_path / "s").rglob("data.zst.age")
    file_key = open_key(stored.read_bytes(), [key.identity]).export()[:16]
    for path in [*(tmp_path / "s").rglob("*"), *(tmp_path / "t").rglob("*"), *(tmp_path / "state").rglob("*")]:
        if path.is_file():
            said.append(path.read_bytes())
    ours = {line for line in watch.seen if b"backhaul" in line and key.secret.encode() not in line}
    assert len(ours) >= 4, "it saw the commands"
    everything = b"\n".join([*said, *ours])
    raw = bytes.fromhex(file_key.hex())
    for secret in (key.secret.encode()[20:], raw, raw.hex().encode(), base64.b64encode(raw).rstrip(b"=")):
        assert secret not in everything
        assert secret.lower() not in everything.lower()


# -- interruption -----------------------------------------------------------------------------------------------------


def kept(files: Files) -> list[Path]:
    """Return where the keys of the uploads lie that can be resumed."""
    stems = [path.stem for path in (files.state / "uploads").iterdir()]
    return [kept_key.SHARED_MEMORY / f"backhaul-{os.getuid()}-{stem}" for stem in stems]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_an_interrupted_push_goes_on_under_its_key(files: Files, key: Key, number: signal.Signals) -> None:
    to = ("--encrypt-to", key.recipient)
    files.interrupt(number, 5, *to)
    (place,) = kept(files)
    assert place.stat().st_mode & 0o777 == 0o600
    result = files.push(*to)
    assert result["destinations"][0]["reused"] >= 3 * PART
    assert files.cli.ok("pull", "-q", files.series, "--identity", key.path).out == files.content
    assert not place.exists(), "the key of a backup is nowhere"


@pytest.mark.parametrize("change", ["gone", "other recipients"])
def test_without_its_key_an_interrupted_push_begins_anew(
    files: Files, s3: Any, key: Key, other: Key, change: str
) -> None:
    files.interrupt(signal.SIGKILL, 5, "--encrypt-to", key.recipient)
    (place,) = kept(files)
    if change == "gone":
        place.unlink()
    held = other if change == "other recipients" else key
    result = files.push("--encrypt-to", held.recipient)
    assert result["destinations"][0]["reused"] == 0
    assert "begun anew" in result["destinations"][0]["remark"]
    assert files.cli.ok("pull", "-q", files.series, "--identity", held.path).out == files.content
    assert len(keys(s3, files.bucket)) == 2
    assert not place.exists()


def test_any_doubt_about_a_kept_key_is_none_at_all(key: Key, tmp_path: Path) -> None:
    """A backup under a key that is not quite the right one would open for nobody."""
    place = kept_key.KeptKey(f"test-{tmp_path.name}-{os.getpid()}")
    path = place._path
    stream_key = new_key([parse_recipient(key.recipient)])
    place.keep("20261121T020000Z", stream_key)
    content = path.read_bytes()
    recalled = place.recall("20261121T020000Z")
    assert recalled is not None and recalled.export() == stream_key.export()
    assert place.recall("20261121T020001Z") is None
    for at in range(0, len(content), 7):
        path.write_bytes(flipped(content, at))
        assert place.recall("20261121T020000Z") is None, at
        path.write_bytes(content[:at])
        assert place.recall("20261121T020000Z") is None, at
    path.write_bytes(content)
    path.chmod(0o644)
    assert place.recall("20261121T020000Z") is None, "others could read it"
    path.unlink()
    path.symlink_to(tmp_path / "elsewhere")
    place.keep("20261121T020000Z", stream_key)
    assert path.is_file() and not path.is_symlink() and not (tmp_path / "elsewhere").exists()
    kept_key.drop_everywhere(new_key([parse_recipient(key.recipient)]))
    assert path.exists(), "another key's"
    kept_key.drop_everywhere(stream_key)
    assert not path.exists()


def test_the_key_is_gone_before_a_backup_stands(files: Files, key: Key, tmp_path: Path) -> None:
    """One destination has committed, the other hangs: nothing on this host opens the one that stands."""
    disk, to = tmp_path / "disk", ("--encrypt-to", key.recipient)
    files.proxy.use(
        FaultPlan(stall=Fault(only=lambda r: r.query.get("partNumber") == "6", place=0.1), stall_seconds=600)
    )
    arguments = ("push", files.series, str(disk), *to, "--from", str(files.file))
    process = files.cli.start(*arguments, env=files.environment)
    seen: set[Path] = set()
    while not list(disk.rglob("manifest.json")):
        assert process.poll() is None
        seen |= {path for path in kept(files) if path.exists()} if files.state.exists() else set()
        time.sleep(0.01)
    assert len(seen) == 1 and not any(path.exists() for path in seen)
    process.kill()
    process.communicate()
    files.proxy.use(FaultPlan())
    result = files.push(str(disk), *to)
    assert [destination["state"] for destination in result["destinations"]] == ["committed", "committed"]
    for place in (files.series, str(disk)):
        assert files.cli.ok("pull", "-q", place, "--identity", key.path).out == files.content
    assert not any(path.exists() for path in seen)


def test_no_copy_of_a_key_is_forgotten(files: Files, key: Key, tmp_path: Path, s3: Any) -> None:
    """Interrupted to two stores, gone on with to one of them: the other's copy of the key opens what stands now."""
    to = ("--encrypt-to", key.recipient)
    other_place = f"s3://{files.bucket}/second"
    files.interrupt(signal.SIGKILL, 5, other_place, *to)
    places = kept(files)
    assert [place.exists() for place in places] == [True, True]
    assert files.push(*to)["destinations"][0]["reused"] > 0
    assert not any(place.exists() for place in places)
    assert files.push(other_place, *to)["destinations"][1]["state"] == "committed"
    headers = [s3.get_object(Bucket=files.bucket, Key=name)["Body"].read(400) for name in keys(s3, files.bucket)]
    ages = [header[:184] for header in headers if header.startswith(b"age-encryption")]
    assert len(ages) == 3 and len(set(ages)) == 2, "a key for each push, not for two"


def test_a_key_never_seals_two_contents(files: Files, key: Key, s3: Any) -> None:
    """The file was changed and its time set back; or the journal is right about a part, and the part is not the same."""
    to = ("--encrypt-to", key.recipient)
    files.interrupt(signal.SIGKILL, 5, *to)
    before = files.file.stat()
    content = bytearray(files.content)
    content[20_000_000] ^= 1
    with open(files.file, "r+b") as file:
        file.seek(20_000_000)
        file.write(content[20_000_000:20_000_001])
    os.utime(files.file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert files.push(*to)["destinations"][0]["reused"] == 0
    assert files.cli.ok("pull", "-q", files.series, "--identity", key.path).out == content

    files.interrupt(signal.SIGKILL, 5, *to)
    (journal,) = (files.state / "uploads").iterdir()
    lines = journal.read_text().splitlines(keepends=True)
    parts = [number for number, line in enumerate(lines) if '"part"' in line]
    lines[parts[1]] = re.sub('"blake3":"..', '"blake3":"00', lines[parts[1]])
    journal.write_text("".join(lines))
    refused = files.cli("push", files.series, *to, "--from", str(files.file), env=files.environment)
    assert_three_parts(refused, 1)
    assert "begins anew" in refused.err
    assert files.push(*to)["destinations"][0]["reused"] == 0
    assert files.cli.ok("pull", "-q", files.series, "--identity", key.path).out == content


def test_what_can_not_be_gone_on_with_is_not_promised(files: Files, key: Key, tmp_path: Path) -> None:
    """S3 breaks down, the disk commits, and with that the key is gone: the same command begins anew, as it says."""
    disk, to = str(tmp_path / "disk"), ("--encrypt-to", key.recipient)
    arguments = ("push", files.series, disk, *to, "--require", "any", "--retry-for", "2s", "--from", str(files.file))
    process = files.cli.start(*arguments, "--limit", "80M", env=files.environment)
    while files.proxy.count("UploadPart") < 4:
        assert process.poll() is None
        time.sleep(0.01)
    files.proxy.outage(True)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert b"run the same command again to go on" not in err
    files.proxy.outage(False)
    result = files.push(disk, *to)
    assert [destination["state"] for destination in result["destinations"]] == ["committed", "committed"]
    for place in (files.series, disk):
        assert files.cli.ok("pull", "-q", place, "--identity", key.path).out == files.content


def test_what_lies_there_instead_of_an_object(cli: Cli, tmp_path: Path, key: Key) -> None:
    """A pipe in its place is not waited for; a key is not replaced by what it opens."""
    series = str(tmp_path / "s")
    cli.ok("push", series, "--encrypt-to", key.recipient, input=DUMP)
    refused = cli("pull", series, "--identity", key.path, "-o", key.path)
    assert_three_parts(refused, 2)
    assert "AGE-SECRET-KEY-1" in Path(key.path).read_text()
    (stored,) = (tmp_path / "s").rglob("data.zst.age")
    stored.unlink()
    os.mkfifo(stored)
    assert_three_parts(cli("pull", series, "--identity", key.path, timeout=20), 1)


class PushEncrypted(PushToOne):
    """A push that dies everywhere; nothing of what is left opens a backup."""

    def __init__(self, key: Key) -> None:
        self.identities = (key.identity,)
        self.options = backhaul.PushOptions(patience=5.0, encrypt_to=(key.recipient,))

    def run(self, world: World) -> None:
        push(self.series, MemorySource(self.content), self.options, now=world.now)


class PushFileEncrypted(PushOfAFile):
    def __init__(self, file: Path, series: tuple[str, ...], key: Key) -> None:
        super().__init__(file, series)
        self.identities = (key.identity,)
        self.options = backhaul.PushOptions(patience=5.0, encrypt_to=(key.recipient,))

    def run(self, world: World) -> None:
        try:
            push(self.series, FileSource(str(self.file)), self.options, now=world.now)
        finally:
            self.no_key_of_a_backup(world)

    def no_key_of_a_backup(self, world: World) -> None:
        kept_keys = []
        for path in kept_key.SHARED_MEMORY.glob(f"backhaul-{os.getuid()}-*"):
            with contextlib.suppress(OSError):  # another test's
                kept_keys.append(StreamKey.imported(path.read_bytes().partition(b"\n")[2]))
        for store in world.stores.values():
            for name, (content, _) in store.objects.items():
                if ".age" in name and f"{name.partition('/')[0]}/manifest.json" in store.objects:
                    assert not any(content.startswith(one.header) for one in kept_keys)


def test_death_at_every_effect_of_an_encrypted_push(tmp_path: Path, key: Key) -> None:
    report = enumerate_crashes(PushEncrypted(key), tmp_path / "worlds", ["after"])
    assert report.runs == len(report.effects) > 10


def test_death_at_every_effect_of_an_encrypted_push_that_is_resumed(tmp_path: Path, key: Key) -> None:
    file = tmp_path / "dump"
    file.write_bytes(NOISE)
    operation = PushFileEncrypted(file, ("s3://world/app", "s3://elsewhere/app"), key)
    report = enumerate_crashes(operation, tmp_path / "worlds", ["after"])
    assert report.runs == len(report.effects) > 20
