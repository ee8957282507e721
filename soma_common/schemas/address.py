"""Where a registry is and how one is let in, checked before anything is sent there."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from soma_common.errors import ConfigurationError

# Apicurio refuses "%" and everything outside ASCII; the rest here keeps ids harmless inside paths and messages.
_ID = re.compile(r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,511}\Z")


@dataclass(frozen=True, slots=True)
class RegistryAuth:
    """Credentials: a bearer token, or a user with a password. Never shown by repr."""

    token: str | None = field(default=None, repr=False)
    username: str | None = None
    password: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (self.token is None) == (self.username is None) or (self.username is None) != (self.password is None):
            raise ConfigurationError("Registry credentials are incomplete.", cure="give a token, or user and password.")
        for value in (self.token, self.username, self.password):
            if value is not None and (not value.isascii() or not value.isprintable()):
                raise ConfigurationError("Registry credentials hold characters that HTTP headers cannot carry.")


def check_url(url: str) -> str:
    """The registry's base URL without a trailing slash or API path: ``http://registry:8085``.

    Raises:
        ConfigurationError: not http(s), no host, credentials inside, a query, or control characters.
    """
    cure = "give it as http://host:port (credentials apart)."
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(f"The registry's URL cannot be read: {error}.", cure=cure) from error
    if parts.username is not None or parts.password is not None:
        raise ConfigurationError("The registry's URL holds credentials, which end up in logs.", cure=cure)
    if not url.isprintable() or " " in url or "\\" in url:
        raise ConfigurationError(f"The registry's URL holds spaces or control characters: {url!r:.100}.", cure=cure)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment or port == 0:
        raise ConfigurationError(f"{url!r:.100} is not a registry's URL.", cure=cure)
    return re.sub(r"(/apis(/registry(/v3)?)?)?/*$", "", url)


def check_id(what: str, value: str) -> str:
    """A group or artifact id that is safe in a path.

    Raises:
        ConfigurationError: empty, too long, or with other characters than letters, digits, ``.``, ``_`` and ``-``.
    """
    if not _ID.match(value):
        raise ConfigurationError(f"{what} {value!r:.80} is not an id.", cure="use letters, digits, '.', '_' and '-'.")
    return value
