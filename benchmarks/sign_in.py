"""`sign_in`: the caller of a request by its JWT, in process, beside a management key's and beside bare joserfc."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from .harness import Benchmark, BenchmarkError, Job, Plan, Role, Round, Sample, Target, closed_loop, side_by_side, start

ISSUER, AUDIENCE = "https://issuer.example", "strongroom"
ALGORITHMS = ("RS256", "ES256", "Ed25519")
BLOCK = 32
"""Headers that are made at once: few, so that they are in the processor's cache, as a parsed header is."""
TOKENS, QUICK_TOKENS = 2_000, 50
SEEN_OF_KEY = 1 / 1.3
FIRST_OF_JOSERFC = 1 / 1.2

KEY = "strongroom, a management key that was seen before"
SEEN = "strongroom, a JWT that was seen before, {}"
FIRST = "strongroom, a JWT for the first time, {}"
BARE = "joserfc, jwt.decode and its claims, {}"


def run(plan: Plan) -> Benchmark:
    tokens = QUICK_TOKENS if plan.quick else TOKENS
    labels = (
        "From the bytes of the Authorization header to the caller, in process. Each header is a new object, as a "
        "server's parser makes it, so that its hash is not known; making it is not timed.",
        f"{tokens:,} tokens of one issuer, tenant and role, each with its own user; the claims are iss, aud, sub, exp, "
        "iat, nbf, jti, tenant, roles and email.",
        "A seen caller is found in memory. It is authenticated anew four times a second: not in these figures.",
        "For the first time: signature, claims, user and roles; users (without documents) and roles are in memory.",
        "joserfc: jwt.decode with a key set of one key, then JWTClaimsRegistry for issuer, audience and times. It "
        "finds no user, role or scope, and checks neither repeated names nor the depth of the claims.",
    )
    groups = []
    with ExitStack() as stack:
        workers = {name: start(stack, plan, f"{name} tokens", _setup, plan.folder, name, tokens) for name in ALGORITHMS}
        seen = [(SEEN.format(name), workers[name]) for name in ALGORITHMS]
        contenders = [workers[ALGORITHMS[0]].contender(KEY, Role.FLOOR, "key")]
        contenders += [worker.contender(name, Role.OURS, "seen") for name, worker in seen]
        targets = [Target(name, of_floor=SEEN_OF_KEY) for name, _ in seen]
        groups.append(side_by_side(plan, "a caller that was seen before", contenders, targets))
        for name in ALGORITHMS:
            both = (
                workers[name].contender(FIRST.format(name), Role.OURS, "first"),
                workers[name].contender(BARE.format(name), Role.FLOOR, "bare"),
            )
            target = Target(FIRST.format(name), of_floor=FIRST_OF_JOSERFC)
            groups.append(side_by_side(plan, f"a token for the first time, {name}", both, [target]))
    return Benchmark("sign_in", "callers/s", labels, tuple(groups))


@asynccontextmanager
async def _setup(folder: str, algorithm: str, count: int) -> AsyncIterator[Round]:
    from joserfc import jwt
    from joserfc.jwk import KeySet

    from strongroom import Strongroom
    from strongroom.server import adminkey
    from strongroom.server.auth import Authenticator
    from strongroom.tenants import Role as TenantRole
    from strongroom.tenants import TokenSettings

    key = _key(algorithm)
    published = {"keys": [key.as_dict(private=False)]}
    file = Path(folder) / f"{algorithm}.json"
    file.write_text(json.dumps(published))
    settings = TokenSettings(ISSUER, (AUDIENCE,), str(file))
    texts = [_token(algorithm, key, number) for number in range(count)]
    headers = [b"Bearer " + text.encode() for text in texts]
    keys = KeySet.import_key_set(published)  # type: ignore[arg-type]
    claims = jwt.JWTClaimsRegistry(
        leeway=60,
        iss={"essential": True, "value": ISSUER},
        aud={"essential": True, "value": AUDIENCE},
        exp={"essential": True},
        sub={"essential": True},
        tenant={"essential": True},
    )
    async with Strongroom.open("json://:memory:", sign_in=settings) as room:
        admin_key = secrets.token_hex(24)
        await adminkey.ensure(room, admin_key)
        await room.tenant("acme").create(TenantRole(id="editor", scopes=["write"]))
        authenticator = Authenticator(room.keys, (), room.sign_in)
        scope: Mapping[str, Any] = {"headers": [], "client": ("127.0.0.1", 1)}
        admin = b"Bearer " + admin_key.encode()
        taken = 0

        def next_one() -> int:
            nonlocal taken
            taken = (taken + 1) % count
            return taken

        async def first() -> None:
            header = headers[next_one()]
            authenticator._forget(header)
            await authenticator.caller(header, scope)

        async def bare() -> None:
            claims.validate(jwt.decode(texts[next_one()], keys, algorithms=[algorithm]).claims)

        async def measure(job: Job) -> Sample:
            if job.what == "first":
                for header in headers:  # roles and users are in memory
                    await authenticator.caller(header, scope)
            if job.what in ("first", "bare"):
                return await closed_loop(first if job.what == "first" else bare, job.seconds, 1)
            header = admin if job.what == "key" else headers[0]
            caller = await authenticator.caller(header, scope)
            caller.trusted_until = float("inf")
            return _seen(authenticator.known, header, job.seconds)

        yield measure


def _seen(known: Callable[[bytes], object], header: bytes, seconds: float) -> Sample:
    """How often a caller is found by a header that is a new object each time."""
    calls, spent = 0, 0.0
    while spent < seconds:
        copies = [bytes(bytearray(header)) for _ in range(BLOCK)]
        began = time.perf_counter()
        for one in copies:
            known(one)
        spent += time.perf_counter() - began
        calls += BLOCK
    if known(header) is None:
        raise BenchmarkError("the caller is not known")
    return Sample(calls, spent)


def _key(algorithm: str) -> Any:
    from joserfc.jwk import ECKey, OKPKey, RSAKey

    if algorithm == "RS256":
        return RSAKey.generate_key(2048, {"kid": "k1", "use": "sig"})
    if algorithm == "ES256":
        return ECKey.generate_key("P-256", {"kid": "k1", "use": "sig"})
    return OKPKey.generate_key("Ed25519", {"kid": "k1", "use": "sig"})


def _token(algorithm: str, key: Any, number: int) -> str:
    from joserfc import jwt

    now = int(time.time())
    times = {"exp": now + 86_400, "iat": now, "nbf": now}
    person = {"sub": f"user-{number}", "email": f"user-{number}@acme.example", "tenant": "acme", "roles": ["editor"]}
    claims = {"iss": ISSUER, "aud": [AUDIENCE], "jti": secrets.token_hex(8), **times, **person}
    return jwt.encode({"alg": algorithm, "kid": "k1"}, claims, key, algorithms=[algorithm])
