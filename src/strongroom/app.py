"""The composition root: builds everything from a store's URL, and closes it in the right order."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Concatenate, Literal, ParamSpec, Self, TypedDict, TypeVar, get_args
from urllib.parse import urlsplit

from .audit import (
    JOB,
    RETENTION_EVERY_S,
    Audit,
    Evidence,
    JournalWitness,
    LegalHold,
    LegalHolds,
    Policies,
    Proofs,
    Redactions,
    RetentionPolicy,
    Witnesses,
)
from .audit.upkeep import Upkeep, is_new
from .audit.witnesses import EVERY_S as WITNESSES_EVERY_S
from .audit.witnesses import parse as parse_witnesses
from .cache import Cache
from .clock import MachineClock, StoreClock, clock_of
from .context import Context, system_context
from .cooperative import to_be_awaited
from .database import Database, IdempotentCall, QueryShape, Reads, StoreState, WriteSwitch
from .entities import MAX_LIMIT, MAX_PAGE_BYTES, Entity, Page, Query, Registry, Secret
from .errors import AlreadyExists, ConfigError, StrongroomError
from .events import Event
from .jobs import JobLease, JobLeases
from .jobs.maintenance import Background, Job, ShapeKeeper, background
from .jobs.sealing import LEASE_S as SEALING_LEASE_S
from .jobs.sealing import Sealing
from .journal import DENY, POLL_S, TREE_ENTITIES, ChangeFeed
from .journal.sealer import Sealer
from .journal.signing_key import SigningKeys
from .keys import ApiKey, Hasher, Keys, KeySource, Leak, LeakPolicy, Leaks, StoredReservation
from .keys.import_source import load as load_sources
from .keys.jobs import RollUp, key_jobs
from .keys.tenant_part import KeysOfTenants
from .limits import LEASE_S, KeyUsage, LeaseManager, Ledger, folder_for
from .pepper import Pepper
from .quotas import Quota
from .quotas.service import Quotas
from .retry_log import RetryLog
from .rules import Policy, default_policy
from .storage import open_store
from .storage.instrumented import InstrumentedStore
from .storage.port import Record
from .storage.url import store_file
from .tenants import (
    DELETIONS_EVERY_S,
    DeletionStatement,
    Owned,
    SignIn,
    StateReader,
    SuspendedTenants,
    TenantDeletion,
    TenantPart,
    Tenants,
    TokenSettings,
    Writes,
    refuse_reserved,
)
from .tenants import ENTITIES as TENANT_ENTITIES
from .webhooks import Deliveries, Delivery, HttpSender, Webhook, Webhooks

if TYPE_CHECKING:
    from opentelemetry.trace import TracerProvider

DEFAULT_STORE = "sqlite:///data/strongroom.db"
MIN_PEPPER_CHARS = 32
MIN_LEASE_S = 0.5
MAX_LEASE_S = 60.0
LimitMode = Literal["durable", "leased"]
E = TypeVar("E", bound=Entity)
P = ParamSpec("P")
R = TypeVar("R")
_log = logging.getLogger(__name__)


class StoredPepper(Entity, collection="peppers", scope="global"):
    """A pepper of key hashes, kept in the store if the configuration has none. The greatest id is current."""

    secret: Annotated[bytes, Secret()]


SYSTEM_ENTITIES: tuple[type[Entity], ...] = (
    ApiKey,
    KeyUsage,
    Quota,
    StoredReservation,
    IdempotentCall,
    StoredPepper,
    KeySource,
    StoreState,
    WriteSwitch,
    JobLease,
    LeakPolicy,
    Leak,
    QueryShape,
    Webhook,
    Event,
    Delivery,
    *TREE_ENTITIES,
    JournalWitness,
    LegalHold,
    RetentionPolicy,
    *TENANT_ENTITIES,
    TenantDeletion,
    DeletionStatement,
)


_OF_TENANTS = frozenset(cls.__collection__.name for cls in (ApiKey, Quota, Webhook, LeakPolicy))
"""Collections of the platform whose documents belong to tenants: nobody changes those of a suspended tenant."""


class OpenOptions(TypedDict, total=False):
    """The options of Strongroom.open beside the store's URL, for code that passes them on."""

    entities: Sequence[type[Entity]]
    policy: Policy
    peppers: Sequence[str]
    journal_days: int | None
    archive: str | Path | None
    cache: str | None
    limits: LimitMode
    lease_s: float
    lease_folder: str | None
    sign_in: TokenSettings | None
    sealing: bool
    signing_key: str | None
    witnesses: str | None
    tracer_provider: TracerProvider | None


class Strongroom:
    """One store, opened: `keys`, `database`, and a handle for each tenant's own data.

    async with Strongroom.open("sqlite:///app.db", entities=[Note]) as room:
        acme = room.tenant("acme")
        note = await acme.create(Note(text="hello"))
        issued = await room.keys.create(name="worker", tenant="acme")
        answer = await room.keys.verify(issued.text)
    """

    def __init__(
        self,
        store: InstrumentedStore,
        database: Database,
        ledger: Ledger,
        keys: Keys,
        feed: ChangeFeed,
        clock: MachineClock | StoreClock,
        background: Background,
        tenants: Tenants,
    ) -> None:
        self.store = store
        self.clock = clock
        self.database = database
        self.ledger = ledger
        self.keys = keys
        self.leaks = Leaks(database, keys, clock)
        self.quotas = Quotas(database, ledger, clock)
        self.tenants = tenants
        self.writes = Writes(database, tenants)
        self.suspended = SuspendedTenants(database, self._tenant_changed)
        database.writes.owned = _OF_TENANTS
        keys.cache.suspended = self.suspended.sentences
        self.feed = feed
        self._reloading = asyncio.Lock()
        self.background = background

    @classmethod
    @asynccontextmanager
    async def open(
        cls,
        url: str = DEFAULT_STORE,
        *,
        entities: Sequence[type[Entity]] = (),
        policy: Policy = default_policy,
        peppers: Sequence[str] = (),
        journal_days: int | None = None,
        archive: str | Path | None = None,
        cache: str | None = None,
        limits: LimitMode = "durable",
        lease_s: float = LEASE_S,
        lease_folder: str | None = None,
        sign_in: TokenSettings | None = None,
        sealing: bool = True,
        signing_key: str | None = None,
        witnesses: str | None = None,
        tracer_provider: TracerProvider | None = None,
    ) -> AsyncIterator[Self]:
        """Open a store, make its schema fit the declarations (additions only), and close everything at the end.

        `peppers`: secrets of 32 characters or more that key hashes are made with, the current one first; without
        them one is made and kept in the store. `journal_days`: how long journal records are kept;
        None: 90 days in a new store, for ever in an older one. `archive`: the folder to which they are written before
        they are dropped. `cache`: where what entities declare as cached is kept,
        `redis://…`, or `memory://` for this process alone; without it every read goes to the store.
        `limits`: `durable` debits each use before it is answered, `leased` debits limit leases, which are then
        spent in memory (docs/limits.md); `lease_s`: how long a limit lease lasts; `lease_folder`: the folder of the
        lease log, which survives a killed process (default: beside the store's file, or the temporary folder).
        `sign_in`: which JWTs the server accepts; without it, none. `sealing`: whether this process seals the journal
        (docs/audit.md) when no other does; `signing_key`: the file of the keys that sign its checkpoints (default:
        beside the store's file, made at the first use); `witnesses`: a file of witnesses that cosign them.
        `tracer_provider`: OpenTelemetry's, which gets a span for each call of the store that belongs to a span. Raises
        ConfigError, SchemaError, StoreError, Unavailable.
        """
        refuse_reserved(entities)
        registry = Registry((*SYSTEM_ENTITIES, *entities))
        async with AsyncExitStack() as stack:
            store, database, clock = await _opened(stack, url, registry, policy, tracer_provider)
            signing_keys = _signing_keys(url, signing_key)
            sealer = Sealing(
                Sealer(store, clock, signing_keys),
                JobLeases(database, clock, lease_s=SEALING_LEASE_S),
                lambda: database.writes.refusal is not None,
            )
            stack.push_async_callback(sealer.close)  # once every record is written
            stack.push_async_callback(database.denials.close)
            await Policies(database, journal_days).begin(lambda: is_new(store))
            hasher = await _hasher(database, peppers)
            database.calls.use(hasher)
            ledger = Ledger(database, store, clock)
            stack.push_async_callback(RollUp(database, clock).at_end, ledger.used)  # once all is written
            stack.push_async_callback(ledger.close)
            feed = ChangeFeed(store)
            leases = JobLeases(database, clock)
            keys = Keys(database, ledger, hasher, clock, feed)
            stack.push_async_callback(keys.cache.close)
            lease_manager = _lease_manager(ledger, clock, keys, url, limits, lease_s, lease_folder)
            tenants = Tenants(database, store, _parts_of_tenants(database, keys, ledger, clock), clock)
            jobs = [*key_jobs(keys, database, clock), Job("tenant-deletions", DELETIONS_EVERY_S, tenants.deletions.run)]
            asked = Witnesses(store, clock, parse_witnesses(witnesses)) if witnesses is not None else None
            if asked is not None:
                jobs.append(Job("journal-witnesses", WITNESSES_EVERY_S, asked.run))
            upkeep = Upkeep.of(database, store, clock, sealer, journal_days, archive)
            jobs.append(Job(JOB, RETENTION_EVERY_S, upkeep.job.run))
            tenants.deletions.hooks.legal_hold = upkeep.blocks_deletion
            tenants.deletions.hooks.guard = upkeep.policies.guard
            work = background(database, store, clock, leases, more=jobs)
            database.writes.applications = frozenset(entity.__collection__.name for entity in entities)
            room = cls(store, database, ledger, keys, feed, clock, work, tenants)
            room.sealer = sealer
            room.proofs = Proofs(store, database, clock, signing_keys)
            tenants.deletions.hooks.tree = room.proofs.size_and_root
            room.witnesses = asked
            room.audit = Audit(store, database, room.proofs)
            room.evidence = Evidence(store, database, room.proofs, clock)
            tenants.deletions.hooks.sign = room.proofs.sign_text
            room.evidence.statements |= {
                "retention": upkeep.retention_statement,
                "legal-holds": upkeep.holds_statement,
            }
            room.legal_holds, room.retention, room.redactions = upkeep.holds, upkeep.policies, upkeep.redactions
            room._configured_peppers = tuple(peppers)
            if cache is not None:
                room.cache = Cache(store, feed, registry.collections, cache, await _namespace(url, database))
                database.use(room.cache)
            if sign_in is not None:
                room.sign_in = SignIn(sign_in, database, clock, feed, room.suspended.check)
            room._listen(stack)
            room._tell_webhooks(leases)
            await room._start(stack)
            if sealing:
                sealer.start()
            if lease_manager is not None:
                lease_manager.start()
            yield room

    def _listen(self, stack: AsyncExitStack) -> None:
        """Let the state in memory follow the changes of all processes, once the feed is started."""
        self.database.hand_records_to(self.feed)
        self.feed.on_record(self.database.writes.seen)
        self.feed.on_record(self.suspended.seen)
        self.feed.on_record(self._seen)
        self.feed.on_reset(self._forget_all)
        if self.sign_in is not None:
            self.feed.on_record(self.sign_in.seen)
            self.feed.on_reset(self.sign_in.forget_all)
        self.feed.on_record(self.sealer.seen)
        self.feed.on_reset(self.sealer.reset)
        self.database.after_commit(lambda _: self.sealer.committed())
        stack.push_async_callback(self._stop_reloading)

    def _tell_webhooks(self, leases: JobLeases) -> None:
        """Let crossed thresholds become events, and deliver events once the deliveries are started."""
        sender = HttpSender()
        self.webhooks = Webhooks(self.database, lambda: self.keys.hasher, self.clock, self.feed, sender)
        self.deliveries = Deliveries(self.database, self.clock, leases, self.webhooks, sender)
        self.ledger.watch(self.webhooks.subscriptions, self.deliveries.wake)

    async def _start(self, stack: AsyncExitStack) -> None:
        """Start the background tasks, in an order in which no change of another process is missed."""
        await self.feed.start()
        stack.push_async_callback(self.feed.close)
        if self.cache is not None:
            self.cache.start()
            stack.push_async_callback(self.cache.close)
        await self.database.writes.load()
        await self.suspended.load()
        state = StateReader(self.database, self.suspended, self.feed)
        state.start()
        stack.push_async_callback(state.close)
        await self._reload_peppers()  # one may have been made after they were read and before the feed began
        await self.webhooks.subscriptions.load()
        if self.sign_in is not None:
            self.sign_in.start()
            stack.push_async_callback(self.sign_in.close)
        self.background.start()
        stack.push_async_callback(self.background.close)
        self.deliveries.start()
        stack.push_async_callback(self.deliveries.close)
        shapes = ShapeKeeper(self.database, self.clock)
        shapes.start()
        stack.push_async_callback(shapes.close)

    webhooks: Webhooks
    deliveries: Deliveries
    legal_holds: LegalHolds
    retention: Policies
    redactions: Redactions
    sealer: Sealing
    """Seals the journal. `await sealer.seal_now()` returns once everything is sealed."""
    proofs: Proofs
    witnesses: Witnesses | None = None
    audit: Audit
    evidence: Evidence
    cache: Cache | None = None
    sign_in: SignIn | None = None
    _configured_peppers: tuple[str, ...] = ()
    _reload: asyncio.Task[None] | None = None
    _reload_again = False
    _reload_whole = False

    def tenant(self, tenant: str, *, actor: str = "system", claims: Mapping[str, Any] | None = None) -> Tenant:
        """A handle on one tenant's data. Without claims it acts for the application itself."""
        return Tenant(self.database, Context(tenant, actor, claims if claims is not None else {}))

    def _seen(self, record: Record) -> None:
        """A journal record of any process: forget what it makes outdated."""
        if record.action == DENY:
            return
        if record.collection == ApiKey.__collection__.name:
            self.keys.changed(record.entity_id)
        elif record.collection == Quota.__collection__.name:
            self.keys.quota_changed(record.entity_id)
        elif record.collection in (StoredPepper.__collection__.name, KeySource.__collection__.name):
            self._reload_soon()

    def _tenant_changed(self, tenant: str) -> None:
        """A tenant was suspended or resumed: its keys and its callers are asked again."""
        self.keys.tenant_changed(tenant)
        if self.sign_in is not None:
            self.sign_in.tenant_changed(tenant)

    def _forget_all(self) -> None:
        """Records were missed: everything that was read before may be outdated."""
        self.keys.forget_all()
        self._reload_whole = True
        self._reload_soon()

    def _reload_soon(self) -> None:
        self._reload_again = True
        if self._reload is None or self._reload.done():
            self._reload = asyncio.get_running_loop().create_task(self._reload_until_done())

    async def rotate_pepper(self) -> None:
        """Make new hashes with a new pepper from now on. Old hashes keep working, each is renewed at its next use."""
        if self._configured_peppers:
            raise ConfigError("the configuration sets the peppers: put the new one first there, and keep the old one")
        current = await _stored_peppers(self.database)
        pepper = StoredPepper(id=f"{int(current[0].id) + 1:06d}", secret=secrets.token_bytes(32))
        await self.database.create(system_context(), pepper)
        await self._reload_peppers()

    async def _reload_peppers(self) -> None:
        # One at a time: a reload that read before a rotation must not put the older peppers back after it.
        async with self._reloading:
            hasher = await _hasher(self.database, self._configured_peppers)
            self.keys.use(hasher)
            self.database.calls.use(hasher)

    async def _reload_until_done(self) -> None:
        told = RetryLog(_log, "the peppers cannot be read")
        while self._reload_again:
            self._reload_again = False
            whole, self._reload_whole = self._reload_whole, False
            try:
                await self._reload_peppers()
                if whole:
                    await self.database.writes.reload()
                    await self.suspended.load()
                    await self.webhooks.subscriptions.reload()
            except Exception as error:
                # Whatever it is: without the peppers the keys that were made with them are not found.
                told.failed(error)
                if not isinstance(error, StrongroomError):
                    _log.exception("the peppers cannot be read, because of an unexpected error")
                self._reload_again, self._reload_whole = True, whole or self._reload_whole
                await asyncio.sleep(POLL_S)

    async def _stop_reloading(self) -> None:
        if self._reload is not None:
            self._reload.cancel()
            await asyncio.wait([self._reload])


def _for_tenant(method: Callable[Concatenate[Any, Context, P], R]) -> Callable[Concatenate[Tenant, P], R]:
    """A method of Database as a method of Tenant, which adds the context. Its signature and description are written
    once, at the method."""
    name = method.__name__

    @wraps(method)
    def call(tenant: Tenant, /, *args: P.args, **kwargs: P.kwargs) -> R:
        found: Callable[Concatenate[Context, P], R] = getattr(tenant._database, name)
        return found(tenant._context.at_now(), *args, **kwargs)

    signature = inspect.signature(method)
    parameters = [parameter for parameter in signature.parameters.values() if parameter.name != "context"]
    vars(call)["__signature__"] = signature.replace(parameters=parameters)
    return to_be_awaited(call)


class Tenant:
    """One tenant's data, as one actor. The methods are those of Database, without the context."""

    def __init__(self, database: Database, context: Context) -> None:
        self._database = database
        self._context = context

    @property
    def context(self) -> Context:
        """This handle's context, now."""
        return self._context.at_now()

    get = _for_tenant(Reads.get)
    get_or_none = _for_tenant(Reads.get_or_none)
    aggregate = _for_tenant(Reads.aggregate)
    create = _for_tenant(Database.create)
    replace = _for_tenant(Database.replace)
    update = _for_tenant(Database.update)
    delete = _for_tenant(Database.delete)
    add = _for_tenant(Database.add)

    async def find(self, cls: type[E], query: Query = Query(), cursor: str | None = None) -> Page[E]:
        """One page of the documents that match: at most `query.limit`, and MAX_PAGE_BYTES. `next_cursor` says whether
        there are more."""
        return await self._database.find(self._context.at_now(), cls, query, cursor, max_bytes=MAX_PAGE_BYTES)


async def _opened(
    stack: AsyncExitStack, url: str, registry: Registry, policy: Policy, tracer_provider: TracerProvider | None
) -> tuple[InstrumentedStore, Database, MachineClock | StoreClock]:
    """The store, with the schema that the declarations ask for, the database over it, and its clock."""
    opened = await open_store(url)
    if tracer_provider is not None:
        from .storage.traced import TracedStore

        opened = TracedStore(opened, tracer_provider)
    store = InstrumentedStore(opened)
    stack.push_async_callback(store.close)
    await store.prepare(registry.collections)
    clock = clock_of(store)
    await clock.start()
    stack.push_async_callback(clock.close)
    database = Database(store, registry, policy, clock)
    await database.writes.load()
    return store, database, clock


def _lease_manager(
    ledger: Ledger,
    clock: MachineClock | StoreClock,
    keys: Keys,
    url: str,
    limits: LimitMode,
    lease_s: float,
    folder: str | None,
) -> LeaseManager | None:
    if limits not in get_args(LimitMode):
        raise ConfigError(f"limits: found {limits!r}, expected durable or leased")
    if not MIN_LEASE_S <= lease_s <= MAX_LEASE_S:
        raise ConfigError(f"lease_s: found {lease_s}, expected {MIN_LEASE_S} to {MAX_LEASE_S} seconds")
    if limits == "durable":
        return None
    return LeaseManager(ledger, clock, lease_s=lease_s, folder=folder_for(url, folder), describe=keys.cache.subject_of)


def _parts_of_tenants(
    database: Database, keys: Keys, ledger: Ledger, clock: MachineClock | StoreClock
) -> list[TenantPart]:
    """What tenants have beside the documents of their own collections."""
    return [
        KeysOfTenants(database, ledger, lambda: keys.hasher, clock),
        Owned(database, Webhook, order=("tenant", "-created_at")),
        Owned(database, Delivery),
        Owned(database, Event),
        Owned(database, WriteSwitch),
    ]


def _signing_keys(url: str, given: str | None) -> SigningKeys | None:
    """The keys that sign checkpoints; None: trees stay unsigned. Raises ConfigError for a given file without keys."""
    if given is not None:
        keys = SigningKeys(given)
        keys.read()
        return keys
    file = store_file(url)
    return SigningKeys.of_store(file) if file is not None else None


def _configured(peppers: Sequence[str]) -> list[Pepper]:
    for text in peppers:
        if len(text) < MIN_PEPPER_CHARS:
            raise ConfigError(f"a pepper has {len(text)} characters, expected {MIN_PEPPER_CHARS} or more")
    digests = [hashlib.sha256(text.encode()) for text in peppers]
    return [Pepper("c" + hashlib.sha256(d.digest()).hexdigest()[:10], d.digest()) for d in digests]


async def _stored_peppers(database: Database) -> list[Pepper]:
    """The store's own peppers, newest first; makes the first one (two processes that start together make one)."""
    context = system_context()
    query = Query(order_by=("-id",), limit=MAX_LIMIT)
    found = (await database.find(context, StoredPepper, query)).items
    if not found:
        with suppress(AlreadyExists):  # another process made it in this moment
            await database.create(context, StoredPepper(id="000001", secret=secrets.token_bytes(32)))
        found = (await database.find(context, StoredPepper, query)).items
    return [Pepper(pepper.id, pepper.secret) for pepper in found]


async def _hasher(database: Database, peppers: Sequence[str]) -> Hasher:
    """Hashes under the configured and the stored peppers; finds imported keys by what came with them."""
    hasher = Hasher([*_configured(peppers), *await _stored_peppers(database)])
    return hasher.with_imported(await load_sources(database, hasher))


async def _namespace(url: str, database: Database) -> str:
    """What sets this store's entries apart from any other store's on one Redis: made of its URL without user and
    password (a copy of the store is another one) and of a secret that was made with it (so is a new one there)."""
    oldest = (await _stored_peppers(database))[-1]
    parts = urlsplit(url)
    place = f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}?{parts.query}"
    return hmac.digest(oldest.secret, f"cache {place}".encode(), "sha256").hex()[:16]
