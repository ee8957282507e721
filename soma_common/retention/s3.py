"""Archives in a bucket: the four calls of the S3 API that are needed, signed by Signature Version 4, over httpx.

No SDK: a PUT, a GET, a DELETE and a list of keys are less than the dependency. Files are far smaller than the 5 GiB
that one PUT may have.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, urlsplit
from xml.etree import ElementTree as Xml

from soma_common.errors import ArchiveUnavailable, ConfigurationError
from soma_common.retention.storage import checked
from soma_common.retry import Backoff

if TYPE_CHECKING:
    import httpx

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]$")
_WAITS: Final = Backoff(base=0.2, maximum=3.0)
_TRIES: Final = 5
_TIMEOUT: Final = 60.0
_AGAIN: Final = frozenset({429, 500, 502, 503, 504})
_CURE: Final = "check the bucket, its region and endpoint, and what the credentials may do."


@dataclass(frozen=True, slots=True, kw_only=True)
class S3Settings:
    """A bucket and who we are there. Without an endpoint it is Amazon's; with one, the bucket is part of the path."""

    bucket: str
    prefix: str = ""
    region: str = "us-east-1"
    endpoint: str = ""
    access_key: str = field(repr=False)
    secret_key: str = field(repr=False)
    session_token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not _BUCKET.fullmatch(self.bucket):
            raise ConfigurationError(f"{self.bucket!r:.80} is no name of a bucket.", cure="write s3://bucket/path.")
        if self.endpoint and urlsplit(self.endpoint).scheme not in ("http", "https"):
            raise ConfigurationError(
                f"The S3 endpoint {self.endpoint!r:.100} is no web address.", cure="write https://host:port."
            )

    @property
    def base(self) -> str:
        """The address under which the keys of the bucket are."""
        if self.endpoint:
            return f"{self.endpoint.rstrip('/')}/{self.bucket}"
        return f"https://{self.bucket}.s3.{self.region}.amazonaws.com"


class S3Storage:
    """Objects of a bucket below a prefix; keeps ``Storage``'s promises. A PUT is whole or nothing by itself."""

    def __init__(self, settings: S3Settings) -> None:
        self.settings = settings
        self._prefix = f"{settings.prefix.strip('/')}/" if settings.prefix.strip("/") else ""
        self.uri = f"s3://{settings.bucket}/{self._prefix}".rstrip("/")
        self._client: httpx.Client | None = None

    @classmethod
    def from_env(cls, place: str, env: Mapping[str, str]) -> S3Storage:
        """``bucket/prefix``, with the variables that every S3 tool reads.

        Raises:
            ConfigurationError: no credentials, or an address that is none.
        """
        bucket, _, prefix = place.partition("/")
        key, secret = env.get("AWS_ACCESS_KEY_ID", ""), env.get("AWS_SECRET_ACCESS_KEY", "")
        if not key or not secret:
            raise ConfigurationError(
                "There are no credentials for S3.", cure="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
            )
        return cls(
            S3Settings(
                bucket=bucket,
                prefix=prefix,
                region=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1",
                endpoint=env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or "",
                access_key=key,
                secret_key=secret,
                session_token=env.get("AWS_SESSION_TOKEN") or None,
            )
        )

    def write(self, name: str, data: bytes) -> None:
        """PUT, refused where there is an object of that name.

        Tried again when the answer was lost, the object may be there by the first try: then it must have these bytes.
        """
        answer = self._send("PUT", name, data=data, headers={"if-none-match": "*"})
        if answer.status_code == 412 and self.read(name) == data:
            return
        if answer.status_code != 200:
            raise self._refused("written", name, answer)

    def read(self, name: str) -> bytes:
        """GET."""
        answer = self._send("GET", name)
        if answer.status_code != 200:
            raise self._refused("read", name, answer)
        return answer.content

    def names(self, ending: str, below: str = "") -> Sequence[str]:
        """Every key below the prefix, page by page."""
        start = self._prefix + (f"{checked(below)}/" if below else "")
        found: list[str] = []
        token = ""
        while True:
            query = {"list-type": "2", "prefix": start} | ({"continuation-token": token} if token else {})
            answer = self._send("GET", "", query=query)
            if answer.status_code != 200:
                raise self._refused("listed", start, answer)
            keys, token = _listed(answer.content)
            found += [key.removeprefix(self._prefix) for key in keys if key.endswith(ending)]
            if not token:
                return sorted(found)

    def remove(self, name: str) -> None:
        """DELETE."""
        answer = self._send("DELETE", name)
        if answer.status_code not in (200, 204, 404):
            raise self._refused("removed", name, answer)

    def _send(
        self, method: str, name: str, *, data: bytes = b"", query: Mapping[str, str] | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> httpx.Response:  # fmt: skip
        """One request, tried again while the server is away; signed anew each time, as signatures grow old."""
        import httpx

        key = self._prefix + checked(name) if name else ""
        path = quote(f"{urlsplit(self.settings.base).path}/{key}", safe="/-_.~")
        asked = "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted((query or {}).items()))
        client = self._client = self._client or httpx.Client(timeout=_TIMEOUT, follow_redirects=False)
        host = urlsplit(self.settings.base).netloc
        reason = ""
        for attempt in range(_TRIES):
            if attempt:
                time.sleep(_WAITS.delay(attempt))
            signed = sign(self.settings, method, host, path, asked, data, headers or {}, datetime.now(UTC))
            url = f"{urlsplit(self.settings.base).scheme}://{host}{path}" + (f"?{asked}" if asked else "")
            try:
                answer = client.request(method, url, content=data, headers=signed)
            except (httpx.TransportError, httpx.InvalidURL) as error:
                reason = f"{type(error).__name__} {error}".strip()
                continue
            if answer.status_code not in _AGAIN:
                return answer
            reason = f"it answered {answer.status_code}"
        raise ArchiveUnavailable(f"{self.uri} cannot be reached after {_TRIES} tries: {reason}.", cure=_CURE)

    def _refused(self, what: str, name: str, answer: httpx.Response) -> ArchiveUnavailable:
        found = re.search(r"<Code>([\w.]+)</Code>", answer.text[:2000])
        said = f"{answer.status_code} {found[1] if found else ''}".strip()
        return ArchiveUnavailable(f"{name} cannot be {what} in {self.uri}: {said}.", cure=_CURE)


def sign(
    settings: S3Settings, method: str, host: str, path: str, query: str, data: bytes, headers: Mapping[str, str],
    now: datetime,
) -> dict[str, str]:  # fmt: skip
    """The headers of a request with its signature (AWS Signature Version 4, one chunk).

    Args:
        path, query: as they are sent, percent-encoded, the query sorted by name.
    """
    stamp, day, digest = f"{now:%Y%m%dT%H%M%SZ}", f"{now:%Y%m%d}", hashlib.sha256(data).hexdigest()
    given = {**headers, "host": host, "x-amz-content-sha256": digest, "x-amz-date": stamp}
    if settings.session_token:
        given["x-amz-security-token"] = settings.session_token
    names = ";".join(sorted(given))
    lines = "".join(f"{name}:{given[name]}\n" for name in sorted(given))
    request = "\n".join((method, path, query, lines, names, digest))
    scope = f"{day}/{settings.region}/s3/aws4_request"
    text = "\n".join(("AWS4-HMAC-SHA256", stamp, scope, hashlib.sha256(request.encode()).hexdigest()))
    key = f"AWS4{settings.secret_key}".encode()
    for part in scope.split("/"):
        key = hmac.digest(key, part.encode(), "sha256")
    signature = hmac.digest(key, text.encode(), "sha256").hex()
    credential = f"{settings.access_key}/{scope}"
    told = f"AWS4-HMAC-SHA256 Credential={credential}, SignedHeaders={names}, Signature={signature}"
    return given | {"authorization": told}


def _listed(data: bytes) -> tuple[list[str], str]:
    """The keys of a page of a list, and the token of the next one, empty at the end."""
    try:
        page = Xml.fromstring(data)
    except Xml.ParseError as error:
        raise ArchiveUnavailable(f"The bucket's list cannot be read: {error}.", cure=_CURE) from error
    space = page.tag.partition("}")[0] + "}" if page.tag.startswith("{") else ""
    keys = [key.text or "" for key in page.iterfind(f"{space}Contents/{space}Key")]
    more = page.findtext(f"{space}IsTruncated", "false") == "true"
    return keys, page.findtext(f"{space}NextContinuationToken", "") if more else ""
