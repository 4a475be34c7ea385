"""What the cache did since the process began, for health and metrics. Both tiers count into it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class CacheStats:
    """Counts since the process began."""

    local_hits: int = 0
    redis_hits: int = 0
    absent_hits: int = 0
    """Hits in either tier that said that the document does not exist."""
    misses: int = 0
    """Reads of the store that the cache could not avoid. A caller who waits for another's read counts as a hit."""
    shared: int = 0
    """Reads that were answered by another caller's read of the store."""
    bypassed: int = 0
    """Reads that went straight to the store because the journal was not followed closely enough."""
    fills: int = 0
    fills_refused: int = 0
    """Fills of Redis that came after an invalidation, or too late."""
    unusable: int = 0
    """Entries in Redis that were damaged, foreign, or older than this node's connection."""
    redis_errors: int = 0
    """Answers of Redis that were errors, came too late, or did not come."""
    connections: int = 0
    invalidations: int = 0


__all__ = ["CacheStats"]
