"""Webhooks: endpoints, signed deliveries with retries, and the guard against requests to inner networks."""

from .deliveries import Deliveries
from .delivery_attempt import Delivery
from .endpoints import DEFAULT_OVERLAP_S, MAX_OVERLAP_S, Webhooks
from .http_sender import HttpSender
from .model import IssuedWebhook, NewWebhook, Webhook, WebhookChanges, WebhookFields
from .signatures import InvalidSignature, verify_signature

__all__ = [
    "DEFAULT_OVERLAP_S",
    "MAX_OVERLAP_S",
    "Deliveries",
    "Delivery",
    "HttpSender",
    "InvalidSignature",
    "IssuedWebhook",
    "NewWebhook",
    "Webhook",
    "WebhookChanges",
    "WebhookFields",
    "Webhooks",
    "verify_signature",
]
