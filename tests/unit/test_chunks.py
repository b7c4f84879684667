"""Chunks sealed and opened, what is damaged or forged, and a roster as people write it."""

from __future__ import annotations

import os
from typing import cast

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from backhaul.errors import FormatError, IntegrityError, UsageError
from backhaul.formats import chunk, fan_out_messages
from backhaul.formats.chunk import HEADER_SIZE, TAG_SIZE, Header
from backhaul.formats.roster import (
    RECEIVER_PORT,
    SETTINGS,
    Host,
    parse_destination,
    parse_host,
    parse_hosts,
    parse_listen,
)
from backhaul.model.fan_out import Abort, FanOutStream, SessionEnd, Start, StreamEnd
from backhaul.model.manifest import ProducerRecord
from backhaul.transforms.seal import Opener, Sealer, SessionKeys

pytestmark = pytest.mark.unit

SIGNER = Ed25519PrivateKey.generate()
KEYS = SessionKeys(b"s" * 16, b"k" * 32, SIGNER.public_key().public_bytes_raw())
END = SessionEnd(
    chunks=3,
    streams=(
        StreamEnd(
            stream=0,
            chunks=1,
            size=5,
            blake3="00" * 32,
            producer=ProducerRecord(kind="command", command=("x",), exit_status=0, seconds=1.0),
        ),
    ),
)
START = Start(
    version=1,
    id="20261122T020000Z",
    sender="a",
    tool="backhaul",
    codec="none",
    streams=(FanOutStream(name="data"),),
    roster=("b", "c"),
)
BODIES: list[Start | StreamEnd | SessionEnd | Abort] = [START, END, END.streams[0], Abort(reason="why")]
SIGNED = st.sampled_from(BODIES)


def sealer(number: int = 0, keys: SessionKeys = KEYS, signer: Ed25519PrivateKey = SIGNER) -> Sealer:
    made = Sealer(keys, signer)
    made.number = number
    return made


def opened(data: bytes | bytearray, keys: SessionKeys = KEYS) -> tuple[Header, bytes]:
    opener = Opener(keys)
    header = opener.header(data)
    return header, bytes(opener.open(header, data))


headers = st.builds(
    Header,
    kind=st.integers(0, 4),
    stream=st.integers(0, 2**16 - 1),
    length=st.integers(TAG_SIZE, chunk.LARGEST_BODY),
    raw=st.integers(0, chunk.LARGEST_RAW),
    number=st.integers(0, 2**64 - 1),
    session=st.binary(min_size=16, max_size=16),
)


@given(headers)
def test_a_header_comes_back(header: Header) -> None:
    data = chunk.encode_header(header)
    assert len(data) == HEADER_SIZE
    assert chunk.decode_header(data, header.session) == header
    assert header.size == HEADER_SIZE + header.length
    with pytest.raises(IntegrityError, match="another session"):
        chunk.decode_header(data, bytes(byte ^ 1 for byte in header.session))


@given(st.binary(max_size=60))
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError):
        chunk.decode_header(data, data[24:40])


@given(headers, st.data())
def test_a_header_out_of_bounds_is_refused(header: Header, data: st.DataObject) -> None:
    """Nobody has memory reserved for what no chunk is."""
    field, values = data.draw(
        st.sampled_from(
            [
                ("kind", st.integers(5, 255)),
                ("length", st.integers(0, TAG_SIZE - 1) | st.integers(chunk.LARGEST_BODY + 1, 2**32 - 1)),
                ("raw", st.integers(chunk.LARGEST_RAW + 1, 2**32 - 1)),
            ]
        )
    )
    wrong = msgspec.structs.replace(header, **{field: data.draw(values)})
    with pytest.raises(IntegrityError):
        chunk.decode_header(chunk.encode_header(wrong), header.session)
    flagged = bytearray(chunk.encode_header(header))
    flagged[5] = data.draw(st.integers(1, 255))
    with pytest.raises(IntegrityError):
        chunk.decode_header(flagged, header.session)


@given(st.binary(max_size=2000), st.integers(0, 2**63), st.integers(0, 65535), st.integers(0, chunk.LARGEST_RAW))
def test_data_comes_back(body: bytes, number: int, stream: int, raw: int) -> None:
    header, got = opened(sealer(number).data(stream, body, raw))
    assert got == body
    assert header == Header(chunk.DATA, stream, len(body) + TAG_SIZE, raw, number, KEYS.session)


@given(SIGNED)
def test_what_is_signed_comes_back(body: Start | StreamEnd | SessionEnd | Abort) -> None:
    header, got = opened(sealer().signed(body))
    assert got == chunk.encode_body(body)
    assert chunk.decode_body(got, cast("type[Start]", type(body))) == body
    assert header.kind in chunk.SIGNED


@given(st.data())
def test_whatever_is_changed_is_found(data: st.DataObject) -> None:
    whole = (
        sealer().data(0, data.draw(st.binary(max_size=300)), 7)
        if data.draw(st.booleans())
        else sealer().signed(data.draw(SIGNED))
    )
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    for damaged in (changed, whole[:place], whole[: max(place, HEADER_SIZE)]):
        with pytest.raises(IntegrityError):
            opened(damaged)


@given(st.binary(max_size=100), st.integers(0, 9), st.integers(0, 9))
def test_a_chunk_can_not_take_the_place_of_another(body: bytes, number: int, other: int) -> None:
    """Not another number, nor another stream, nor another session's of the same key."""
    whole = sealer(number).data(number, body, len(body))
    header = Opener(KEYS).header(whole)
    for changed in (
        msgspec.structs.replace(header, number=other),
        msgspec.structs.replace(header, stream=other),
        msgspec.structs.replace(header, raw=len(body) + other),
    ):
        renamed = chunk.encode_header(changed) + whole[HEADER_SIZE:]
        if changed == header:
            assert opened(renamed)[1] == body
        else:
            with pytest.raises(IntegrityError):
                opened(renamed)
    elsewhere = SessionKeys(b"t" * 16, KEYS.key, KEYS.signer)
    with pytest.raises(IntegrityError, match="another session"):
        opened(whole, elsewhere)
    moved = chunk.encode_header(msgspec.structs.replace(header, session=elsewhere.session)) + whole[HEADER_SIZE:]
    with pytest.raises(IntegrityError):
        opened(moved, elsewhere)


@given(SIGNED)
def test_a_receiver_can_not_make_an_end(body: Start | StreamEnd | SessionEnd | Abort) -> None:
    """It has the session's key, and not the sender's: what it signs, or does not sign, is found out."""
    with pytest.raises(IntegrityError, match="sign"):
        opened(sealer(3, signer=Ed25519PrivateKey.generate()).signed(body))
    # The signature of another chunk: the true one, of the same words at another place of the session.
    true = sealer(2)
    _, text = opened(true.signed(body))
    header = Opener(KEYS).header(sealer(3).signed(body))
    plain = os.urandom(64) + text
    forger = sealer(3)
    with pytest.raises(IntegrityError, match="sign"):
        opened(forger._seal(header.kind, header.stream, plain, len(plain)))
    # Data that says of itself that it is an end.
    data = forger.data(0, plain, len(plain))
    renamed = chunk.encode_header(msgspec.structs.replace(Opener(KEYS).header(data), kind=header.kind))
    with pytest.raises(IntegrityError):
        opened(renamed + data[HEADER_SIZE:])


def test_no_nonce_is_used_twice() -> None:
    """Whatever is sealed: numbers go up by one, and each has a nonce of its own."""
    made = sealer()
    numbers = []
    for count in range(200):
        whole = made.signed(Abort(reason="x")) if count % 7 == 0 else made.data(count % 3, b"same", 4)
        numbers.append(Opener(KEYS).header(whole).number)
    assert numbers == list(range(200))
    assert len({chunk.nonce(number) for number in [*range(3000), 2**32, 2**32 + 1, 2**64 - 1]}) == 3003
    assert all(len(chunk.nonce(number)) == 12 for number in numbers)


@given(st.binary(max_size=200), st.sampled_from([Start, StreamEnd, SessionEnd, Abort]))
def test_a_body_that_is_none_is_refused(text: bytes, kind: type[Start]) -> None:
    with pytest.raises(IntegrityError):
        chunk.decode_body(text, kind)
    with pytest.raises(IntegrityError):
        chunk.decode_body(b'{"reason": "\xff' + text + b'"}', kind)
    with pytest.raises(IntegrityError):
        chunk.decode_body(b'{"version": 1, "chunks": 1, "streams": [{"name": "\xff"}], "codec": "\xff"}', kind)


@given(st.binary(max_size=200))
def test_a_message_that_is_none_is_refused(text: bytes) -> None:
    for words in (text, b'{"type": "bye", "reason": "' + text, b'{"type": "' + text + b'"}', b'{"type": "hello"}'):
        try:
            message = fan_out_messages.decode(words)
        except FormatError:
            continue
        # By chance it was one: then it says the same again.
        assert fan_out_messages.decode(fan_out_messages.encode(message)[fan_out_messages.LENGTH.size :]) == message


# -- rosters -------------------------------------------------------------------------------------------------

names = st.from_regex(r"[a-z0-9][a-z0-9.-]{0,20}", fullmatch=True) | st.ip_addresses().map(str)
hosts = st.builds(Host, name=names, port=st.integers(1, 65535))


@given(hosts, st.integers(1, 65535))
def test_a_host_comes_back(host: Host, usual: int) -> None:
    assert parse_host(host.text(usual), usual) == host


@given(st.lists(hosts, min_size=1, max_size=6, unique_by=lambda host: host.name))
def test_a_roster_comes_back(found: list[Host]) -> None:
    text = ",".join(host.text(RECEIVER_PORT) for host in found)
    assert parse_hosts(text) == tuple(found)
    assert parse_hosts(text.replace(",", " , ")) == tuple(found)
    with pytest.raises(UsageError, match="twice"):
        parse_hosts(f"{text},{found[-1].text(RECEIVER_PORT).upper()}")
    roster, settings = parse_destination(f"send:{text}?require=1&max-wait=5m")
    assert (roster, settings) == (text, {"require": "1", "max-wait": "5m"})


@given(st.text(max_size=30))
def test_any_text_is_a_host_or_a_usage_error(text: str) -> None:
    for parse in (parse_hosts, lambda text: (parse_host(text, 1),), lambda text: (parse_listen(text, 1),)):
        try:
            found = parse(text)
        except UsageError:
            continue
        for host in found:
            assert 0 <= host.port < 65536
            assert not set(host.name) & set(" \n/@,?&")


@given(st.text(max_size=12))
def test_any_setting_is_known_or_a_usage_error(name: str) -> None:
    for text in (f"send:a?{name}=1", f"send:{name}", f"send:a?require=1&{name}"):
        try:
            _, settings = parse_destination(text)
        except UsageError:
            continue
        assert set(settings) <= set(SETTINGS)
    with pytest.raises(UsageError, match="twice"):
        parse_destination("send:a?require=1&require=2")
    with pytest.raises(UsageError, match="did you mean spool"):
        parse_destination("send:a?spol=x")


@pytest.mark.parametrize(
    ("text", "host"),
    [
        (":7410", Host("", 7410)),
        ("7410", Host("", 7410)),
        ("10.0.0.1", Host("10.0.0.1", 9)),
        ("[::1]:7", Host("::1", 7)),
        ("[::1]", Host("::1", 9)),
    ],
)
def test_where_to_listen(text: str, host: Host) -> None:
    assert parse_listen(text, 9) == host
