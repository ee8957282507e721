"""The settings of the console, and when it refuses to start."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network
from typing import Final

from soma_common.config import number_of, secret_of
from soma_common.errors import ConfigurationError
from soma_common.ranges import check_settings

EVERY: Final = "*"
_SHORTEST: Final = 20  # characters of a token
_LOCAL: Final = ("localhost", "127.0.0.1", "[::1]")


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleSettings:
    """How the console is reached, and by whom.

    Without tokens and proxies everybody who reaches it is an operator: that is allowed on loopback only.

    Args:
        host, port: where it listens; port 0 chooses a free one.
        hosts: names under which browsers reach it, without ports; empty: on loopback its own names, elsewhere any.
        token: who knows it is an operator.
        viewer_token: who knows it may look, and do nothing.
        proxies: addresses, or networks such as 10.0.0.0/8, whose headers are believed.
        user_header, groups_header, tenants_header: how a proxy says who it is, in which groups, and of which tenants
            (lists are joined by commas; ``*`` is every tenant). Without a tenants_header: all of ``tenants``.
        operators, viewers: groups that may act, or look; ``*`` is everybody whom the proxy lets through.
        tenants: the tenants that are shown at all; ``*`` is every one.
        query_timeout: seconds after which the database gives up a statement of a page.
        pool_size: most database connections for pages; what runs in the background has two more.
        live: most live connections of browsers at once.
        session_hours: for how long a sign-in is good.
        certificate, certificate_key: files for HTTPS; without them: HTTP.
    """

    host: str = "127.0.0.1"
    port: int = 8790
    hosts: tuple[str, ...] = ()
    token: str | None = field(default=None, repr=False)
    viewer_token: str | None = field(default=None, repr=False)
    proxies: tuple[str, ...] = ()
    user_header: str = "X-Forwarded-User"
    groups_header: str = "X-Forwarded-Groups"
    tenants_header: str = ""
    operators: tuple[str, ...] = ()
    viewers: tuple[str, ...] = (EVERY,)
    tenants: tuple[str, ...] = (EVERY,)
    query_timeout: float = 5.0
    pool_size: int = 8
    live: int = 32
    session_hours: float = 8.0
    certificate: str = ""
    certificate_key: str = ""

    def __post_init__(self) -> None:
        check_settings(
            self, host=str, port=(0, 65535), query_timeout=(0.05, 600), pool_size=(1, 100), live=(1, 10_000),
            session_hours=(0.001, 720),
        )  # fmt: skip
        for name, token in (("SOMA_CONSOLE_TOKEN", self.token), ("SOMA_CONSOLE_VIEWER_TOKEN", self.viewer_token)):
            if token is not None and (len(token) < _SHORTEST or not token.isascii() or not token.isprintable()):
                raise ConfigurationError(
                    f"{name} is no good token.",
                    cure=f"use {_SHORTEST} printable ASCII characters or more: `openssl rand -hex 32`.",
                )
        if self.token is not None and self.token == self.viewer_token:
            raise ConfigurationError("Both tokens are the same.", cure="use two tokens, or only one.")
        self._check_proxies()
        if not self.tenants:
            raise ConfigurationError("SOMA_CONSOLE_TENANTS names nobody.", cure="name tenants, or * for all.")
        if bool(self.certificate) != bool(self.certificate_key):
            raise ConfigurationError("A certificate and its key go together.", cure="name both files, or neither.")
        if not self.is_local and not self.asks_who:
            raise ConfigurationError(
                f"The console does not listen on {self.host} without knowing who comes.",
                cure="set SOMA_CONSOLE_TOKEN_FILE, or SOMA_CONSOLE_PROXIES, or leave SOMA_CONSOLE_HOST out.",
            )

    def _check_proxies(self) -> None:
        for each in self.proxies:
            try:
                ip_network(each, strict=False)
            except ValueError as error:
                raise ConfigurationError(
                    f"SOMA_CONSOLE_PROXIES has {each!r:.80}.", cure="use addresses, or networks such as 10.0.0.0/8."
                ) from error
        if self.proxies and not self.user_header:
            raise ConfigurationError("Proxies are believed, but no header of theirs.", cure="name a user header.")

    @property
    def is_local(self) -> bool:
        """Whether it listens on loopback only."""
        try:
            return ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def asks_who(self) -> bool:
        """Whether people must say who they are."""
        return self.token is not None or self.viewer_token is not None or bool(self.proxies)

    @property
    def names(self) -> tuple[str, ...] | None:
        """Names that the Host header may have, in lower case; None: any."""
        if self.hosts:
            return tuple(name.lower() for name in self.hosts)
        if not self.is_local:
            return None
        return _LOCAL if self.host in ("localhost", "127.0.0.1", "::1") else (*_LOCAL, self.host)

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> ConsoleSettings:
        """The settings in environment variables (see docs/reference/configuration.md).

        Raises:
            ConfigurationError: a variable is wrong, or the console would be open to everybody.
        """
        given = os.environ if env is None else env
        known = cls.__dataclass_fields__

        def text(name: str, field: str) -> str:
            return given.get(name, str(known[field].default))

        return cls(
            host=text("SOMA_CONSOLE_HOST", "host"),
            port=number_of(given, "SOMA_CONSOLE_PORT", 8790, 0, 65535),
            hosts=_list(given.get("SOMA_CONSOLE_HOSTS", "")),
            token=secret_of(given, "SOMA_CONSOLE_TOKEN") or None,
            viewer_token=secret_of(given, "SOMA_CONSOLE_VIEWER_TOKEN") or None,
            proxies=_list(given.get("SOMA_CONSOLE_PROXIES", "")),
            user_header=text("SOMA_CONSOLE_USER_HEADER", "user_header"),
            groups_header=text("SOMA_CONSOLE_GROUPS_HEADER", "groups_header"),
            tenants_header=text("SOMA_CONSOLE_TENANTS_HEADER", "tenants_header"),
            operators=_list(given.get("SOMA_CONSOLE_OPERATORS", "")),
            viewers=_list(given.get("SOMA_CONSOLE_VIEWERS", EVERY)),
            tenants=_list(given.get("SOMA_CONSOLE_TENANTS", EVERY)),
            certificate=given.get("SOMA_CONSOLE_CERTIFICATE", ""),
            certificate_key=given.get("SOMA_CONSOLE_CERTIFICATE_KEY", ""),
        )


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split(",") if part.strip())
