"""The read-through cache: documents kept in this process and in Redis, invalidated by the journal."""

from .read_through import Cache
from .single_flight import SingleFlight

__all__ = ["Cache", "SingleFlight"]
