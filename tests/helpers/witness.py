"""A witness on 127.0.0.1, as C2SP tlog-witness describes it: it keeps the last checkpoint of one log, and cosigns those
that continue it."""

from __future__ import annotations

import threading
from base64 import b64decode
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from cryptography.hazmat.primitives.asymmetric import ed25519

from strongroom.journal.merkle import EMPTY_ROOT, verify_consistency
from strongroom.journal.signed_note import (
    COSIGNATURE,
    Checkpoint,
    Signature,
    SignedNote,
    VerifierKey,
    signed_message,
)

NAME = "witness.example/w1"
TIME_S = 1_800_000_000


@dataclass
class Witness:
    """`trusted`: the log's keys. `answer`: where set, what it answers instead: a status, a media type and a body."""

    private: ed25519.Ed25519PrivateKey = field(default_factory=ed25519.Ed25519PrivateKey.generate)
    trusted: list[VerifierKey] = field(default_factory=list)
    size: int = 0
    root: bytes = EMPTY_ROOT
    answer: tuple[int, str, bytes] | None = None
    asked: list[int] = field(default_factory=list)
    """The old sizes of the requests."""
    port: int = 0

    @property
    def key(self) -> VerifierKey:
        return VerifierKey(NAME, COSIGNATURE, self.private.public_key().public_bytes_raw())

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/witness"

    def add_checkpoint(self, body: str) -> tuple[int, str, bytes]:
        head, _, text = body.partition("\n\n")
        first, *proof = head.split("\n")
        old = int(first.removeprefix("old "))
        self.asked.append(old)
        if self.answer is not None:
            return self.answer
        note = SignedNote.parse(text)
        checkpoint = Checkpoint.parse(note.text)
        if not note.signers(self.trusted)[0]:
            return 403, "text/plain", b""
        if old > checkpoint.size:
            return 400, "text/plain", b""
        if old != self.size:
            return 409, "text/x.tlog.size", f"{self.size}\n".encode()
        hashes = [b64decode(line) for line in proof]
        if old and not verify_consistency(old, checkpoint.size, self.root, checkpoint.root, hashes):
            return (409 if old == checkpoint.size else 422), "text/plain", b""
        self.size, self.root = checkpoint.size, checkpoint.root
        return 200, "text/plain", self.cosignature(note).line.encode()

    def cosignature(self, note: SignedNote) -> Signature:
        signature = self.private.sign(signed_message(COSIGNATURE, NAME, note.text, TIME_S))
        return Signature(NAME, self.key.id, TIME_S.to_bytes(8, "big") + signature)


@contextmanager
def witnessing(witness: Witness) -> Iterator[Witness]:
    """The witness, served."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"])).decode()
            known = self.path == "/witness/add-checkpoint"
            status, kind, content = witness.add_checkpoint(body) if known else (404, "text/plain", b"")
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing on the terminal."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    witness.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield witness
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
