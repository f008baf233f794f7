"""Ask a server over HTTP which vectors it serves."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["check"]


def check(base_url: str, *, api_key: str | None = None, timeout: float = 10.0) -> dict[str, Any]:
    """Return what a vLLM server says of its steering vectors, or fail in words if it steers nothing.

    A server without the plugin ignores the key ``steering`` of a request in silence, so that a client
    had better call this once before it sends any.

    Args:
        base_url: The server's address, such as ``"http://localhost:8000"``, with or without ``/v1``.
        api_key: The server's key, if it asks for one.
        timeout: The number of seconds to wait for the server.

    Returns:
        A dictionary with ``vectors``, which maps each name to its ``layers`` and its ``hash``,
        ``capacity``, ``loading`` (true if vectors may be loaded and unloaded) and ``layers``, those
        that can be steered.

    Raises:
        ConnectionError: If there is no server at this address.
        RuntimeError: If the server doesn't steer, or refuses to answer.
        ValueError: If ``base_url`` is no HTTP address.

    >>> check("localhost:8000")
    Traceback (most recent call last):
    ValueError: base_url must begin with http:// or https://, got 'localhost:8000'
    """
    # Here, since the plugin's entry point passes through this module whenever vLLM starts.
    import urllib.error
    import urllib.request
    from http.client import HTTPException

    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
    url = f"{base_url.rstrip('/').removesuffix('/v1')}/v1/steering"
    asked = urllib.request.Request(url, headers={"Authorization": f"Bearer {api_key}"} if api_key else {})
    try:
        with urllib.request.urlopen(asked, timeout=timeout) as answer:
            found = json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        if error.code in (401, 403):
            raise RuntimeError(f"{url} answers {error.code} {error.reason}: pass the server's api_key") from None
        raise RuntimeError(f"{url} answers {error.code} {error.reason}: {_ADVICE}") from None
    except (OSError, HTTPException) as error:
        raise ConnectionError(f"there is no server at {base_url}: {error}") from error
    except ValueError:
        found = None
    if not isinstance(found, dict) or "vectors" not in found:
        raise RuntimeError(f"{url} answers something else than a list of steering vectors: {_ADVICE}")
    return found


_ADVICE = (
    "this server steers nothing, and ignores steering in requests; install steering-vectors where vLLM runs, and start "
    "it with STEERING_VECTORS_DIR=FOLDER and VLLM_PLUGINS=steering_vectors"
)
