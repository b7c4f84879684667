"""The age format, keys and ciphers: against pyrage, against the specification's facts, and against every tampering."""

from __future__ import annotations

import base64
import contextlib
import random
import threading
from collections.abc import Iterator

import msgspec
import pyrage
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
from hypothesis import example, given, settings
from hypothesis import strategies as st

from backhaul.errors import BackhaulError, FormatError, IdentityError, IntegrityError
from backhaul.formats import age, age_armor, age_keys, age_ssh, bech32
from backhaul.formats import manifest as manifest_format
from backhaul.formats.age import CHUNK_SIZE, SEALED_CHUNK_SIZE, Payload
from backhaul.formats.age_keys import X25519Identity
from backhaul.transforms import encrypt
from backhaul.transforms.encrypt import BATCH_CHUNKS, BATCH_SIZE, StreamKey, opened_chunks

pytestmark = pytest.mark.unit

IDENTITY = X25519Identity(bytes(range(32)))
OTHER = X25519Identity(bytes(range(1, 33)))
RECIPIENT = age_keys.parse_recipient(IDENTITY.recipient)
NOISE = random.Random(4).randbytes(3 * BATCH_SIZE + 99)
# Around every boundary: chunks, batches, and several of them.
SIZES = st.one_of(
    st.integers(0, 300),
    st.builds(
        lambda count, unit, off: max(0, count * unit + off),
        st.integers(0, 3),
        st.sampled_from([CHUNK_SIZE, BATCH_SIZE]),
        st.integers(-2, 2),
    ),
)


def sealed(plain: bytes, cuts: int = 50_000) -> bytes:
    key = encrypt.new_key([RECIPIENT])
    return key.header + payload_of(key, plain, cuts)


def payload_of(key: StreamKey, plain: bytes, cuts: int = 50_000) -> bytes:
    pieces = [plain[at : at + cuts] for at in range(0, len(plain), cuts)]
    return b"".join(key.cipher().seal(batch) for batch in encrypt.batches(pieces))


def opened(data: bytes) -> bytes:
    return b"".join(opened_chunks(data, [IDENTITY]))


# -- there and back ------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(size=SIZES, cuts=st.integers(1000, 3_000_000))
@example(size=0, cuts=1)
@example(size=BATCH_SIZE, cuts=BATCH_SIZE)
def test_what_is_sealed_opens_again_here_and_with_pyrage(size: int, cuts: int) -> None:
    plain = NOISE[:size]
    data = sealed(plain, cuts)
    assert opened(data) == plain
    assert pyrage.decrypt(data, [pyrage.x25519.Identity.from_str(IDENTITY.text())]) == plain
    theirs = pyrage.encrypt(plain, [pyrage.x25519.Recipient.from_str(IDENTITY.recipient)])
    assert opened(theirs) == plain
    assert len(theirs) - len(plain) <= len(data) - len(plain) + 200  # (rage adds a stanza of grease)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, at=st.integers(0, 3 * BATCH_SIZE), length=st.integers(0, 3 * CHUNK_SIZE))
def test_any_range_opens_alone(size: int, at: int, length: int) -> None:
    plain = NOISE[:size]
    key = encrypt.new_key([RECIPIENT])
    data = memoryview(key.header + payload_of(key, plain))
    payload = Payload(len(key.header), size)
    assert payload.end == len(data)
    at, length = min(at, size), min(length, size - min(at, size))
    part = payload.covering(at, length)
    stored = data[part.offset : part.offset + part.length]
    assert len(stored) == part.length > 0
    # No more than a chunk too much at either end.
    assert part.length <= (length // CHUNK_SIZE + 2) * SEALED_CHUNK_SIZE
    out = memoryview(bytearray(part.count * CHUNK_SIZE))
    count = key.cipher().open_into(payload, part.first, stored, out)
    skipped = at - part.first * CHUNK_SIZE
    assert out[skipped : skipped + length] == plain[at : at + length]
    assert count == min(part.count * CHUNK_SIZE, size - part.first * CHUNK_SIZE)


@given(st.lists(st.binary(max_size=200_000), max_size=12))
def test_batches_are_whole_chunks_and_only_the_last_is_short(pieces: list[bytes]) -> None:
    batches = list(encrypt.batches(pieces))
    assert b"".join(bytes(chunk) for batch in batches for chunk in batch.chunks) == b"".join(pieces)
    assert [batch.last for batch in batches] == [False] * (len(batches) - 1) + [True]
    assert [batch.first for batch in batches] == [BATCH_CHUNKS * place for place in range(len(batches))]
    chunks = [chunk for batch in batches for chunk in batch.chunks]
    assert all(len(chunk) == CHUNK_SIZE for chunk in chunks[:-1])
    assert len(chunks) == 1 or len(chunks[-1]) > 0
    assert all(len(batch.chunks) == BATCH_CHUNKS for batch in batches[:-1])


def test_one_key_serves_many_threads() -> None:
    key = encrypt.new_key([RECIPIENT])
    cipher, batches = key.cipher(), list(encrypt.batches([NOISE]))
    expected = [key.cipher().seal(batch) for batch in batches]
    wrong: list[int] = []

    def work() -> None:
        for _ in range(20):
            wrong.extend(number for number, batch in enumerate(batches) if cipher.seal(batch) != expected[number])

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_two_streams_share_nothing() -> None:
    first, second = encrypt.new_key([RECIPIENT]), encrypt.new_key([RECIPIENT])
    assert first.export()[:16] != second.export()[:16]
    assert first.header[-16:] != second.header[-16:]
    assert first.authenticate(b"x") != second.authenticate(b"x")
    assert payload_of(first, b"same") != payload_of(second, b"same")


# -- tampering: never a byte that was not sealed, and always an error --------------------------------------------


def refused(data: bytes, plain: bytes) -> type[BackhaulError]:
    """Open what was tampered with; what comes out first must be the beginning of what was sealed."""
    out = b""
    try:
        for chunk in opened_chunks(data, [IDENTITY]):
            out += chunk
    except BackhaulError as error:
        assert plain.startswith(out)
        assert error.why
        return type(error)
    raise AssertionError("it was not noticed")


@settings(max_examples=300, deadline=None)
@given(size=st.sampled_from([0, 1, CHUNK_SIZE, CHUNK_SIZE + 1, 3 * CHUNK_SIZE]), data=st.data())
def test_any_flipped_bit_is_noticed(size: int, data: st.DataObject) -> None:
    whole = bytearray(sealed(NOISE[:size]))
    # Half of the time in the header, which is small.
    place = data.draw(st.one_of(st.integers(0, min(215, len(whole) - 1)), st.integers(0, len(whole) - 1)))
    whole[place] ^= 1 << data.draw(st.integers(0, 7))
    refused(bytes(whole), NOISE[:size])


@settings(max_examples=100, deadline=None)
@given(size=SIZES, data=st.data())
def test_any_truncation_is_noticed(size: int, data: st.DataObject) -> None:
    whole = sealed(NOISE[:size])
    refused(whole[: data.draw(st.integers(0, len(whole) - 1))], NOISE[:size])


def parts_of(data: bytes) -> tuple[bytes, list[bytes]]:
    _, size = age.parse_header(data)
    start = size + age.NONCE_SIZE
    return data[:start], [data[at : at + SEALED_CHUNK_SIZE] for at in range(start, len(data), SEALED_CHUNK_SIZE)]


@pytest.mark.parametrize("whole_chunks", [True, False])
def test_chunks_that_are_cut_off_swapped_repeated_or_added(whole_chunks: bool) -> None:
    plain = NOISE[: 4 * CHUNK_SIZE - (0 if whole_chunks else 100)]
    head, chunks = parts_of(sealed(plain))
    other_head, others = parts_of(sealed(plain))
    assert len(chunks) == 4
    for tampered in (
        chunks[:3],  # truncated at a chunk's end
        chunks[:1],
        [],
        [chunks[1], chunks[0], *chunks[2:]],
        [chunks[0], chunks[2], chunks[1], chunks[3]],
        [*chunks[:3], chunks[2], chunks[3]],
        [*chunks, chunks[3]],
        [*chunks, chunks[0]],
        [*chunks, b"x"],
        [*chunks, bytes(16)],
        [*chunks[:3], chunks[3][:-1]],
        [*chunks[:3], chunks[3] + b"\0"],
        [chunks[0], others[1], *chunks[2:]],  # of another stream, with the same plaintext
        others,
    ):
        assert refused(head + b"".join(tampered), plain) is IntegrityError
    assert refused(other_head + b"".join(chunks), plain) is IntegrityError


def test_an_empty_last_chunk_behind_others_is_refused() -> None:
    key = encrypt.new_key([RECIPIENT])
    plain = NOISE[:CHUNK_SIZE]
    cipher = key.cipher()
    longer = cipher.seal(encrypt.Batch(0, [plain], last=False)) + cipher.seal(encrypt.Batch(1, [b""], last=True))
    assert refused(key.header + longer, plain) is IntegrityError


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_no_header_makes_the_parser_fail_in_another_way(data: st.DataObject) -> None:
    """Fuzz: mangled real headers, and lines out of nowhere. What is accepted, encodes to the same bytes."""
    stanzas = tuple(RECIPIENT.wrap(bytes(16), lambda count: bytes([7]) * count) for _ in range(2))
    good = age.encode_header(stanzas, bytes(16))
    lines = good.split(b"\n")
    strange = st.one_of(
        st.binary(max_size=80),
        st.sampled_from(
            [b"", b"->", b"-> ", b"-> X25519", b"--- ", b"---", b"-> a  b", b"=" * 64, b"A" * 64, b"A" * 65]
        ),
        st.sampled_from(lines),
    )
    for _ in range(data.draw(st.integers(0, 3))):
        place = data.draw(st.integers(0, len(lines) - 1))
        match data.draw(st.sampled_from(["replace", "insert", "delete", "flip"])):
            case "replace":
                lines[place] = data.draw(strange)
            case "insert":
                lines.insert(place, data.draw(strange))
            case "delete" if len(lines) > 1:
                del lines[place]
            case _ if lines[place]:
                at = data.draw(st.integers(0, len(lines[place]) - 1))
                lines[place] = lines[place][:at] + data.draw(st.binary(max_size=2)) + lines[place][at + 1 :]
            case _:
                pass
    mangled = b"\n".join(lines)
    try:
        header, size = age.parse_header(mangled)
    except FormatError as error:
        assert error.why
        return
    assert header.authenticated == age.encode_header(header.stanzas, bytes(16)).rpartition(b" ")[0]
    assert mangled[:size] == header.authenticated + b" " + base64.b64encode(header.mac).rstrip(b"=") + b"\n"
    with contextlib.suppress(FormatError):
        for stanza in header.stanzas:
            IDENTITY.unwrap([stanza])


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=400))
def test_anything_else_is_refused_in_words(data: bytes) -> None:
    for parse in (age.parse_header, age_armor.decode):
        with pytest.raises(FormatError):
            parse(data)
    with pytest.raises(FormatError):
        age_keys.parse_identities(data.decode("latin-1"))
    with pytest.raises(FormatError):
        age_ssh.parse_identity(data)


def test_a_header_without_end_is_not_read_for_ever() -> None:
    endless = age.VERSION_LINE + b"-> X25519 a\n" + (b"A" * 64 + b"\n") * 20_000
    assert len(endless) > age.MAX_HEADER_SIZE
    with pytest.raises(FormatError, match="too long"):
        age.parse_header(endless)


# -- keys ------------------------------------------------------------------------------------------------------


def test_the_specifications_key_pair() -> None:
    """The pair that the text of the specification gives."""
    (identity,) = age_keys.parse_identities(
        "AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX"
    )
    assert identity.recipient == "age1zvkyg2lqzraa2lnjvqej32nkuu0ues2s82hzrye869xeexvn73equnujwj"
    assert (
        bech32.decode("AGE-SECRET-KEY-1GFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPYYSJZGFPQ4EGAEX")[1] == b"\x42" * 32
    )


@pytest.mark.parametrize(
    "text",
    [
        # Valid by BIP 173, whole bytes or not.
        "A12UEL5L",
        "an83characterlonghumanreadablepartthatcontainsthenumber1andtheexcludedcharactersbio1tt5tgs",
        "?1ezyfcl",
    ],
)
def test_bech32_of_bip_173(text: str) -> None:
    prefix, data = bech32.decode(text)
    assert (prefix, data) == (text.lower().rpartition("1")[0], b"")
    assert bech32.encode(prefix, data) == text.lower()


@pytest.mark.parametrize(
    "text",
    ["", "1nwldj5", "pzry9x0s0muk", "1pzry9x0s0muk", "x1b4n0q5v", "li1dgmt3", "A1G7SGD8", "10a06t8", "1qzzfhee", "a1B"],
)
def test_what_is_no_bech32_of_bip_173(text: str) -> None:
    with pytest.raises(FormatError):
        bech32.decode(text)


@given(st.binary(max_size=60), st.data())
def test_bech32_round_trip_and_every_typo(content: bytes, data: st.DataObject) -> None:
    text = bech32.encode("age", content)
    assert bech32.decode(text) == ("age", content) == bech32.decode(text.upper())
    place = data.draw(st.integers(4, len(text) - 1))
    letter = data.draw(st.sampled_from("qpzry9x8gf2tvdw0s3jn54khce6mua7l").filter(lambda one: one != text[place]))
    with pytest.raises(FormatError):
        bech32.decode(text[:place] + letter + text[place + 1 :])


def ssh_key(kind: str) -> tuple[bytes, str]:
    """Return a fresh private key as OpenSSH writes it, and its public line."""
    private = Ed25519PrivateKey.generate() if kind == "ed25519" else generate_private_key(65537, 2048)
    pem = private.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    public = private.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return pem, f"{public.decode()} somebody@some-host"


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_ssh_keys_both_ways_with_pyrage(kind: str) -> None:
    pem, public = ssh_key(kind)
    recipient, identity = age_keys.parse_recipient(public), age_ssh.parse_identity(pem)
    assert identity is not None and identity.recipient == recipient.text
    assert "somebody" not in recipient.text
    key = encrypt.new_key([RECIPIENT, recipient])
    data = key.header + payload_of(key, b"for both")
    assert pyrage.decrypt(data, [pyrage.ssh.Identity.from_buffer(pem)]) == b"for both"
    for one in (identity, IDENTITY):
        assert b"".join(opened_chunks(data, [one])) == b"for both"
    theirs = pyrage.encrypt(b"from rage", [pyrage.ssh.Recipient.from_str(public)])
    assert b"".join(opened_chunks(theirs, [OTHER, identity])) == b"from rage"
    another, _ = ssh_key(kind)
    stranger = age_ssh.parse_identity(another)
    assert stranger is not None
    with pytest.raises(IdentityError):
        list(opened_chunks(data, [stranger]))


def test_other_peoples_keys_and_several_recipients() -> None:
    third = X25519Identity(bytes(range(2, 34)))
    key = encrypt.new_key([RECIPIENT, age_keys.parse_recipient(OTHER.recipient)])
    data = key.header + payload_of(key, b"secret")
    for identities in ([IDENTITY], [OTHER], [third, OTHER]):
        assert b"".join(opened_chunks(data, identities)) == b"secret"
    with pytest.raises(IdentityError):
        list(opened_chunks(data, [third]))
    with pytest.raises(IdentityError):
        list(opened_chunks(data, []))


BAD_RECIPIENTS = {
    "": "no recipient",
    "age1": "no recipient",
    "nonsense": "no recipient",
    IDENTITY.recipient[:-1] + "q": "checksum",
    IDENTITY.recipient.upper()[:20] + IDENTITY.recipient[20:]: "upper and lower",
    bech32.encode("bc", bytes(32)): "begins with age1",
    "age1pq1x34nzsvr0rxjsgdn8zgyhfe8j7ceq5r9rdelkjuh3y235": "does not know",
    "ssh-ed25519 AAAA": "damaged",
    "ssh-ed25519 !!!": "damaged",
    "ssh-dss AAAAB3NzaC1kc3MAAACBA": "no recipient",
    IDENTITY.text(): "secret half",
    IDENTITY.text().lower(): "secret half",
    f"key:{IDENTITY.text()}": "secret half",
    f"'{IDENTITY.text()}'": "secret half",
    "ecdsa-sha2-nistp256 AAAAE2VjZHNhLXNoYTItbmlzdHAyNTYAAAAIbmlzdHAyNTY=": "damaged, or of a kind",
    # y = 1, for which there is no point on the other curve.
    "ssh-ed25519 " + base64.b64encode(b"\0\0\0\x0bssh-ed25519\0\0\0\x20\1" + bytes(31)).decode(): "damaged",
}


@pytest.mark.parametrize("text", BAD_RECIPIENTS, ids=lambda text: text[:16])
def test_what_is_no_recipient_is_refused_with_a_reason(text: str) -> None:
    with pytest.raises(FormatError) as caught:
        age_keys.parse_recipient(text)
    error = caught.value
    assert BAD_RECIPIENTS[text] in f"{error.what} {error.why}"
    assert error.todo
    # (The beginning of a secret key is the same for all of them.)
    assert IDENTITY.text()[20:].lower() not in f"{error.what} {error.why} {error.todo}".lower()


def test_a_recipient_that_begins_like_another_kind() -> None:
    text = "age1tagnp2sxq05a2jlrnadq2828e2wdysehu2lh6xtpss3l9c5wmpkqt8cehr"
    assert age_keys.parse_recipient(text).text == text
    with pytest.raises(FormatError, match="does not know"):
        age_keys.parse_recipient("age1tag1qt8lw0ual6avlwmwatk888yqnmdamm7xfd0wak53ut6elz5c4swx2yqdj4e")


def test_letters_that_only_look_like_others() -> None:
    with pytest.raises(FormatError, match="letters"):
        bech32.decode(IDENTITY.text().replace("K", "\N{KELVIN SIGN}"))


@pytest.mark.parametrize("kind", ["ed25519", "rsa"])
def test_an_ssh_key_with_a_passphrase(kind: str) -> None:
    private = Ed25519PrivateKey.generate() if kind == "ed25519" else generate_private_key(65537, 2048)
    locked = private.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.OpenSSH,
        serialization.BestAvailableEncryption(b"correct horse"),
    )
    assert age_ssh.parse_identity(locked) is None, "it says that it wants one"
    age_ssh.check_passphrases_work(locked)
    identity = age_ssh.parse_identity(locked, "correct horse")
    assert identity is not None and identity.recipient.startswith(f"ssh-{kind}")
    with pytest.raises(FormatError, match="passphrase"):
        age_ssh.parse_identity(locked, "wrong horse")


def test_files_of_keys_name_the_line_and_never_quote_it() -> None:
    good = f"# a comment\n\n  {IDENTITY.text()}  \r\n{OTHER.text()}\n"
    assert [identity.recipient for identity in age_keys.parse_identities(good)] == [
        IDENTITY.recipient,
        OTHER.recipient,
    ]
    damaged = good.replace(OTHER.text(), OTHER.text()[:-3] + "QQQ")
    with pytest.raises(FormatError) as caught:
        age_keys.parse_identities(damaged)
    assert "ine 4" in caught.value.what and OTHER.text()[20:40] not in f"{caught.value} {caught.value.todo}"
    with pytest.raises(FormatError, match="Line 2"):
        age_keys.parse_recipients(f"{IDENTITY.recipient}\nage1nonsense\n")
    for parse in (age_keys.parse_identities, age_keys.parse_recipients):
        with pytest.raises(FormatError, match="There is no"):
            parse("# nothing\n")


def test_nothing_secret_is_shown_by_accident() -> None:
    key = encrypt.new_key([RECIPIENT])
    file_key = key.export()[:16]
    shown = f"{key!r} {key} {IDENTITY!r} {IDENTITY} {age_keys.PassphraseIdentity('hunter2')!r} {[key, IDENTITY]}"
    for secret in (file_key.hex(), repr(file_key)[2:-1], IDENTITY.text(), "hunter2", bytes(range(32)).hex()):
        assert secret not in shown


def test_a_key_id_names_a_key_and_does_not_give_it_away() -> None:
    assert age_keys.key_id(IDENTITY.recipient) != age_keys.key_id(OTHER.recipient)
    assert len(age_keys.key_id(IDENTITY.recipient)) == 16
    assert age_keys.key_id(IDENTITY.recipient) not in IDENTITY.recipient


# -- the manifest's MAC --------------------------------------------------------------------------------------------


def manifest_text(key: StreamKey) -> Iterator[bytes]:
    document = {
        "format": "backhaul-manifest",
        "version": manifest_format.VERSION,
        "id": "20261121T020000Z",
        "started": "2026-11-21T02:00:00Z",
        "finished": "2026-11-21T02:01:00Z",
        "host": "db7",
        "tool": {"name": "backhaul", "version": "0"},
        "producers": [{"kind": "stdin", "seconds": 1.0}],
        "streams": [
            {
                "name": "data",
                "object": "data.zst.age",
                "raw": {"size": 1, "blake3": "00"},
                "stored": {"size": 1, "blake3": "00", "crc64nvme": "AA=="},
                "codec": {"name": "zstd", "frame_size": 1, "setting": "auto"},
                "frames": 1,
                "producer": 0,
                "store": {},
                "encryption": {
                    "format": age.FORMAT,
                    "header_size": len(key.header),
                    "payload_size": 1,
                    "recipients": [],
                    "mac": manifest_format.NO_MAC,
                },
            }
        ],
    }
    text = manifest_format.encode(manifest_format.decode(msgspec.json.encode(document)))
    yield text
    yield text.replace(manifest_format.NO_MAC.encode(), key.authenticate(text).encode())


def is_authentic(key: StreamKey, text: bytes) -> bool:
    manifest = manifest_format.decode(text)
    encryption = manifest.streams[0].encryption
    return encryption is not None and key.is_authentic(
        manifest_format.authenticated_bytes(text, manifest), encryption.mac
    )


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_no_byte_of_a_manifest_can_be_changed(data: st.DataObject) -> None:
    key = encrypt.new_key([RECIPIENT])
    _, text = manifest_text(key)
    assert is_authentic(key, text)
    place = data.draw(st.integers(0, len(text) - 1))
    changed = data.draw(
        st.sampled_from(
            [
                text[:place] + bytes([text[place] ^ 1 << data.draw(st.integers(0, 6))]) + text[place + 1 :],
                text[:place] + b" " + text[place:],
                text[:place] + text[place + 1 :],
                text + b" ",
            ]
        )
    )
    with contextlib.suppress(FormatError):
        assert not is_authentic(key, changed)


def test_tricks_with_the_mac_itself() -> None:
    key = encrypt.new_key([RECIPIENT])
    unsigned, text = manifest_text(key)
    encryption = manifest_format.decode(text).streams[0].encryption
    assert encryption is not None
    mac = encryption.mac
    assert not is_authentic(key, unsigned)
    for changed in (
        text.replace(mac.encode(), mac.upper().encode()),
        text.replace(mac.encode(), mac[:-1].encode()),
        text.replace(mac.encode(), b""),
        text.replace(mac.encode(), "ä".encode() * 64),
        # The same text by an escape, and the MAC a second time where it may mean something.
        text.replace(mac.encode(), f"\\u{ord(mac[0]):04x}{mac[1:]}".encode()),
        text.replace(b'"host": "db7"', f'"host": "{mac}"'.encode()),
        text.replace(b'"host": "db7"', f'"host": "db7", "more": "{mac}"'.encode()),
        text.replace(b'"mac"', b'"mac": "0", "mac"'),
    ):
        assert changed != text
        assert not is_authentic(key, changed)
    assert not is_authentic(encrypt.new_key([RECIPIENT]), text)
