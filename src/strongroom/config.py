"""One table of settings: name, default, help. Read from the environment; what contradicts itself stops the start.

The fields of `Settings` are the table; `settings_table()` gives it to the documentation.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, quote, unquote, urlsplit

from pydantic import Field, SecretStr, ValidationError, field_validator
from pydantic.fields import FieldInfo
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from .entities import problems_of
from .errors import ConfigError
from .keys import is_possible
from .tenants import DEFAULT_LEEWAY_S, MAX_LEEWAY_S, TokenSettings, is_token

DEFAULT_STORE = "sqlite:///data/strongroom.db"
STORES = {
    "sqlite": "sqlite:///path",
    "json": "json:///path",
    "postgresql": "postgresql://user:password@host:port/database",
    "firestore": "firestore://project/database",
}
"""How the URL of each kind of store looks."""
CACHES = ("redis", "rediss", "unix")
MIN_ADMIN_KEY_CHARS = 32
MIN_ADMIN_KEY_DIFFERENT = 10
"""Of the characters of an administrator's key: one of a single letter, however long, is soon guessed."""
MIN_PEPPER_CHARS = 32
MAX_WORKERS = 64
PREFIX = "STRONGROOM_"
ENV_FILE = ".env"
"""In the current folder."""
NOT_SETTINGS = ("STRONGROOM_DEBUG", "STRONGROOM_REQUIRE")
"""Names that others read: the command line, the tests."""


def _setting(name: str, default: Any, help: str, **constraints: Any) -> Any:
    return Field(default=default, validation_alias=name, description=help, **constraints)


class Settings(BaseSettings):
    """What the environment says. `load` reads and checks it; `store_url` and its like are what the program uses."""

    model_config = SettingsConfigDict(
        case_sensitive=True, env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True
    )

    # Where the data is.
    store: str | None = _setting(
        "STRONGROOM_STORE",
        None,
        f"The store: {', '.join(STORES.values())} (default {DEFAULT_STORE}).",
        repr=False,
    )
    database_url: str | None = _setting("DATABASE_URL", None, "Another name for STRONGROOM_STORE.", repr=False)
    database_path: str | None = _setting("DATABASE_PATH", None, "A SQLite file: as STRONGROOM_STORE=sqlite:///path.")
    db_host: str | None = _setting("DB_HOST", None, "PostgreSQL, in parts: the host (localhost).")
    db_port: int | None = _setting("DB_PORT", None, "PostgreSQL, in parts: the port (5432).", ge=1, le=65_535)
    db_user: str | None = _setting("DB_USER", None, "PostgreSQL, in parts: the user (postgres).")
    db_password: SecretStr | None = _setting("DB_PASSWORD", None, "PostgreSQL, in parts: the password.")
    db_name: str | None = _setting("DB_NAME", None, "PostgreSQL, in parts: the database (strongroom).")
    db_max_connections: int = _setting(
        "DB_MAX_CONNECTIONS", 20, "PostgreSQL: the most connections of one process.", ge=2, le=1_000
    )
    analytics: str | None = _setting(
        "STRONGROOM_ANALYTICS", None, "The store of cost analytics: refused, because this version has none yet."
    )
    cache: str | None = _setting(
        "STRONGROOM_CACHE", None, "The cache: a Redis that all nodes share, redis://….", repr=False
    )
    redis_url: str | None = _setting("REDIS_URL", None, "Another name for STRONGROOM_CACHE.", repr=False)

    journal_days: int | None = _setting(
        "STRONGROOM_JOURNAL_DAYS",
        None,
        "Days that journal records are kept; older ones are archived and dropped (default: 90 on new stores, "
        "for ever on older ones).",
        ge=1, le=36_500,
    )  # fmt: skip
    archive: str | None = _setting(
        "STRONGROOM_ARCHIVE", None, "The folder to which journal records are written before they are dropped."
    )

    journal_signing_key: str | None = _setting(
        "STRONGROOM_JOURNAL_SIGNING_KEY",
        None,
        "The file of the keys that sign the journal's checkpoints, as `strongroom audit keys --make FILE` makes it "
        "(default: beside the file of a SQLite or JSON store; other stores stay unsigned).",
    )

    witnesses: str | None = _setting(
        "STRONGROOM_WITNESSES",
        None,
        "A file of witnesses that cosign the journal's checkpoints (C2SP tlog-witness): a URL and a public key a line.",
    )

    limits: Literal["durable", "leased"] = _setting(
        "STRONGROOM_LIMITS",
        "durable",
        "durable: each call is debited before its answer. leased: limit leases are debited, then spent "
        "in memory. Both are exact.",
    )
    lease_s: float = _setting(
        "STRONGROOM_LEASE_S", 5.0, "Seconds that a limit lease lasts without renewal.", ge=0.5, le=60
    )
    lease_dir: str | None = _setting(
        "STRONGROOM_LEASE_DIR",
        None,
        "The folder of the lease log, which survives a killed process (default: beside the file of a "
        "SQLite or JSON store, else the temporary folder).",
    )

    # The server.
    host: str = _setting("STRONGROOM_HOST", "127.0.0.1", "The address that the server listens on.")
    port: int = _setting(
        "STRONGROOM_PORT", 8080, "The port that the server listens on; 0 takes a free one.", ge=0, le=65_535
    )
    workers: int = _setting("STRONGROOM_WORKERS", 1, "Worker processes of the server.", ge=1, le=MAX_WORKERS)
    log_level: Literal["debug", "info", "warning", "error"] = _setting(
        "STRONGROOM_LOG_LEVEL", "info", "The lowest level that is logged: debug, info, warning or error."
    )
    log_format: Literal["json", "cloud-logging"] = _setting(
        "STRONGROOM_LOG_FORMAT",
        "json",
        "json, or cloud-logging: the same lines with Google Cloud Logging's fields for severity and trace.",
    )
    access_log: bool = _setting(
        "STRONGROOM_ACCESS_LOG", False, "Log every request except verifications and health checks: true or false."
    )
    max_body_bytes: int = _setting(
        "STRONGROOM_MAX_BODY_BYTES", 1_048_576, "The largest request body; larger ones are answered 413.",
        ge=1_024, le=64 * 1_048_576,
    )  # fmt: skip
    max_concurrency: int = _setting(
        "STRONGROOM_MAX_CONCURRENCY",
        1_000,
        "Concurrent requests of each worker; more are answered 429. The last quarter is reserved for "
        "callers with less than a quarter. Verifications have the same number for themselves.",
        ge=1, le=100_000,
    )  # fmt: skip
    max_connections: int = _setting(
        "STRONGROOM_MAX_CONNECTIONS",
        10_000,
        "Open connections of each worker; more are answered 503. The system's limit of open files "
        "(ulimit -n) may lower this; some files are reserved for the store.",
        ge=1, le=1_000_000,
    )  # fmt: skip
    max_peer_connections: int = _setting(
        "STRONGROOM_MAX_PEER_CONNECTIONS",
        2_000,
        "Open connections of each worker from one address (IPv6: one /64); more are answered 429. "
        "Trusted proxies have no such limit.",
        ge=1, le=1_000_000,
    )  # fmt: skip
    max_watchers: int = _setting(
        "STRONGROOM_MAX_WATCHERS", 200, "Open `:watch` streams of each worker; more are answered 429.",
        ge=0, le=100_000,
    )  # fmt: skip
    trusted_proxies: Annotated[tuple[str, ...], NoDecode] = _setting(
        "STRONGROOM_TRUSTED_PROXIES",
        (),
        "Addresses and networks of the reverse proxies in front of the server, separated by commas. "
        "Only their X-Forwarded-For headers are used for the client's address.",
    )
    stop_timeout_s: int = _setting(
        "STRONGROOM_STOP_TIMEOUT_S", 20, "Seconds for requests in flight to finish when the server stops.",
        ge=1, le=600,
    )  # fmt: skip

    # Access and secrets.
    admin_key: SecretStr | None = _setting(
        "STRONGROOM_ADMIN_KEY",
        None,
        f"The administrator's key, any text of {MIN_ADMIN_KEY_CHARS} characters or more, at least "
        f"{MIN_ADMIN_KEY_DIFFERENT} of them different. Without it the first start creates a key and prints it once.",
    )
    peppers: Annotated[tuple[SecretStr, ...], NoDecode] = _setting(
        "STRONGROOM_PEPPER",
        (),
        f"Peppers of the key hashes, {MIN_PEPPER_CHARS} characters or more each, the current one first, "
        "separated by commas. Without them the store keeps a pepper of its own.",
    )
    rules: str | None = _setting(
        "STRONGROOM_RULES", None, "A file with access rules: refused, because this version has none yet."
    )
    leak_keys: str | None = _setting(
        "STRONGROOM_LEAK_KEYS",
        None,
        "The public keys of secret scanners that report leaked keys by signature: the https:// URL of "
        "their list, or a file with the same JSON (default: reports need a management key).",
        repr=False,
    )
    jwt_issuer: str | None = _setting(
        "STRONGROOM_JWT_ISSUER",
        None,
        "Sign-in by JWT: the issuer, as the claim `iss` has it. Needs STRONGROOM_JWT_AUDIENCE and "
        "STRONGROOM_JWKS (default: no JWTs are accepted).",
    )
    jwt_audience: Annotated[tuple[str, ...], NoDecode] = _setting(
        "STRONGROOM_JWT_AUDIENCE",
        (),
        "Sign-in by JWT: the audience; the claim `aud` must have it. Several are separated by commas: one must match.",
    )
    jwks: str | None = _setting(
        "STRONGROOM_JWKS",
        None,
        "Sign-in by JWT: the issuer's public keys (JWKS), an https:// URL or a file.",
        repr=False,
    )
    jwt_tenant_claim: str = _setting(
        "STRONGROOM_JWT_TENANT_CLAIM",
        "tenant",
        "Sign-in by JWT: the claim with the caller's tenant. In a name without / and :, a dot leads into an object.",
        min_length=1, max_length=200,
    )  # fmt: skip
    jwt_roles_claim: str = _setting(
        "STRONGROOM_JWT_ROLES_CLAIM",
        "roles",
        "Sign-in by JWT: the claim with the names of the caller's roles, such as realm_access.roles.",
        min_length=1, max_length=200,
    )  # fmt: skip
    jwt_leeway_s: int = _setting(
        "STRONGROOM_JWT_LEEWAY_S",
        DEFAULT_LEEWAY_S,
        "Sign-in by JWT: seconds by which the issuer's clock and the store's may differ.",
        ge=0, le=MAX_LEEWAY_S,
    )  # fmt: skip
    pq_encryption_password: SecretStr | None = _setting(
        "PQ_ENCRYPTION_PASSWORD",
        None,
        "The password that encrypts secret fields: refused, because this version does not encrypt them yet.",
    )
    entities: Annotated[tuple[str, ...], NoDecode] = _setting(
        "STRONGROOM_ENTITIES", (), "Python modules with your own Entity classes, separated by commas."
    )

    # Google Cloud.
    google_application_credentials: str | None = _setting(
        "GOOGLE_APPLICATION_CREDENTIALS", None, "Google Cloud: a service account's key file."
    )
    google_cloud_project_id: str | None = _setting("GOOGLE_CLOUD_PROJECT_ID", None, "Google Cloud: the project.")
    firestore_collection: str = _setting("FIRESTORE_COLLECTION", "api_keys", "Firestore: the collection of keys.")
    firestore_emulator_host: str | None = _setting("FIRESTORE_EMULATOR_HOST", None, "Firestore: an emulator.")
    pubsub_emulator_host: str | None = _setting("PUBSUB_EMULATOR_HOST", None, "Pub/Sub: an emulator.")

    @field_validator("peppers", "entities", "trusted_proxies", "jwt_audience", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        return tuple(part.strip() for part in value.split(",") if part.strip()) if isinstance(value, str) else value

    # What the program uses.

    @property
    def store_url(self) -> str:
        """The store, with what other settings say of it as options of the URL; options that it has already stay."""
        named = self._stores()
        url = named[0][1] if named else DEFAULT_STORE
        match url.partition(":")[0]:
            case "postgresql":
                return _with_option(url, "max_connections", str(self.db_max_connections))
            case "firestore":
                project = self.google_cloud_project_id or ""
                url = re.sub(r"^firestore:///", f"firestore://{quote(project, safe='')}/", url)
                return _with_option(url, "collection", self.firestore_collection)
            case _:
                return url

    @property
    def cache_url(self) -> str | None:
        return self.cache if self.cache is not None else self.redis_url

    @property
    def proxies(self) -> tuple[IPv4Network | IPv6Network, ...]:
        """The networks of `trusted_proxies`."""
        return tuple(ip_network(text) for text in self.trusted_proxies)

    @property
    def sign_in(self) -> TokenSettings | None:
        """Which JWTs are accepted; None: none."""
        if self.jwt_issuer is None or self.jwks is None:
            return None
        return TokenSettings(
            self.jwt_issuer,
            self.jwt_audience,
            self.jwks,
            self.jwt_tenant_claim,
            self.jwt_roles_claim,
            self.jwt_leeway_s,
        )

    @property
    def pepper_texts(self) -> tuple[str, ...]:
        return tuple(pepper.get_secret_value() for pepper in self.peppers)

    def _stores(self) -> list[tuple[str, str]]:
        """Each setting that names the store, and the URL it names."""
        named = []
        if self.store is not None:
            named.append(("STRONGROOM_STORE", self.store))
        if self.database_url is not None:
            named.append(("DATABASE_URL", re.sub(r"^postgres://", "postgresql://", self.database_url)))
        if self.database_path is not None:
            named.append(("DATABASE_PATH", f"sqlite:///{quote(self.database_path)}"))
        parts = [name for name in ("db_host", "db_port", "db_user", "db_password", "db_name") if getattr(self, name)]
        if parts:
            password = f":{quote(self.db_password.get_secret_value(), safe='')}" if self.db_password else ""
            account = quote(self.db_user or "postgres", safe="") + password
            where = f"{self.db_host or 'localhost'}:{self.db_port or 5432}"
            named.append((parts[0].upper(), f"postgresql://{account}@{where}/{quote(self.db_name or 'strongroom')}"))
        return named


def _with_option(url: str, name: str, value: str) -> str:
    if name in dict(parse_qsl(urlsplit(url).query, keep_blank_values=True)):
        return url
    return f"{url}{'&' if '?' in url else '?'}{name}={quote(value, safe='')}"


# --- Reading and checking -------------------------------------------------------------------------------------


def read_env_file(file: Path) -> None:
    """Put the settings of a `.env` file into the environment, where everything reads them, unless they are set there.
    Names that are no settings of ours are left alone. Raises ConfigError."""
    if not file.is_file():
        return
    from dotenv.parser import parse_stream

    try:
        with file.open(encoding="utf-8-sig") as opened:
            bindings = list(parse_stream(opened))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: cannot be read: {error}") from None
    wrong = [binding.original.line for binding in bindings if binding.error]
    if wrong:
        raise ConfigError(f"{file}: line {wrong[0]}: expected NAME=value")
    known = {row.name for row in settings_table()}
    for binding in bindings:
        name, value = binding.key, binding.value
        if name is not None and value is not None and (name in known or name.startswith(PREFIX)):
            os.environ.setdefault(name, value)


def named_by(settings: Settings) -> str:
    """Which setting names the store."""
    named = settings._stores()
    return named[0][0] if named else "STRONGROOM_STORE (the default)"


def load(*, store_is: str = "--store", **given: Any) -> Settings:
    """The settings: what is given (by field name, None for not given), then the environment.

    A store that is given replaces whatever the environment says of the store; `store_is` is what the caller calls it.
    Raises ConfigError: one sentence that
    names every setting that is wrong, contradicts another, or asks for what this version does not have.
    """
    given = {name: value for name, value in given.items() if value is not None}
    read_env_file(Path(ENV_FILE))
    if "store" in given:  # the command line outranks every name that the environment has for the store
        given = {**dict.fromkeys(_STORE_FIELDS), **given}
    fields = {Settings.model_fields[name].validation_alias: value for name, value in given.items()}
    try:
        settings = Settings(**{str(alias): value for alias, value in fields.items()})
    except ValidationError as error:
        wrong = [f"{p.path}: {p.message}" for p in problems_of(error, secrets=_SECRET_NAMES)]
        raise ConfigError(_as_given("; ".join(wrong), given, store_is)) from None
    wrong = [*_contradictions(settings), *_not_yet(settings), *_secrets(settings), *_proxies(settings)]
    if wrong:
        raise ConfigError(_as_given("; ".join(wrong), given, store_is))
    return settings


def _as_given(message: str, given: Mapping[str, Any], store_is: str) -> str:
    """A message about settings, with the option's name for each that the command line gave."""
    for name, value in given.items():
        if value is not None:
            alias = re.escape(str(Settings.model_fields[name].validation_alias))
            option = store_is if name == "store" else f"--{name.replace('_', '-')}"
            message = re.sub(rf"\b{alias}\b", option, message)
    return message


_SECRET_NAMES = frozenset(
    str(field.validation_alias) for field in Settings.model_fields.values() if "SecretStr" in str(field.annotation)
) | {"STRONGROOM_STORE", "DATABASE_URL", "STRONGROOM_CACHE", "REDIS_URL"}
"""Settings that may hold a password: no message shows what they are."""
_STORE_FIELDS = ("database_url", "database_path", "db_host", "db_port", "db_user", "db_password", "db_name")


def _contradictions(settings: Settings) -> list[str]:
    wrong = []
    stores = settings._stores()
    for (first, one), (second, other) in pairwise(stores):
        if one != other:
            wrong.append(f"{first} and {second} name different stores: keep one of them")
    if settings.cache is not None and settings.redis_url is not None and settings.cache != settings.redis_url:
        wrong.append("STRONGROOM_CACHE and REDIS_URL name different caches: keep one of them")
    if stores and (project := settings.google_cloud_project_id) and stores[0][1].startswith("firestore://"):
        named = unquote(stores[0][1].removeprefix("firestore://").partition("/")[0])
        if named not in ("", project):
            wrong.append(f"{stores[0][0]} and GOOGLE_CLOUD_PROJECT_ID name different projects: keep one of them")
    sign_in = {
        "STRONGROOM_JWT_ISSUER": settings.jwt_issuer,
        "STRONGROOM_JWT_AUDIENCE": settings.jwt_audience,
        "STRONGROOM_JWKS": settings.jwks,
    }
    given, missing = ([name for name in sign_in if bool(sign_in[name]) is there] for there in (True, False))
    if given and missing:
        wrong.append(f"{' and '.join(given)} cannot be used without {' and '.join(missing)}: set all three, or none")
    if settings.workers > 1 and settings.store_url.startswith("json:"):
        wrong.append(
            f"STRONGROOM_WORKERS={settings.workers} and a json: store (STRONGROOM_STORE): only one process can use it"
        )
    return wrong


def _not_yet(settings: Settings) -> list[str]:
    """What is asked for and this version does not have: said, and never ignored."""
    wrong = []
    name, url = next(iter(settings._stores()), ("STRONGROOM_STORE", DEFAULT_STORE))
    scheme, separator, rest = url.partition("://")
    if not separator or scheme not in STORES:
        wrong.append(f"{name}: found {_without_password(url)!r}, expected {' or '.join(STORES.values())}")
    elif scheme == "firestore" and rest.startswith("/") and not settings.google_cloud_project_id:
        wrong.append(f"{name}: names no project: expected {STORES['firestore']}, or GOOGLE_CLOUD_PROJECT_ID beside it")
    if settings.analytics is not None:
        wrong.append("STRONGROOM_ANALYTICS: this version keeps no cost analytics yet; leave it out")
    for name, value in (("STRONGROOM_CACHE", settings.cache), ("REDIS_URL", settings.redis_url)):
        if value is not None and value.partition("://")[0] not in CACHES:
            wrong.append(f"{name}: found {_without_password(value)!r}, expected redis://host:port/database")
    if settings.leak_keys is not None and not _is_list_of_keys(settings.leak_keys):
        wrong.append(
            f"STRONGROOM_LEAK_KEYS: found {_without_password(settings.leak_keys)!r}, expected an https:// URL (http:// "
            "only on this machine) or a file"
        )
    if settings.jwks is not None and not _is_list_of_keys(settings.jwks):
        wrong.append(
            f"STRONGROOM_JWKS: found {_without_password(settings.jwks)!r}, expected an https:// URL (http:// only on "
            "this machine) or a file"
        )
    if settings.archive is not None and ("://" in settings.archive or not settings.archive.strip()):
        wrong.append(
            f"STRONGROOM_ARCHIVE: found {_without_password(settings.archive)!r}, expected a folder; this version "
            "archives to no other place"
        )
    if settings.rules is not None:
        wrong.append("STRONGROOM_RULES: this version cannot read a rules file yet; leave it out")
    if settings.pq_encryption_password is not None:
        wrong.append("PQ_ENCRYPTION_PASSWORD: this version does not encrypt secret fields yet; leave it out")
    return wrong


def _is_list_of_keys(place: str) -> bool:
    """Whether a list of public keys may be read there: over a network that anyone can alter, it proves nothing."""
    scheme, separator, rest = place.partition("://")
    if not separator:
        return True
    host = rest.partition("/")[0].rpartition("@")[2]
    local = host.partition(":")[0] in ("localhost", "127.0.0.1") or host.startswith("[::1]")
    return bool(host) and (scheme == "https" or (scheme == "http" and local))


def _without_password(url: str) -> str:
    try:
        password = urlsplit(url).password
    except ValueError:
        return url.partition(":")[0] + ":…"
    if password is None and "@" in url:  # mistyped in a way that hides what the password is
        return url.partition(":")[0] + ":…"
    return url.replace(password, "***") if password else url


def _secrets(settings: Settings) -> list[str]:
    wrong = []
    if settings.admin_key is not None:
        text = settings.admin_key.get_secret_value()
        if len(text) < MIN_ADMIN_KEY_CHARS:
            wrong.append(f"STRONGROOM_ADMIN_KEY: found {len(text)} characters, expected {MIN_ADMIN_KEY_CHARS} or more")
        elif len(set(text)) < MIN_ADMIN_KEY_DIFFERENT:
            wrong.append(
                f"STRONGROOM_ADMIN_KEY: found {len(set(text))} different characters, expected "
                f"{MIN_ADMIN_KEY_DIFFERENT} or more"
            )
        elif is_token(text):
            wrong.append("STRONGROOM_ADMIN_KEY: found the form of a JWT, which would be taken for one; choose another")
        elif not is_possible(text) or text != text.strip():
            wrong.append(
                "STRONGROOM_ADMIN_KEY: expected printable text of at most 512 characters without spaces around it, "
                "and not a mistyped Strongroom key"
            )
    for number, pepper in enumerate(settings.pepper_texts, 1):
        if len(pepper) < MIN_PEPPER_CHARS:
            wrong.append(
                f"STRONGROOM_PEPPER: number {number} has {len(pepper)} characters, expected {MIN_PEPPER_CHARS} or more"
            )
    return wrong


def _proxies(settings: Settings) -> list[str]:
    wrong = []
    for text in settings.trusted_proxies:
        try:
            ip_network(text)
        except ValueError as error:
            hint = f"; did you mean {ip_network(text, strict=False)}?" if "host bits" in str(error) else ""
            wrong.append(
                f"STRONGROOM_TRUSTED_PROXIES: found {text[:64]!r}, expected an address or a network such as "
                f"10.0.0.0/8{hint}"
            )
    return wrong


_ENGINE_OF = {
    "DB_MAX_CONNECTIONS": "postgresql",
    "FIRESTORE_COLLECTION": "firestore",
    "FIRESTORE_EMULATOR_HOST": "firestore",
    "PUBSUB_EMULATOR_HOST": "pubsub",
}
"""Settings that only one engine looks at."""


def warnings(settings: Settings, environment: Mapping[str, str] = os.environ) -> list[str]:
    """What is set and has no effect: unknown names that begin like ours, settings of engines that are not used."""
    found = []
    known = [row.name for row in settings_table()]
    for name in sorted(environment):
        if name.startswith(PREFIX) and name not in known and name not in NOT_SETTINGS:
            ends = [one.removeprefix(PREFIX) for one in known]  # the prefix is in each, and would make all alike
            close = [PREFIX + one for one in difflib.get_close_matches(name.removeprefix(PREFIX), ends, 1)]
            found.append(f"{name} is not a setting" + (f"; did you mean {close[0]}?" if close else ""))
    for number, pepper in enumerate(settings.pepper_texts, 1):
        if len(set(pepper)) < MIN_ADMIN_KEY_DIFFERENT:
            found.append(f"STRONGROOM_PEPPER: number {number} has few different characters and may be guessed")
    scheme = settings.store_url.partition(":")[0]
    for name, engine in _ENGINE_OF.items():
        if environment.get(name) and scheme != engine:
            found.append(f"{name} has no effect with this store")
    return found


# --- The table ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Setting:
    """One row of the table. `default` is None where there is none; a secret's value is never shown."""

    name: str
    default: Any
    help: str
    secret: bool


def settings_table() -> list[Setting]:
    """Every setting, in the order of the declaration."""
    return [_row(field) for field in Settings.model_fields.values()]


def _row(field: FieldInfo) -> Setting:
    secret = "SecretStr" in str(field.annotation)
    return Setting(
        str(field.validation_alias), None if field.default == () else field.default, field.description or "", secret
    )
