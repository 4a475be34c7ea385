"""Reads a short public document that the operator names, such as a list of public keys: a file, or a URL.

Every read has a bound on its size and its time. No redirect is followed and nothing is decompressed, because the
operator chose this place and this size, and no other.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

CONNECT_TIMEOUT_S = 5.0


def is_file(place: str) -> bool:
    """Whether a place is a file and not a URL."""
    return "://" not in place


def read_file(place: str, *, max_bytes: int) -> bytes:
    """The content of a file. Raises ValueError, OSError."""
    with Path(place).open("rb") as opened:
        content = opened.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes} bytes")
    return content


async def fetch(url: str, *, max_bytes: int, timeout_s: float) -> bytes:
    """The content of a URL. Raises ValueError, which says why there is none; ImportError without httpx."""
    import httpx

    # The trusted certificates take a tenth of a second to load: off the loop. http has none, and is never redirected.
    verify = await asyncio.to_thread(httpx.create_ssl_context) if url.startswith("https:") else False
    timeout = httpx.Timeout(timeout_s, connect=min(CONNECT_TIMEOUT_S, timeout_s))
    headers = {"accept": "application/json", "accept-encoding": "identity"}
    content = bytearray()
    try:
        async with (
            asyncio.timeout(timeout_s),
            httpx.AsyncClient(timeout=timeout, verify=verify, follow_redirects=False) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            if answer.status_code != 200:
                hint = ", and redirects are not followed" if answer.is_redirect else ""
                raise ValueError(f"it was answered with {answer.status_code}{hint}")
            if answer.headers.get("content-encoding", "identity") != "identity":
                raise ValueError("it is compressed, although that was not asked for")
            async for part in answer.aiter_raw():
                content += part
                if len(content) > max_bytes:
                    raise ValueError(f"it has more than {max_bytes} bytes")
    except TimeoutError:
        raise ValueError(f"there was no whole answer within {timeout_s:g} s") from None
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from None
    return bytes(content)


def reason(error: OSError | ValueError) -> str:
    """Why a read failed, in words."""
    return (error.strerror or str(error)) if isinstance(error, OSError) else str(error)


def shown(place: str) -> str:
    """The place without a user, a password or a query, for logs and answers."""
    if is_file(place):
        return place
    parts = urlsplit(place)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"


__all__ = ["fetch", "is_file", "read_file", "reason", "shown"]
