"""Images from other servers, for `--allow-remote`: only public addresses, only images, not too large, not too slow."""

from __future__ import annotations

import asyncio
import ipaddress
import socket
from collections.abc import Awaitable, Callable, Sequence

import httpx

from holov_export.serve.faults import FaultError, refused
from holov_export.serve.parts import Reference, is_image

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
#: what a host's name stands for; raises OSError
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

_REDIRECTS = 3
_HEAD = 16
#: IPv6 networks that lead to IPv4 addresses, and where those are. Source: RFC 6052, 3056
_NAT64, _SIX_TO_FOUR = ipaddress.ip_network("64:ff9b::/96"), ipaddress.ip_network("2002::/16")


async def addresses_of(host: str, port: int) -> Sequence[str]:
    """The addresses of a host, as the system resolves it."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(item[4][0]) for item in found))


def is_public(text: str) -> bool:
    """False of addresses of this machine, this network and anything else that is not the open Internet."""
    try:
        address: Address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return False
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped
        if inner is None and address in _NAT64:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is None and address in _SIX_TO_FOUR:
            inner = address.sixtofour
        if inner is not None:
            address = inner
    return address.is_global and not address.is_multicast


class RemoteImages:
    """Fetches images.

    The name is resolved here and the connection goes to an address that was looked at, so that a name cannot stand for
    another one a moment later. Each redirect is looked at in the same way. No proxy of the environment is asked: it
    would resolve names itself.
    """

    def __init__(
        self,
        most: int,
        *,
        seconds: float = 10.0,
        resolve: Resolve = addresses_of,
        may_ask: Callable[[str], bool] = is_public,
    ) -> None:
        """Args: most: bytes of an image. seconds: for all of it, redirects included."""
        self._most, self._seconds = most, seconds
        self._resolve, self._may_ask = resolve, may_ask

    async def fetch(self, item: Reference) -> bytes:
        """The bytes of the image that `item` names.

        Raises:
            FaultError: 400, whatever the reason; it does not say what answered at an address that is not public.
        """
        try:
            return await asyncio.wait_for(self._followed(item), self._seconds)
        except asyncio.TimeoutError:
            raise _refused(item, f"it took more than {self._seconds:g} s") from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError, UnicodeError):
            raise _refused(item, "it cannot be reached") from None

    async def _followed(self, item: Reference) -> bytes:
        url = httpx.URL(item.url)
        async with httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=self._seconds) as client:
            for _ in range(_REDIRECTS + 1):
                request = await self._request(client, url, item)
                response = await client.send(request, stream=True)
                try:
                    if not response.has_redirect_location:
                        return await self._body(response, item)
                    url = url.join(response.headers["location"])
                finally:
                    await response.aclose()
        raise _refused(item, f"it redirects more than {_REDIRECTS} times")

    async def _request(self, client: httpx.AsyncClient, url: httpx.URL, item: Reference) -> httpx.Request:
        """A request to one of the host's addresses, all of which must be public."""
        if url.scheme not in ("http", "https") or not url.host or url.userinfo:
            raise _refused(item, "only plain http: and https: addresses are fetched")
        port = url.port or (443 if url.scheme == "https" else 80)
        addresses = await self._resolve(url.host, port)
        if not addresses or not all(self._may_ask(address) for address in addresses):
            raise _refused(item, "its host is not a public one")
        headers = {"host": url.netloc.decode("ascii"), "accept": "image/*", "accept-encoding": "identity"}
        target = url.copy_with(host=addresses[0])
        return client.build_request("GET", target, headers=headers, extensions={"sni_hostname": url.host})

    async def _body(self, response: httpx.Response, item: Reference) -> bytes:
        if response.status_code != 200:
            raise _refused(item, f"its server answered {response.status_code}")
        if int(response.headers.get("content-length", "0") or "0") > self._most:
            raise _refused(item, f"it has more than {self._most:,} bytes")
        data = bytearray()
        async for chunk in response.aiter_raw():
            data += chunk
            if len(data) > self._most:
                raise _refused(item, f"it has more than {self._most:,} bytes")
            if len(data) >= _HEAD and not is_image(bytes(data[:_HEAD])):
                raise _refused(item, "it is no image")
        return bytes(data)


def _refused(item: Reference, reason: str) -> FaultError:
    return refused(f"the image was not fetched: {reason}.", param=item.param, code="invalid_url")
