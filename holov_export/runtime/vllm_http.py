"""HTTP to a vLLM server with the standard library: JSON in, JSON or a stream of events out."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from typing import Any
from urllib.parse import urlsplit

from holov_export.errors import EnvironmentFaultError, NetworkError, UsageError

#: what a server says at most of an error
_LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Reply:
    """An answer in one piece: its HTTP status and its JSON, {} where it has none."""

    status: int
    body: dict[str, Any]

    @property
    def message(self) -> str:
        """What the server says of an error."""
        error = self.body.get("error", self.body)
        found = error.get("message") if isinstance(error, dict) else error
        return str(found or f"HTTP status {self.status}")[:_LONGEST_MESSAGE]


@dataclass(frozen=True)
class VllmHttp:
    """Where a server listens. Each request has its own connection: closing it is how a server is told to stop.

    Attributes:
        address: "http://host:port", for messages.
        secure: https. host, port: as in the address.
        prefix: a path before every other one.
        api_key: sent as a bearer token.
        connect_timeout: seconds until the server takes the connection. timeout: of silence, on an open one.
    """

    address: str
    secure: bool
    host: str
    port: int | None
    prefix: str
    api_key: str | None
    connect_timeout: float = 10.0
    timeout: float = 300.0

    def get(self, path: str) -> Reply:
        """Raises: NetworkError if the server does not answer."""
        return self._whole("GET", path, None)

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        """Raises: NetworkError if the server does not answer."""
        return self._whole("POST", path, body)

    def _whole(self, method: str, path: str, body: dict[str, Any] | None) -> Reply:
        connection = self._connected()
        try:
            return _reply(self._sent(connection, method, path, body))
        except (OSError, HTTPException) as error:
            raise self._silent(error) from error
        finally:
            connection.close()

    def events(self, path: str, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The server's events as they come. Closing the iterator closes the connection.

        Raises:
            UsageError: the server refuses the request or the key.
            EnvironmentFaultError: the server fails, is too busy or has no such path.
            NetworkError: it does not answer, falls silent, or ends before it says that it is done.
        """
        connection = self._connected()
        try:
            response = self._sent(connection, "POST", path, body)
            if response.status != 200:
                raise fault_from_reply(_reply(response), self.address)
            while line := response.readline():
                if not line.startswith(b"data:"):
                    continue
                data = line.removeprefix(b"data:").strip()
                if data == b"[DONE]":
                    return
                event = _parsed(data)
                if "error" in event:
                    raise EnvironmentFaultError(
                        f"the vLLM server at {self.address} failed: {Reply(response.status, event).message}"
                    )
                yield event
        except (OSError, HTTPException) as error:
            raise self._silent(error) from error
        finally:
            connection.close()
        raise NetworkError(f"the vLLM server at {self.address} ended the answer before it was done.")

    def _connected(self) -> HTTPConnection:
        kind = HTTPSConnection if self.secure else HTTPConnection
        connection = kind(self.host, self.port, timeout=self.connect_timeout)
        try:
            connection.connect()
        except OSError as error:
            raise NetworkError(
                f"no vLLM server answers at {self.address}: {error}",
                hint="Start it: vllm serve CHECKPOINT --enable-mm-embeds --enable-scale-out",
            ) from error
        connection.sock.settimeout(self.timeout)
        return connection

    def _sent(self, connection: HTTPConnection, method: str, path: str, body: dict[str, Any] | None) -> HTTPResponse:
        headers = {"Accept": "application/json, text/event-stream"}
        if self.api_key:
            headers["Authorization"] = f"Bearer {self.api_key}"
        data = None
        if body is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps(body).encode("utf-8")
        connection.request(method, self.prefix + path, body=data, headers=headers)
        return connection.getresponse()

    def _silent(self, error: Exception) -> NetworkError:
        if isinstance(error, TimeoutError):
            return NetworkError(f"the vLLM server at {self.address} said nothing for {self.timeout:g} s.")
        return NetworkError(f"the connection to the vLLM server at {self.address} broke: {error!r}")


def http_from_url(url: str, api_key: str | None, *, timeout: float = 300.0) -> VllmHttp:
    """Take an address apart. "/v1" at its end, as OpenAI clients want it, is left out.

    Raises:
        UsageError: it is no http or https address.
    """
    hint = "It looks like http://127.0.0.1:8000"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise UsageError(f"'{url}' is no address of a server: {error}", hint=hint) from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise UsageError(f"'{url}' is no address of a server.", hint=hint)
    if parts.username is not None:
        raise UsageError("an address with a name or password in it is not supported.", hint="Give the key by itself.")
    prefix = parts.path.rstrip("/").removesuffix("/v1").rstrip("/")
    name = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    address = f"{parts.scheme}://{name}" + (f":{port}" if port else "") + prefix
    return VllmHttp(address, parts.scheme == "https", parts.hostname, port, prefix, api_key, timeout=timeout)


def fault_from_reply(reply: Reply, address: str) -> UsageError | EnvironmentFaultError:
    """The error that a reply with another status than 200 means."""
    said = f"{reply.message}" + ("" if reply.message.endswith(".") else ".")
    if reply.status == 401:
        return UsageError(f"the vLLM server at {address} refuses the key: {said}", hint="Give its --api-key.")
    if reply.status in (429, 503):
        return EnvironmentFaultError(f"the vLLM server at {address} takes no request now: {said}", hint="Try again.")
    if reply.status in (400, 413, 422):
        return UsageError(f"the vLLM server at {address} refuses the request: {said}")
    return EnvironmentFaultError(f"the vLLM server at {address} failed ({reply.status}): {said}")


def _reply(response: HTTPResponse) -> Reply:
    return Reply(response.status, _parsed(response.read()))


def _parsed(data: bytes) -> dict[str, Any]:
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {"value": found}
