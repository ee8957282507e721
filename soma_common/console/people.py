"""Who asks: by a token, by a proxy that is believed, or, on loopback without either, whoever is there."""

from __future__ import annotations

import getpass
import hashlib
import hmac
import json
import os
import secrets
import time
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address, ip_network
from typing import Any, Final

from soma_common.console.settings import EVERY, ConsoleSettings

_MOST_NAME: Final = 100  # characters of a person's name


class Role(StrEnum):
    """What a person may do: look, or also act."""

    VIEWER = "viewer"
    OPERATOR = "operator"


@dataclass(frozen=True, slots=True)
class Person:
    """Who asks. ``tenants``: those that may be seen; None: all, and what belongs to nobody."""

    name: str
    role: Role
    tenants: frozenset[str] | None
    way: str

    @property
    def who(self) -> str:
        """The name in histories and journals. One that nobody vouched for says so."""
        return f"{self.name} (console{', by token' if self.way == 'token' else ''})"

    @property
    def acts(self) -> bool:
        """Whether verbs are open."""
        return self.role is Role.OPERATOR

    def may_see(self, tenant: str | None) -> bool:
        """Whether this tenant's things are shown; None: what belongs to no tenant."""
        return self.tenants is None or tenant in self.tenants


class Signer:
    """Signs what a cookie carries, with a key that only this process knows: sessions end with it."""

    def __init__(self, key: bytes | None = None) -> None:
        self._key = key or secrets.token_bytes(32)

    def mac(self, purpose: str, text: str) -> str:
        """A signature of a text for one purpose."""
        return hmac.new(self._key, f"{purpose}\0{text}".encode(), hashlib.sha256).hexdigest()

    def sign(self, purpose: str, value: Any) -> str:
        """A value as text that only this signer can have made."""
        text = urlsafe_b64encode(json.dumps(value).encode()).decode()
        return f"{text}.{self.mac(purpose, text)}"

    def read(self, purpose: str, signed: str | None) -> Any:
        """The value, or None when it is not ours."""
        text, _, mac = (signed or "").partition(".")
        if not hmac.compare_digest(mac.encode("utf-8", "replace"), self.mac(purpose, text).encode()):
            return None
        try:
            return json.loads(urlsafe_b64decode(text))
        except ValueError:
            return None


class Gate:
    """Knows who somebody is."""

    def __init__(self, settings: ConsoleSettings, signer: Signer) -> None:
        self._settings, self._signer = settings, signer
        self._proxies = tuple(ip_network(each, strict=False) for each in settings.proxies)
        self._all = None if EVERY in settings.tenants else frozenset(settings.tenants)

    @property
    def takes_tokens(self) -> bool:
        """Whether there is a page to sign in."""
        return self._settings.token is not None or self._settings.viewer_token is not None

    def person(self, peer: str | None, headers: Mapping[str, str], session: str | None) -> Person | None:
        """Who this is; None: nobody knows."""
        if self.is_proxy(peer):
            found = self._of_proxy(headers)
            if found is not None:
                return found
        if self.takes_tokens:
            scheme, _, token = headers.get("authorization", "").partition(" ")
            if scheme.lower() == "bearer":
                return self.of_token(token.strip(), "api")
            return self._of_session(session)
        return None if self._settings.proxies else Person(_login(), Role.OPERATOR, self._all, "local")

    def is_proxy(self, peer: str | None) -> bool:
        """Whether headers of this address are believed."""
        try:
            return any(ip_address(peer or "") in network for network in self._proxies)
        except ValueError:
            return False

    def of_token(self, token: str, name: str) -> Person | None:
        """Whose token this is; each is compared in constant time."""
        given, role = token.encode("utf-8", "replace"), None
        for known, its in ((self._settings.token, Role.OPERATOR), (self._settings.viewer_token, Role.VIEWER)):
            if known is not None and hmac.compare_digest(given, known.encode()):
                role = its
        if role is None:
            return None
        return Person(clean_name(name) or "somebody", role, self._all, "token")

    def session_of(self, person: Person) -> str:
        """What the cookie of somebody who signed in carries."""
        until = time.time() + self._settings.session_hours * 3600
        return self._signer.sign("session", [person.name, person.role.value, until])

    def _of_session(self, session: str | None) -> Person | None:
        value = self._signer.read("session", session)
        if value is None or value[2] < time.time():
            return None
        return Person(value[0], Role(value[1]), self._all, "token")

    def _of_proxy(self, headers: Mapping[str, str]) -> Person | None:
        settings = self._settings
        name = clean_name(headers.get(settings.user_header.lower(), ""))
        groups = _names(headers.get(settings.groups_header.lower(), "")) | {EVERY}
        if not name:
            return None
        if groups & set(settings.operators):
            role = Role.OPERATOR
        elif groups & set(settings.viewers):
            role = Role.VIEWER
        else:
            return None
        return Person(name, role, self._tenants(headers), "proxy")

    def _tenants(self, headers: Mapping[str, str]) -> frozenset[str] | None:
        if not self._settings.tenants_header:
            return self._all
        given = _names(headers.get(self._settings.tenants_header.lower(), ""))
        if EVERY in given:
            return self._all
        return given if self._all is None else given & self._all


def clean_name(text: str) -> str:
    """A person's name as one short line."""
    return "".join(c for c in text if c.isprintable())[:_MOST_NAME].strip()


def _names(text: str) -> frozenset[str]:
    return frozenset(part.strip() for part in text.split(",") if part.strip())


def _login() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"
