"""Apicurio Registry 3 over its REST API v3, and what is known of it when it is away."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Coroutine, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from soma_common.errors import (
    CodecError,
    ConfigurationError,
    IncompatibleSchema,
    RegistryUnavailable,
    SchemaNotFound,
)
from soma_common.retry import Backoff
from soma_common.schemas.address import RegistryAuth, check_id, check_url
from soma_common.schemas.avro import Schema, artifact_id, schema_text
from soma_common.schemas.compat import breaks, field_at
from soma_common.schemas.table import SchemaRef, SchemaTable

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger(__name__)

MAX_ANSWER_BYTES: Final = 4 * 1024 * 1024
# For so long a "no such id" is not asked again: hostile ids must not become a flood of requests.
ABSENT_SECONDS: Final = 10.0
_AT_ONCE: Final = 8
_IDS_PATH: Final = {"content": "contentIds", "global": "globalIds"}

_WAITS: Final = Backoff(base=0.1, maximum=2.0)

EventKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to try: seconds for one request, and how often with which waits before RegistryUnavailable."""

    timeout: float = 5.0
    attempts: int = 4
    backoff: Backoff = _WAITS


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    text: str

    def json(self) -> Any:
        """The answer's JSON, or an empty object where it is none."""
        try:
            found = json.loads(self.text)
        except (ValueError, RecursionError):
            return {}
        return found if isinstance(found, dict) else {}


class Registry:
    """The schemas of one group (a service) in Apicurio Registry, kept in memory and in a snapshot file.

    ``await resolve(schemas)`` once at start; from then on writing needs no request, and reading one per unknown
    writer schema. Implements the codec's ``SchemaIds``. Use it as an async context manager, in one event loop.
    """

    def __init__(
        self,
        url: str,
        *,
        group: str = "soma",
        auth: RegistryAuth | None = None,
        snapshot: Path | None = None,
        patience: Patience = Patience(),
    ) -> None:
        self.url, self.group = check_url(url), check_id("group", group)
        self._auth, self._snapshot, self._patience = auth, snapshot, patience
        self._table = SchemaTable()
        self._client: httpx.AsyncClient | None = None
        self._flights: dict[SchemaRef, asyncio.Task[Any]] = {}
        self._absent: dict[SchemaRef, float] = {}
        if snapshot is not None:
            self._table.load(snapshot, self._source)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections. May be called twice."""
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    @property
    def _source(self) -> str:
        return f"{self.url} {self.group}"

    def id_of(self, event_type: str, version: int) -> int | None:
        """The content id that this event type and version is written with, or None."""
        return self._table.id_of(event_type, version)

    def schema_of(self, ref: SchemaRef) -> Any | None:
        """The schema behind an id, as far as known here."""
        return self._table.schema_of(ref)

    async def resolve(self, schemas: Mapping[EventKey, Schema], *, register: bool = True) -> None:
        """Learn the ids of these schemas; those the registry does not have are registered, unless told otherwise.

        When the registry is away and the snapshot knows every one of them, its ids are used and a warning is logged.

        Raises:
            RegistryUnavailable: the registry is away, and the snapshot lacks some of them.
            SchemaNotFound: ``register=False``, and the registry lacks one.
            IncompatibleSchema: the registry refuses one; nothing is known about the other new ones then.
        """
        texts = {key: schema_text(schema) for key, schema in schemas.items()}
        try:
            # One probe decides whether the registry is there, instead of every schema waiting for itself.
            self._expect(await self._send("GET", "/system/info"))
            await self._resolve_all(texts, register)
        except RegistryUnavailable as error:
            self._resolve_offline(texts, error)
        await self._save()

    async def fetch(self, ref: SchemaRef) -> Any:
        """The schema behind an id; many callers at once make one request.

        Raises:
            SchemaNotFound: the registry has no such id (remembered for 10 seconds).
            RegistryUnavailable: it is away.
        """
        known = self._table.schema_of(ref)
        if known is not None:
            return known
        if self._absent.get(ref, 0.0) > asyncio.get_running_loop().time():
            raise SchemaNotFound(f"{self.url} has no schema with {ref}.")
        return await self._single(ref, self._fetch(ref))

    async def register(self, event_type: str, version: int, schema: Schema) -> int:
        """Put a schema into the registry under the BACKWARD rule, or find it there; its content id.

        Raises:
            IncompatibleSchema: it cannot read what the latest one wrote; names the fields.
            RegistryUnavailable: the registry is away.
        """
        key, text = (event_type, version), schema_text(schema)
        await self._register(key, text)
        await self._save()
        return self._table.id_of(*key) or 0

    async def check(self, event_type: str, version: int, schema: Schema) -> bool:
        """Whether the registry has this very schema already; when not, that it would accept it (dryRun).

        Raises:
            IncompatibleSchema: it cannot read what the latest one wrote; names the fields.
            RegistryUnavailable: the registry is away.
        """
        key, text = (event_type, version), schema_text(schema)
        if await self._lookup(key, text) is not None:
            return True
        answer = await self._create(key, text, dry_run=True)
        found = await self._breaks(key, schema)
        self._accepted(key, answer, found, schema)
        # A registry without any rule accepts everything: our own reading of Avro's rules stands behind it.
        if found:
            raise _incompatible(key, found, [])
        return False

    async def set_global_rule(self, level: str = "BACKWARD") -> None:
        """Make a compatibility level the default of the whole registry."""
        body = {"ruleType": "COMPATIBILITY", "config": level}
        answer = await self._send("POST", "/admin/rules", body)
        if answer.status == 409:
            answer = await self._send("PUT", "/admin/rules/COMPATIBILITY", body)
        self._expect(answer)

    async def _resolve_all(self, texts: Mapping[EventKey, str], register: bool) -> None:
        gate = asyncio.Semaphore(_AT_ONCE)
        work = (self._resolve_one(key, text, register, gate) for key, text in texts.items())
        for outcome in await asyncio.gather(*work, return_exceptions=True):
            if outcome is not None:
                raise outcome

    async def _resolve_one(self, key: EventKey, text: str, register: bool, gate: asyncio.Semaphore) -> None:
        async with gate:
            number = await self._lookup(key, text)
            if number is not None:
                self._learn(key, text, number)
            elif register:
                await self._register(key, text)
            else:
                raise SchemaNotFound(f"{self.url} lacks {_named(key)}.", cure="run `somastack schemas push`.")

    def _resolve_offline(self, texts: Mapping[EventKey, str], error: BaseException) -> None:
        missing = [_named(key) for key, text in texts.items() if self._table.content_id(text) is None]
        if missing:
            raise RegistryUnavailable(
                f"{error} No snapshot knows {', '.join(missing[:5])}{' and others' if len(missing) > 5 else ''}.",
                cure="start the registry; later starts can use the snapshot.",
            ) from error
        for key, text in texts.items():
            self._table.bind(*key, self._table.content_id(text) or 0)
        logger.warning("The schema registry is away; the ids of the snapshot %s are used: %s", self._snapshot, error)

    async def _register(self, key: EventKey, text: str) -> None:
        ruled = await self._guard(key)
        answer = await self._create(key, text, dry_run=False)
        if answer.status not in (200, 201):
            schema = json.loads(text)
            self._accepted(key, answer, await self._breaks(key, schema), schema)
        number = answer.json().get("version", {}).get("contentId")
        if not isinstance(number, int):
            raise self._strange(answer)
        if not ruled:
            await self._guard(key)
        self._learn(key, text, number)

    async def _guard(self, key: EventKey) -> bool:
        """Set the BACKWARD rule on an artifact; False when the artifact is not there yet."""
        body = {"ruleType": "COMPATIBILITY", "config": "BACKWARD"}
        answer = await self._send("POST", f"{self._artifacts}/{_path_id(key)}/rules", body)
        if answer.status not in (404, 409):
            self._expect(answer)
        return answer.status != 404

    async def _create(self, key: EventKey, text: str, *, dry_run: bool) -> _Answer:
        content = {"content": text, "contentType": "application/json"}
        body = {"artifactId": _path_id(key), "artifactType": "AVRO", "firstVersion": {"content": content}}
        # Content is compared as it is: the canonical form reorders fields, and another order is another binary format.
        query = f"?ifExists=FIND_OR_CREATE_VERSION&dryRun={str(dry_run).lower()}"
        answer = await self._send("POST", f"{self._artifacts}{query}", body)
        # Two that create the same artifact at once: the loser finds it on the second try.
        return await self._send("POST", f"{self._artifacts}{query}", body) if answer.status == 409 else answer

    async def _lookup(self, key: EventKey, text: str) -> int | None:
        """The content id of exactly this text under exactly this artifact."""
        query = f"?groupId={self.group}&artifactId={_path_id(key)}&artifactType=AVRO&limit=1"
        answer = await self._send("POST", f"/search/versions{query}", text)
        self._expect(answer)
        versions = answer.json().get("versions") or []
        return int(versions[0]["contentId"]) if versions else None

    async def _breaks(self, key: EventKey, schema: Schema) -> list[str]:
        path = f"{self._artifacts}/{_path_id(key)}/versions/branch=latest/content"
        answer = await self._send("GET", path)
        if answer.status != 200:
            return []
        try:
            return breaks(schema, answer.json())
        except (KeyError, TypeError, AttributeError) as error:
            raise CodecError(f"The latest {_named(key)} in the registry is not Avro: {error!r:.200}.") from error

    async def _fetch(self, ref: SchemaRef) -> Any:
        answer = await self._send("GET", f"/ids/{_IDS_PATH[ref.kind]}/{ref.id}")
        if answer.status == 404 and answer.json().get("name"):
            self._absent[ref] = asyncio.get_running_loop().time() + ABSENT_SECONDS
            raise SchemaNotFound(f"{self.url} has no schema with {ref}.", cure="look at the record's producer.")
        self._expect(answer)
        schema = answer.json()
        if not schema:
            raise CodecError(f"The schema with {ref} at {self.url} is not an Avro record.")
        self._table.learn(ref, answer.text)
        await self._save()
        return schema

    async def _single(self, ref: SchemaRef, work: Coroutine[Any, Any, Any]) -> Any:
        """One flight for all who ask for the same; a waiter that gives up does not stop it for the others."""
        flight = self._flights.get(ref)
        if flight is None:
            flight = self._flights[ref] = asyncio.create_task(work)
            flight.add_done_callback(lambda done: self._landed(ref, done))
        else:
            work.close()
        return await asyncio.shield(flight)

    def _landed(self, ref: SchemaRef, flight: asyncio.Task[Any]) -> None:
        self._flights.pop(ref, None)
        if not flight.cancelled() and flight.exception() is not None:
            logger.debug("The schema with %s was not fetched: %s", ref, flight.exception())

    def _learn(self, key: EventKey, text: str, number: int) -> None:
        before = self._table.content_id(text)
        if before is not None and before != number:
            logger.warning("%s had contentId %d in the snapshot and has %d now", _named(key), before, number)
        self._table.learn(SchemaRef("content", number), text)
        self._table.bind(*key, number)

    async def _save(self) -> None:
        if self._snapshot is None:
            return
        try:
            await asyncio.to_thread(self._table.save, self._snapshot, self._source)
        except OSError as error:
            logger.warning("The schema snapshot %s cannot be written: %s", self._snapshot, error)

    @property
    def _artifacts(self) -> str:
        return f"/groups/{self.group}/artifacts"

    def _accepted(self, key: EventKey, answer: _Answer, found: list[str], schema: Schema) -> None:
        document = answer.json()
        if document.get("name") == "RuleViolationException":
            raise _incompatible(key, found, _causes(document, schema) or [str(document.get("title"))])
        self._expect(answer)

    def _expect(self, answer: _Answer) -> None:
        if answer.status in (401, 403):
            cure = "give the registry's client a token, or user and password, that may do this."
            raise ConfigurationError(f"The registry {self.url} refuses these credentials ({answer.status}).", cure=cure)
        if answer.status not in (200, 201, 204):
            raise self._strange(answer)

    def _strange(self, answer: _Answer) -> ConfigurationError:
        title = answer.json().get("title") or answer.text[:200]
        cure = "check that this is the address of an Apicurio Registry 3."
        return ConfigurationError(f"{self.url} answered {answer.status}: {title!s:.300}.", cure=cure)

    async def _send(self, method: str, path: str, body: Any = None) -> _Answer:
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
            f"The schema registry {self.url} cannot be reached after {self._patience.attempts} attempts: {reason}.",
            cure="start it, or correct its URL.",
        )

    async def _try(self, method: str, path: str, body: Any) -> tuple[_Answer | None, str]:
        import httpx

        content = body if isinstance(body, str) or body is None else json.dumps(body)
        client = self._client = self._client or self._connect(httpx)
        try:
            async with client.stream(method, f"/apis/registry/v3{path}", content=content) as response:
                answer = _Answer(response.status_code, await _limited(response))
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
            base_url=self.url, headers=headers, auth=auth, timeout=self._patience.timeout, follow_redirects=False
        )
        return client


async def _limited(response: httpx.Response) -> str:
    chunks = bytearray()
    async for chunk in response.aiter_bytes():
        chunks += chunk
        if len(chunks) > MAX_ANSWER_BYTES:
            raise CodecError(f"The registry's answer is above {MAX_ANSWER_BYTES} bytes.")
    return chunks.decode("utf-8", "replace")


def _path_id(key: EventKey) -> str:
    return check_id("artifact", artifact_id(*key))


def _named(key: EventKey) -> str:
    return f"{key[0]} v{key[1]}" if key[0] else artifact_id(*key)


def _causes(document: Mapping[str, Any], schema: Schema) -> list[str]:
    """The server's reasons with its JSON pointers turned into field paths."""
    causes = [cause for cause in document.get("causes") or [] if isinstance(cause, dict)]
    pairs = [(field_at(schema, str(cause.get("context", ""))), str(cause.get("description", ""))) for cause in causes]
    return [f"{path}: {why}" for path, why in pairs if path]


def _incompatible(key: EventKey, found: list[str], causes: list[str]) -> IncompatibleSchema:
    lines = found or causes
    fields = tuple(dict.fromkeys(line.split(": ", 1)[0] for line in [*found, *causes] if ": " in line))
    return IncompatibleSchema(
        f"{_named(key)} could not read events that are already written: {'; '.join(lines[:8])}.",
        fields=fields,
        cure="give new fields a default and keep the types, or raise the version and write an upcaster.",
    )
