"""UDP sockets for multicast, with the kernel's help to send and take many datagrams at once where it gives it.

Numbers that Python's ``socket`` module has no names for are from Linux's ``udp.h``, ``in.h`` and ``socket.h``.
"""

from __future__ import annotations

import socket
import struct

from backhaul.errors import ConfigurationError

UDP_SEGMENT, UDP_GRO = 103, 104
_SO_RCVBUFFORCE = 33
_IP_MULTICAST_ALL = 49
_SEND_BUFFER = 4 << 20
GRO_SIZE = struct.Struct("=i")
ANCILLARY = socket.CMSG_SPACE(GRO_SIZE.size)


def sending_socket(interface: str, *, ttl: int, loop: bool) -> socket.socket:
    """Return a socket whose multicasts leave by the interface with that IPv4 address.

    Raises:
        ConfigurationError: this host has no such address.
    """
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, _address(interface))
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, ttl)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, int(loop))
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        sock.bind((interface, 0))
    except OSError as error:
        sock.close()
        raise _refused(interface, error) from error
    return sock


def segment(sock: socket.socket, size: int) -> bool:
    """Let the kernel cut what is sent into datagrams of that size (0: not any more); tell whether it can."""
    try:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
    except OSError:
        return False
    return True


def group_socket(interface: str, group: str, port: int, buffer: int) -> socket.socket:
    """Return a non-blocking socket for what is sent to a group, joined on the interface with that IPv4 address.

    It is bound to the group's address, so nothing else comes in, and shared with other processes of this host.

    Raises:
        ConfigurationError: the group could not be joined there.
    """
    sock = _receiving(buffer)
    try:
        sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        sock.bind((group, port))
        membership = _address(group) + _address(interface)
        sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
    except OSError as error:
        sock.close()
        raise _refused(f"{group} on {interface}", error) from error
    return sock


def own_socket(interface: str, buffer: int, port: int = 0) -> socket.socket:
    """Return a non-blocking socket for what is sent to this host alone; with port 0 on a free one.

    Raises:
        ConfigurationError: the address or port is not to be had.
    """
    sock = _receiving(buffer)
    try:
        sock.bind((interface, port))
    except OSError as error:
        sock.close()
        raise _refused(f"{interface} port {port}", error) from error
    return sock


def receive_buffer(sock: socket.socket) -> int:
    """Return the bytes of the socket's buffer, as the kernel counts them (it gives twice what was asked for)."""
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)


def _receiving(buffer: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer)
    except PermissionError:  # for root only; others get what net.core.rmem_max lets them have
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    try:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    except OSError:  # before Linux 5.0: datagrams come one by one
        pass
    return sock


def _address(text: str) -> bytes:
    try:
        return socket.inet_aton(text)
    except OSError as error:
        raise _refused(text, error) from error


def _refused(what: str, error: OSError) -> ConfigurationError:
    return ConfigurationError(
        f"No multicast with {what}",
        error.strerror or str(error),
        "Give an IPv4 address that this host has, and a group between 224.0.0.0 and 239.255.255.255.",
    )
