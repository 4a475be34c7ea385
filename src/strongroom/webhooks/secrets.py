"""The signing secrets of webhook endpoints, encrypted under the store's peppers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..clock import Clock
from ..context import utc_from_us
from ..errors import StoreError
from ..pepper import Peppers
from .model import Webhook


class WebhookSecrets:
    """Encrypts and decrypts the secrets of endpoints. `peppers` gives the current peppers."""

    def __init__(self, peppers: Callable[[], Peppers], clock: Clock) -> None:
        self._peppers = peppers
        self._clock = clock

    def encrypt(self, id: str, secret: bytes) -> bytes:
        """The secret of the endpoint `id`, encrypted under the current pepper."""
        return self._peppers().conceal(secret, _purpose(id))

    def current(self, webhook: Webhook) -> bytes:
        """The endpoint's current secret. Raises StoreError if its pepper is missing."""
        return self._decrypt(webhook.id, webhook.secret)

    def signing(self, webhook: Webhook) -> Sequence[bytes]:
        """The secrets that sign now: the current one, then the previous one during its overlap. Raises StoreError."""
        signing = [self.current(webhook)]
        until = webhook.previous_until
        if webhook.previous_secret is not None and until is not None and utc_from_us(self._clock.now_us()) < until:
            signing.append(self._decrypt(webhook.id, webhook.previous_secret))
        return signing

    def _decrypt(self, id: str, encrypted: bytes) -> bytes:
        secret = self._peppers().reveal(encrypted, _purpose(id))
        if secret is None:
            raise StoreError(
                f"the secret of the webhook {id} cannot be decrypted: its pepper is missing; rotate the secret"
            )
        return secret


def _purpose(id: str) -> str:
    return f"webhook\x00{id}"
