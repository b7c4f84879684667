"""Where ``push`` and ``send`` have their stream from: they ask alike, before anything begins."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.conftest import Cli, Result
from tests.end_to_end.test_failures import assert_three_parts

VERBS = [("push", "series"), ("send", "--hosts", "nobody.invalid")]


@pytest.mark.parametrize("verb", VERBS, ids=["push", "send"])
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--",), "nothing follows the --"),
        (("--from", "file", "--", "cat", "file"), "both --from and a command are given"),
    ],
    ids=["no command", "two places"],
)
def test_a_stream_has_one_place(
    local_cli: Cli, tmp_path: Path, verb: tuple[str, ...], words: tuple[str, ...], why: str
) -> None:
    (tmp_path / "file").write_text("one")
    result = local_cli(*verb, *words)
    assert_three_parts(result, 2)
    assert why in result.err
    assert f"backhaul {verb[0]}" in result.err or "Leave one of them out" in result.err
    assert not (tmp_path / "series").exists()


@pytest.mark.parametrize("verb", VERBS, ids=["push", "send"])
def test_a_terminal_is_no_stream(local_cli: Cli, tmp_path: Path, verb: tuple[str, ...]) -> None:
    near, far = os.openpty()
    try:
        process = local_cli.start(*verb, stdin=far)
        _, err = process.communicate(timeout=60)
    finally:
        os.close(near)
        os.close(far)
    assert_three_parts(Result(process.returncode, b"", err.decode()), 2)
    assert "stdin is a terminal" in err.decode()
    assert f"backhaul {verb[0]}" in err.decode()
    assert not (tmp_path / "series").exists()
