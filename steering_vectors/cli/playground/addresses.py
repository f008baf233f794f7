"""Check where to serve, before anything is loaded."""

from __future__ import annotations

import errno
import re
import socket
from ipaddress import ip_address

from steering_vectors.cli.usage import BadParameter


def check_address(host: str, port: int | None) -> None:
    """Raise BadParameter for a host that is no address of this machine, and OSError for a port that can't be used."""
    family, address = _resolved(host)
    with socket.socket(family, socket.SOCK_STREAM) as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((address, port or 0))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise OSError(f"port {port} is taken: name another, or leave --port out") from None
            if error.errno == errno.EACCES:
                raise PermissionError(f"port {port} is only for administrators: name one above 1023") from None
            raise _no_address(host) from None


def is_loopback(host: str) -> bool:
    """Return True if only this machine reaches an address."""
    return ip_address(_resolved(host)[1].partition("%")[0]).is_loopback


def in_brackets(host: str) -> str:
    """Return a host as URLs have it: an IPv6 address in brackets."""
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


def _resolved(host: str) -> tuple[socket.AddressFamily, str]:
    """Return the family and the address of a host. Raises BadParameter if it has none."""
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        if re.fullmatch(r"[\d.]*", bare):
            ip_address(bare)  # numbers like 256.1.1.1 are no names to ask other machines about
        family, _, _, _, address = socket.getaddrinfo(bare, None, type=socket.SOCK_STREAM)[0]
    except (OSError, ValueError):  # among them UnicodeError, for names that no machine can have
        raise _no_address(host) from None
    return family, str(address[0])


def _no_address(host: str) -> Exception:
    return BadParameter(
        f"{host!r} is no address of this machine: leave --host out, or write 0.0.0.0 to open the page to the network",
        param_hint="--host",
    )
