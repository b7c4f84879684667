"""Blocks of a stream to independent Zstandard frames, and back into memory that is used again and again.

Every frame carries its content size and its content checksum (the low half of XXH64, checked by every
decoder). The raw size of a frame is fixed by ``FRAME_SIZE``; only the last may be shorter.
"""

from __future__ import annotations

import zstandard

from backhaul.errors import FormatError, IntegrityError, UsageError

FRAME_SIZE = 4 << 20
AUTO = "auto"
NONE = "none"
MAX_LEVEL = 19

# ``auto``: strategy fast with tables that fit a core's L2 cache. Measured on five kinds of data (COPY text,
# pgbench rows, JSON lines, machine code, random text), it is as fast as level 1 and denser on four.
_AUTO_PARAMETERS = {
    "strategy": zstandard.STRATEGY_FAST,
    "window_log": 19,
    "hash_log": 14,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 6,
    "target_length": 0,
}
# For data that does not compress: the same strategy with so large a step that it looks at next to nothing
# and copies (5 GB/s a core against 1.4 for level 1). The result is an ordinary frame of raw blocks.
_SKIP_PARAMETERS = {**_AUTO_PARAMETERS, "target_length": 131072}
# How ``auto`` decides: four samples spread over the block are compressed; if they save less than this share
# the block is passed on as it is. A wrong guess costs ratio on one block, never correctness.
_SAMPLE_SIZE = 16 << 10
_SAMPLES = 4
_WORTH_SAVING = 0.03


def check_setting(setting: str) -> str:
    """Return the ``--compress`` setting in its normal form.

    Raises:
        UsageError: not ``auto``, ``none`` or a level from 1 to 19.
    """
    if setting in (AUTO, NONE):
        return setting
    if setting.isascii() and setting.isdigit() and 1 <= int(setting) <= MAX_LEVEL:
        return str(int(setting))
    raise UsageError(
        f"--compress {setting} is not known",
        f"it takes auto, none, or a level from 1 to {MAX_LEVEL}",
        "Use auto.",
    )


def codec_name(setting: str) -> str:
    """Return the codec that a setting leads to: ``zstd`` or ``none``."""
    return "none" if setting == NONE else "zstd"


def largest_frame(raw_size: int) -> int:
    """Return the most bytes that a frame of that many raw bytes can take (ZSTD_COMPRESSBOUND and checksum)."""
    return (
        raw_size + (raw_size >> 8) + (64 if raw_size >= 128 << 10 else ((128 << 10) - raw_size) // 2048 + 64)
    )


def context_memory(setting: str) -> int:
    """Return the bytes that one compressor needs for its tables and window."""
    if setting == NONE:
        return 0
    return int(_parameters(setting).estimated_compression_context_size())


class FrameCompressor:
    """Makes frames from blocks. Not thread-safe: one for each worker, since libzstd reuses its tables."""

    def __init__(self, setting: str) -> None:
        self._setting = setting
        if setting == NONE:
            return
        self._compressor = zstandard.ZstdCompressor(compression_params=_parameters(setting))
        if setting == AUTO:
            self._skipper = zstandard.ZstdCompressor(compression_params=_checked(_SKIP_PARAMETERS))

    def compress(self, block: memoryview) -> bytes:
        """Return the block as one frame, or a copy of it where the setting is ``none``."""
        if self._setting == NONE:
            return bytes(block)
        if self._setting == AUTO and self._is_incompressible(block):
            return self._skipper.compress(block)
        return self._compressor.compress(block)

    def _is_incompressible(self, block: memoryview) -> bool:
        if len(block) < _SAMPLES * _SAMPLE_SIZE:
            return False
        step = (len(block) - _SAMPLE_SIZE) // (_SAMPLES - 1)
        for start in range(0, step * (_SAMPLES - 1) + 1, step):
            sample = self._compressor.compress(block[start : start + _SAMPLE_SIZE])
            if len(sample) < _SAMPLE_SIZE * (1 - _WORTH_SAVING):
                return False
        return True


class FrameDecompressor:
    """Decodes frames into the caller's memory. Not thread-safe: one for each worker."""

    def __init__(self) -> None:
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 31)

    def decompress_into(self, frame: memoryview, out: memoryview) -> None:
        """Decode exactly one frame that fills ``out`` exactly; its content checksum is checked.

        libzstd decodes in a single pass, without an inner buffer, when it sees the whole frame and room
        for all of it.

        Raises:
            IntegrityError: the checksum does not fit, or the frame holds fewer or more bytes than ``out``.
        """
        try:
            reader = self._decompressor.stream_reader(frame, read_across_frames=False)
            done = 0
            while done < len(out):
                count = reader.readinto(out[done:])
                if count == 0:
                    raise IntegrityError(
                        "A frame is too short", f"it holds {done} bytes and should hold {len(out)}"
                    )
                done += count
            if reader.read(1):
                raise IntegrityError("A frame is too long", f"it should hold {len(out)} bytes")
        except zstandard.ZstdError as error:
            raise IntegrityError("A frame does not decode", str(error)) from error


def frame_content_size(frame: memoryview) -> int:
    """Return the raw size that a frame's header declares.

    Raises:
        FormatError: there is no frame header.
    """
    try:
        return zstandard.frame_content_size(frame)
    except zstandard.ZstdError as error:
        raise FormatError("No Zstandard frame begins here", str(error)) from error


def _checked(parameters: dict[str, int]) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(write_checksum=True, write_content_size=True, **parameters)


def _parameters(setting: str) -> zstandard.ZstdCompressionParameters:
    if setting == AUTO:
        return _checked(_AUTO_PARAMETERS)
    return zstandard.ZstdCompressionParameters.from_level(
        int(setting), source_size=FRAME_SIZE, write_checksum=True
    )
