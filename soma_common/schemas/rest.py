"""Requests to Apicurio's REST API v3: tried again while it is away, its answers bounded and checked."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from soma_common.errors import CodecError, ConfigurationError, RegistryUnavailable
from soma_common.retry import Backoff
from soma_common.schemas.address import RegistryAuth

if TYPE_CHECKING:
    import httpx

MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
_WAITS: Final = Backoff(base=0.1, maximum=2.0)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try: seconds for one request, and how often with which waits before RegistryUnavailable."""

    timeout: float = 5.0
    attempts: int = 4
    backoff: Backoff = _WAITS


@dataclass(frozen=True, slots=True)
class Answer:
    """What the registry said."""

    status: int
    text: str

    def json(self) -> Any:
        """The answer's JSON, or an empty object where it is none."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}

    def at(self, *path: str | int) -> Any:
        """What stands at this place of the answer's JSON, or None."""
        found = self.json()
        for step in path:
            try:
                found = found[step]
            except (KeyError, IndexError, TypeError):
                return None
        return found


class Rest:
    """The API below one base URL. The connection is made with the first request, and httpx is loaded then."""

    def __init__(self, url: str, auth: RegistryAuth | None, patience: Patience) -> None:
        self._url, self._auth, self._patience = url, auth, patience
        self._client: httpx.AsyncClient | None = None

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def send(self, method: str, path: str, body: Any = None) -> Answer:
        """One request, tried again while the registry is away.

        Raises:
            RegistryUnavailable: all attempts failed; names the last reason.
        """
        reason: BaseException | str = "no attempt was made"
        for attempt in range(self._patience.attempts):
            if attempt:
                await asyncio.sleep(self._patience.backoff.delay(attempt))
            answer, reason = await self._try(method, path, body)
            if answer is not None:
                return answer
        raise RegistryUnavailable(
            f"The schema registry {self._url} cannot be reached after {self._patience.attempts} attempts: {reason}.",
            cure="start it, or correct its URL.",
        )

    async def _try(self, method: str, path: str, body: Any) -> tuple[Answer | None, str]:
        import httpx

        content = body if isinstance(body, str) or body is None else json.dumps(body)
        client = self._client = self._client or self._connect(httpx)
        try:
            async with client.stream(method, f"/apis/registry/v3{path}", content=content) as response:
                answer = Answer(response.status_code, await _limited(response))
        except httpx.TransportError as error:
            return None, f"{type(error).__name__} {error}".strip()
        if answer.status == 429 or answer.status >= 500:
            return None, f"it answered {answer.status}: {answer.text[:200]}"
        return answer, ""

    def _connect(self, module: Any) -> httpx.AsyncClient:
        headers = {"content-type": "application/json", "accept": "application/json, */*;q=0.5"}
        auth = None
        if self._auth is not None and self._auth.token is not None:
            headers["authorization"] = f"Bearer {self._auth.token}"
        elif self._auth is not None:
            auth = module.BasicAuth(self._auth.username, self._auth.password)
        client: httpx.AsyncClient = module.AsyncClient(
            base_url=self._url, headers=headers, auth=auth, timeout=self._patience.timeout, follow_redirects=False
        )
        return client

    def expect(self, answer: Answer) -> None:
        """Nothing when it went well; else ConfigurationError with what was said."""
        if answer.status in (401, 403):
            cure = "give the registry's client a token, or user and password, that may do this."
            raise ConfigurationError(
                f"The registry {self._url} refuses these credentials ({answer.status}).", cure=cure
            )
        if answer.status not in (200, 201, 204):
            raise self.strange(answer)

    def strange(self, answer: Answer) -> ConfigurationError:
        """The error for an answer that an Apicurio Registry 3 does not give."""
        title = answer.json().get("title") or answer.text[:200]
        cure = "check that this is the address of an Apicurio Registry 3."
        return ConfigurationError(f"{self._url} answered {answer.status}: {title!s:.300}.", cure=cure)


async def _limited(response: httpx.Response) -> str:
    chunks = bytearray()
    async for chunk in response.aiter_bytes():
        chunks += chunk
        if len(chunks) > MAX_ANSWER_BYTES:
            raise CodecError(f"The registry's answer is above {MAX_ANSWER_BYTES} bytes.")
    return chunks.decode("utf-8", "replace")
