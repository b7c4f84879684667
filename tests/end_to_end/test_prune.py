"""prune on real stores: what goes, what stays, in which order, and what a death leaves."""

from __future__ import annotations

import datetime as dt
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import backhaul
from backhaul.errors import BackupNotFoundError, StoreRefusedError, UsageError
from backhaul.formats import drill as drill_format
from backhaul.formats import hold as hold_format
from backhaul.formats import names
from backhaul.model.backup_hold import BackupHold
from backhaul.model.drill import DrillRecord
from backhaul.model.objects import StoredObject
from backhaul.operations.backup_hold import hold_backup, release_backup
from backhaul.operations.clean import clean
from backhaul.operations.prune import PruneOptions, prune
from backhaul.operations.push import PushOptions, push
from backhaul.operations.refused import GuardError
from backhaul.planning.guard import MaxDelete
from backhaul.stores.local import LocalStore
from backhaul.testing.crashes import MODES, MemorySource, Operation, UnsoundError, World, enumerate_crashes
from backhaul.testing.servers import MotoS3, s3_client, s3_environment
from backhaul.transforms.digest import crc64nvme
from tests.conftest import Cli, keys
from tests.end_to_end.test_crashes import NOISE, RULES

# Long ago: the command line has its own clock, and must not take these backups for those of the future.
NOW = dt.datetime(2024, 11, 21, 12, tzinfo=dt.UTC)
ALL_MAY = MaxDelete(percent=100.0)
PATIENCE = 5.0


def push_at(series: str, time: dt.datetime, content: bytes) -> str:
    return push([series], MemorySource(content), PushOptions(patience=PATIENCE), now=lambda: time).id


def push_days(series: str, *days: int) -> dict[str, bytes]:
    """Push a backup of so many days ago each; return contents by id, oldest first."""
    made = {}
    for day in sorted(days, reverse=True):
        content = f"of {day} days ago ".encode() * 100
        made[push_at(series, NOW - dt.timedelta(days=day), content)] = content
    return made


def pruned(series: str, **options: Any) -> backhaul.PruneResult:
    """Prune as of NOW; any number may go."""
    disk = {name: options.pop(name) for name in ("free_space", "pause", "dry_run") if name in options}
    given = PruneOptions(**{"max_delete": ALL_MAY, "patience": PATIENCE, **options})
    return prune(series, given, now=lambda: NOW, **disk)


def listed(series: str) -> list[str]:
    return [backup.id for backup in backhaul.list(series).backups]


def drill_record(backup: str, result: str, day: int = 0) -> tuple[str, bytes]:
    time = NOW - dt.timedelta(days=day)
    record = DrillRecord(
        format=drill_format.FORMAT,
        version=drill_format.VERSION,
        id=backup,
        started=time.isoformat(),
        finished=time.isoformat(),
        host="db7",
        tool="backhaul",
        result=result,
    )
    return drill_format.drill_key(backup, time), drill_format.encode(record)


def write_drill(series: str, backup: str, result: str, day: int = 0) -> None:
    key, body = drill_record(backup, result, day)
    Path(series, key).write_bytes(body)


# -- death ---------------------------------------------------------------------------------------------------


class PruneSome(Operation):
    """Five backups, the three oldest go: one in segments, one with records and a claim beside it."""

    series = ("s3://world/app",)
    rules = RULES

    def prepare(self, world: World) -> None:
        (series,) = self.series
        contents = (b"the first", NOISE, b"the third", b"the fourth", b"the fifth")
        made = [push([series], MemorySource(each), now=world.now).id for each in contents]
        store = world._store("world", "app")
        expired = BackupHold(
            format=hold_format.FORMAT,
            version=hold_format.VERSION,
            id=made[2],
            since="2026-01-01T00:00:00Z",
            until="2026-02-01T00:00:00Z",
        )
        for key, body in (
            drill_record(made[2], "failed", 1),
            drill_record(made[2], "proved", 2),
            (hold_format.hold_key(made[2], NOW), hold_format.encode(expired)),
            (names.object_key(made[2], names.CLAIM), b"{}"),
        ):
            store.put(key, body, crc64nvme(body))

    def run(self, world: World) -> None:
        prune(self.series[0], PruneOptions(keep_last=2, max_delete=ALL_MAY, patience=PATIENCE), now=world.now)

    def expects_new(self) -> bool:
        return False

    def may_go(self, series: str, older: Sequence[str]) -> Sequence[str]:
        return sorted(older)[:3]

    def check_end(self, backups: Mapping[str, Mapping[str, bytes]]) -> None:
        (found,) = backups.values()
        if sorted(found.values()) != [b"the fifth", b"the fourth"]:
            raise UnsoundError(f"not what a prune should leave: {sorted(found)}")


def test_death_at_every_effect_of_a_prune(tmp_path: Path) -> None:
    """What stays comes back bit for bit, nothing listed is broken, another prune and clean leave nothing else."""
    report = enumerate_crashes(PruneSome(), tmp_path)
    deleted = [effect.partition(" ")[2] for effect in report.effects]
    files = [names.file_of(key) for key in deleted]
    assert files[:6] == [
        "manifest.json",
        "data.zst",
        "manifest.json",
        "data.zst.0001",
        "data.zst.0002",
        "manifest.json",
    ]
    assert sorted(file.partition("-")[0] for file in files[6:-1]) == ["data.zst", "drill", "drill", "hold"]
    assert files[-1] == "claim.json"
    assert deleted == sorted(deleted, key=lambda key: key.partition("/")[0]), "the oldest goes first"
    assert report.runs == 3 * len(report.effects)
    assert report.survived == len(report.effects), "losing a reply never costs the run"


def test_the_enumerator_finds_a_prune_in_the_wrong_order(tmp_path: Path) -> None:
    class StreamsFirst(PruneSome):
        def run(self, world: World) -> None:
            (series,) = self.series
            from backhaul.operations.places import series_at
            from backhaul.stores.open import open_store

            store = open_store(series_at(series))
            for backup in listed(series)[:-2]:
                for entry in sorted(store.list(f"{backup}/"), key=lambda entry: entry.key):
                    store.delete(entry.key)

    with pytest.raises(UnsoundError):
        enumerate_crashes(StreamsFirst(), tmp_path, modes=MODES[:2])


def test_clean_collects_what_a_dead_prune_left(tmp_path: Path) -> None:
    series = str(tmp_path / "series")
    (old, *_) = push_days(series, 0, 1, 2)
    write_drill(series, old, "failed")
    hold_backup(f"{series}@{old}", length=None, reason="")
    Path(series, old, names.MANIFEST).unlink()
    young = clean(series)
    assert young.removed == ()
    assert len(young.kept) == 3
    later = clean(series, now=lambda: dt.datetime.now(dt.UTC) + dt.timedelta(days=2))
    assert len(later.removed) == 3
    assert not Path(series, old).exists()
    assert len(listed(series)) == 2


# -- real stores, the command line ---------------------------------------------------------------------------


@pytest.mark.usefixtures("s3_environment")
@pytest.mark.parametrize("kind", ["s3", "disk"])
def test_a_policy(cli: Cli, s3: Any, bucket: str, tmp_path: Path, kind: str) -> None:
    """A dry run touches nothing; then goes what was said, and nothing else; then nothing more."""
    series = f"s3://{bucket}/app" if kind == "s3" else str(tmp_path / "app")
    made = push_days(series, *range(10), 40, 41, 400)

    def files() -> list[str]:
        if kind == "s3":
            return keys(s3, bucket)
        return sorted(path.relative_to(tmp_path).as_posix() for path in (tmp_path / "app").rglob("*") if path.is_file())

    running = "20241121T000001Z"  # a push that is at work: no manifest yet
    for name in ("notes.txt", f"{running}/claim.json", f"{running}/data.zst"):
        if kind == "s3":
            s3.put_object(Bucket=bucket, Key=f"app/{name}", Body=b"x")
        else:
            (tmp_path / "app" / name).parent.mkdir(exist_ok=True)
            (tmp_path / "app" / name).write_bytes(b"x")
    before = files()
    rules = ["--keep-daily", "3", "--keep-monthly", "3"]
    refused = cli("prune", series, *rules, "--json")
    assert refused.code == 1
    assert "--max-delete 8" in refused.json["series"][0]["next"]
    rules += ["--max-delete", "8"]
    said = cli.ok("prune", series, *rules, "--dry-run", "--json").json["series"][0]
    text = cli.ok("prune", series, *rules, "--dry-run").out.decode()
    assert files() == before
    assert all(backup in text for backup in made)
    # Days 0 to 2; of the months November, October (40 days ago) and October a year before (400).
    kept = [list(made)[index] for index in (0, 2, -3, -2, -1)]
    assert [backup["id"] for backup in said["kept"]] == kept
    assert "the newest good one of the month 2024-10" in said["kept"][1]["reasons"]
    done = cli.ok("prune", series, *rules, "--json").json["series"][0]
    assert done["removed"] == said["removed"]
    assert done["freed"] == sum(backup["size"] for backup in done["removed"]) > 0
    gone = {backup["id"] for backup in done["removed"]}
    assert files() == [name for name in before if name.split("/")[-2] not in gone]
    assert listed(series) == kept
    for backup in kept:
        assert cli.ok("pull", "-q", f"{series}@{backup}").out == made[backup]
    assert cli.ok("prune", series, *rules, "--json").json["series"][0]["removed"] == []


@pytest.mark.usefixtures("s3_environment")
def test_the_guard_names_what_would_go(cli: Cli, s3: Any, bucket: str) -> None:
    series = f"s3://{bucket}/app"
    made = list(push_days(series, *range(8)))
    before = keys(s3, bucket)
    for more in ((), ("--dry-run",), ("--max-delete", "10%"), ("--quiet",)):
        result = cli("prune", series, "--keep-last", "2", *more)
        assert result.code == 1
        assert all(backup in result.err for backup in made[:6])
        assert "next:" in result.err and "--max-delete 6" in result.err
    assert keys(s3, bucket) == before


def test_words_that_mean_nothing(local_cli: Cli, tmp_path: Path) -> None:
    for arguments, words in (
        (("s",), "Nothing says what to keep"),
        (("s", "--keep-within", "0s"), "keeps nothing"),
        (("s", "--keep-last", "0"), "keep-last"),
        (("s", "--keep-free", "0"), "keeps nothing"),
        (("s", "--keep-last", "1", "--timezone", "Mars/Base"), "time zone"),
        (("s@latest", "--keep-last", "1"), "names one backup"),
        (("s3://b/s", "--keep-free", "1G"), "local disk"),
    ):
        result = local_cli("prune", *arguments)
        assert result.code == 2, arguments
        assert words in result.err
    # A mistyped name must not be green for ever.
    empty = local_cli("prune", "s", "--keep-last", "1")
    assert empty.code == 3
    assert "no committed backup" in empty.out.decode()
    assert "mistyped" in empty.err
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "file").write_bytes(b"x")
    local_cli.ok("sync", "tree", "mirror", "-q", env={"BACKHAUL_STATE": str(tmp_path / "state")})
    result = local_cli("prune", "mirror", "--keep-last", "1")
    assert result.code == 2
    assert "is a mirror" in result.err
    assert "why:" in result.err and "next:" in result.err
    assert (tmp_path / "mirror" / "file").exists()


def test_each_series_has_its_own_fate(local_cli: Cli, tmp_path: Path) -> None:
    for name in ("a", "b", "c"):
        push_days(str(tmp_path / name), 0, 1, 2)
    (tmp_path / "b" / ".backhaul").mkdir()
    (tmp_path / "b" / ".backhaul" / "mirror.json").write_bytes(b"{}")
    result = local_cli("prune", "a", "b", "c", "--keep-last", "1", "--json")
    assert result.code == 3
    assert [bool(each.get("complete")) for each in result.json["series"]] == [True, False, True]
    assert "is a mirror" in result.err
    assert [len(listed(str(tmp_path / name))) for name in ("a", "b", "c")] == [1, 3, 1]
    assert local_cli("prune", "b", str(tmp_path / "b"), "--keep-last", "1").code == 1


# -- what is never removed -----------------------------------------------------------------------------------


def test_the_newest_good_backup_stays(tmp_path: Path) -> None:
    """Of the newest one a stream is missing, of the next it is shorter, the third failed its drill."""
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(6)))
    Path(series, made[-1], "data.zst").unlink()
    with open(Path(series, made[-2], "data.zst"), "r+b") as file:
        file.truncate(20)
    write_drill(series, made[-3], "failed", 1)
    write_drill(series, made[-3], "could not test", 0)
    result = pruned(series, keep_last=1, dry_run=True)
    assert [backup.id for backup in result.kept] == [made[-4], made[-1]]
    assert result.kept[0].protected
    assert {backup.problem.partition(" ")[0] for backup in result.removed if backup.problem} == {"data.zst", "its"}
    assert result.complete
    pruned(series, keep_last=1)
    assert listed(series) == [made[-4], made[-1]]


def test_without_a_good_backup_nothing_goes(tmp_path: Path) -> None:
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(4)))
    for backup in made:
        Path(series, backup, "data.zst").unlink()
    with pytest.raises(GuardError, match="no good backup would be left") as caught:
        pruned(series, keep_last=1)
    assert "data.zst is missing" in caught.value.why
    assert listed(series) == made
    assert pruned(series, keep_last=4).removed == ()
    result = pruned(series, keep_last=1, dry_run=True)
    assert not result.complete


def test_a_manifest_that_cannot_be_read(local_cli: Cli, tmp_path: Path) -> None:
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(5)))
    manifest = Path(series, made[1], names.MANIFEST)
    manifest.write_bytes(manifest.read_bytes()[:-30])
    result = local_cli("prune", series, "--keep-last", "1", "--json")
    assert result.code == 3
    assert made[1] in result.err
    assert listed(series) == [made[1], made[-1]], "the others went"
    kept = result.json["series"][0]["kept"][0]
    assert "can't be read" in kept["reasons"][0]


def test_the_newest_proved_backup_stays(tmp_path: Path) -> None:
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(6)))
    write_drill(series, made[1], "proved")
    write_drill(series, made[2], "proved", 1)
    write_drill(series, made[2], "could not test", 0)
    write_drill(series, made[3], "proved", 1)
    write_drill(series, made[3], "failed", 0)
    assert [backup.id for backup in pruned(series, keep_last=1, unproved_ok=True, dry_run=True).kept] == [made[-1]]
    pruned(series, keep_last=1)
    assert listed(series) == [made[2], made[-1]]


def test_holds(local_cli: Cli, tmp_path: Path) -> None:
    """In force, over, without end, unreadable; told by show; released."""
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(6)))
    hold = hold_backup(f"{series}@{made[0]}", length=3600.0, reason="audit of 2024", now=lambda: NOW)
    assert (hold.id, hold.since, hold.until) == (made[0], "2024-11-21T12:00:00Z", "2024-11-21T13:00:00Z")
    hold_backup(f"{series}@{made[1]}", length=3600.0, reason="", now=lambda: NOW - dt.timedelta(hours=1))
    hold_backup(f"{series}@{made[2]}", length=None, reason="", now=lambda: NOW)
    hold_backup(f"{series}@{made[2]}", length=5.0, reason="in the same second", now=lambda: NOW)
    Path(series, hold_format.hold_key(made[3], NOW)).write_bytes(b"\x00")
    result = pruned(series, keep_last=1)
    assert listed(series) == [made[0], made[2], made[3], made[5]]
    reasons = {backup.id: backup.reasons[0] for backup in result.kept}
    assert "until 2024-11-21T13:00:00Z" in reasons[made[0]] and "audit of 2024" in reasons[made[0]]
    assert "can't be read" in reasons[made[3]]
    assert not Path(series, made[1]).exists(), "a hold that is over goes with its backup"

    shown = local_cli.ok("show", f"{series}@{made[0]}").out.decode()
    assert "audit of 2024" in shown and "until 2024-11-21T13:00:00Z" in shown
    assert "can't be read" in local_cli.ok("show", f"{series}@{made[3]}").out.decode()
    document = local_cli.ok("show", f"{series}@{made[2]}", "--json").json
    assert [each["until"] for each in document["holds"]] == [None, "2024-11-21T12:00:05Z"]
    assert [backup.drill for backup in backhaul.list(series).backups] == [None] * 4, "a hold is no drill"
    assert backhaul.verify(f"{series}@{made[2]}", deep=True).ok
    assert clean(series, now=lambda: NOW + dt.timedelta(days=999)).removed == ()

    assert [release_backup(f"{series}@{made[index]}") for index in (0, 2, 3, 5)] == [1, 2, 1, 0]
    pruned(series, keep_last=1)
    assert listed(series) == [made[5]]
    with pytest.raises(BackupNotFoundError):
        hold_backup(f"{series}@{made[0]}", length=None, reason="")
    with pytest.raises(UsageError):
        hold_backup(series, length=0.0, reason="")


def test_object_lock(cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Retention of all, of the stream alone, a legal hold on the manifest; one whose retention is over goes."""
    server = MotoS3(tmp_path / "server")
    server.start()
    try:
        environment = s3_environment(server.endpoint)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        client = s3_client(server.endpoint)
        client.create_bucket(Bucket="locked", ObjectLockEnabledForBucket=True)
        until = dt.datetime.now(dt.UTC) + dt.timedelta(days=3)
        now = dt.datetime.now(dt.UTC)
        made = [push_at("s3://locked/app", now - dt.timedelta(days=day), b"content") for day in (9, 8, 7, 6)]
        made.append(push_at("s3://locked/app?retain-until=30d", now - dt.timedelta(days=5), b"content"))
        made.append(push_at("s3://locked/app", now - dt.timedelta(days=1), b"content"))
        client.put_object_retention(
            Bucket="locked",
            Key=f"app/{made[0]}/data.zst",
            Retention={"Mode": "GOVERNANCE", "RetainUntilDate": until},
        )
        client.put_object_legal_hold(Bucket="locked", Key=f"app/{made[2]}/manifest.json", LegalHold={"Status": "ON"})
        client.put_object_retention(
            Bucket="locked",
            Key=f"app/{made[3]}/data.zst",
            Retention={"Mode": "GOVERNANCE", "RetainUntilDate": now - dt.timedelta(days=1)},
        )
        result = cli.ok("prune", "s3://locked/app", "--keep-last", "1", "--json", env=environment).json["series"][0]
        assert [backup["id"] for backup in result["removed"]] == [made[1], made[3]]
        reasons = {backup["id"]: backup["reasons"][0] for backup in result["kept"]}
        assert f"data.zst until {until:%Y-%m-%d}" in reasons[made[0]]
        assert "manifest.json is under a legal hold" in reasons[made[2]]
        assert "object lock" in reasons[made[4]]
        for index in (0, 2, 4, 5):
            assert cli.ok("pull", "-q", f"s3://locked/app@{made[index]}", env=environment).out == b"content"
        client.put_object_legal_hold(Bucket="locked", Key=f"app/{made[2]}/manifest.json", LegalHold={"Status": "OFF"})
        arguments = ("prune", "s3://locked/app", "--keep-last", "1", "--json")
        result = cli.ok(*arguments, env=environment).json["series"][0]
        assert [backup["id"] for backup in result["removed"]] == [made[2]]
        client.close()
    finally:
        server.kill()


def test_a_store_that_does_not_say_what_is_locked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may list and read but not look at streams: what can't be known to be free stays, and nothing breaks."""
    world = World(tmp_path / "state")
    with world.process():
        made = [push(["s3://world/app"], MemorySource(b"x"), now=world.now).id for _ in range(4)]
        store = world._store("world", "app")
        look = store.stat

        def stat(key: str) -> StoredObject | None:
            if key == f"{made[1]}/data.zst":
                raise StoreRefusedError("Could not look", "403 Forbidden", "Allow it.")
            return look(key)

        monkeypatch.setattr(store, "stat", stat)
        options = PruneOptions(keep_last=1, max_delete=ALL_MAY, patience=PATIENCE)
        result = prune("s3://world/app", options, now=world.now)
        assert [backup.id for backup in result.removed] == [made[0], made[2]]
        assert "403 Forbidden" in result.problems[0]


# -- others at work in the same series -----------------------------------------------------------------------


@pytest.fixture
def at_delete(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Callable[[], None]]]:
    """Something that happens in the moment before (``before KEY``) or after (``after KEY``) an object is deleted."""
    happens: dict[str, Callable[[], None]] = {}
    real = LocalStore.delete

    def delete(self: LocalStore, key: str, *, etag: str | None = None) -> None:
        happens.pop(f"before {key}", lambda: None)()
        real(self, key, etag=etag)
        happens.pop(f"after {key}", lambda: None)()

    monkeypatch.setattr(LocalStore, "delete", delete)
    yield happens
    assert not happens, "it happened"


def test_a_backup_that_was_replaced_meanwhile_stays(tmp_path: Path, at_delete: dict[str, Callable[[], None]]) -> None:
    series = str(tmp_path / "series")
    made = push_days(series, 0, 1, 2, 3)
    first, second, *_ = made
    manifest = Path(series, first, names.MANIFEST)

    def replace() -> None:
        copied = manifest.with_name("copied")
        copied.write_bytes(manifest.read_bytes())
        copied.replace(manifest)

    at_delete[f"before {first}/manifest.json"] = replace
    result = pruned(series, keep_last=2)
    assert [backup.id for backup in result.removed] == [second]
    assert "another one" in result.problems[0] and first in result.problems[0]
    assert result.kept[0].id == first
    target = tmp_path / "out"
    backhaul.pull(f"{series}@{first}", backhaul.FileTarget(str(target)))
    assert target.read_bytes() == made[first]


def test_a_hold_in_the_last_moment(tmp_path: Path, at_delete: dict[str, Callable[[], None]]) -> None:
    """Set before the manifest goes it holds; set after that it is refused. Never does it hold what is gone."""
    series = str(tmp_path / "series")
    made = push_days(series, 0, 1, 2, 3, 4)
    first, second, third, *_ = made

    def in_time() -> None:
        hold_backup(f"{series}@{first}", length=None, reason="now")

    at_delete[f"before {first}/manifest.json"] = in_time
    refused: list[str] = []

    def too_late() -> None:
        key = hold_format.hold_key(second, NOW)
        try:
            hold_backup(f"{series}@{second}", length=None, reason="now")
        except BackupNotFoundError:
            refused.append(key)

    at_delete[f"after {second}/manifest.json"] = too_late
    result = pruned(series, keep_last=2)
    assert [backup.id for backup in result.removed] == [second, third]
    assert refused
    assert not Path(series, second).exists()
    assert "on hold" in result.kept[0].reasons[0]
    target = tmp_path / "out"
    backhaul.pull(f"{series}@{first}", backhaul.FileTarget(str(target)))
    assert target.read_bytes() == made[first]
    assert [hold.reason for hold in backhaul.show(f"{series}@{first}").holds] == ["now"]


def test_what_comes_during_the_run_is_seen(tmp_path: Path, at_delete: dict[str, Callable[[], None]]) -> None:
    """A hold on one that is still to go: its manifest is not even touched. A manifest that is back keeps its streams."""
    series = str(tmp_path / "series")
    made = push_days(series, 0, 1, 2, 3, 4)
    first, second, *_ = made
    manifest = Path(series, first, names.MANIFEST)
    text = manifest.read_bytes()

    def others() -> None:
        hold_backup(f"{series}@{second}", length=None, reason="")
        manifest.write_bytes(text)

    at_delete[f"after {first}/manifest.json"] = others
    untouched = Path(series, second, names.MANIFEST).stat().st_ino
    result = pruned(series, keep_last=2)
    assert len(result.removed) == 1
    assert Path(series, second, names.MANIFEST).stat().st_ino == untouched
    assert first in result.problems[0]
    target = tmp_path / "out"
    for backup in (first, second):
        backhaul.pull(f"{series}@{backup}", backhaul.FileTarget(str(target)))
        assert target.read_bytes() == made[backup]


def test_two_prunes_and_a_push_at_once(tmp_path: Path, at_delete: dict[str, Callable[[], None]]) -> None:
    series = str(tmp_path / "series")
    made = list(push_days(series, 0, 1, 2, 3, 4))
    newer: list[str] = []

    def others() -> None:
        pruned(series, keep_last=1)
        newer.append(push_at(series, NOW - dt.timedelta(hours=1), b"newer"))

    at_delete[f"before {made[1]}/manifest.json"] = others
    result = pruned(series, keep_last=2)
    # The other one keeps one alone; what both would remove is gone, what either has not planned is not touched.
    assert listed(series) == sorted([made[-1], *newer])
    assert result.complete
    assert sorted(path.name for path in Path(series).iterdir()) == listed(series)


# -- room ----------------------------------------------------------------------------------------------------


def push_megabytes(series: str, *days: int) -> list[str]:
    """Push two megabytes that don't compress for each day."""
    rng = random.Random(7)
    return [
        push_at(series, NOW - dt.timedelta(days=day), rng.randbytes(2_000_000)) for day in sorted(days, reverse=True)
    ]


def test_as_many_as_fit(local_cli: Cli, tmpfs: Path) -> None:
    series = str(tmpfs / "series")
    made = push_megabytes(series, *range(6))
    free = shutil.disk_usage(tmpfs).free
    nothing = local_cli.ok("prune", series, "--keep-free", str(free - 10_000), "--json").json["series"][0]
    assert nothing["removed"] == []
    assert {reason for backup in nothing["kept"] for reason in backup["reasons"]} == {
        "it fits",
        "the newest good backup",
    }
    # Three megabytes more: two of the backups.
    wanted = str(free + 3_000_000)
    said = local_cli.ok("prune", series, "--keep-free", wanted, "--json", "--dry-run").json["series"][0]
    assert [backup["id"] for backup in said["removed"]] == made[:2]
    assert listed(series) == made
    done = local_cli.ok("prune", series, "--keep-free", wanted, "--json").json["series"][0]
    assert done["removed"] == said["removed"]
    assert listed(series) == made[2:]
    assert shutil.disk_usage(tmpfs).free >= int(wanted)
    assert local_cli.ok("prune", series, "--keep-free", wanted, "--json").json["series"][0]["removed"] == []
    push_megabytes(series, -1)  # and there is room for the next one


def test_room_takes_what_rules_keep_and_nothing_else(local_cli: Cli, tmpfs: Path) -> None:
    series = str(tmpfs / "series")
    made = push_megabytes(series, *range(6))
    hold_backup(f"{series}@{made[1]}", length=None, reason="audit")
    write_drill(series, made[3], "proved")
    free = shutil.disk_usage(tmpfs).free
    result = local_cli.ok("prune", series, "--keep-last", "4", "--keep-free", str(free + 3_000_000), "--json").json[
        "series"
    ][0]
    assert [backup["id"] for backup in result["removed"]] == [made[0], made[2]]
    assert result["removed"][1]["reasons"][1] == "else kept: one of the newest 4"
    # Two more would have to go, and only one may: that is no reason to lose it.
    failed = local_cli("prune", series, "--keep-last", "4", "--keep-free", str(free + 8_000_000), "--json")
    assert failed.code == 3
    assert listed(series) == [made[1], *made[3:]]
    for words in (made[1], "audit", made[3], "a drill proved", made[5], "the newest good backup"):
        assert words in failed.err
    assert made[4] not in failed.err


def test_room_that_does_not_come_back(tmpfs: Path) -> None:
    """Somebody still reads what was removed: one backup is lost to that, and not all."""
    series = str(tmpfs / "series")
    made = push_megabytes(series, *range(6))
    free = shutil.disk_usage(tmpfs).free
    waited: list[float] = []
    with open(Path(series, made[0], "data.zst"), "rb"), open(Path(series, made[1], "data.zst"), "rb"):
        result = pruned(series, keep_free=free + 5_000_000, pause=waited.append)
    assert [backup.id for backup in result.removed] == made[:1]
    assert "still reads it" in result.problems[0]
    assert sum(waited) > 5
    assert listed(series) == made[1:]


def test_the_disk_is_asked_after_each_removal(tmp_path: Path) -> None:
    """Backups that free more than their size says: it stops when there is enough."""
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(8)))
    sizes = {b.id: b.size for b in pruned(series, keep_last=99).kept}
    asked: list[int] = []

    def free_space(path: str) -> int:
        assert path == series
        asked.append(10_000 + 5 * sum(sizes[each] for each in made if each not in listed(series)))
        return asked[-1]

    wanted = 10_000 + 4 * sizes[made[0]]
    result = pruned(series, keep_free=wanted, free_space=free_space)
    assert [backup.id for backup in result.removed] == made[:1]
    assert result.complete
    assert result.free == asked[-1] >= wanted


def test_the_guard_bounds_what_goes_for_room(tmp_path: Path) -> None:
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(8)))
    size = pruned(series, keep_last=99).kept[0].size
    with pytest.raises(GuardError, match="3 backups"):
        pruned(series, keep_free=3 * size - 5, free_space=lambda path: 0, max_delete=MaxDelete(files=2))
    assert listed(series) == made

    def half(path: str) -> int:
        return sum(size * 6 // 10 for each in made if each not in listed(series))

    result = pruned(series, keep_free=2 * size - 5, free_space=half, max_delete=MaxDelete(files=2))
    assert [backup.id for backup in result.removed] == made[:2]
    assert "at most 2 backups" in result.problems[0]


def test_nothing_can_be_removed(local_cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first delete is refused: an error. A later one: what went is said, and that not all did."""
    series = str(tmp_path / "series")
    made = list(push_days(series, *range(5)))
    real = LocalStore.delete

    def delete(self: LocalStore, key: str, *, etag: str | None = None) -> None:
        if key.startswith(refused):
            raise StoreRefusedError(f"Could not delete {key}", "not permitted", "Allow it.")
        real(self, key, etag=etag)

    monkeypatch.setattr(LocalStore, "delete", delete)
    refused = made[0]
    with pytest.raises(StoreRefusedError):
        pruned(series, keep_last=1)
    assert listed(series) == made
    refused = f"{made[1]}/data"
    result = pruned(series, keep_last=1)
    assert [backup.id for backup in result.removed] == made[:2]
    assert "not permitted" in result.problems[0]
    assert any("backhaul clean" in remark for remark in result.remarks)
    assert listed(series) == made[2:]
    assert result.kept[0].reasons[-1] == "but it was not removed in this run"


_LEARNING = """
import sys
from pathlib import Path
from backhaul.formats import drill, hold, manifest
learnt = []
sys.setprofile(lambda frame, event, _: learnt.append(1) if frame.f_code.co_name == "get_class_annotations" else None)
for format_, text in zip((drill, hold, manifest), sys.stdin.read().split("====")):
    format_.decode(text.encode(), where="x")
sys.setprofile(None)
assert not learnt
import msgspec
class New(msgspec.Struct):
    a: int
sys.setprofile(lambda frame, event, _: learnt.append(1) if frame.f_code.co_name == "get_class_annotations" else None)
msgspec.json.decode(b'{"a": 1}', type=New)
assert learnt, "this is how it would show"
"""


def test_what_is_read_side_by_side_was_learnt_before(tmp_path: Path) -> None:
    """msgspec learns a struct at its first decoding, and that in several threads at once crashes the process."""
    series = str(tmp_path / "series")
    (backup,) = push_days(series, 0)
    write_drill(series, backup, "proved")
    hold_backup(series, length=None, reason="", now=lambda: NOW)
    drilled = Path(series, drill_record(backup, "")[0])
    files = [drilled, Path(series, hold_format.hold_key(backup, NOW)), Path(series, backup, names.MANIFEST)]
    subprocess.run([sys.executable, "-c", _LEARNING], input=b"====".join(f.read_bytes() for f in files), check=True)
