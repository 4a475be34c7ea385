"""Settings: one table, read from the environment; contradicting settings stop the start with a sentence."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

import pytest

from strongroom import config
from strongroom import served_entities as served
from strongroom.app import DEFAULT_STORE
from strongroom.errors import ConfigError
from strongroom.tenants import TokenSettings

SECRET = "0123456789abcdef0123456789abcdef-secret"


@pytest.fixture(autouse=True)
def _nothing_of_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in config.settings_table():
        monkeypatch.delenv(row.name, raising=False)


def test_without_settings_the_embedded_store_is_used() -> None:
    settings = config.load()
    assert settings.store_url == config.DEFAULT_STORE == DEFAULT_STORE
    assert (settings.host, settings.port, settings.workers) == ("127.0.0.1", 8080, 1)
    assert (settings.db_max_connections, settings.firestore_collection) == (20, "api_keys")
    assert (settings.admin_key, settings.pepper_texts, settings.entities) == (None, (), ())


@pytest.mark.parametrize(
    ("name", "value", "url"),
    [
        ("STRONGROOM_STORE", "json:///a.json", "json:///a.json"),
        ("DATABASE_URL", "sqlite:///a.db", "sqlite:///a.db"),
        ("DATABASE_PATH", "data/a b.db", "sqlite:///data/a%20b.db"),
        ("DATABASE_PATH", "/var/a.db", "sqlite:////var/a.db"),
        ("STRONGROOM_STORE", "postgresql://u:p@h/d", "postgresql://u:p@h/d?max_connections=20"),
        ("DATABASE_URL", "postgres://u:p@h/d?ssl=on", "postgresql://u:p@h/d?ssl=on&max_connections=20"),
        ("DATABASE_URL", "postgres://u@h/d?max_connections=3", "postgresql://u@h/d?max_connections=3"),
        ("DB_HOST", "h", "postgresql://postgres@h:5432/strongroom?max_connections=20"),
        ("DB_PASSWORD", "a/b?", "postgresql://postgres:a%2Fb%3F@localhost:5432/strongroom?max_connections=20"),
        ("STRONGROOM_STORE", "firestore://p/d", "firestore://p/d?collection=api_keys"),
    ],
)
def test_each_setting_that_names_the_store_is_read(
    name: str, value: str, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert config.load().store_url == url
    assert config.load(store="json://:memory:").store_url == "json://:memory:", "the command line outranks it"


def test_two_settings_may_name_the_same_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_STORE", "sqlite:///a.db")
    monkeypatch.setenv("DATABASE_URL", "sqlite:///a.db")
    monkeypatch.setenv("DATABASE_PATH", "a.db")
    assert config.load().store_url == "sqlite:///a.db"


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        (
            {"STRONGROOM_STORE": "sqlite:///a.db", "DATABASE_URL": "sqlite:///b.db"},
            ["STRONGROOM_STORE", "DATABASE_URL"],
        ),
        ({"STRONGROOM_STORE": "sqlite:///a.db", "DATABASE_PATH": "b.db"}, ["STRONGROOM_STORE", "DATABASE_PATH"]),
        ({"DATABASE_URL": "postgres://a/b", "DATABASE_PATH": "b.db"}, ["DATABASE_URL", "DATABASE_PATH"]),
        ({"DATABASE_URL": "postgres://a/b", "DB_HOST": "c"}, ["DATABASE_URL", "DB_HOST"]),
        ({"STRONGROOM_STORE": "sqlite:///a.db", "DB_PASSWORD": "c"}, ["STRONGROOM_STORE", "DB_PASSWORD"]),
        ({"STRONGROOM_CACHE": "redis://a", "REDIS_URL": "redis://b"}, ["STRONGROOM_CACHE", "REDIS_URL"]),
        (
            {"STRONGROOM_STORE": "firestore://a/d", "GOOGLE_CLOUD_PROJECT_ID": "b"},
            ["STRONGROOM_STORE", "GOOGLE_CLOUD_PROJECT_ID"],
        ),
        ({"STRONGROOM_WORKERS": "2", "STRONGROOM_STORE": "json:///a"}, ["STRONGROOM_WORKERS", "STRONGROOM_STORE"]),
    ],
)
def test_two_contradicting_settings_are_both_named(
    environment: dict[str, str], names: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        config.load()
    for name in names:
        assert name in caught.value.message


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("STRONGROOM_STORE", "firestore:///d"), ("STRONGROOM_STORE", "postgresql:u:hunter2@h/d"),
        ("STRONGROOM_STORE", "mysql://u:hunter2@h/d"), ("STRONGROOM_STORE", "a.db"),
        ("STRONGROOM_ANALYTICS", "bigquery://p/d"), ("STRONGROOM_CACHE", "memcached://:hunter2@h"),
        ("REDIS_URL", "localhost:6379"), ("DB_MAX_CONNECTIONS", "1"),
        ("STRONGROOM_RULES", "rules.txt"), ("PQ_ENCRYPTION_PASSWORD", "hunter2"),
        ("STRONGROOM_ADMIN_KEY", "hunter2"), ("STRONGROOM_ADMIN_KEY", "x" * 31), ("STRONGROOM_ADMIN_KEY", "a" * 32),
        ("STRONGROOM_ADMIN_KEY", "abcdefghi" * 8), ("STRONGROOM_ADMIN_KEY", SECRET * 14),
        ("STRONGROOM_ADMIN_KEY", SECRET + "\n"), ("STRONGROOM_ADMIN_KEY", " " + SECRET),
        ("STRONGROOM_ADMIN_KEY", "sr_SR1" + "abcdefghijklm" * 4), ("STRONGROOM_PEPPER", f"{SECRET},hunter2"),
        ("STRONGROOM_PORT", "http"), ("STRONGROOM_PORT", "65536"), ("STRONGROOM_PORT", "tcp://10.0.0.1:8080"),
        ("STRONGROOM_WORKERS", "0"), ("STRONGROOM_WORKERS", "1000"), ("STRONGROOM_LOG_LEVEL", "loud"),
        ("STRONGROOM_MAX_BODY_BYTES", "-1"), ("DB_MAX_CONNECTIONS", "many"),
        ("STRONGROOM_TRUSTED_PROXIES", "10.0.0.1, proxy.internal"), ("STRONGROOM_TRUSTED_PROXIES", "10.0.0.1/8"),
        ("STRONGROOM_JWKS", "http://u:hunter2@issuer.example/jwks.json"), ("STRONGROOM_JWKS", "ftp://issuer.example/k"),
        ("STRONGROOM_JWT_LEEWAY_S", "301"), ("STRONGROOM_JWT_LEEWAY_S", "-1"), ("STRONGROOM_JWT_ISSUER", "https://i.example"),
        ("STRONGROOM_ADMIN_KEY", "eyJhbGciOiJSUzI1NiJ9.abcdefghijklmnop.abcdefghijklmnop"),
    ],
)  # fmt: skip
def test_an_invalid_setting_is_refused_by_name_without_its_secret(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError) as caught:
        config.load()
    assert name in caught.value.message
    assert "hunter2" not in caught.value.message
    assert "\n" not in caught.value.message


def test_sign_in_needs_issuer_audience_and_keys_together(monkeypatch: pytest.MonkeyPatch) -> None:
    assert config.load().sign_in is None
    monkeypatch.setenv("STRONGROOM_JWT_ISSUER", "https://issuer.example")
    with pytest.raises(ConfigError, match="ISSUER cannot be used without STRONGROOM_JWT_AUDIENCE and STRONGROOM_JWKS"):
        config.load()
    monkeypatch.setenv("STRONGROOM_JWT_AUDIENCE", "strongroom, console")
    with pytest.raises(ConfigError, match="AUDIENCE cannot be used without STRONGROOM_JWKS: set all three, or none"):
        config.load()
    monkeypatch.setenv("STRONGROOM_JWKS", "https://issuer.example/jwks.json")
    monkeypatch.setenv("STRONGROOM_JWT_TENANT_CLAIM", "org.id")
    assert config.load().sign_in == TokenSettings(
        "https://issuer.example", ("strongroom", "console"), "https://issuer.example/jwks.json", "org.id"
    )


def test_an_administrators_key_needs_ten_different_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_ADMIN_KEY", "a" * 32)
    with pytest.raises(ConfigError, match="found 1 different characters, expected 10 or more"):
        config.load()
    monkeypatch.setenv("STRONGROOM_ADMIN_KEY", "abcdefghij" + "a" * 22)
    assert config.load().admin_key is not None


def test_a_pepper_of_few_different_characters_gives_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_PEPPER", f"{SECRET},{'a' * 32}")
    (warning,) = [text for text in config.warnings(config.load()) if "PEPPER" in text]
    assert "number 2" in warning


def test_every_problem_is_reported_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_RULES", "r")
    monkeypatch.setenv("STRONGROOM_ADMIN_KEY", "short")
    monkeypatch.setenv("REDIS_URL", "h")
    with pytest.raises(ConfigError, match=r"REDIS_URL.*STRONGROOM_RULES.*STRONGROOM_ADMIN_KEY"):
        config.load()


def test_other_settings_become_options_of_the_url(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_MAX_CONNECTIONS", "7")
    monkeypatch.setenv("FIRESTORE_COLLECTION", "our keys")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT_ID", "p")
    assert config.load(store="postgresql://h/d").store_url == "postgresql://h/d?max_connections=7"
    assert config.load(store="firestore:///d").store_url == "firestore://p/d?collection=our%20keys"
    monkeypatch.setenv("REDIS_URL", "redis://:hunter2@h/0")
    settings = config.load()
    assert settings.cache_url == "redis://:hunter2@h/0"
    assert "hunter2" not in repr(settings)


def test_an_empty_setting_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for row in config.settings_table():
        monkeypatch.setenv(row.name, "")
    assert config.load() == config.Settings()


def test_lists_are_separated_by_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_PEPPER", f"{SECRET}1, {SECRET}2")
    monkeypatch.setenv("STRONGROOM_ENTITIES", "a.b, c")
    settings = config.load()
    assert settings.pepper_texts == (f"{SECRET}1", f"{SECRET}2")
    assert settings.entities == ("a.b", "c")


def test_secrets_are_not_shown_and_settings_can_be_handed_to_a_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_PEPPER", SECRET)
    monkeypatch.setenv("STRONGROOM_ADMIN_KEY", SECRET)
    settings = config.load()
    assert SECRET not in repr(settings) + str(settings)
    monkeypatch.delenv("STRONGROOM_PEPPER")
    assert pickle.loads(pickle.dumps(settings)) == settings  # noqa: S301


def test_a_setting_without_effect_gives_a_warning() -> None:
    environment = {"STRONGROOM_PROT": "1", "STRONGROOM_REQUIRE": "all", "FIRESTORE_EMULATOR_HOST": "h", "PATH": "/"}
    first, second = config.warnings(config.load(), environment)
    assert "FIRESTORE_EMULATOR_HOST" in second
    assert first == "STRONGROOM_PROT is not a setting; did you mean STRONGROOM_PORT?"
    assert config.warnings(config.load(), {"STRONGROOM_BOGUS": "1"}) == ["STRONGROOM_BOGUS is not a setting"]


@pytest.mark.parametrize("name", ["STRONGROOM_ANALYTICS", "STRONGROOM_RULES", "PQ_ENCRYPTION_PASSWORD"])
def test_a_setting_of_a_missing_feature_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "duckdb:///data/analytics")
    with pytest.raises(ConfigError, match=rf"^{name}: this version .* yet; leave it out$"):
        config.load()
    (row,) = [row for row in config.settings_table() if row.name == name]
    assert "this version" in row.help


def test_the_table_has_every_name_with_a_help_text_and_no_secret_default() -> None:
    rows = config.settings_table()
    names = [row.name for row in rows]
    assert len(set(names)) == len(names)
    assert {
        "STRONGROOM_STORE", "STRONGROOM_ANALYTICS", "STRONGROOM_CACHE", "STRONGROOM_HOST", "STRONGROOM_PORT",
        "STRONGROOM_WORKERS", "STRONGROOM_ADMIN_KEY", "STRONGROOM_RULES", "DATABASE_URL", "DATABASE_PATH", "DB_HOST",
        "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME", "DB_MAX_CONNECTIONS", "GOOGLE_APPLICATION_CREDENTIALS",
        "GOOGLE_CLOUD_PROJECT_ID", "FIRESTORE_COLLECTION", "FIRESTORE_EMULATOR_HOST", "PUBSUB_EMULATOR_HOST",
        "PQ_ENCRYPTION_PASSWORD", "REDIS_URL",
    } <= set(names)  # fmt: skip
    assert all(row.help.endswith(".") for row in rows)
    assert {row.name for row in rows if row.secret} == {
        "DB_PASSWORD", "STRONGROOM_ADMIN_KEY", "STRONGROOM_PEPPER", "PQ_ENCRYPTION_PASSWORD",
    }  # fmt: skip


# --- Entities of one's own ------------------------------------------------------------------------------------

MODULE = """
from strongroom import Entity
class Thing(Entity, collection="things"):
    name: str
class Base(Entity):
    name: str
"""


def test_entities_are_found_in_modules_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "own_things.py").write_text(MODULE)
    try:
        (found,) = served.load_entities(["own_things"])
        assert found.__collection__.name == "things"
    finally:
        sys.modules.pop("own_things", None)


@pytest.mark.parametrize(
    ("text", "why"), [(None, "cannot be imported"), ("1/0", "ZeroDivisionError"), ("", "declares no")]
)
def test_a_module_without_entities_stops_the_start(
    text: str | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    if text is not None:
        (tmp_path / "wrong_things.py").write_text(text)
    try:
        with pytest.raises(ConfigError, match=rf"STRONGROOM_ENTITIES: 'wrong_things'.*{why}"):
            served.load_entities(["wrong_things"])
    finally:
        sys.modules.pop("wrong_things", None)


def test_trusted_proxies_are_addresses_and_networks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STRONGROOM_TRUSTED_PROXIES", "10.0.0.0/8, 192.0.2.7,fd00::/8")
    assert [str(network) for network in config.load().proxies] == ["10.0.0.0/8", "192.0.2.7/32", "fd00::/8"]
    monkeypatch.setenv("STRONGROOM_TRUSTED_PROXIES", "10.0.0.1/8, nowhere")
    with pytest.raises(ConfigError, match=r"'10\.0\.0\.1/8'.*did you mean 10\.0\.0\.0/8\?.*'nowhere'"):
        config.load()
