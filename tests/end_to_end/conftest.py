"""Fixtures of the tests of fan-out: keys, what is sent, and hosts.

A module says with ``HOSTS`` which hosts there are, with ``SWITCH`` what lies between them, and with ``PAYLOAD`` how
large the dump is.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from backhaul.testing.network_lab import Lab
from tests.end_to_end.fan_out_hosts import Hosts, make_keys, make_payload


@pytest.fixture(scope="session")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key for each host; no test changes them."""
    return make_keys(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def payload(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of ``PAYLOAD`` bytes that do not compress."""
    return make_payload(tmp_path_factory.mktemp("payload"), getattr(request.module, "PAYLOAD", 24_000_000))


@pytest.fixture
def hosts(request: pytest.FixtureRequest, tmp_path: Path, keys: Path, payload: Path) -> Iterator[Hosts]:
    with Lab(request.module.HOSTS, getattr(request.module, "SWITCH", None)) as lab:
        yield Hosts(lab, tmp_path, keys, payload)
