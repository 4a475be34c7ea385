"""How many connections one process keeps: in all, so that the store never lacks descriptors, and from one peer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from ..errors import TooManyRequests, Unavailable
from .metrics import Metrics

MAX_TURNED_AWAY = 100
"""Connections over a bound that are kept a moment longer, so that they read why. More are told and closed at once,
which some clients see as a reset."""
IPV6_PEER_BITS = 64
"""Of an IPv6 address these say who the peer is: the others are its own to choose."""

Network = IPv4Network | IPv6Network


class Connections:
    """The connections that are open, counted. `proxies` speak for many, and are not bounded as one peer."""

    def __init__(self, most: int, most_per_peer: int, proxies: Iterable[Network] = ()) -> None:
        self.most = most
        self.most_per_peer = most_per_peer
        self.open = 0
        self.turned_away = 0
        self.refused: dict[str, int] = {"peer": 0, "all": 0}
        self._proxies = tuple(proxies)
        self._peers: dict[str, int] = {}
        self._metrics: Metrics | None = None

    def enter(self, address: str | None) -> str | None:
        """Take a place for a peer's connection; what is returned is handed back to `leave`. Raises TooManyRequests,
        Unavailable."""
        if self.open >= self.most:
            self.refused["all"] += 1
            raise Unavailable(f"{self.open} connections are open, the most that this server accepts")
        peer = self._peer(address)
        if peer is not None:
            count = self._peers.get(peer, 0)
            if count >= self.most_per_peer:
                self.refused["peer"] += 1
                raise TooManyRequests(f"{count} connections are open from {peer}, the most for one address")
            self._peers[peer] = count + 1
        self.open += 1
        return peer

    def leave(self, peer: str | None) -> None:
        self.open -= 1
        if peer is not None:
            left = self._peers[peer] - 1
            if left:
                self._peers[peer] = left
            else:
                del self._peers[peer]

    def measured(self, metrics: Metrics) -> None:
        """Show these numbers among the metrics."""
        self._metrics = metrics
        metrics.gauge("strongroom_connections", "Connections that are open.", lambda: self.open)
        metrics.counter(
            "strongroom_connections_refused",
            "Connections refused because too many were open: from one peer, or in all.",
            "bound",
            lambda: self.refused,
        )

    def answered(self, status: int) -> None:
        """A connection's last answer was an error of the protocol's own."""
        if self._metrics is not None:
            self._metrics.refused(status)

    def _peer(self, address: str | None) -> str | None:
        """By which name a peer is counted; None for one that is not."""
        try:
            found = ip_address((address or "").partition("%")[0])
        except ValueError:
            return None  # no address: a socket of this machine's own
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        if any(found in network for network in self._proxies if network.version == found.version):
            return None
        return str(found) if found.version == 4 else str(ip_network((found, IPV6_PEER_BITS), strict=False))


def descriptors(wanted: int) -> int:
    """How many files this process may have open: the soft limit is raised as far as `wanted` and the hard one allow."""
    if sys.platform == "win32":
        return wanted
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    if soft == unlimited or soft >= wanted:
        return wanted
    most = wanted if hard == unlimited else min(wanted, hard)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError):  # some systems have a bound of their own below the hard limit
        return soft
    return most


__all__ = ["Connections", "descriptors"]
