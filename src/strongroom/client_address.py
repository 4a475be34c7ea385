"""Where a request comes from: the peer's address, or, behind proxies that are trusted, the one that they tell."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address

Network = IPv4Network | IPv6Network
MAX_FORWARDED = 64
"""Addresses of a X-Forwarded-For header that are looked at, from the right."""
MAX_ADDRESS_CHARS = 100
"""A longer text is no address, whatever a header says, and is not kept."""


def address(text: str) -> str | None:
    """An address without a port, in its canonical form, or None if the text is none."""
    return _address(text) if len(text) <= MAX_ADDRESS_CHARS else None


@functools.lru_cache(maxsize=4_096)
def _address(text: str) -> str | None:
    text = text.strip()
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ip_address(text)
    except ValueError:
        return None
    if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(found)


def client_address(peer: str | None, forwarded: Sequence[bytes], trusted: Sequence[Network]) -> str | None:
    """The caller's address: the peer's, or where that is a trusted proxy, the first one from the right of
    X-Forwarded-For that is not. None where it is not known; a key that is bound to addresses is then refused."""
    found = address(peer) if peer is not None else None
    if not trusted or not forwarded or found is None or not _is_in(found, trusted):
        return found
    hops = b",".join(forwarded).decode("latin-1").split(",")
    for hop in list(reversed(hops))[:MAX_FORWARDED]:
        found = address(hop)
        if found is None or not _is_in(found, trusted):
            return found
    return found


def _is_in(text: str, trusted: Sequence[Network]) -> bool:
    found = ip_address(text)
    return any(found.version == network.version and found in network for network in trusted)


__all__ = ["MAX_FORWARDED", "Network", "address", "client_address"]
