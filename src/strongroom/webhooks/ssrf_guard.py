"""Which addresses a webhook may be sent to: what its URL may say, and which addresses its name may lead to.

A URL that a tenant chose is fetched from inside the operator's network, so it must not reach what only that network
does (server-side request forgery). A name says nothing of where it leads, and may lead elsewhere a moment later: so it
is resolved here, every address is checked, and the connection is made to a checked address (`http_sender.py`).
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
"""Of the addresses of one name, so many are looked at, and all of these must be allowed."""
FIRST_FREE_PORT = 1_024
"""Below it, only 443: a webhook must not speak to mail servers and their like."""
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]
"""Host and port to addresses as text. Raises OSError if there are none."""

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
"""What `ipaddress` calls global and is not for the likes of us: protocol assignments, relays of 6to4."""
_NEVER_V4 = tuple(
    map(
        IPv4Network,
        (
            "0.0.0.0/8", "169.254.0.0/16", "224.0.0.0/4", "255.255.255.255/32",
            # Where clouds keep a machine's credentials beside link-local: Alibaba, Azure, Oracle.
            "100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32",
        ),
    )
)  # fmt: skip
_NEVER_V6 = tuple(
    # The last two: the metadata of Amazon, Google.
    map(IPv6Network, ("::/128", "fe80::/10", "ff00::/8", "fd00:ec2::/32", "fd20:ce::/32"))
)


class Refused(Exception):
    """The address may not be reached. Never leaves the library: it becomes a problem, or a failed attempt."""


@dataclass(frozen=True, slots=True)
class Target:
    """A URL that may be sent to, taken apart. `host` is lower case and without brackets, `path` begins with `/` and
    includes the query."""

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
    """Take a webhook's URL apart; no name is resolved. Raises InvalidInput, which names the field `url`.

    `allow_private`: http and every port will do as well, and private addresses.
    """
    problem = url_problem(url, allow_private=allow_private)
    if problem is not None:
        raise InvalidInput([Problem("url", problem)])
    parts = urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Target(parts.scheme, host, parts.port or (443 if parts.scheme == "https" else 80), path)


def url_problem(url: str, *, allow_private: bool) -> str | None:
    """What `parse_url` would say of a URL; None if nothing."""
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
    # What ends in a number is an address to some resolvers and a name to others: 2130706433, 0x7f.1, 0177.0.0.1.
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
    """Why an address may not be reached; None if it may.

    With `allow_private` loopback and private addresses may; never may those where clouds keep a machine's credentials
    (link-local and others), multicast and the unspecified address, in whatever form of IPv6 they are written.
    """
    inner = _inner(address)
    hidden = _embedded(address) if isinstance(address, IPv6Address) else ()
    if isinstance(inner, IPv4Address):
        forbidden = _is_in(inner, _NEVER_V4) or not (allow_private or _is_public_v4(inner))
    else:
        forbidden = _is_in(inner, _NEVER_V6) or not (allow_private or _is_public_v6(inner))
    # No tunnel leads to 0.0.0.0/8, and ::1 is no form of 0.0.0.1.
    if not forbidden and not any(_is_in(one, _NEVER_V4[1:]) for one in hidden):
        return None
    expected = "one that is not link-local or multicast" if allow_private else "a public address"
    return f"found the address {address}, expected {expected}"


def _inner(address: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    """The IPv4 address that a mapped or translated (NAT64) IPv6 address stands for."""
    if isinstance(address, IPv6Address) and (address in _MAPPED or address in _NAT64):
        return IPv4Address(int(address) & 0xFFFF_FFFF)
    return address


def _embedded(address: IPv6Address) -> tuple[IPv4Address, ...]:
    """Every IPv4 address that a router, a tunnel or a translator may take an IPv6 address for."""
    bits = int(address)
    low = bits & 0xFFFF_FFFF
    found = []
    if (bits >> 32) & 0xFFFF_FFFF in _ISATAP or any(
        address in network for network in (_COMPATIBLE, _MAPPED, _TRANSLATED, _NAT64)
    ):
        found.append(low)
    if address in _TO4:
        found.append((bits >> 80) & 0xFFFF_FFFF)
    if address in _TEREDO:  # its server, and its client with all bits turned over
        found += [(bits >> 64) & 0xFFFF_FFFF, low ^ 0xFFFF_FFFF]
    if address in _LOCAL_NAT64:  # RFC 6052: behind 48, 56, 64 or 96 bits, around the eight bits that stay zero
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
    """The addresses of a host, as the machine's resolver knows them. Raises OSError."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(entry[4][0]) for entry in found))


async def addresses_of(target: Target, *, allow_private: bool, resolver: Resolver = resolve) -> list[str]:
    """The addresses of a target, each of which may be reached.

    Raises Refused if any may not be, for then the name is not what it seems; OSError if there are none.
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
