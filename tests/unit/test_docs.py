"""What the docs say is what the code does."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import get_args

import pytest
from tools.pages import CONFIG, DIRECTORY, PROVIDERS, config_page, pages, providers_page

from backhaul import errors, version
from backhaul.formats import (
    age,
    catalog,
    chunk,
    drill,
    fan_out_messages,
    hold,
    manifest,
    mirror_plan,
    part_sizes,
    roster,
    run_record,
    seekable,
    signature,
)
from backhaul.formats.config import read_config
from backhaul.model.drill import FAILED, PROVED, UNTESTED
from backhaul.model.job import RUN_STATES
from backhaul.model.manifest import SECTIONS
from backhaul.model.profile import Limits
from backhaul.network import control
from backhaul.operations.fan_out import FanOutOptions
from backhaul.operations.mirror import records
from backhaul.planning import chain
from backhaul.transforms import chunks, compress, encrypt

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parent.parent.parent


def test_the_constants_in_the_format_page() -> None:
    text = (ROOT / "docs" / "FORMAT.md").read_text()
    expected = {
        "frame_size": str(compress.FRAME_SIZE),
        "skippable_magic": f"0x{seekable.SKIPPABLE_MAGIC:08X}",
        "seekable_magic": f"0x{seekable.SEEKABLE_MAGIC:08X}",
        "manifest_format": f"`{manifest.FORMAT}`",
        "manifest_version": f"`{manifest.VERSION}`",
        "chunk": str(age.CHUNK_SIZE),
        "sealed_chunk": str(age.SEALED_CHUNK_SIZE),
        "manifest_label": encrypt.MANIFEST_LABEL.decode(),
        "raw_label": encrypt.RAW_HASH_LABEL.decode(),
        "mac_digits": str(len(manifest.NO_MAC)),
        "part_first": str(part_sizes.FIRST_SIZE),
        "part_step": str(part_sizes.STEPS[-1]),
        "part_reach": f"{part_sizes.plan_layout(Limits()).capacity(1) / 2**40:.1f} TiB",
        "part_equal_largest": str(part_sizes.EQUAL_LARGEST),
        "part_equal_count": str(part_sizes.EQUAL_PARTS),
        "mirror_schema": f"`{catalog.RECORD_SCHEMA}`",
        "plan_schema": f"`{mirror_plan.SCHEMA}`",
        "segment_lines": str(records.SEGMENT_LINES),
        "chunk_smallest": str(chunks.SMALLEST),
        "chunk_average": str(chunks.AVERAGE),
        "chunk_largest": str(chunks.LARGEST),
        "hash_size": str(signature.HASH_SIZE),
        "sections": ", ".join(f"`{section}`" for section in SECTIONS),
        "drill_format": f"`{drill.FORMAT}`",
        "drill_version": f"`{drill.VERSION}`",
        "hold_format": f"`{hold.FORMAT}`",
        "hold_version": f"`{hold.VERSION}`",
        "drill_results": ", ".join(f"`{result}`" for result in (PROVED, FAILED, UNTESTED)),
        "run_format": f"`{run_record.FORMAT}`",
        "run_version": f"`{run_record.VERSION}`",
        "run_states": ", ".join(f"`{state}`" for state in RUN_STATES),
        **_fan_out(),
    }
    found = re.findall(r"<!-- (\w+) -->(.+?)<!-- -->", text, re.DOTALL)
    assert {name for name, _ in found} == set(expected)
    for name, value in found:
        assert value == expected[name], name


def _fan_out() -> dict[str, str]:
    kinds = {chunk.START: "START", chunk.DATA: "DATA", chunk.STREAM_END: "STREAM END"}
    kinds |= {chunk.SESSION_END: "SESSION END", chunk.ABORT: "ABORT"}
    header = chunk.Header(kind=chunk.START, stream=0, length=16, raw=0, number=0, session=bytes(16))
    return {
        "fan_magic": f"`{chunk.encode_header(header)[:4].decode()}`",
        "fan_kinds": ", ".join(f"{number} {word}" for number, word in sorted(kinds.items())),
        "fan_header": str(chunk.HEADER_SIZE),
        "fan_tag": str(chunk.TAG_SIZE),
        "fan_signature": str(chunk.SIGNATURE_SIZE),
        "fan_largest_body": str(chunk.LARGEST_BODY),
        "fan_largest_raw": str(chunk.LARGEST_RAW),
        "fan_hello": str(chunk.LINK_HELLO.size),
        "fan_answer": str(chunk.LINK_ANSWER.size),
        "fan_link_magic": f"`{chunk.LINK_MAGIC.decode()}`",
        "fan_link_context": chunk.LINK_CONTEXT,
        "fan_datagram": str(chunk.DATAGRAM_SIZE),
        "fan_datagram_header": str(chunk.DATAGRAM.size),
        "fan_datagram_magic": f"`{chunk.DATAGRAM_MAGIC.decode()}`",
        "fan_datagram_context": chunk.DATAGRAM_CONTEXT,
        "fan_piece": str(chunk.PIECE_SIZE),
        "fan_probe_magic": f"`{chunk.PROBE_MAGIC.decode()}`",
        "fan_messages": str(fan_out_messages.VERSION),
        "fan_sender_port": str(roster.SENDER_PORT),
        "fan_receiver_port": str(roster.RECEIVER_PORT),
        "fan_group_port": str(FanOutOptions().group_port),
        "fan_silence": f"{control.SILENCE:g}",
        "fan_link_patience": f"{chain.LINK_PATIENCE:g}",
    }


def test_the_constants_in_the_guide_to_fan_out() -> None:
    expected = _fan_out() | {"fan_settings": ", ".join(f"`{name}`" for name in roster.SETTINGS)}
    found = re.findall(r"<!-- (\w+) -->(.+?)<!-- -->", (ROOT / "docs" / "FAN_OUT.md").read_text(), re.DOTALL)
    assert "fan_settings" in {name for name, _ in found}
    for name, value in found:
        assert value == expected[name], name


def test_every_message_of_a_fan_out_is_in_the_format_page() -> None:
    text = (ROOT / "docs" / "FORMAT.md").read_text()
    for message in get_args(fan_out_messages.Message):
        assert f"| `{message.__name__.lower()}` |" in text, message


def test_every_test_that_a_promise_names_exists() -> None:
    text = (ROOT / "docs" / "PROMISES.md").read_text()
    named = set(re.findall(r"`(test_\w+)`", text))
    code = "\n".join(p.read_text() for p in [*ROOT.glob("tests/**/*.py"), *ROOT.glob("src/backhaul/testing/*.py")])
    defined = set(re.findall(r"def (test_\w+)", code))
    assert len(named) > 20
    assert named - defined == set()


def test_the_command_pages_are_up_to_date() -> None:
    made = pages()
    assert sorted(path.name for path in DIRECTORY.iterdir()) == sorted(made)
    for name, text in made.items():
        assert (DIRECTORY / name).read_text() == text, f"{name}: run `make docs`"


def test_the_table_of_providers_is_up_to_date() -> None:
    text = PROVIDERS.read_text()
    assert providers_page(text) == text, "run `make docs`"


def test_the_tables_of_the_config_are_up_to_date() -> None:
    text = CONFIG.read_text()
    assert config_page(text) == text, "run `make docs`"


def test_the_config_of_the_page_is_right() -> None:
    (example,) = re.findall(r"```toml\n(.+?)```", CONFIG.read_text(), re.DOTALL)
    found = read_config([("docs/CONFIG.md", example)], "UTC")
    assert set(found.jobs) == {"orders", "chunks", "prove-orders", "keep-orders", "billing"}


def test_exit_codes_cover_every_error_class() -> None:
    codes = {code for code, _, _ in errors.EXIT_CODES}
    assert codes == {0, 1, 2, 3, 10, 11, 75, 130}
    for code, _, classes in errors.EXIT_CODES:
        assert all(c.exit_code == code for c in classes)

    def below(cls: type[errors.BackhaulError]) -> set[type[errors.BackhaulError]]:
        return {cls}.union(*(below(c) for c in cls.__subclasses__()))

    assert {c.exit_code for c in below(errors.BackhaulError)} <= codes


def test_the_version_is_one() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == version.VERSION


def test_lock_files_hold_no_addresses() -> None:
    for path in (ROOT / "requirements").glob("*.txt"):
        text = path.read_text()
        assert "://" not in text
        assert "--index" not in text
        assert "--find-links" not in text
        for requirement in re.split(r"\n(?=\S)", text):
            assert "--hash=sha256:" in requirement or not requirement.strip(), requirement


def test_links_in_the_docs_lead_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/**/*.md")]:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
