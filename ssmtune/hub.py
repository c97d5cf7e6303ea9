"""Whether the hub can be reached, asked once and quickly: its own client tries for a minute and prints every try."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from urllib.parse import urlsplit

_SECONDS = 5


@cache
def hub_is_reachable() -> bool:
    """Whether there is a way to the hub; behind a proxy the question is left to the client."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), _SECONDS).close()
    except OSError:
        return False
    return True


@contextmanager
def cache_alone_if_unreachable() -> Iterator[None]:
    """Let the clients look only into their caches while the hub cannot be reached."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not hub_is_reachable()
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before
