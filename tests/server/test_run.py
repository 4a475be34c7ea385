"""The server as a process: start, stop, bounds on a real socket, several workers."""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from strongroom.config import load
from strongroom.server.run import serve
from tests.helpers.server_app import ADMIN, TOKENS, check_problem
from tests.helpers.server_process import Running, running, start
from tests.helpers.servers import answers
from tests.helpers.waiting import PATIENCE_S, wait_without_loop

pytestmark = pytest.mark.server
on_the_one_process = pytest.mark.xdist_group("server")


def _sentence(err: str) -> str:
    """The one line that is not a log line."""
    (line,) = [line for line in err.splitlines() if not line.startswith("{")]
    assert line.startswith("strongroom: "), err
    return line


def _raw(server: Running, *pieces: bytes) -> bytes:
    """What the server answers to bytes that no HTTP client would send."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
        answer = b""
        try:
            for piece in pieces:
                connection.sendall(piece)
            connection.shutdown(socket.SHUT_WR)
            while chunk := connection.recv(65_536):
                answer += chunk
        except (ConnectionResetError, BrokenPipeError):
            pass
        return answer


# --- Start ----------------------------------------------------------------------------------------------------


def test_the_first_start_prints_an_administrators_key_once(tmp_path: Path) -> None:
    with running(tmp_path, STRONGROOM_ADMIN_KEY="") as server:
        with server.client() as anonymous:
            assert anonymous.get("/v1/keys").status_code == 401
        status, out, err = server.stop()
    assert (status, len(out.splitlines())) == (0, 2), out
    key = out.splitlines()[1]
    assert key not in err
    assert all(json.loads(line) for line in err.splitlines()), "every line of standard error is JSON"
    with running(tmp_path, STRONGROOM_ADMIN_KEY="") as server:
        with server.client(key) as admin:
            assert admin.post("/v1/keys", json={"name": "n"}).status_code == 201
        assert server.stop()[:2] == (0, "")
    assert (tmp_path / "data" / "strongroom.db").exists()


def test_a_busy_port_prints_one_sentence_and_has_a_status(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        process = start(tmp_path, STRONGROOM_PORT=str(port))
        out, err = process.communicate(timeout=2 * PATIENCE_S)
    assert (process.returncode, out) == (1, "")
    assert _sentence(err).startswith(f"strongroom: cannot listen at 127.0.0.1:{port}: another program listens there")


STARTS = [
    ({"store": "sqlite:///damaged.db"}, 1, "damaged.db"),
    ({"store": "sqlite:///folder.db"}, 1, "folder.db"),
    ({"store": "sqlite:///file/store.db"}, 1, "file"),
    ({"store": "sqlite:////proc/locked/store.db"}, 1, "locked"),  # where not even root may write
    ({"store": "json:///damaged.db"}, 1, "damaged.db"),
    ({"host": "203.0.113.1", "port": 1}, 1, "203.0.113.1:1: this machine has no such address"),
    ({"host": "no such host"}, 1, "no such host"),
    ({"entities": ("no_such_module",)}, 2, "STRONGROOM_ENTITIES: 'no_such_module' cannot be imported"),
]


@pytest.mark.parametrize(("given", "wanted", "words"), STARTS)
def test_a_failed_start_prints_one_sentence_and_has_a_status(
    given: dict[str, Any],
    wanted: int,
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "damaged.db").write_bytes(b"this is no database" * 1_000)
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "file").write_text("")
    root, handlers, level = logging.getLogger(), logging.getLogger().handlers[:], logging.getLogger().level
    try:
        status = serve(load(**{"port": 0, "store": "json://:memory:", **given}))
    finally:
        root.handlers[:] = handlers
        root.setLevel(level)
    out, err = capsys.readouterr()
    assert (status, out) == (wanted, "")
    assert words in _sentence(err)


def test_an_invalid_environment_prints_one_sentence_and_has_a_status(tmp_path: Path) -> None:
    process = start(tmp_path, STRONGROOM_ADMIN_KEY="short", DATABASE_URL="sqlite:///a", DATABASE_PATH="b")
    _, err = process.communicate(timeout=2 * PATIENCE_S)
    assert process.returncode == 2
    assert all(name in _sentence(err) for name in ("STRONGROOM_ADMIN_KEY", "DATABASE_URL", "DATABASE_PATH"))


def test_an_applications_own_entities_have_routes(tmp_path: Path) -> None:
    (tmp_path / "shop.py").write_text(
        "from strongroom import Entity\nclass Order(Entity, collection='orders'):\n    total: int\n"
    )
    with running(tmp_path, STRONGROOM_ENTITIES="shop") as server, server.client() as admin:
        made = admin.post("/v1/tenants/acme/orders", json={"total": 5})
        assert (made.status_code, made.json()["total"]) == (201, 5)
        assert "/v1/tenants/{tenant}/orders" in admin.get("/openapi.json").json()["paths"]


# --- Stop -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_loses_no_acknowledged_write_and_a_restart_works_at_once(number: int, tmp_path: Path) -> None:
    acknowledged = {"limited": 0, "free": 0}
    with running(tmp_path) as server:
        with server.client() as admin:
            limited = admin.post("/v1/keys", json={"name": "n", "limits": [{**TOKENS, "limit": 10**9}]}).json()
            free = admin.post("/v1/keys", json={"name": "n"}).json()  # its uses are written up to a second later

        def use(name: str, text: str) -> None:
            with server.client() as client:
                while True:
                    try:
                        answer = client.post("/v1/keys/verify", json={"key": text, "cost": {"tokens": 1}})
                    except httpx.TransportError:
                        return
                    assert answer.json()["valid"]
                    acknowledged[name] += 1

        threads = [
            threading.Thread(target=use, args=pair) for pair in (("limited", limited["key"]), ("free", free["key"]))
        ]
        for thread in threads:
            thread.start()
        stream, watching = threading.Event(), threading.Event()

        def watch() -> None:
            with server.client() as client, client.stream("GET", "/v1/tenants/acme/policies:watch") as answer:
                watching.set()
                for _ in answer.iter_lines():
                    pass
            stream.set()  # it ended in good order

        watcher = threading.Thread(target=watch)
        watcher.start()
        wait_without_loop(lambda: watching.is_set() and min(acknowledged.values()) > 20)
        began = time.monotonic()
        status, _, err = server.stop(number)
        assert (status, time.monotonic() - began < PATIENCE_S) == (0, True), err
        assert "Traceback" not in err
        for thread in (*threads, watcher):
            thread.join()
        assert stream.is_set()
    with running(tmp_path, STRONGROOM_PORT=str(server.port)) as again, again.client() as admin:
        for name, key in (("limited", limited), ("free", free)):
            stats = admin.get(f"/v1/keys/{key['id']}/stats").json()
            counted = stats["totals"]["tokens"]
            assert acknowledged[name] <= counted <= acknowledged[name] + 1, "one may be counted whose answer was lost"
            assert acknowledged[name] > 0


def test_a_request_in_flight_is_answered_before_the_stop(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        head = (
            f"POST /v1/keys HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\nContent-Type: application/json\r\n"
            "Content-Length: 13\r\nExpect: 100-continue\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE_S) as connection:
            connection.sendall(head.encode())
            assert connection.recv(65_536).startswith(b"HTTP/1.1 100"), "the request is in work"
            connection.sendall(b'{"name"')
            server.process.send_signal(signal.SIGTERM)
            wait_without_loop(lambda: not answers(server.port))
            connection.sendall(b': "n"}')
            assert connection.recv(65_536).startswith(b"HTTP/1.1 201")
        assert server.stop()[0] == 0


# --- The socket -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """One process for the tests that only talk to it."""
    with running(tmp_path_factory.mktemp("server")) as found:
        yield found


@on_the_one_process
def test_a_body_of_ten_megabytes_is_refused_and_its_sender_reads_why(server: Running) -> None:
    with server.client() as admin:
        for path in ("/v1/keys", "/v1/keys/verify", "/v1/tenants/acme/policies"):
            for content in (b" " * 10_000_000, iter([b" " * 100_000] * 100)):
                answer = admin.post(path, content=content)
                assert answer.status_code == 413, path
                check_problem(answer)
        assert admin.post("/v1/keys", json={"name": "n"}).status_code == 201
        assert _peak_kb(server.process.pid) < 400_000


def _peak_kb(pid: int) -> int:
    """The most memory that a process has had; 0 where that is not told."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


@on_the_one_process
def test_malformed_http_and_too_large_heads_have_the_error_shape(server: Running) -> None:
    bad = [
        (b"nonsense\r\n\r\n", b"400"),
        (b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n", b"400"),
    ]
    for sent, status in bad:
        answer = _raw(server, sent)
        assert answer.startswith(b"HTTP/1.1 " + status), (sent, answer)
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "malformed_request"
    fields = [b"X-%d: " % n + b"x" * 1_000 + b"\r\n" for n in range(1_000)]
    answer = _raw(server, b"GET / HTTP/1.1\r\n", *fields)
    assert answer.startswith(b"HTTP/1.1 431"), answer[:200]
    answer = _raw(server, b"GET /", *(b"x" * 10_000 for _ in range(1_000)))
    assert answer.startswith(b"HTTP/1.1 431") or not answer, answer[:200]  # it may be gone before we read
    with server.client() as admin:
        assert admin.get("/v1/keys").status_code == 200


def test_a_client_that_goes_away_in_its_body_is_no_error(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        for path in ("/v1/keys", "/v1/keys/verify", "/v1/tenants/acme/policies"):
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {ADMIN}\r\nContent-Length: 500\r\n\r\n"
            with socket.create_connection(("127.0.0.1", server.port)) as connection:
                connection.sendall(head.encode() + b'{"key": "k"}')
                time.sleep(0.1)
        with server.client() as admin:
            wait_without_loop(lambda: "strongroom_requests_in_work 1.0" in admin.get("/metrics").text)
        _, _, err = server.stop()
        assert [line for line in err.splitlines() if json.loads(line)["level"] == "error"] == []


@on_the_one_process
def test_encoded_names_arrive_unchanged_through_the_socket(server: Running) -> None:
    with server.client() as admin:
        body = {"policy_type": "t", "policy_name": "n"}
        made = admin.put("/v1/tenants/a%2Fb/policies/%E2%82%AC%2F1", json=body)
        assert (made.status_code, made.json()["id"]) == (201, "€/1")
        assert admin.get("/v1/tenants/a%2Fb/policies").json()["items"] == [made.json()]


# --- Workers --------------------------------------------------------------------------------------------------


def test_workers_share_one_store_exactly_and_a_dead_worker_is_replaced(tmp_path: Path) -> None:
    with running(tmp_path, STRONGROOM_WORKERS="2") as server:
        with server.client() as admin:
            made = admin.post("/v1/keys", json={"name": "n", "limits": [{**TOKENS, "limit": 60}]}).json()
        admitted = []

        def use() -> None:
            for _ in range(25):
                with server.client() as client:  # a connection each, so that both workers get some
                    answer = client.post("/v1/keys/verify", json={"key": made["key"], "cost": {"tokens": 1}}).json()
                    admitted.append(answer["valid"])

        threads = [threading.Thread(target=use) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sum(admitted) == 60
        workers = _children(server.process.pid)
        assert len(workers) == 2
        os.kill(workers[0], signal.SIGKILL)
        wait_without_loop(lambda: len({*_children(server.process.pid)} - {workers[0]}) == 2)  # it is replaced
        with server.client() as admin:
            assert admin.get(f"/v1/keys/{made['id']}/stats").json()["totals"] == {"tokens": 60}
        assert server.stop()[0] == 0
        assert [pid for pid in workers if _alive(pid)] == []


def test_one_scrape_shows_all_workers_and_what_a_killed_worker_had_counted(tmp_path: Path) -> None:
    def verified(text: str) -> float:
        line = next((line for line in text.splitlines() if 'verifications_total{code="NOT_FOUND"}' in line), "_ 0")
        return float(line.rpartition(" ")[2])

    def scrape() -> str:
        with process.client() as client:
            return str(client.get("/metrics").text)

    def pids(text: str) -> set[str]:
        return {line for line in text.splitlines() if line.startswith("strongroom_process{")}

    with running(tmp_path, STRONGROOM_WORKERS="2") as process:
        wait_without_loop(lambda: len(pids(scrape())) == 2)
        for _ in range(40):
            with process.client() as client:  # a connection each, so that both workers get some
                client.post("/v1/keys/verify", json={"key": "unknown"}).raise_for_status()
        wait_without_loop(lambda: verified(scrape()) == 40)
        os.kill(_children(process.process.pid)[0], signal.SIGKILL)
        wait_without_loop(lambda: len(pids(scrape())) >= 2 and verified(scrape()) == 40)


def test_workers_end_when_their_parent_is_killed(tmp_path: Path) -> None:
    with running(tmp_path, STRONGROOM_WORKERS="2") as server:
        workers = _children(server.process.pid)
        server.process.kill()
        server.process.wait()
        wait_without_loop(lambda: not any(_alive(pid) for pid in workers))  # orphans would keep the port
    with running(tmp_path, STRONGROOM_PORT=str(server.port)) as again, again.client() as admin:
        assert admin.get("/v1/keys").status_code == 200


def _children(pid: int) -> list[int]:
    """The server processes that a parent started (not the helper that Python keeps beside them)."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            command = (entry / "cmdline").read_bytes()
        except (OSError, ValueError):
            continue
        if parent == pid and b"spawn_main" in command:
            found.append(int(entry.name))
    return sorted(found)


def _alive(pid: int) -> bool:
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
