"""The guard against server-side request forgery: which URLs and which addresses a webhook may be sent to.

The server sends a request to a URL that a tenant chose, from inside the operator's network. That request must not reach
services that only this network reaches. A host name can resolve to another address at any moment. So the guard
resolves the name, checks every address, and the HTTP sender connects to a checked address.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from urllib.parse import urlsplit

from ..errors import InvalidInput, Problem

MAX_URL_CHARS = 2_048
MAX_HOST_CHARS = 253
MAX_ADDRESSES = 16
"""Addresses of one name that are checked and used; every checked address must be allowed."""
FIRST_FREE_PORT = 1_024
"""Lower ports are refused, except 443: a webhook must not reach mail servers and other system services."""
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""From host and port to addresses as text. Raises OSError if there are none."""

_LABEL = re.compile(r"(?!-)[A-Za-z0-9_-]{1,63}(?<!-)")
_NUMBER = re.compile(r"[0-9]+|0[xX][0-9A-Fa-f]*")
_COMPATIBLE = IPv6Network("::/96")
_MAPPED = IPv6Network("::ffff:0:0/96")
_TRANSLATED = IPv6Network("::ffff:0:0:0/96")
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")
_TO4 = IPv6Network("2002::/16")
_TEREDO = IPv6Network("2001::/32")
_ISATAP = (0x0000_5EFE, 0x0200_5EFE)
_NAT64 = IPv6Network("64:ff9b::/96")
_UNICAST = IPv6Network("2000::/3")
_BLOCKED_V6 = tuple(
    map(
        IPv6Network,
        # Teredo, ORCHID and documentation within 2001::/23 and beside it; 6to4; documentation again.
        ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20"),
    )
)
_BLOCKED_V4 = tuple(map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24")))
"""Networks that `ipaddress` calls global but that are no public hosts: protocol assignments, relays of 6to4."""
_NEVER_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32",
            # Metadata services outside link-local: Alibaba, Azure, Oracle.
            "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32",
        ),
    )
)  # fmt: skip
_NEVER_V6 = tuple(
    # The last two are the metadata services of Amazon and Google.
    map(IPv6Network, ("::/128", "fe80::/10", "ff00::/8", "fd00:ec2::/32", "fd20:ce::/32"))
)


class Refused(Exception):
    """The address is not allowed. Callers turn it into a Problem, or into a failed attempt."""


@dataclass(frozen=True, slots=True)
class Target:
    """The parts of an allowed URL. `host` is lower case without brackets; `path` begins with `/` and includes the
    query."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """What the Host header says."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


# --- URLs -----------------------------------------------------------------------------------------------------


def parse_url(url: str, *, allow_private: bool = False) -> Target:
    """Parse a webhook's URL without resolving its name. Raises InvalidInput, which names the field `url`.

    `allow_private` allows http, every port, and private addresses.
    """
    problem = url_problem(url, allow_private=allow_private)
    if problem is not None:
        raise InvalidInput([Problem("url", problem)])
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80), path)


def url_problem(url: str, *, allow_private: bool) -> str | None:
    """The problem for which `parse_url` refuses a URL; None if it accepts the URL."""
    if not 1 <= len(url) <= MAX_URL_CHARS:
        return f"found {len(url)} characters, expected 1 to {MAX_URL_CHARS}"
    if not url.isascii() or any(c <= " " or c in '\\"<>^`{|}\x7f' for c in url):
        return "found a character that must be encoded, expected printable ASCII (a name such as xn--bcher-kva.example)"
    schemes = ("https", "http") if allow_private else ("https",)
    try:
        parts = urlsplit(url)
        port = parts.port
        host = parts.hostname or ""
    except ValueError as error:
        return f"is not a URL: {error}"
    if parts.scheme not in schemes:
        found = f"the scheme {parts.scheme[:32]!r}" if parts.scheme else "no scheme"
        return f"found {found}, expected {' or '.join(schemes)}"
    if "@" in parts.netloc:
        return "found a user name, expected none: a webhook is authenticated by its signature"
    if "#" in url:
        return "found a fragment, expected none: it is never sent"
    if port == 0 or not (allow_private or port in (None, 443) or port >= FIRST_FREE_PORT):
        return f"found the port {port}, expected 443 or one from {FIRST_FREE_PORT} on"
    return _host_problem(parts.netloc, host.rstrip("."), allow_private)


def _host_problem(netloc: str, host: str, allow_private: bool) -> str | None:
    if not host or len(host) > MAX_HOST_CHARS:
        return "found no host, expected the name of one"
    if netloc.startswith("["):
        return _literal_problem(host, allow_private)
    labels = host.split(".")
    # Some resolvers read a host whose last label is a number as an address: 2130706433, 0x7f.1, 0177.0.0.1.
    if _NUMBER.fullmatch(labels[-1]):
        return _literal_problem(host, allow_private)
    if not all(_LABEL.fullmatch(label) for label in labels):
        return f"found the host {host[:64]!r}, expected a name or an address"
    if labels[-1] == "localhost" and not allow_private:
        return "found localhost, expected a public address"
    return None


def _literal_problem(host: str, allow_private: bool) -> str | None:
    try:
        address = ip_address(host)
    except ValueError:
        return f"found the address {host[:64]!r}, expected four decimal numbers, or IPv6 in brackets"
    if isinstance(address, IPv6Address) and address.scope_id is not None:
        return "found an address with a zone, expected one without"
    return address_problem(address, allow_private)


# --- Addresses ------------------------------------------------------------------------------------------------


def address_problem(address: IPv4Address | IPv6Address, allow_private: bool = False) -> str | None:
    """Why an address is refused; None if it is allowed.

    `allow_private` allows loopback and private addresses. Always refused, in every IPv6 form: the addresses of cloud
    metadata services (link-local and others), multicast and the unspecified address.
    """
    inner = _inner(address)
    hidden = _embedded(address) if isinstance(address, IPv6Address) else ()
    if isinstance(inner, IPv4Address):
        forbidden = _is_in(inner, _NEVER_V4) or not (allow_private or _is_public_v4(inner))
    else:
        forbidden = _is_in(inner, _NEVER_V6) or not (allow_private or _is_public_v6(inner))
    # No tunnel leads to 0.0.0.0/8, and ::1 is not a form of 0.0.0.1.
    if not forbidden and not any(_is_in(one, _NEVER_V4[1:]) for one in hidden):
        return None
    expected = "one that is not link-local or multicast" if allow_private else "a public address"
    return f"found the address {address}, expected {expected}"


def _inner(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address inside a mapped or translated (NAT64) IPv6 address; any other address itself."""
    if isinstance(address, IPv6Address) and (address in _MAPPED or address in _NAT64):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _embedded(address: IPv6Address) -> tuple[IPv4Address, ...]:
    """Every IPv4 address to which a router, a tunnel or a translator may forward an IPv6 address."""
    bits = int(address)
    low = bits & 0xFFFF_FFFF
    found = []
    if (bits >> 32) & 0xFFFF_FFFF in _ISATAP or any(
        address in network for network in (_COMPATIBLE, _MAPPED, _TRANSLATED, _NAT64)
    ):
        found.append(low)
    if address in _TO4:
        found.append((bits >> 80) & 0xFFFF_FFFF)
    if address in _TEREDO:  # the address of the server, and that of the client with all bits inverted
        found += [(bits >> 64) & 0xFFFF_FFFF, low ^ 0xFFFF_FFFF]
    if address in _LOCAL_NAT64:  # RFC 6052: after 48, 56, 64 or 96 bits, around the eight bits that are zero
        high, rest = bits >> 64, bits & 0xFFFF_FFFF_FFFF_FFFF
        found += [
            low,
            (high & 0xFFFF) << 16 | (rest >> 40) & 0xFFFF,
            (high & 0xFF) << 24 | (rest >> 32) & 0xFF_FFFF,
            (rest >> 24) & 0xFFFF_FFFF,
        ]
    return tuple(map(IPv4Address, found))


def _is_in(address: IPv4Address | IPv6Address, networks: Sequence[IPv4Network] | Sequence[IPv6Network]) -> bool:
    return any(address in network for network in networks)


def _is_public_v4(address: IPv4Address) -> bool:
    return address.is_global and not address.is_multicast and not _is_in(address, _BLOCKED_V4)


def _is_public_v6(address: IPv6Address) -> bool:
    return address in _UNICAST and address.is_global and not _is_in(address, _BLOCKED_V6)


async def resolve(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, from the machine's resolver. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def addresses_of(target: Target, *, allow_private: bool, resolver: Resolver = resolve) -> list[str]:
    """The addresses of a target, all of them allowed.

    Raises Refused if one is not allowed, because such a name is an attack or misconfigured; OSError if there are none.
    """
    try:
        found: Sequence[str] = [str(ip_address(target.host))]
    except ValueError:
        found = await resolver(target.host, target.port)
    if not found:
        raise OSError(f"{target.host} has no address")
    for text in found[:MAX_ADDRESSES]:
        address = ip_address(text.partition("%")[0])
        if problem := address_problem(address, allow_private):
            raise Refused(f"{target.host}: {problem}" if text != target.host else problem)
    return list(found[:MAX_ADDRESSES])
