"""What the kernel says of idle cores, whatever it says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from backhaul.operations.leveling import IdleCores

pytestmark = pytest.mark.unit

OWN = min(os.sched_getaffinity(0))
TICK = os.sysconf("SC_CLK_TCK")


class Kernel:
    """A file of counters and a clock; each look is a second after the one before."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.now = 100.0
        self.idle = IdleCores(str(path), lambda: self.now)

    def look(self, idle: int, waiting: int = 0) -> float | None:
        self.now += 1.0
        # (Of the whole host, of a core of ours, and of one that is none of ours.)
        self.path.write_text(f"cpu  1 2 3 999 9\ncpu{OWN} 5 0 5 {idle} {waiting} 0\ncpu4000 5 0 5 77777 0 0\nintr 12\n")
        return self.idle.look()


@pytest.fixture
def kernel(tmp_path: Path) -> Kernel:
    return Kernel(tmp_path / "stat")


def test_idle_and_waiting_time_of_our_own_cores_adds_up(kernel: Kernel) -> None:
    assert kernel.look(10 * TICK) == 0.0
    assert kernel.look(11 * TICK) == pytest.approx(1.0)
    assert kernel.look(11 * TICK, waiting=TICK // 2) == pytest.approx(1.5)


def test_it_is_not_asked_again_within_a_quarter_of_a_second(kernel: Kernel) -> None:
    kernel.look(10 * TICK)
    kernel.now -= 0.8
    assert kernel.look(20 * TICK) == 0.0
    assert kernel.look(20 * TICK) == pytest.approx(10.0)


def test_a_counter_that_goes_back_is_not_counted_twice(kernel: Kernel) -> None:
    kernel.look(10 * TICK)
    assert kernel.look(12 * TICK) == pytest.approx(2.0)
    assert kernel.look(11 * TICK) == pytest.approx(2.0)
    assert kernel.look(13 * TICK) == pytest.approx(3.0)


def test_a_kernel_that_does_not_say_is_none_and_one_that_stops_saying_adds_nothing(kernel: Kernel) -> None:
    kernel.now += 1.0
    assert kernel.idle.look() is None
    kernel.look(10 * TICK)
    kernel.look(12 * TICK)
    kernel.path.unlink()
    kernel.now += 1.0
    assert kernel.idle.look() == pytest.approx(2.0)
