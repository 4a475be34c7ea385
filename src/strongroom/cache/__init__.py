"""The read-through cache: documents kept in this process and in Redis, invalidated by the journal."""

from .read_through import Cache
from .single_flight import SingleFlight
from .stats import CacheStats

__all__ = ["Cache", "CacheStats", "SingleFlight"]
