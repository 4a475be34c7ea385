"""A receiver of webhooks on 127.0.0.1 that keeps what arrives and answers as a test says; and certificates for it."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

import strongroom.app
from strongroom import Strongroom
from strongroom.webhooks.deliveries import Deliveries, Timing
from strongroom.webhooks.http_sender import HttpSender
from tests.helpers.faulty_store import FaultyStore
from tests.helpers.stores import opened

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
FAST = Timing(poll_s=0.05, first_look_s=0.05, claim_margin_s=0.5, backoff_s=0.01)
"""A background that looks twenty times a second and tries again almost at once."""


def status(code: int, *headers: str) -> bytes:
    """A whole answer without a body."""
    lines = [f"HTTP/1.1 {code} Whatever", "content-length: 0", *headers, "", ""]
    return "\r\n".join(lines).encode()


@dataclass
class Arrived:
    """One request. `headers` by lower-case name; `sni` is the name that the TLS handshake asked for."""

    path: str
    headers: dict[str, str]
    body: bytes
    sni: str | None

    @property
    def id(self) -> str:
        return self.headers["webhook-id"]


Answer = Callable[[asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Receiver:
    """`answers` are used one after the other, then `answer`: bytes as they are, or a function that writes."""

    port: int = 0
    scheme: str = "http"
    host: str = "127.0.0.1"
    arrived: list[Arrived] = field(default_factory=list)
    answers: list[bytes | Answer] = field(default_factory=list)
    answer: bytes | Answer = OK
    inside: int = 0
    most_inside: int = 0
    connections: int = 0
    sni: str | None = None

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}/hook"

    @property
    def ids(self) -> list[str]:
        return [one.id for one in self.arrived]

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        with suppress(ConnectionError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            first, *lines = head.strip().split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
            body = await reader.readexactly(int(headers["content-length"]))
            self.arrived.append(Arrived(first.split()[1], headers, body, self.sni))
            answer = self.answers.pop(0) if self.answers else self.answer
            self.inside += 1
            self.most_inside = max(self.most_inside, self.inside)
            try:
                if isinstance(answer, bytes):
                    writer.write(answer)
                    await writer.drain()
                else:
                    await _while_connected(reader, answer(writer))
            finally:
                self.inside -= 1
        writer.close()


@asynccontextmanager
async def receiving(tls: ssl.SSLContext | None = None, *, host: str = "127.0.0.1") -> AsyncIterator[Receiver]:
    """A receiver, listening. `host`: by what name it is reached."""
    receiver = Receiver(scheme="http" if tls is None else "https", host=host)
    if tls is not None:
        tls.sni_callback = lambda _, name, __: setattr(receiver, "sni", name)
    tasks: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            await receiver.handle(reader, writer)
        except asyncio.CancelledError:
            writer.close()
        finally:
            tasks.discard(task)

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    receiver.port = server.sockets[0].getsockname()[1]
    try:
        yield receiver
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=5)
        await server.wait_closed()


async def _while_connected(reader: asyncio.StreamReader, answer: Awaitable[None]) -> None:
    tasks = [asyncio.ensure_future(answer), asyncio.ensure_future(reader.read())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def hang(writer: asyncio.StreamWriter) -> None:
    """Never answer, until the client gives up."""
    await asyncio.Event().wait()


# --- TLS ------------------------------------------------------------------------------------------------------


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's TLS with a certificate for `name`, and a client's that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    pem = folder / f"{name}.pem"
    pem.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        + built.public_bytes(serialization.Encoding.PEM)
    )
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(pem)
    return server, ssl.create_default_context(cadata=built.public_bytes(serialization.Encoding.PEM).decode())


# --- Rooms ----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def delivering(
    url: str,
    *,
    timing: Timing = FAST,
    sender: Callable[[], HttpSender] = HttpSender,
    beside: FaultyStore | None = None,
    **options: Any,
) -> AsyncIterator[tuple[Strongroom, FaultyStore]]:
    """A Strongroom whose deliveries have this timing, and are sent by this."""
    with (
        patch.object(strongroom.app, "Deliveries", partial(Deliveries, timing=timing)),
        patch.object(strongroom.app, "HttpSender", sender),
    ):
        manager = opened(url, beside=beside, **options)
        both = await manager.__aenter__()
    try:
        yield both
    finally:
        await manager.__aexit__(None, None, None)
