"""Blocks of a stream to independent Zstandard frames, and back into memory that is used again and again.

Every frame carries its content size and its content checksum (the low half of XXH64, checked by every
decoder). The raw size of a frame is fixed by ``FRAME_SIZE``; only the last may be shorter.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import msgspec
import zstandard

from backhaul.errors import IntegrityError, UsageError
from backhaul.planning.compression_level import Prior

FRAME_SIZE = 4 << 20
# The same bytes and settings make the same frames only with the same library, at the same rungs of the same ladder.
WRITER = f"zstd {'.'.join(map(str, zstandard.ZSTD_VERSION))}, ladder 1"
AUTO = "auto"
NONE = "none"
MAX_LEVEL = 19


class Rung(msgspec.Struct, frozen=True):
    """One way to compress: its parameters, and what it costs and saves against the first rung on many kinds of data."""

    parameters: Mapping[str, int]
    prior: Prior


def _rung(
    strategy: int, window: int, hashes: int, chain: int, search: int, match: int, target: int, prior: Prior
) -> Rung:
    parameters = {
        "strategy": strategy,
        "window_log": window,
        "hash_log": hashes,
        "chain_log": chain,
        "search_log": search,
        "min_match": match,
        "target_length": target,
    }
    return Rung(parameters, prior)


# The rungs that ``auto`` climbs (``planning.compression_level``), of all levels and many settings that were tried those
# that no mixture of others beats on most of five kinds of data (COPY text, pgbench rows, JSON lines, web logs, machine
# code), and whose tables are small: level 19 saves no more than the last one, and takes 49 MiB a core instead of 13.
# The first is strategy fast with tables that fit a core's L2 cache. It is about as fast as level 1, and as dense
# within 2.5% either way, denser on three of the five. Levels 2 to 5 lie above the line from it to the second.
# Who changes anything here changes the ladder's number above, since an interrupted push may go on at these very rungs.
LADDER = (
    _rung(zstandard.STRATEGY_FAST, 19, 13, 6, 1, 6, 0, Prior(1.0, 1.0)),
    _rung(zstandard.STRATEGY_LAZY, 22, 19, 18, 3, 5, 4, Prior(5.0, 0.91)),
    _rung(zstandard.STRATEGY_LAZY2, 22, 19, 19, 3, 5, 8, Prior(6.2, 0.885)),
    _rung(zstandard.STRATEGY_LAZY2, 22, 19, 20, 4, 5, 16, Prior(7.0, 0.875)),
    _rung(zstandard.STRATEGY_LAZY2, 22, 20, 20, 5, 5, 16, Prior(9.1, 0.867)),
    _rung(zstandard.STRATEGY_BTOPT, 22, 18, 21, 4, 5, 48, Prior(73.0, 0.83)),
    _rung(zstandard.STRATEGY_BTULTRA, 22, 20, 21, 6, 3, 128, Prior(206.0, 0.79)),
)
_BASE = LADDER[0].parameters
# Tables of dense rungs that a worker keeps beside those of the first: it seldom needs more than two, side by side.
_KEPT_TABLES = 16 << 20
# For data that does not compress: the same strategy with so large a step that it looks at next to nothing
# and copies (5 GB/s a core into memory that is warm, against 3.7 with a step of one). The result is an ordinary
# frame of raw blocks.
_SKIP_PARAMETERS = {**_BASE, "target_length": 131072}
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
    if setting == AUTO:
        # (One that is dropped for another is gone before that is made.)
        return 2 * _tables(_BASE) + _KEPT_TABLES
    return int(_parameters(setting).estimated_compression_context_size())


class FrameCompressor:
    """Makes frames from blocks. Not thread-safe: one for each worker, since libzstd reuses its tables.

    Attributes:
        passed: whether the last block did not compress, and was passed on as it was.
    """

    def __init__(self, setting: str) -> None:
        self._setting = setting
        self.passed = False
        if setting == NONE:
            return
        self._compressor = zstandard.ZstdCompressor(compression_params=_parameters(setting))
        if setting == AUTO:
            self._skipper = zstandard.ZstdCompressor(compression_params=_checked(_SKIP_PARAMETERS))
            self._dense: dict[int, zstandard.ZstdCompressor] = {}

    @property
    def kept(self) -> list[int]:
        """The dense rungs whose tables are there."""
        return list(self._dense)

    def compress(self, block: memoryview, rung: Callable[[], int] = lambda: 0) -> bytes:
        """Return the block as one frame, or a copy of it where the setting is ``none``.

        What comes out depends on the block, the setting and the rung, and on nothing that was compressed before.

        Args:
            block: what to compress.
            rung: asked for a place on the ladder if the setting is ``auto`` and the block does compress.
        """
        if self._setting == NONE:
            return bytes(block)
        if self._setting != AUTO:
            return self._compressor.compress(block)
        self.passed = self._is_incompressible(block)
        if self.passed:
            return self._skipper.compress(block)
        return self._at(rung()).compress(block)

    def _at(self, rung: int) -> zstandard.ZstdCompressor:
        """Return the compressor of a rung; those used last are kept."""
        if rung == 0:
            return self._compressor
        compressor = self._dense.pop(rung, None)
        if compressor is None:
            needed = _tables(LADDER[rung].parameters)
            while self._dense and sum(_tables(LADDER[kept].parameters) for kept in self._dense) + needed > _KEPT_TABLES:
                del self._dense[next(iter(self._dense))]
            compressor = zstandard.ZstdCompressor(compression_params=_checked(LADDER[rung].parameters))
        self._dense[rung] = compressor  # (the one used last is the last one)
        return compressor

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


def _checked(parameters: Mapping[str, int]) -> zstandard.ZstdCompressionParameters:
    return zstandard.ZstdCompressionParameters(write_checksum=True, write_content_size=True, **parameters)


@functools.cache
def _tables_of(values: tuple[tuple[str, int], ...]) -> int:
    return int(_checked(dict(values)).estimated_compression_context_size())


def _tables(parameters: Mapping[str, int]) -> int:
    """Return the bytes that a compressor with these parameters needs."""
    return _tables_of(tuple(parameters.items()))


def _parameters(setting: str) -> zstandard.ZstdCompressionParameters:
    if setting == AUTO:
        return _checked(_BASE)
    return zstandard.ZstdCompressionParameters.from_level(int(setting), source_size=FRAME_SIZE, write_checksum=True)
