"""`strongroom doctor`, `.env`, and the way back to a lost administrator's key."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from strongroom import config
from strongroom.cli import doctor
from strongroom.errors import ConfigError
from strongroom.storage.jsonfile.store import JsonStore
from strongroom.storage.postgres.store import PostgresStore
from tests.cli.test_cli import Run, created, run
from tests.helpers.issuer import Issuer, key_of, public
from tests.helpers.server_app import ADMIN
from tests.helpers.servers import free_port, postgres

__all__ = ["run"]  # the fixture


def looked(run: Run, *options: str) -> tuple[int, dict[str, tuple[str, str, str]]]:
    """The exit status, and status, finding and remedy of each check."""
    ran = run("doctor", "--json", *options)
    checks = {one["name"]: (one["status"], one["found"], one["remedy"]) for one in ran.json["checks"]}
    assert ran.json["ok"] == (ran.status == 0) == all(status != "fail" for status, *_ in checks.values())
    assert all(bool(remedy) == (status != "ok") for status, _, remedy in checks.values())
    return ran.status, checks


def test_doctor_passes_every_check_on_a_healthy_store(run: Run, tmp_path: Path) -> None:
    assert run("keys", "create", "--name", "a", "--tenant", "*", "--permission", "strongroom:admin").status == 0
    status, checks = looked(run)
    assert (status, set(checks)) == (
        0, {"settings", "store", "clock", "disk sync", "schema", "writes", "write switches", "administrator"}
    )  # fmt: skip
    assert {name for name, (found, *_) in checks.items() if found != "ok"} <= {"disk sync", "store"}  # a slow machine
    assert f"sqlite:///{tmp_path}/store.db" in checks["store"][1]
    lines = run("doctor").out.splitlines()
    assert lines[0].split()[:2] == ["ok", "settings"]


def test_doctor_names_each_problem_with_a_remedy(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    created(run)
    status, checks = looked(run)
    assert (status, checks["administrator"][0]) == (0, "warn")
    assert "recover-administrator" in checks["administrator"][2]
    monkeypatch.setenv("STRONGROOM_PROT", "1")
    assert looked(run)[1]["settings"] == (
        "warn",
        "STRONGROOM_PROT is not a setting; did you mean STRONGROOM_PORT?",
        "remove the setting, or correct its name",
    )
    monkeypatch.setattr(doctor, "SLOW_SYNC_S", 0.0)
    assert looked(run)[1]["disk sync"][0] == "warn"
    monkeypatch.setenv("STRONGROOM_LIMITS", "sometimes")
    status, checks = looked(run)
    assert (status, list(checks), checks["settings"][0]) == (1, ["settings"], "fail")
    monkeypatch.delenv("STRONGROOM_LIMITS")
    status, checks = looked(run, "--store", f"sqlite:///{tmp_path}/typo.db")
    assert (status, checks["store"][0], (tmp_path / "typo.db").exists()) == (1, "fail", False)
    (tmp_path / "empty.json").write_text("")
    before = (tmp_path / "empty.json").read_bytes()
    status, checks = looked(run, "--store", f"json:///{tmp_path}/empty.json")
    assert (tmp_path / "empty.json").read_bytes() == before


def test_doctor_says_whether_the_keys_of_the_token_issuer_can_be_read(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    created(run)
    file = tmp_path / "jwks.json"
    file.write_text(json.dumps({"keys": [public(key_of("ES256"))]}))
    for name, value in Issuer(url=str(file)).environment().items():
        monkeypatch.setenv(name, value)
    assert looked(run)[1]["sign-in"] == ("ok", f"{file}: 1 key", "")
    monkeypatch.setenv("STRONGROOM_JWKS", f"http://127.0.0.1:{free_port()}/jwks.json")
    status, checks = looked(run)
    assert (status, checks["sign-in"][0]) == (1, "fail")
    assert "ConnectError" in checks["sign-in"][1]
    assert "STRONGROOM_JWKS" in checks["sign-in"][2]


def test_doctor_names_the_store_to_which_the_data_moved(run: Run, tmp_path: Path) -> None:
    created(run)
    both = ("--from", f"sqlite:///{tmp_path}/store.db", "--to", f"json:///{tmp_path}/there.json")
    assert run("migrate", *both, "--live").status == 0
    status, checks = looked(run, "--store", f"json:///{tmp_path}/there.json")
    assert (status, checks["writes"][0]) == (1, "fail")
    assert f"sqlite:///{tmp_path}/store.db" in checks["writes"][1]


def test_doctor_names_writes_that_an_operator_turned_off(run: Run) -> None:
    created(run)
    run("tenants", "create", "acme")
    assert looked(run)[1]["write switches"][0] == "ok"
    run("writes", "off", "--tenant", "acme", "--reason", "a breach")
    assert looked(run)[1]["write switches"][:2] == ("warn", "writes of one tenant are off")
    run("writes", "off", "--reason", "a rollback")
    status, checks = looked(run)
    assert (status, checks["write switches"][:2]) == (0, ("warn", "writes of all tenants are off: a rollback"))


def test_doctor_fails_the_check_of_an_unreachable_store(run: Run) -> None:
    status, checks = looked(run, "--store", f"postgresql://app:secret@127.0.0.1:{free_port()}/x")
    assert (status, checks["store"][0]) == (1, "fail")
    assert "secret" not in checks["store"][1]
    assert "reach it" in checks["store"][2]


def test_doctor_checks_postgresqls_roles_clock_and_durability(
    run: Run, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = postgres.start(request, "postgres-18", postgres.bundled())
    url = server.url(postgres.new_schema())
    asked = PostgresStore.durability
    answers: list[dict[str, str]] = []

    async def durable(self: PostgresStore) -> dict[str, str]:
        answers.append(await asked(self))  # the server of the tests need not be durable
        return dict.fromkeys(answers[-1], "on")

    monkeypatch.setattr(PostgresStore, "durability", durable)
    status, checks = looked(run, "--store", url)
    assert set(answers[0]) == {"fsync", "synchronous_commit", "full_page_writes"}
    assert set(answers[0].values()) <= {"on", "off"}
    assert (status, checks["schema"][0], checks["roles"][0]) == (0, "warn", "warn"), checks
    assert "schema apply" in checks["schema"][2]
    assert (checks["disk sync"][0], checks["clock"][0]) == ("ok", "ok")
    assert run("schema", "apply", "--store", url).status == 0
    assert looked(run, "--store", url)[1]["schema"][0] == "ok"
    status, checks = looked(run, "--store", url.replace("app:app@", "admin@"))
    assert (status, checks["roles"][0], "superuser" in checks["roles"][1]) == (1, "fail", True)

    async def lossy(self: Any) -> dict[str, str]:
        return {"fsync": "on", "synchronous_commit": "off"}

    async def ahead(self: Any) -> int:
        return 4_000_000_000_000_000

    monkeypatch.setattr(PostgresStore, "durability", lossy)
    monkeypatch.setattr(PostgresStore, "now_us", ahead)
    status, checks = looked(run, "--store", url)
    assert (status, checks["disk sync"][0], checks["clock"][0]) == (1, "fail", "warn")
    assert "synchronous_commit is off" in checks["disk sync"][1]


def test_doctor_fails_the_check_of_a_store_that_does_not_answer(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def away(self: Any) -> Any:
        from strongroom.storage.port import Health

        return Health(False, 0.0, {"problem": "it is away"})

    monkeypatch.setattr(JsonStore, "check", away)
    (tmp_path / "store.json").touch()
    status, checks = looked(run, "--store", "json://:memory:")
    assert (status, "it is away" in checks["store"][1]) == (1, True)


# --- The administrator's key ------------------------------------------------------------------------------------


def test_a_lost_administrators_key_is_replaced_with_access_to_the_store_alone(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run("keys", "recover-administrator", "--yes").out.strip()
    assert run("keys", "verify", first, "--permission", "strongroom:admin").status == 0
    administrator = ("--tenant", "*", "--permission", "strongroom:admin")
    assert run("keys", "create", "--name", "another", *administrator).status == 0
    assert run("keys", "delete", "admin", "--yes").status == 0
    refused = run("keys", "recover-administrator")
    assert (refused.status, "--yes" in refused.err) == (2, True)
    second = run("keys", "recover-administrator", "--yes", "--json").json
    assert (second["id"], second["key"] != first) == ("admin", True)
    assert run("keys", "verify", second["key"], "--permission", "strongroom:admin").status == 0
    assert run("keys", "verify", first).status == 1
    monkeypatch.setenv("STRONGROOM_ADMIN_KEY", ADMIN)
    refused = run("keys", "recover-administrator", "--yes")
    assert (refused.status, "STRONGROOM_ADMIN_KEY" in refused.err) == (2, True)


# --- .env -------------------------------------------------------------------------------------------------------


def test_an_env_file_sets_what_the_environment_does_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = dict(os.environ)
    try:
        (tmp_path / ".env").write_text(
            "# of this checkout\nexport STRONGROOM_PORT=9000\n"
            "STRONGROOM_ADMIN_KEY=\"a 'quoted' text of $32 characters\"\n"
            "STRONGROOM_LIMITS=leased\nPATH=/nowhere\n"
        )
        monkeypatch.setenv("STRONGROOM_LIMITS", "durable")
        settings = config.load()
        assert (settings.port, settings.limits) == (9000, "durable")
        assert settings.admin_key is not None
        assert settings.admin_key.get_secret_value() == "a 'quoted' text of $32 characters"
        assert os.environ["PATH"] == before["PATH"]
        (tmp_path / ".env").write_text("STRONGROOM_PORT 9000\n=\n")
        with pytest.raises(ConfigError, match=r"^\.env: line 1: expected NAME=value$"):
            config.load()
        (tmp_path / ".env").write_bytes(b"STRONGROOM_PORT=\xff\n")
        with pytest.raises(ConfigError, match=r"^\.env: cannot be read"):
            config.load()
    finally:
        os.environ.clear()
        os.environ.update(before)
