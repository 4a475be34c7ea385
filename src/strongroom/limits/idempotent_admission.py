"""Idempotent requests: what their record keeps, so that a retry gets the first answer. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec

from .usage_state import Status, Subjects

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(list[tuple[str, str, int, int | None, int, int, int]]).decode


class EarlierAdmission(NamedTuple):
    """The record of an idempotent request that was admitted: its fingerprint, and the statuses of the limits."""

    fingerprint: str
    memo: bytes | None


def kept_statuses(subjects: Subjects, statuses: Sequence[Status]) -> bytes:
    """The statuses of limits, as the record of an idempotent request keeps them."""
    whose = {id(one): subject.id for subject in subjects.all for one in subject.compiled_limits}
    names = [(whose[id(one.compiled_limit)], one.compiled_limit.id) for one in statuses]
    numbers = [(one.used, one.resets_at_us, one.recorded, one.reserved, one.leased) for one in statuses]
    return _encode([(*name, *number) for name, number in zip(names, numbers, strict=True)])


def statuses_kept(subjects: Subjects, memo: bytes | None) -> tuple[Status, ...] | None:
    """The statuses that `kept_statuses` was given, of the limits that still exist; None if none were kept."""
    if not memo:
        return None
    there = {(subject.id, one.id): one for subject in subjects.all for one in subject.compiled_limits}
    return tuple(
        Status(compiled_limit, used, resets_at_us, recorded, reserved, leased)
        for subject, limit, used, resets_at_us, recorded, reserved, leased in _decode(memo)
        if (compiled_limit := there.get((subject, limit))) is not None
    )
