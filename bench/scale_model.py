"""A model of a push, for hosts that are not here: measured costs of the stages in, the stage that is full first out.

``python -m bench.scale_model`` prints the tables of docs/SCALE.md; ``--write`` puts them there; a test compares.

The model is one of bottlenecks. A push is a row of stages; in a steady state its rate is that of the first one that is
full. There are three kinds: what one thread does in order (reading and hashing the raw stream; hashing what is stored
and putting it into parts), what any number of threads do side by side (compression, sealing, sending), and what only
one thread at a time may do, whichever it is (Python, under its lock). All of them share the cores.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path

import msgspec

from backhaul.formats.part_sizes import PartLayout, plan_layout
from backhaul.formats.profiles import PROFILES
from backhaul.formats.quantities import format_size
from backhaul.operations.memory import push_bound
from backhaul.stores.base import PartRules

ROOT = Path(__file__).resolve().parent.parent
COSTS = ROOT / "docs" / "benchmarks" / "stages.json"
PAGE = ROOT / "docs" / "SCALE.md"
TIB = 1 << 40
MOST = 10_000 * (5 << 30)
HOSTS = (2, 8, 32, 96)
LINES = (1.2, 3.0, 12.0)
SIZES = (1 << 30, 100 << 30, TIB, 10 * TIB, MOST)
# What stores give one client, from a busy one to one without a limit.
REQUEST_RATES = (50, 200, 100_000)
NAMES = (10_000, 100_000, 1_000_000)
_LISTED = 1000


class PushRate(msgspec.Struct, frozen=True):
    """A measured push: on so many cores, in GB/s of raw bytes, with CPU-seconds per raw GB."""

    cores: int
    rate: float
    cpu: float


class StageCosts(msgspec.Struct, frozen=True, kw_only=True):
    """CPU-seconds per GB: of raw bytes up to ``compress`` and for ``python``, of stored ones behind it.

    ``ratio`` is raw to stored; ``frame`` the raw bytes of a frame; ``pushes`` are whole ones, to a directory in memory.
    Seconds per million: ``request`` of small requests by HTTP; ``listing`` of names in answers to listings;
    ``mirror_first`` and ``mirror_again`` of names in a mirror's first run and in one without changes, without both.
    """

    date: str
    machine: str
    read: float
    hash: float
    compress: dict[str, float]
    ratio: float
    digest: float
    crc: float
    copy: float
    seal: float
    write: float
    send: float
    python: float
    listing: float
    request: float
    mirror_first: float
    mirror_again: float
    frame: int
    pushes: tuple[PushRate, ...]


class Stage(msgspec.Struct, frozen=True):
    """What is full at a rate (raw GB/s)."""

    name: str
    rate: float


def stages(
    costs: StageCosts, cores: int, *, line: float | None, level: str = "auto", sealed: bool = False
) -> list[Stage]:
    """Return every stage with the rate at which it is full, the first one first.

    Args:
        costs: as measured.
        cores: of the host.
        line: GB/s that network and source can take, each; None for a directory in memory.
        level: of compression.
        sealed: whether the backup is encrypted.
    """
    small = 1 / costs.ratio
    seal = costs.seal * small if sealed else 0.0
    # To S3: a copy into the part, its CRC, and the sending. To a directory: one write, where the copy would be.
    in_order = costs.digest * small + (costs.write if line is None else costs.copy) * small
    beside = costs.compress[level] + seal + (0.0 if line is None else (costs.crc + costs.send) * small)
    first = costs.read + costs.hash
    found = [
        Stage("all cores", cores / (first + in_order + beside + costs.python)),
        Stage("reading and hashing the stream (one thread)", 1 / first),
        Stage("hashing what is stored, filling parts (one thread)", 1 / in_order),
        Stage("Python's lock", 1 / costs.python if costs.python else math.inf),
    ]
    if line is not None:
        found += [Stage("the network", line * costs.ratio), Stage("the source", line)]
    return sorted(found, key=lambda stage: stage.rate)


def pipeline_rows(costs: StageCosts) -> Iterator[str]:
    """Yield the table of hosts and lines."""
    yield "| cores | line and source | level | full first | rate of the stream | then | at |"
    yield "| ---: | ---: | --- | --- | ---: | --- | ---: |"
    for cores in HOSTS:
        for line in LINES:
            for level in ("auto", "9"):
                first, second = stages(costs, cores, line=line, level=level)[:2]
                yield (
                    f"| {cores} | {line:g} GB/s | {level} | {first.name} | {first.rate:.2f} GB/s "
                    f"| {second.name} | {second.rate:.2f} GB/s |"
                )


def cost_rows(costs: StageCosts) -> Iterator[str]:
    """Yield where it was measured, and the table."""
    yield f"Measured on {costs.date} on {costs.machine}, which others used too; medians of three to five runs."
    yield ""
    yield "| stage | CPU-seconds per GB | of | threads |"
    yield "| --- | ---: | --- | --- |"
    yield f"| read | {costs.read:.3f} | raw | one |"
    yield f"| BLAKE3 | {costs.hash:.3f} | raw | the same one |"
    for level, seconds in costs.compress.items():
        yield f"| compress, {level} | {seconds:.2f} | raw | as many as cores |"
    yield f"| BLAKE3 and CRC64NVME | {costs.digest:.3f} | stored | one |"
    yield f"| copy into a part | {costs.copy:.3f} | stored | the same one |"
    yield f"| CRC64NVME of a part | {costs.crc:.3f} | stored | those that send |"
    yield f"| seal | {costs.seal:.2f} | stored | as many as cores |"
    yield f"| send by HTTP | {costs.send:.2f} | stored | several |"
    yield f"| write into a file in memory | {costs.write:.2f} | stored | one |"
    each = costs.python * costs.frame / 1e9 * 1000
    yield f"| Python itself, at most | {costs.python:.3f} | raw ({each:.2f} ms a frame) | one at a time |"


def check_rows(costs: StageCosts) -> Iterator[str]:
    """Yield the table of what the model says of pushes that were measured."""
    yield "| cores | measured | model | the model is off by |"
    yield "| ---: | ---: | ---: | ---: |"
    for push in costs.pushes[1:]:
        said = stages(costs, push.cores, line=None)[0].rate
        yield f"| {push.cores} | {push.rate:.2f} GB/s | {said:.2f} GB/s | {(said / push.rate - 1) * 100:+.0f}% |"


class Schedule(msgspec.Struct, frozen=True):
    """How a stream is cut: objects, parts, and the largest part."""

    objects: int
    parts: int
    largest: int


def schedule(layout: PartLayout, size: int) -> Schedule:
    """Cut a stream of so many stored bytes as the writer does, part by part."""
    objects = parts = largest = 0
    left = size
    while left > 0:
        objects += 1
        here = min(left, layout.capacity(objects))
        left -= here
        number = 0
        while here > 0:
            number += 1
            part = min(here, layout.part_size(objects, number))
            here -= part
            largest = max(largest, part)
        parts += number
    return Schedule(objects, parts, largest)


def part_rows(costs: StageCosts) -> Iterator[str]:
    """Yield the table of part scheduling."""
    yield "| stored | length | provider | objects | parts | largest part | memory at most, 32 cores |"
    yield "| ---: | --- | --- | ---: | ---: | ---: | ---: |"
    for size in SIZES:
        for known in (False, True):
            for name in ("aws", "r2", "scaleway"):
                profile = PROFILES[name]
                layout = plan_layout(profile.limits, at_most=size if known else None)
                cut = schedule(layout, size)
                rules = PartRules(buffered=True, parallel=profile.parallel, layout=layout)
                frames = int(size * costs.ratio / costs.frame)
                bound = push_bound(32, "auto", [rules], stored_size=size, frames=frames)
                yield (
                    f"| {format_size(size)} | {'known' if known else 'not known'} | {name} | {cut.objects} "
                    f"| {cut.parts:,} | {format_size(cut.largest)} | {format_size(bound.total)} |"
                )


def mirror_rows(costs: StageCosts) -> Iterator[str]:
    """Yield the table of what a mirror asks of its store, and of its host."""
    rates = " / ".join(f"{rate:,}" for rate in REQUEST_RATES)
    yield f"| names | without changes | its CPU | the first run, at least | its CPU | hours at {rates} requests/s |"
    yield "| ---: | ---: | ---: | ---: | ---: | ---: |"
    for names in NAMES:
        pages = -(-names // _LISTED)
        again = (names * (costs.mirror_again + costs.listing) + pages * costs.request) / 1e6
        first = names * (costs.mirror_first + costs.request) / 1e6
        # (Nearly all of it is Python's: a second core makes it hardly shorter.)
        hours = " / ".join(f"{max(names / rate, first) / 3600:.2f}" for rate in REQUEST_RATES)
        asked = f"{names:,} requests"
        yield f"| {names:,} | {pages:,} listings | {again:.1f} s | {asked} | {first:.0f} s | {hours} |"


def render(text: str, costs: StageCosts) -> str:
    """Return the page with its tables as the model has them."""
    tables = {
        "costs": cost_rows(costs),
        "check": check_rows(costs),
        "pipeline": pipeline_rows(costs),
        "parts": part_rows(costs),
        "mirror": mirror_rows(costs),
    }
    for name, rows in tables.items():
        before, _, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition("<!-- end -->")
        text = f"{before}<!-- {name} -->\n" + "\n".join(rows) + f"\n{end}{after}"
    return text


def read_costs() -> StageCosts:
    """Return the costs that lie in docs/benchmarks."""
    return msgspec.json.decode(COSTS.read_bytes(), type=StageCosts)


def main() -> None:
    """Print the page, or put its tables into it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write docs/SCALE.md")
    options = parser.parse_args()
    text = render(PAGE.read_text(), read_costs())
    if options.write:
        PAGE.write_text(text)
    else:
        print(text)


if __name__ == "__main__":
    main()
