"""Blocks of a stream to independent Zstandard frames, and back into memory that is used again and again.

Every frame carries its content size and its content checksum (the low half of XXH64, checked by every
decoder). The raw size of a frame is fixed by ``FRAME_SIZE``; only the last may be shorter.
"""

from __future__ import annotations

import zstandard

from backhaul.errors import IntegrityError, UsageError

FRAME_SIZE = 4 << 20
# The same bytes and settings make the same frames only with the same library.
WRITER = f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}"
AUTO = "auto"
NONE = "none"
MAX_LEVEL = 19

# ``auto``: strategy fast with tables that fit a core's L2 cache. Measured on five kinds of data (COPY text,
# pgbench rows, JSON lines, machine code, random text), it is as fast as level 1 or up to 5% faster,
# and as dense within 2.5% either way, denser on three.
_AUTO_PARAMETERS = {
    "strategy": zstandard.STRATEGY_FAST,
    "window_log": 19,
    "hash_log": 13,
    "chain_log": 6,
    "search_log": 1,
    "min_match": 6,
    "target_length": 0,
}
# For data that does not compress: the same strategy with so large a step that it looks at next to nothing
# and copies (5 GB/s a core into memory that is warm, against 3.7 with a step of one). The result is an ordinary
# frame of raw blocks.
_SKIP_PARAMETERS = {**_AUTO_PARAMETERS, "target_length": 131072}
# How ``auto`` decides: four samples spread over the block are compressed; if they save less than this share
# the block is passed on as it is. A wrong guess costs ratio on one block, never correctness.
_SAMPLE_SIZE = 16 << 10
_SAMPLES = 4
_WORTH_SAVING = 0.03
_RLE_BLOCK = 1


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
    return raw_size + (raw_size >> 8) + (64 if raw_size >= 128 << 10 else ((128 << 10) - raw_size) // 2048 + 64)


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

        The frame's structure is measured first. libzstd's streaming interface would accept a frame that is
        cut inside its checksum, without a word; a whole one it decodes in a single pass, straight into
        ``out``, and compares.

        Raises:
            IntegrityError: the checksum does not fit, the frame is cut or continued, or holds another
                number of bytes than ``out``.
        """
        try:
            parameters = zstandard.get_frame_parameters(frame)
            if not parameters.has_checksum or parameters.content_size != len(out):
                raise IntegrityError(
                    "A frame is not the one that belongs here",
                    f"it declares {parameters.content_size} bytes, and should hold {len(out)} and a checksum",
                )
            length = frame_length(frame)
            if length != len(frame):
                raise IntegrityError("A frame is cut or continued", f"it has {len(frame)} bytes and needs {length}")
            if len(out) == 0:
                self._decompressor.decompress(frame)
                return
            count = self._decompressor.stream_reader(frame, read_across_frames=False).readinto(out)
            if count != len(out):
                raise IntegrityError("A frame is too short", f"it holds {count} bytes and should hold {len(out)}")
        except zstandard.ZstdError as error:
            raise IntegrityError("A frame does not decode", str(error)) from error


def frame_length(frame: memoryview) -> int:
    """Return the length that a frame needs by its own block headers (RFC 8878, 3.1.1), checksum included.

    The result exceeds ``len(frame)`` for a frame that is cut.

    Raises:
        zstandard.ZstdError: no frame begins here.
    """
    position = zstandard.frame_header_size(frame)
    checksum = 4 if frame[4] & 0x04 else 0
    while True:
        if position + 3 > len(frame):
            return position + 3 + checksum
        header = frame[position] | frame[position + 1] << 8 | frame[position + 2] << 16
        is_last, kind, size = header & 1, header >> 1 & 3, header >> 3
        position += 3 + (1 if kind == _RLE_BLOCK else size)
        if is_last:
            return position + checksum


def _checked(parameters: dict[str, int]) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(write_checksum=True, write_content_size=True, **parameters)


def _parameters(setting: str) -> zstandard.ZstdCompressionParameters:
    if setting == AUTO:
        return _checked(_AUTO_PARAMETERS)
    return zstandard.ZstdCompressionParameters.from_level(int(setting), source_size=FRAME_SIZE, write_checksum=True)
