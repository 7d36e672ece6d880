"""Whether the Hub can be reached, asked once and quickly: its clients would retry for a minute."""

from __future__ import annotations

import socket
import sys
from urllib.parse import urlsplit
from urllib.request import getproxies


def go_offline_if_unreachable() -> None:
    """Without a network only the cache is asked. Sets the switches of huggingface_hub and, if loaded, datasets."""
    import huggingface_hub.constants as hub

    if not hub.HF_HUB_OFFLINE and "https" not in getproxies():
        try:
            socket.getaddrinfo(urlsplit(hub.ENDPOINT).hostname, 443)
        except OSError:
            hub.HF_HUB_OFFLINE = True
    if hub.HF_HUB_OFFLINE and "datasets.config" in sys.modules:
        sys.modules["datasets.config"].HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
