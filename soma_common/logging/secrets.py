"""Secrets never appear: they are found by the name of their field, and by their looks inside of text.

What is logged is looked at twice. First its JSON is searched for a few words, which takes less than a microsecond and
finds nothing nearly always; only what may hold a secret is taken apart.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Final

HIDDEN: Final = "***"
_LONGEST_NAME: Final = 100  # that is remembered

# Names of fields, as words: "apiKey", "api-key" and "X_API_KEY" all end in "api key".
NAMES: Final = (
    "password", "passwd", "passphrase", "pwd", "secret", "token", "jwt", "authorization", "cookie", "credential",
    "api key", "access key", "private key", "secret key", "encryption key", "signing key", "client secret", "sessionid",
)  # fmt: skip

# Where a word of a name ends: at a separator, or before a capital letter.
_WORDS: Final = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[_\-. ]")
_GITHUB: Final = ("ghp_", "gho_", "ghs_", "ghu_", "ghr_")
# In quotes that are escaped, as JSON inside of a string has them: up to the quote that is escaped as often.
_ESCAPED: Final = (
    r"""(?P<escape>\\+)(?P<quote>["'])(?:(?!(?<!\\)(?P=escape)(?P=quote))[^\r\n])*(?:(?P=escape)(?P=quote))?"""
)
_VALUE: Final = rf"""(?:{_ESCAPED}|"(?:[^"\\]|\\.)*"?|'(?:[^'\\]|\\.)*'?|[^\s,;&"'<>)}}\]]+)"""
_PATTERNS: Final = (
    # scheme://user:password@host; not http://host:8080/?mail=a@b
    (re.compile(r"(://[^\s:/?#\"'@]{0,200}:)(?!\d{1,5}[/?#])[^\s\"'<>]{0,1000}@"), rf"\1{HIDDEN}@"),
    # the whole value of these headers, as they stand in a dump of headers or in a repr
    (
        re.compile(
            r"""(?i)\b((?:proxy-)?authorization|(?:set-)?cookies?)(\\*["'],\s*|\\*["']?\s*[:=]\s*)b?(\\*["']?)[^\r\n"'\\]+"""
        ),
        rf"\1\2\3{HIDDEN}",
    ),
    (re.compile(r"(?i)\b(bearer)\s+(?=\S*[\d._-])[\w.~+/=-]{8,}"), rf"\1 {HIDDEN}"),
    (re.compile(r"eyJ[\w-]{8,}(?:\.[\w-]*){0,4}"), HIDDEN),  # a JSON web token: {" in base64
    (re.compile(r"\b(?:gh[opsru]_\w{16,}|xox[bp]-[\w-]{10,}|AKIA[0-9A-Z]{12,}|sk-[\w-]{16,})"), HIDDEN),
    (re.compile(r"(-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----)(?s:.*?)(-----END|\Z)"), rf"\1{HIDDEN}\2"),
)


def _assigned(names: Iterable[str]) -> re.Pattern[str]:
    """``name=value``, ``"name": "value"`` and the like; of several (``tokens: 512``) not where it is a count."""
    spelled = "|".join(re.escape(name).replace(r"\ ", r"[_\-. ]?") for name in names)
    several = r"""(?:s(?!\\*["']?\s*[:=]\s*\d+\b))?"""
    return re.compile(rf"""(?i)((?:{spelled}){several})(\\*["']?\s*(?:[:=]|=>)\s*)b?{_VALUE}""")


def _hinted(lower: str) -> bool:
    """Whether a text in lower case holds a piece of one of NAMES, written in any way, or of what a pattern finds.

    A single character is found several times faster than a word, and k, w, j, x, z and @ are in none of the names that
    each line has: so they are looked for before the words that hold them.
    """
    if "w" in lower and ("passw" in lower or "pwd" in lower):
        return True
    if "k" in lower and ("token" in lower or "cookie" in lower or "akia" in lower or "sk-" in lower or _key(lower)):
        return True
    if "j" in lower and ("eyj" in lower or "jwt" in lower):
        return True
    if "secret" in lower or "credential" in lower or "bearer" in lower or "passphrase" in lower or "sessionid" in lower:
        return True
    if "z" in lower and "authoriz" in lower:
        return True
    if "x" in lower and "xox" in lower:
        return True
    return ("gh" in lower and any(start in lower for start in _GITHUB)) or ("@" in lower and "://" in lower)


def _key(lower: str) -> bool:
    return "key" in lower and any(name in lower for name in ("api", "access", "private", "encryption", "signing"))


class Secrets:
    """Which fields hold secrets: the usual names and those given here.

    Args:
        names: more names of fields, in any spelling: ``"national_id"`` also finds ``nationalId`` and ``National-ID``.
    """

    def __init__(self, names: Iterable[str] = ()) -> None:
        own = [words for words in map(_words, names) if words.strip()]
        spelled = dict.fromkeys([*NAMES, *own])
        # "api key" is also written apikey
        self._names = tuple(dict.fromkeys([*spelled, *(name.replace(" ", "") for name in spelled)]))
        self._hints = tuple(hint for name in own for hint in _hints_of(max(name.split(), key=len)))
        self._assigned = _assigned(spelled)
        self._known_key: Callable[[str], tuple[str, bool]] = lru_cache(maxsize=4096)(self._look_at_key)

    def suspected(self, text: str) -> bool:
        """Whether a text, or JSON in ASCII, may hold a secret or a field of such a name. Cheap, and never wrong when it
        says no.
        """
        lower = text.lower()
        if _hinted(lower):
            return True
        return any(hint in lower for hint in self._hints) if self._hints else False

    def without(self, value: Any) -> Any:
        """A value made of JSON's kinds (as ``orjson.loads`` gives it), with its secrets hidden."""
        if type(value) is str:
            return self.without_in(value)
        if type(value) is dict:
            return dict(self._field(key, inner) for key, inner in value.items())
        if type(value) is list:
            return [self.without(inner) for inner in value]
        return value

    def without_in(self, text: str) -> str:
        """A text with the secrets hidden that can be told by their looks."""
        if not self.suspected(text):
            return text
        for pattern, replacement in _PATTERNS:
            text = pattern.sub(replacement, text)
        return self._assigned.sub(rf"\1\2{HIDDEN}", text)

    def is_secret(self, key: str) -> bool:
        """Whether a field of this name holds a secret."""
        words = _words(key)
        parts = f" {words} "
        return words.endswith(self._names) or any(f" {name} " in parts or f" {name}s " in parts for name in self._names)

    def _field(self, key: str, value: Any) -> tuple[str, Any]:
        """A field as it may be shown, its name too: names are the same again and again, unless they are long."""
        shown, secret = self._known_key(key) if len(key) <= _LONGEST_NAME else self._look_at_key(key)
        # That there is none, or whether there is one, tells nothing; nor do counts: "tokens": 512.
        if value is None or type(value) is bool or not secret:
            return shown, self.without(value)
        counted = type(value) in (int, float) and not _words(key).endswith(self._names)
        return shown, value if counted else HIDDEN

    def _look_at_key(self, key: str) -> tuple[str, bool]:
        return self.without_in(key), self.is_secret(key)


def _hints_of(word: str) -> list[str]:
    """What a text in lower case holds when it holds this word, as it is or as JSON in ASCII."""
    if word.isascii():
        return [word]
    runs = re.findall(r"[a-z\d]{3,}", word)
    if runs:
        return [max(runs, key=len)]
    odd = next(character for character in word if not character.isascii())
    return [word, json.dumps(odd)[1:5]]  # \u04: a letter and its capital begin alike, and so do all of its script


def _words(key: str) -> str:
    """``apiKey``, ``API-key`` and ``api_key`` are the words "api key"."""
    return _WORDS.sub(" ", key).lower()
