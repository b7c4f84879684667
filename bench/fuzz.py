"""``python -m bench.fuzz``: mangled age headers, armour and keys through the parsers, and what comes of them.

Counts for docs/RELIABILITY.md; ``COUNT`` sets how many. Every input is made from a real one by up to four changes.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable

from backhaul.errors import BackhaulError
from backhaul.formats import age, age_armor
from backhaul.formats.age_keys import new_identity, parse_identities, parse_recipient, parse_recipients, unwrap
from backhaul.transforms.encrypt import new_key

COUNT = int(os.environ.get("COUNT", "200000"))


def mangled(good: bytes, rng: random.Random) -> bytes:
    """Return bytes that were real once: bits flipped, pieces cut out, doubled, swapped or replaced."""
    data = bytearray(good)
    for _ in range(rng.randrange(1, 5)):
        at, end = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        end = min(end, at + 80)
        match rng.randrange(5):
            case 0 if at < len(data):
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at:end]
            case 2:
                data[at:at] = data[at:end]
            case 3:
                data[at:end] = rng.choice(
                    [b"\n", b"-> ", b"---", b" ", b"=", b"\0", b"A" * 64 + b"\n", rng.randbytes(9)]
                )
            case _:
                data[at:end] = data[at:end][::-1]
    return bytes(data)


def main() -> None:
    """Print a row for each parser."""
    rng = random.Random(20261121)
    identity = new_identity(os.urandom)
    recipient = parse_recipient(identity.recipient)
    header = new_key((recipient, recipient)).header
    armoured = (
        b"-----BEGIN AGE ENCRYPTED FILE-----\n"
        + age.encode64(header).encode()[:64]
        + b"\n-----END AGE ENCRYPTED FILE-----\n"
    )
    key_file = f"# created\n{identity.text()}\n".encode()
    recipients = f"# team\n{identity.recipient}\n".encode()

    def open_header(data: bytes) -> None:
        parsed, _ = age.parse_header(data)
        age.check_mac(parsed, unwrap(parsed, [identity]))

    parsers: tuple[tuple[str, bytes, Callable[[bytes], object]], ...] = (
        ("header: parse, unwrap, MAC", header, open_header),
        ("armour", armoured, age_armor.decode),
        ("identities", key_file, lambda data: parse_identities(data.decode("utf-8", "replace"))),
        ("recipients", recipients, lambda data: parse_recipients(data.decode("utf-8", "replace"))),
    )
    print("| parser | mangled inputs | refused | taken: still well-formed | any other outcome |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, good, parse in parsers:
        refused = taken = 0
        for _ in range(COUNT):
            try:
                parse(mangled(good, rng))
                taken += 1
            except BackhaulError:
                refused += 1
        print(f"| {name} | {COUNT} | {refused} | {taken} | 0 |", flush=True)


if __name__ == "__main__":
    main()
