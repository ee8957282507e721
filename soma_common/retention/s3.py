"""Archives in a bucket with the S3 API, by boto3 (the extra ``s3``)."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final
from urllib.parse import urlsplit

from soma_common.errors import ArchiveUnavailable, ConfigurationError
from soma_common.retention.storage import checked

_BUCKET = re.compile(r"^[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]\Z")
_TRIES: Final = 5  # of a request, with boto3's own waits between them
_CONNECT, _READ = 10.0, 60.0  # seconds
_CURE: Final = "check the bucket, its region and endpoint, and what the credentials may do."


class S3Storage:
    """Objects of a bucket below a prefix; keeps ``Storage``'s promises. A PUT is whole or nothing by itself.

    Args:
        place: ``bucket/prefix``.
        env: the variables that S3 tools share (``AWS_…``). What is not there, boto3 looks for as it always does: in
            profiles, container and instance roles.

    Raises:
        ConfigurationError: an address that is none, or boto3 is missing.
    """

    def __init__(self, place: str, env: Mapping[str, str]) -> None:
        self.bucket, _, prefix = place.partition("/")
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.uri = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        self.endpoint = env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL") or None
        if not _BUCKET.fullmatch(self.bucket):
            raise ConfigurationError(f"{self.bucket!r:.80} is no name of a bucket.", cure="write s3://bucket/path.")
        if self.endpoint and not _is_web_address(self.endpoint):
            raise ConfigurationError("The S3 endpoint is no web address.", cure="write https://host:port.")
        self._client = _client(self.endpoint, env)

    def write(self, name: str, data: bytes) -> None:
        """PUT, refused where there is an object of that name.

        Tried again when the answer was lost, the object may be there by the first try: then it must have these bytes.
        """
        key = self._key(name)
        answer = self._asked("written", name, "put_object", Key=key, Body=data, IfNoneMatch="*", known=(412,))
        if answer is None and self.read(name) != data:
            raise ArchiveUnavailable(f"{name} cannot be written in {self.uri}: it is there already.", cure=_CURE)

    def read(self, name: str) -> bytes:
        """GET."""
        body: bytes = self._asked("read", name, "get_object", Key=self._key(name))
        return body

    def names(self, ending: str, below: str = "") -> Sequence[str]:
        """Every key below the prefix, page by page."""
        start = self._prefix + (f"{checked(below)}/" if below else "")
        found: list[str] = []
        more: dict[str, Any] = {}
        while True:
            page = self._asked("listed", start or "it", "list_objects_v2", Prefix=start, **more)
            keys = [entry["Key"] for entry in page.get("Contents", ())]
            found += [key.removeprefix(self._prefix) for key in keys if key.endswith(ending)]
            if not page.get("IsTruncated"):
                return sorted(found)
            more = {"ContinuationToken": page["NextContinuationToken"]}

    def remove(self, name: str) -> None:
        """DELETE."""
        self._asked("removed", name, "delete_object", Key=self._key(name), known=(404,))

    def _key(self, name: str) -> str:
        return self._prefix + checked(name)

    def _asked(self, what: str, name: str, call: str, *, known: Sequence[int] = (), **given: Any) -> Any:
        """The answer of one call; of an object its bytes. None for an answer with a ``known`` status."""
        from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

        try:
            answer = getattr(self._client, call)(Bucket=self.bucket, **given)
            return answer["Body"].read() if call == "get_object" else answer
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
            if status in known:
                return None
            said = f"{status} {error.response.get('Error', {}).get('Code', '')}"
            raise ArchiveUnavailable(f"{name} cannot be {what} in {self.uri}: {said.strip()}.", cure=_CURE) from error
        except NoCredentialsError as error:
            raise ConfigurationError(
                "There are no credentials for S3.",
                cure="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give the machine a role.",
            ) from error
        except (BotoCoreError, OSError) as error:
            raise ArchiveUnavailable(f"{self.uri} cannot be reached: {error}", cure=_CURE) from error


def _is_web_address(endpoint: str) -> bool:
    """A name and a password in it would stand in every error."""
    try:
        parts = urlsplit(endpoint)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and "@" not in parts.netloc
    except ValueError:
        return False


def _client(endpoint: str | None, env: Mapping[str, str]) -> Any:
    try:
        import boto3
        from botocore.config import Config
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise ConfigurationError(
            "Archives in S3 need boto3, which is not installed.", cure="pip install 'soma-common[s3]'."
        ) from error
    config = Config(
        retries={"mode": "standard", "total_max_attempts": _TRIES},
        connect_timeout=_CONNECT,
        read_timeout=_READ,
        s3={"addressing_style": "path" if endpoint else "auto"},
        # Checksums beyond those of the signature are Amazon's own; other servers may refuse them.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    try:
        session = boto3.session.Session(
            aws_access_key_id=env.get("AWS_ACCESS_KEY_ID") or None,
            aws_secret_access_key=env.get("AWS_SECRET_ACCESS_KEY") or None,
            aws_session_token=env.get("AWS_SESSION_TOKEN") or None,
            region_name=env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1",
        )
        return session.client("s3", endpoint_url=endpoint, config=config)
    except (BotoCoreError, ValueError) as error:  # a profile, a region or an endpoint that there is not
        raise ConfigurationError(f"The settings of S3 cannot be used: {error}.", cure=_CURE) from error
