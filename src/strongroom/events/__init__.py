"""Events: the outbox, written in the same commit as the change that an event tells of."""

from .outbox import EVENT_TYPES, KEPT, KEY_LEAKED, LIMIT_THRESHOLD, PREFIX, TEST, Event, event, put

__all__ = ["EVENT_TYPES", "KEPT", "KEY_LEAKED", "LIMIT_THRESHOLD", "PREFIX", "TEST", "Event", "event", "put"]
