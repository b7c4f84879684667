"""A fan-out from the texts that a command line, or a push's destination, has for it."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable

from backhaul.errors import UsageError
from backhaul.formats.quantities import parse_duration, parse_size
from backhaul.formats.roster import SENDER_PORT, parse_destination, parse_hosts, parse_listen
from backhaul.network.credentials import Credentials, default_key_path, load_credentials, plain
from backhaul.operations.fan_out import FanOut, FanOutOptions


def credentials_of(key: str | None, *, insecure_plain: bool, name: str | None = None) -> Credentials:
    """Return what this host shows to others.

    Args:
        key: its key file; None for the usual place.
        insecure_plain: whether to do without.
        name: this host's, where its key has none; None for its host name.

    Raises:
        UsageError: both are given.
        ConfigurationError: there is no usable key.
    """
    name = name or socket.gethostname()
    if insecure_plain:
        if key is not None:
            raise UsageError(
                "--key and --insecure-plain exclude each other", "both are given", "Leave one of them out."
            )
        return plain(name)
    return load_credentials(key or default_key_path(), name=name)


def fan_out_of(
    roster: str | None,
    *,
    min_receivers: int | None = None,
    min_wait: str | None = None,
    max_wait: str | None = None,
    require: str | None = None,
    listen: str | None = None,
    key: str | None = None,
    insecure_plain: bool = False,
    transport: str | None = None,
    group: str | None = None,
    interface: str | None = None,
    rate: str | None = None,
    parity: str | None = None,
    slow: str | None = None,
    max_hold: str | None = None,
    receipt_wait: str | None = None,
    spool: str | None = None,
    spool_size: str | None = None,
    memory: str | None = None,
    on_news: Callable[[str], None] = lambda text: None,
) -> FanOut:
    """Return the fan-out that the settings mean: ``FanOutOptions`` says what each is.

    Raises:
        UsageError: one is malformed, or they exclude each other.
        ConfigurationError: there is no usable key.
    """
    default = FanOutOptions()
    if roster is not None and min_receivers is not None:
        raise UsageError(
            "--hosts and --min-receivers exclude each other", "both are given", "Use --require N to do with fewer."
        )
    if roster is None and min_receivers is None:
        raise UsageError(
            "Nobody is to receive",
            "neither --hosts nor --min-receivers is given",
            "Write: backhaul send --hosts db2,db3",
        )
    for name, value, known in (
        ("transport", transport, ("chain", "multicast")),
        ("slow", slow, ("throttle", "drop")),
    ):
        if value is not None and value not in known:
            raise UsageError(f"--{name} {value} is unknown", f"it takes {' or '.join(known)}", "Correct it.")
    if parity is not None and (not parity.isdecimal() or int(parity) > 64):
        raise UsageError(f"--parity {parity} is no number of pieces", "it takes 0 to 64", "Correct it.")
    where = parse_listen(listen, SENDER_PORT) if listen is not None else None
    options = FanOutOptions(
        hosts=parse_hosts(roster) if roster is not None else (),
        min_receivers=min_receivers or 1,
        min_wait=parse_duration(min_wait) if min_wait is not None else default.min_wait,
        max_wait=parse_duration(max_wait) if max_wait is not None else default.max_wait,
        require=require or default.require,
        address=where.name if where is not None else "",
        port=where.port if where is not None else None,
        transport="multicast" if transport == "multicast" else "chain",
        group=group or default.group,
        interface=interface,
        rate=parse_size(rate) if rate is not None else None,
        parity=int(parity or 0),
        slow=slow or default.slow,
        max_hold=parse_duration(max_hold) if max_hold is not None else default.max_hold,
        receipt_wait=parse_duration(receipt_wait) if receipt_wait is not None else default.receipt_wait,
        spool=spool,
        spool_size=parse_size(spool_size) if spool_size is not None else default.spool_size,
        memory=parse_size(memory) if memory is not None else default.memory,
    )
    if ":" in options.group:
        address, _, port = options.group.rpartition(":")
        options = _with_group(options, address, port)
    if not _is_group(options.group):
        raise UsageError(
            f"--group {options.group} is no multicast group",
            "those are the addresses from 224.0.0.0 to 239.255.255.255",
            "Leave it out, or take one of 239.255.0.0/16.",
        )
    return FanOut(credentials_of(key, insecure_plain=insecure_plain), options, on_news)


def fan_out_at(text: str, on_news: Callable[[str], None] = lambda text: None) -> FanOut:
    """Return the fan-out of ``send:ROSTER?SETTING=VALUE&...``. Raises as ``fan_out_of`` does."""
    roster, settings = parse_destination(text)
    values = {name.replace("-", "_"): value for name, value in settings.items()}
    insecure = values.pop("insecure_plain", None)
    number = int(roster) if roster.isascii() and roster.isdecimal() else None
    return fan_out_of(
        None if number is not None else roster,
        min_receivers=number,
        insecure_plain=insecure is not None and insecure not in ("0", "no", "false"),
        on_news=on_news,
        **values,
    )


def _is_group(address: str) -> bool:
    try:
        return ipaddress.IPv4Address(address).is_multicast
    except ValueError:
        return False


def _with_group(options: FanOutOptions, address: str, port: str) -> FanOutOptions:
    import msgspec

    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise UsageError(f"--group {options.group} has no port", f"{port!r} is none", "Write ADDRESS:PORT.")
    return msgspec.structs.replace(options, group=address, group_port=int(port))
