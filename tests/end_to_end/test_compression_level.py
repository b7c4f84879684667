"""Frames of many rungs in one stream: it comes back the same, and an interrupted push makes the same ones again."""

from __future__ import annotations

import base64
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from backhaul.testing.data import dump_text, random_bytes
from backhaul.transforms.compress import FRAME_SIZE, LADDER
from tests.conftest import Cli, Files, keys, open_uploads

PART = 8 << 20
# More than fits between the source and the store, whichever of them is fast: an interrupted run has not made it all.
SIZE = 56 * FRAME_SIZE


def choosing(directory: Path, rungs: str) -> dict[str, str]:
    """Return the environment in which frame after frame is made at these rungs, over and over, however things stand."""
    directory.mkdir()
    (directory / "sitecustomize.py").write_text(
        "import itertools\n"
        "from backhaul.operations.leveling import Leveling\n"
        f"rungs = itertools.cycle({[int(rung) for rung in rungs]})\n"
        "Leveling.choose = lambda self: next(rungs)\n"
    )
    return {"PYTHONPATH": os.pathsep.join([str(directory), os.environ.get("PYTHONPATH", "")])}


def test_a_stream_of_all_rungs_comes_back_the_same(local_cli: Cli, tmp_path: Path) -> None:
    count = len(LADDER)
    content = b"".join([*dump_text((2 * count - 1) * FRAME_SIZE), *random_bytes(2 * FRAME_SIZE), *dump_text(1000)])
    environment = choosing(tmp_path / "rungs", "".join(map(str, range(count))))
    pushed = local_cli.ok("push", "store", "--json", input=content, env=environment).json
    assert pushed["compression"] == {"setting": "auto", "rungs": [2] * count, "passed": 2}
    assert pushed["frames"] == 2 * count + 2
    assert pushed["peak_memory"] <= pushed["memory"]["total"]
    assert local_cli.ok("pull", "-q", "store").out == content


def test_a_fixed_level_stays_fixed(local_cli: Cli, tmp_path: Path) -> None:
    content = b"".join(dump_text(3 * FRAME_SIZE))
    environment = choosing(tmp_path / "rungs", "4")
    fixed = local_cli.ok("push", "store", "--json", "--compress", "1", input=content, env=environment).json
    assert fixed["compression"] is None
    assert (
        local_cli.ok("push", "other", "--json", "--compress", "1", input=content).json["stored_size"]
        == (fixed["stored_size"])
    )


@pytest.fixture
def text_files(files: Files) -> Files:
    # Half of it base64: denser rungs save something of all, and parts fill in half the time.
    text = b"".join(dump_text(SIZE // 2))
    noise = base64.b64encode(b"".join(random_bytes(SIZE * 3 // 8)))
    piece = 64 << 10
    files.content = b"".join(each[at : at + piece] for at in range(0, SIZE // 2, piece) for each in (text, noise))
    assert len(files.content) == SIZE
    files.file.write_bytes(files.content)
    return files


def test_an_encrypted_push_that_can_be_gone_on_with_makes_its_frames_at_one_rung(
    text_files: Files, tmp_path: Path
) -> None:
    """Its key outlives the run, in as many places as there are destinations: under it lies one stream, and no other."""
    files = text_files
    to = ["--encrypt-to", files.cli.ok("keygen", "-o", str(tmp_path / "key")).out.decode().strip()]
    usual = files.environment
    files.environment = {**usual, **choosing(tmp_path / "first", "0123")}
    files.interrupt(signal.SIGKILL, 5, *to)
    (journal,) = (files.state / "uploads").iterdir()
    assert [line for line in journal.read_text().splitlines() if '"type":"rung"' in line] == []
    result = files.cli.ok(
        "push", files.series, *to, "--from", str(files.file), "--json",
        env={**usual, **choosing(tmp_path / "second", "4")},
    ).json  # fmt: skip
    assert result["destinations"][0]["reused"] >= 3 * PART
    assert result["compression"] is None
    assert files.cli.ok("pull", "-q", files.series, "--identity", str(tmp_path / "key")).out == files.content
    # What is encrypted and never gone on with follows the bottleneck as everything does.
    piped = files.cli.ok(
        "push", "piped", *to, "--json", input=files.content, env={**usual, **choosing(tmp_path / "third", "4")}
    ).json
    assert piped["compression"]["rungs"][4] == SIZE // FRAME_SIZE


def test_an_interrupted_push_makes_the_same_frames_again(text_files: Files, s3: Any, tmp_path: Path) -> None:
    files = text_files
    usual = files.environment
    files.environment = {**usual, **choosing(tmp_path / "first", "0123")}
    files.interrupt(signal.SIGKILL, 5)
    (journal,) = (files.state / "uploads").iterdir()
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    noted = {line["frame"]: line["rung"] for line in lines if line["type"] == "rung"}
    assert sorted(noted.values()) == sorted(number % 4 for number in range(len(noted)))
    assert len(noted) < SIZE // FRAME_SIZE, "nothing is left that could be made otherwise"
    # Left to itself the second run would make every frame at another rung.
    result = files.cli.ok(
        "push", files.series, "--from", str(files.file), "--json",
        env={**usual, **choosing(tmp_path / "second", "4")},
    ).json  # fmt: skip
    assert result["destinations"][0]["reused"] >= 3 * PART
    assert result["compression"]["rungs"][4] == SIZE // FRAME_SIZE - len(noted)
    assert sum(result["compression"]["rungs"][:4]) == len(noted)
    assert open_uploads(s3, files.bucket) == []
    assert files.cli.ok("pull", "-q", files.series).out == files.content
    assert len(keys(s3, files.bucket)) == 2


def test_a_torn_record_of_an_encrypted_push_is_not_gone_on_with(text_files: Files, tmp_path: Path) -> None:
    """A frame that it said more about could be made otherwise now, and sealed under the same key."""
    files = text_files
    to = ["--encrypt-to", files.cli.ok("keygen", "-o", str(tmp_path / "key")).out.decode().strip()]
    files.interrupt(signal.SIGKILL, 5, *to)
    (journal,) = (files.state / "uploads").iterdir()
    journal.write_bytes(journal.read_bytes() + b'{"type":"rung","fra')
    result = files.push(*to)
    assert result["destinations"][0]["reused"] == 0
    assert "damaged" in result["destinations"][0]["remark"]
    assert files.cli.ok("pull", "-q", files.series, "--identity", str(tmp_path / "key")).out == files.content


def test_what_is_sent_again_to_one_place_and_anew_to_another_is_of_the_same_frames(
    text_files: Files, s3: Any, tmp_path: Path
) -> None:
    """A second destination joins: its journal says all rungs, those of the first run included."""
    files = text_files
    usual = files.environment
    files.environment = {**usual, **choosing(tmp_path / "first", "0123")}
    files.interrupt(signal.SIGKILL, 5)
    other = f"s3://{files.bucket}/second?endpoint={files.proxy.endpoint}"
    files.environment = {**usual, **choosing(tmp_path / "second", "4")}
    files.interrupt(signal.SIGKILL, 5, other)
    files.environment = {**usual, **choosing(tmp_path / "third", "0")}
    arguments = ("push", other, "--from", str(files.file), "--json")
    result = files.cli.ok(*arguments, env=files.environment).json
    assert result["destinations"][0]["reused"] > 0
    assert files.cli.ok("pull", "-q", other).out == files.content
