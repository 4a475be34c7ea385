"""Parts of a store's URL, and its form without the password."""

from __future__ import annotations

import os
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit, urlunsplit


def store_file(url: str) -> str | None:
    """The whole path of the file that a store's URL names; None if it names a server, or nothing."""
    scheme, separator, rest = url.partition(":///")
    path = unquote(rest.partition("?")[0])
    return os.path.realpath(path) if separator and scheme in ("sqlite", "json") and path else None


def shown_url(url: str) -> str:
    """A store's URL as it may be shown and kept: without a password, a file by its whole path."""
    file = store_file(url)
    if file is not None:
        return f"{url.partition(':')[0]}:///{file}"
    try:
        parts = urlsplit(url)
    except ValueError:
        return url.partition(":")[0] + ":…"
    user, _, host = parts.netloc.rpartition("@")
    account = f"{user.partition(':')[0]}@{host}" if user else host
    query = urlencode([(name, value) for name, value in parse_qsl(parts.query) if "pass" not in name.lower()])
    return urlunsplit((parts.scheme, account, parts.path, query, ""))


__all__ = ["shown_url", "store_file"]
