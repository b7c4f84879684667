"""Who is who, as certificates: an authority, what it says of a host, and the bytes that both are kept in.

An authority (CA) signs one certificate for each host, with the host's name and with what it may do: its
*roles*, as the URIs ``backhaul:send`` and ``backhaul:receive``. A host's *bundle* is PEM: its private key,
its certificate, and the authority's certificate. The authority's own file has its key and certificate alone.

A *shared key* is 32 random bytes. Whoever has them has the same authority, and signs a certificate for
itself: so one way of checking serves both kinds (TLS 1.3, X.509 as in RFC 5280).

No sockets and no files here; times come in as arguments.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import ipaddress
import re

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from backhaul.errors import FormatError, UsageError

SEND = "send"
RECEIVE = "receive"
ROLES = frozenset((SEND, RECEIVE))

SHARED_KEY_SIZE = 32
HOST_DAYS = 3653
"""How long a host's certificate is good for: ten years."""
AUTHORITY_DAYS = 7305
"""How long an authority is good for: twenty years."""

_SHARED_WORD = "BACKHAUL-SHARED-KEY-"
_SHARED_LABEL = b"backhaul fan-out, shared key 1: authority"
_ROLE_PREFIX = "backhaul:"
# Hosts whose clocks differ a little must be able to use a key at once.
_BACK_DATED = dt.timedelta(days=1)
# Certificates that live in memory only, made anew by every process: what ends their use is another shared
# key. So no clock, however wrong, has a say. The end is the one that RFC 5280 (4.1.2.5) means "none" by.
_ALWAYS = (dt.datetime(1970, 1, 1, tzinfo=dt.UTC), dt.datetime(9999, 12, 31, 23, 59, 59, tzinfo=dt.UTC))
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", re.ASCII)

PrivateKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey


class Bundle(msgspec.Struct, frozen=True):
    """What a host's key file holds.

    Attributes:
        name: the host, as its certificate says.
        roles: what it may do.
        chain: its private key and certificate, PEM.
        trusted: the authority's certificate, PEM.
        begins: from when on both certificates are good.
        expires: until when both are.
    """

    name: str
    roles: frozenset[str]
    chain: bytes
    trusted: bytes
    begins: dt.datetime
    expires: dt.datetime


class Authority:
    """Signs the certificates of hosts."""

    def __init__(self, key: PrivateKey, certificate: x509.Certificate) -> None:
        self._key = key
        self._certificate = certificate

    @property
    def expires(self) -> dt.datetime:
        """Until when it is good for anything."""
        return self._certificate.not_valid_after_utc

    def certificate_pem(self) -> bytes:
        """Return its certificate: what hosts check others by."""
        return self._certificate.public_bytes(serialization.Encoding.PEM)

    def pem(self) -> bytes:
        """Return its key and certificate. Whoever has these can make a key for any host."""
        return _key_pem(self._key) + self.certificate_pem()

    def issue(self, name: str, roles: frozenset[str], now: dt.datetime) -> bytes:
        """Return a new bundle for a host, good for ``HOST_DAYS``, but no longer than the authority itself.

        Raises:
            UsageError: the name is none that a host can have.
        """
        end = min(now + dt.timedelta(days=HOST_DAYS), self.expires)
        return self._issue(name, roles, now - _BACK_DATED, end)

    def issue_for_ever(self, name: str) -> bytes:
        """Return a new bundle with all roles and no end, for a certificate that never leaves the memory."""
        return self._issue(name, ROLES, *_ALWAYS)

    def _issue(self, name: str, roles: frozenset[str], begin: dt.datetime, end: dt.datetime) -> bytes:
        name = host_name(name)
        # P-256: every OpenSSL with TLS 1.3 has it, also where policy allows certain curves only.
        key = ec.generate_private_key(ec.SECP256R1())
        alternatives: list[x509.GeneralName] = [_general_name(name)]
        alternatives += [x509.UniformResourceIdentifier(_ROLE_PREFIX + role) for role in sorted(roles)]
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        issuer_id = self._certificate.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value
        builder = (
            x509.CertificateBuilder()
            # (For people: 64 characters is all that a common name may have. What counts is below.)
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name[:64])]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(begin)
            .not_valid_after(end)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(authority=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.SubjectAlternativeName(alternatives), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_subject_key_identifier(issuer_id), critical=False)
        )
        certificate = builder.sign(self._key, _hash_for(self._key))
        return _key_pem(key) + certificate.public_bytes(serialization.Encoding.PEM) + self.certificate_pem()


def new_authority(now: dt.datetime) -> Authority:
    """Return a new authority, good for ``AUTHORITY_DAYS``."""
    key = ec.generate_private_key(ec.SECP256R1())
    digest = x509.SubjectKeyIdentifier.from_public_key(key.public_key()).digest
    return _authority(
        key,
        f"Backhaul fan-out {digest[:4].hex()}",
        x509.random_serial_number(),
        (now - _BACK_DATED, now + dt.timedelta(days=AUTHORITY_DAYS)),
    )


def shared_authority(secret: bytes) -> Authority:
    """Return the authority that a shared key stands for: the same wherever the key is."""
    assert len(secret) == SHARED_KEY_SIZE
    seed = HKDF(hashes.SHA256(), 32, salt=None, info=_SHARED_LABEL).derive(secret)
    return _authority(ed25519.Ed25519PrivateKey.from_private_bytes(seed), "Backhaul fan-out, shared key", 1, _ALWAYS)


def _authority(key: PrivateKey, name: str, serial: int, validity: tuple[dt.datetime, dt.datetime]) -> Authority:
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    public = key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(public)
        .serial_number(serial)
        .not_valid_before(validity[0])
        .not_valid_after(validity[1])
        # Path length 0: no host can make itself an authority.
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(authority=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(public), critical=False)
    )
    return Authority(key, builder.sign(key, _hash_for(key)))


def read_authority(content: bytes) -> Authority:
    """Read what ``Authority.pem`` returned.

    Raises:
        FormatError: it is something else. Nothing of the content is quoted.
    """
    key, own, others = _read_pem(content)
    if others or not _is_authority(own):
        raise FormatError("It is no authority's key", "it is one host's", "Name the directory that has ca.key.")
    try:
        own.verify_directly_issued_by(own)
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise FormatError("It is damaged", "it did not sign itself", "Use a copy of it.") from error
    return Authority(key, own)


def read_bundle(content: bytes) -> Bundle:
    """Read what ``Authority.issue`` returned; the order of the three does not matter.

    Raises:
        FormatError: it is something else, damaged, or put together from several. Nothing of it is quoted.
    """
    key, own, others = _read_pem(content)
    if not others and _is_authority(own):
        raise FormatError(
            "It is the authority's own key",
            "it makes keys, and is none of a host",
            "Copy this host's file here, and keep ca.key where it was made.",
        )
    if len(others) != 1:
        raise FormatError("It is not whole", f"it has {len(others) + 1} certificates, and must have 2", _COPY_AGAIN)
    try:
        own.verify_directly_issued_by(others[0])
        # TLS trusts what it is given and checks no signature there: this finds one that is damaged.
        others[0].verify_directly_issued_by(others[0])
    except (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm) as error:
        raise FormatError(
            "It is put together from several", "the authority in it did not sign the certificate in it", _COPY_AGAIN
        ) from error
    name, roles = identity_in(own)
    pem = serialization.Encoding.PEM
    return Bundle(
        name=name,
        roles=roles,
        chain=_key_pem(key) + own.public_bytes(pem),
        trusted=others[0].public_bytes(pem),
        begins=max(own.not_valid_before_utc, others[0].not_valid_before_utc),
        expires=min(own.not_valid_after_utc, others[0].not_valid_after_utc),
    )


def identity_in(certificate: x509.Certificate) -> tuple[str, frozenset[str]]:
    """Return the host's name and roles from its certificate; roles that are unknown here are left out.

    Raises:
        FormatError: it has not exactly one name, or one that no host can have.
    """
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError) as error:
        raise FormatError("The certificate names no host", "it has no names at all", _MAKE_ONE) from error
    names = [str(n) for kind in (x509.DNSName, x509.IPAddress) for n in found.get_values_for_type(kind)]
    if len(names) != 1:
        raise FormatError("The certificate names no host", f"it has {len(names)} names, and must have one", _MAKE_ONE)
    uris = found.get_values_for_type(x509.UniformResourceIdentifier)
    roles = {uri.removeprefix(_ROLE_PREFIX) for uri in uris if uri.startswith(_ROLE_PREFIX)}
    try:
        return host_name(names[0]), ROLES & roles
    except UsageError as error:
        raise FormatError("The certificate names no host", error.why, _MAKE_ONE) from error


def new_shared_key(secret: bytes) -> bytes:
    """Return the text of a shared key file for 32 random bytes."""
    assert len(secret) == SHARED_KEY_SIZE
    return (
        b"# Backhaul: the key that the hosts of a fan-out share. Who has it can send and receive as any of them.\n"
        b"# The same file goes to every host; readable by its owner alone.\n"
        + f"{_SHARED_WORD}1 {base64.b64encode(secret).decode()}\n".encode()
    )


def is_shared_key(content: bytes) -> bool:
    """Tell whether a file's content is meant to be a shared key, whole or not."""
    return any(line.startswith(_SHARED_WORD.encode()) for line in content.splitlines())


def read_shared_key(content: bytes) -> bytes:
    """Return the 32 bytes of a shared key file.

    Raises:
        FormatError: it is damaged, or of a version unknown here. Nothing of it is quoted.
    """
    lines = [line.strip() for line in content.splitlines()]
    lines = [line for line in lines if line and not line.startswith(b"#")]
    if len(lines) != 1:
        raise FormatError(
            "It is no shared key", f"it has {len(lines)} lines that count, and must have one", _COPY_AGAIN
        )
    word, _, text = lines[0].partition(b" ")
    version = word.removeprefix(_SHARED_WORD.encode())
    if version != b"1":
        raise FormatError(
            "It is a shared key of another version", "this Backhaul knows version 1", "Upgrade it, or make a new key."
        )
    try:
        secret = base64.b64decode(text.strip(), validate=True)
    except (binascii.Error, ValueError):
        # (From None: the error's text could quote the key.)
        raise FormatError("The shared key is damaged", "it is no base64", _COPY_AGAIN) from None
    if len(secret) != SHARED_KEY_SIZE:
        raise FormatError("The shared key is damaged", f"it has {len(secret)} bytes instead of 32", _COPY_AGAIN)
    return secret


def host_name(text: str) -> str:
    """Return a host's name in its one spelling: lower case; an IP address in its shortest form.

    Raises:
        UsageError: it is no name by RFC 1123, and no address.
    """
    if "%" not in text:  # (An address with its interface means something on one host only.)
        try:
            return str(ipaddress.ip_address(text))
        except ValueError:
            pass
    name = text.lower()
    labels = name.split(".")
    # A last label of digits alone is an address that went wrong: 10.0.0.300.
    if len(name) > 253 or not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        raise UsageError(
            f"{text!r} can't be a host's name",
            "a name has letters, digits, '-' and '.' (RFC 1123), or is an IP address",
            "Use the name that the other hosts know it by, such as db2 or db2.example.net.",
        )
    return name


_COPY_AGAIN = "Copy it here again from where it was made."
_MAKE_ONE = "Make it a key: backhaul keys DIR --sender HOST --receiver HOST"


def _read_pem(content: bytes) -> tuple[PrivateKey, x509.Certificate, list[x509.Certificate]]:
    """Return the private key, the certificate that belongs to it, and the others."""
    try:
        key = serialization.load_pem_private_key(content, None)
        certificates = x509.load_pem_x509_certificates(content)
        publics = [certificate.public_key() for certificate in certificates]
    except TypeError:
        raise FormatError(
            "Its private key is locked", "it takes a passphrase", "Use the file as backhaul keys made it."
        ) from None
    except (ValueError, x509.InvalidVersion, UnsupportedAlgorithm) as error:
        why = "it has no private key with certificates that can be read"
        raise FormatError("It is no key, or a damaged one", why, _COPY_AGAIN) from error
    if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
        raise FormatError("Its private key is of no kind used here", "it must be P-256 or Ed25519", _MAKE_ONE)
    own = [at for at, public in enumerate(publics) if public == key.public_key()]
    if len(own) != 1:
        raise FormatError(
            "It is put together from several", "none of its certificates is its private key's", _COPY_AGAIN
        )
    return key, certificates[own[0]], certificates[: own[0]] + certificates[own[0] + 1 :]


def _is_authority(certificate: x509.Certificate) -> bool:
    try:
        return bool(certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca)
    except (x509.ExtensionNotFound, x509.DuplicateExtension, ValueError):
        return False


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _key_usage(*, authority: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not authority,
        key_cert_sign=authority,
        crl_sign=authority,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _key_pem(key: PrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )


def _hash_for(key: PrivateKey) -> hashes.SHA256 | None:
    # (Ed25519 has its own.)
    return None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
