"""Creates a key over HTTP, uses up its limit, reserves for a stream, and stores documents; synchronous client.

make serve, then in another terminal, with the administrator's key that it prints:
STRONGROOM_KEY=... python examples/client_sync.py
"""

from __future__ import annotations

import os
from collections.abc import Generator
from dataclasses import dataclass

from strongroom.client import Client, Limit, PreconditionFailed, Window

URL = os.environ.get("STRONGROOM_URL", "http://127.0.0.1:8080")
KEY = os.environ["STRONGROOM_KEY"]


@dataclass
class Signal:
    signal_type: str
    timestamp_ns: int
    id: str = ""
    priority: int = 0
    version: int = 0


def words(client: Client, key: str) -> Generator[str]:
    """A stream is charged for the words that it sent, also if it is closed early."""
    with client.reservations.hold(key, cost={"requests": 1, "tokens": 500}) as hold:
        for word in ("an", "answer", "comes", "one", "word", "at", "a", "time"):
            hold.use(tokens=1)
            yield word


def keys(client: Client) -> None:
    limits = [Limit("tokens", 1_000, Window.calendar("day", "Europe/Berlin")), Limit("requests", 3, Window.rolling(60))]
    issued = client.keys.create("sync example", tenant="acme", limits=limits)
    print(f"key {issued.key.display} for {issued.key.tenant}")
    for _ in range(2):
        answer = client.keys.verify(issued.text, cost={"requests": 1, "tokens": 100})
        print(f"{answer.code}: {answer.limits[0].remaining} tokens remain")
    stream = words(client, issued.text)
    print("streamed:", next(stream), next(stream))
    stream.close()  # as if the reader had disconnected
    print("tokens used:", client.keys.stats(issued.key.id).totals["tokens"])
    denied = client.keys.verify(issued.text)
    print(f"{denied.code}: {denied.message}")
    client.keys.delete(issued.key.id, purge=True)


def documents(client: Client) -> None:
    signals = client.tenant("acme").collection("signals", Signal)
    signal = signals.create(Signal("scale-up", timestamp_ns=1, priority=3))
    signals.update(signal.id, {"priority": 5})
    try:
        signals.update(signal.id, {"priority": 4}, expected=signal.version)
    except PreconditionFailed:
        print("someone else was faster")
    print("urgent:", [found.signal_type for found in signals.find(priority__ge=5, id=signal.id)])
    signals.delete(signal.id)


if __name__ == "__main__":
    with Client(URL, KEY) as client:
        keys(client)
        documents(client)
