"""Compress and digest, against other implementations where there are any."""

from __future__ import annotations

import random
import subprocess

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import IntegrityError, UsageError
from backhaul.testing.data import dump_text, random_bytes
from backhaul.testing.servers import tool
from backhaul.transforms import compress
from backhaul.transforms.digest import StreamDigest, combine_crc64nvme, crc64nvme, encode_crc64nvme

pytestmark = pytest.mark.unit

SETTINGS = ["auto", "1", "3", "9", "19"]


def blocks() -> dict[str, bytes]:
    text = b"".join(dump_text(4 << 20))
    noise = b"".join(random_bytes(4 << 20))
    return {
        "text": text,
        "noise": noise,
        "half": text[: 2 << 20] + noise[: 2 << 20],
        "zeros": bytes(4 << 20),
        "short": b"x",
        "empty": b"",
    }


@pytest.mark.parametrize("setting", ["auto", "1", "3"])
def test_frames_decode_with_the_zstd_program_and_with_ours(setting: str) -> None:
    compressor = compress.FrameCompressor(setting)
    for name, block in blocks().items():
        frame = compressor.compress(memoryview(block))
        assert len(frame) <= compress.largest_frame(len(block)), name
        done = subprocess.run([tool("zstd"), "-d", "-c"], input=frame, capture_output=True, check=True)
        assert done.stdout == block, name
        out = bytearray(len(block))
        compress.FrameDecompressor().decompress_into(memoryview(frame), memoryview(out))
        assert out == block, name


def test_auto_spends_nothing_on_noise_and_still_compresses_the_rest() -> None:
    compressor = compress.FrameCompressor("auto")
    sizes = {name: len(compressor.compress(memoryview(block))) for name, block in blocks().items()}
    assert sizes["text"] < (4 << 20) / 2.5
    assert sizes["half"] < 3.2 * (1 << 20)
    assert (4 << 20) < sizes["noise"] < (4 << 20) + 1000
    level_one = len(compress.FrameCompressor("1").compress(memoryview(blocks()["text"])))
    assert sizes["text"] <= level_one * 1.02


def test_a_frame_depends_on_its_block_and_its_rung_and_on_nothing_before() -> None:
    """An interrupted push is gone on with by making the same frames again, in another process."""
    content = [block for name, block in blocks().items() if name != "empty"]
    used = compress.FrameCompressor("auto")
    for rung in (0, 4, 1, 5, 2, 4, 3, 1, 0):
        for block in content:
            frame = used.compress(memoryview(block), lambda rung=rung: rung)  # type: ignore[misc]
            fresh = compress.FrameCompressor("auto").compress(memoryview(block), lambda rung=rung: rung)  # type: ignore[misc]
            assert frame == fresh
            out = bytearray(len(block))
            compress.FrameDecompressor().decompress_into(memoryview(frame), memoryview(out))
            assert out == block


def test_dense_rungs_are_dense_and_nobody_asks_for_one_where_nothing_compresses() -> None:
    compressor = compress.FrameCompressor("auto")
    text, noise = memoryview(blocks()["text"]), memoryview(blocks()["noise"])
    sizes = [len(compressor.compress(text, lambda rung=rung: rung)) for rung in (0, 1, 4, 5)]  # type: ignore[misc]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < 0.85 * sizes[0]

    def nobody() -> int:
        raise AssertionError("what does not compress is passed on at no rung")

    compressor.compress(noise, nobody)
    assert compressor.passed


def test_the_tables_of_a_worker_stay_within_the_formula() -> None:
    compressor = compress.FrameCompressor("auto")
    small = memoryview(b"".join(dump_text(100_000)))
    for rung in (*range(len(compress.LADDER)), *reversed(range(len(compress.LADDER))), 6, 1, 6, 2):
        compressor.compress(small, lambda rung=rung: rung)  # type: ignore[misc]
        kept = [compress.LADDER[number].parameters for number in (0, 0, *compressor.kept)]
        assert sum(compress._tables(each) for each in kept) <= compress.context_memory("auto")
        assert rung == 0 or rung in compressor.kept


def test_none_copies() -> None:
    block = bytearray(b"abc")
    copy = compress.FrameCompressor("none").compress(memoryview(block))
    block[0] = 0
    assert copy == b"abc"


@given(st.binary(max_size=5000), st.sampled_from(SETTINGS))
def test_round_trip(block: bytes, setting: str) -> None:
    frame = compress.FrameCompressor(setting).compress(memoryview(block))
    assert len(frame) <= compress.largest_frame(len(block))
    out = bytearray(len(block))
    compress.FrameDecompressor().decompress_into(memoryview(frame), memoryview(out))
    assert bytes(out) == block


def test_every_flipped_byte_of_a_frame_is_found() -> None:
    block = b"".join(dump_text(20_000))
    frame = compress.FrameCompressor("auto").compress(memoryview(block))
    rng = random.Random(5)
    for position in [*range(12), *rng.sample(range(12, len(frame)), 300), len(frame) - 1]:
        bad = bytearray(frame)
        bad[position] ^= 1 << rng.randrange(8)
        out = bytearray(len(block))
        try:
            compress.FrameDecompressor().decompress_into(memoryview(bad), memoryview(out))
        except IntegrityError:
            continue
        assert bytes(out) == block, f"byte {position} changed the content unnoticed"


@pytest.mark.parametrize("size", [0, 1, 19_999, 20_001, 40_000])
def test_a_frame_of_another_size_is_refused(size: int) -> None:
    frame = compress.FrameCompressor("auto").compress(memoryview(b"".join(dump_text(20_000))))
    with pytest.raises(IntegrityError):
        compress.FrameDecompressor().decompress_into(memoryview(frame), memoryview(bytearray(size)))


def test_a_truncated_frame_is_refused() -> None:
    frame = compress.FrameCompressor("auto").compress(memoryview(b"".join(dump_text(20_000))))
    for length in (0, 1, 10, len(frame) // 2, len(frame) - 1):
        with pytest.raises(IntegrityError):
            compress.FrameDecompressor().decompress_into(memoryview(frame[:length]), memoryview(bytearray(20_000)))


@pytest.mark.parametrize("setting", ["0", "20", "-1", "fast", "", "１"])
def test_settings_that_are_refused(setting: str) -> None:
    with pytest.raises(UsageError):
        compress.check_setting(setting)


def test_settings() -> None:
    assert compress.check_setting("07") == "7"
    assert compress.codec_name("none") == "none"
    assert compress.codec_name("7") == "zstd"
    assert 0 < compress.context_memory("auto") < compress.context_memory("19")


@given(st.lists(st.binary(max_size=500), max_size=10))
def test_digest_is_that_of_the_whole(pieces: list[bytes]) -> None:
    digest = StreamDigest()
    combined = 0
    for piece in pieces:
        digest.feed(piece)
        combined = combine_crc64nvme(combined, crc64nvme(piece), len(piece))
    whole = b"".join(pieces)
    assert digest.size == len(whole)
    assert digest.blake3 == blake3(whole).hexdigest()
    assert digest.crc64nvme == crc64nvme(whole) == combined


def test_crc64nvme_check_value() -> None:
    # The check value of CRC-64/NVME in the catalogue of parametrised CRC algorithms.
    assert crc64nvme(b"123456789") == 0xAE8B14860A799888
    assert encode_crc64nvme(0xAE8B14860A799888) == "rosUhgp5mIg="
