"""The entities of application state: policies, signals, actions and the status of services."""

from .model import ENTITIES, Action, CoordinationStatus, Policy, Signal

__all__ = ["ENTITIES", "Action", "CoordinationStatus", "Policy", "Signal"]
