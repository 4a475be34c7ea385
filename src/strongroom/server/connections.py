"""Bounds the connections of one process: in all, so that the store has descriptors left, and from one peer."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

from ..errors import TooManyRequests, Unavailable
from .metrics import Metrics

MAX_TURNED_AWAY = 100
"""Refused connections that linger, so that the client can read the answer. More are closed at once, which some
clients see as a reset."""
IPV6_PEER_BITS = 64
"""The bits of an IPv6 address that identify the peer: it can choose the other bits freely."""

Network = IPv4Network | IPv6Network


class Connections:
    """Counts the open connections. `proxies` carry the connections of many clients and have no bound of their own."""

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
        """Count a peer's connection; returns the value for `leave`. Raises TooManyRequests, Unavailable."""
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
        """Export these numbers as metrics."""
        self._metrics = metrics
        metrics.gauge("strongroom_connections", "Open connections.", lambda: self.open)
        metrics.counter(
            "strongroom_connections_refused",
            "Connections refused because too many were open: from one peer, or in all.",
            "bound",
            lambda: self.refused,
        )

    def answered(self, status: int) -> None:
        """Count a connection's last answer, an error of the protocol itself."""
        if self._metrics is not None:
            self._metrics.refused(status)

    def _peer(self, address: str | None) -> str | None:
        """The name under which a peer is counted; None for a peer without a bound."""
        try:
            found = ip_address((address or "").partition("%")[0])
        except ValueError:
            return None  # no address: a Unix socket of this machine
        if isinstance(found, IPv6Address) and found.ipv4_mapped is not None:
            found = found.ipv4_mapped
        if any(found in network for network in self._proxies if network.version == found.version):
            return None
        return str(found) if found.version == 4 else str(ip_network((found, IPV6_PEER_BITS), strict=False))


def descriptors(wanted: int) -> int:
    """The number of files that this process may open. The soft limit is raised up to `wanted` and the hard limit."""
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
    except (OSError, ValueError):  # some systems have another bound below the hard limit
        return soft
    return most


__all__ = ["Connections", "descriptors"]
