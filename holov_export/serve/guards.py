"""Who may ask: an API key, and for servers of one machine the name they are asked by."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from holov_export.serve.faults import Fault, response_from_fault


def needs_no_key(path: str) -> bool:
    """Whether the server is ready, and the page, which has a field for the key."""
    return path in ("/", "/health") or path.startswith("/page/")


class KeyGuard:
    """Refuses requests without the key. Preflights of browsers never get here; see `app_from`."""

    def __init__(self, app: ASGIApp, key: str) -> None:
        self._app = app
        self._digest = _digest(key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not needs_no_key(scope["path"]):
            word, _, given = Headers(scope=scope).get("authorization", "").partition(" ")
            # digests have one length, so that the comparison takes one time
            if word.lower() != "bearer" or not hmac.compare_digest(_digest(given.strip()), self._digest):
                text = "this server needs an API key: 'Authorization: Bearer KEY'." if not given else "wrong API key."
                fault = Fault(401, text, code="invalid_api_key")
                await response_from_fault(fault)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class HostGuard:
    """Refuses requests to a foreign name, for servers that only this machine reaches and that have no key.

    A page on the Internet may let its own name point to 127.0.0.1 (DNS rebinding); to a browser this server is then
    part of that page.
    """

    def __init__(self, app: ASGIApp, origins: tuple[str, ...] = ()) -> None:
        """Args: origins: whose hosts are good names as well."""
        self._app = app
        self._names = {urlsplit(origin).hostname for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not self._is_own(Headers(scope=scope).get("host", "")):
            fault = Fault(403, "this server is asked by another name than that of this machine.", code="wrong_host")
            await response_from_fault(fault)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _is_own(self, host: str) -> bool:
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        return name == "localhost" or name.endswith(".localhost") or name in self._names or is_address(name)


def is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True
