"""Secrets never appear: by the name of their field, by their looks, wherever they stand."""

from __future__ import annotations

import json
from typing import Any

import pytest
from pydantic import SecretBytes, SecretStr

from soma_common.logging.formatters import SomaStackFormatter, SomaStackJSONFormatter
from soma_common.logging.secrets import NAMES, Secrets
from tests.log_support import check_console, parsed, raised, record

SECRET = "hunter2Canary"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NSJ9.hunter2Canary-sig_nature"

as_json = SomaStackJSONFormatter(service="shop", secrets=["national_id", "iban"])
for_people = SomaStackFormatter(service="shop", emoji=True, colour=False, secrets=["national_id", "iban"])


def lines(*args: Any, **fields: Any) -> str:
    """Both lines of a record, which are valid."""
    given = record(*args, **fields)
    line, text = as_json.format(given), for_people.format(given)
    parsed(line)
    check_console(text)
    return f"{line}\n{text}"


FIELDS = [
    "password", "PASSWORD", "db_password", "dbPassword", "user-password", "passwd", "pwd", "passphrase", "secret",
    "client_secret", "clientSecret", "SECRET_KEY", "token", "access_token", "accessToken", "csrftoken", "refresh.token",
    "api_key", "apiKey", "apikey", "X-API-Key", "API_KEY", "authorization", "Authorization", "proxy-authorization",
    "cookie", "Set-Cookie", "cookies", "credentials", "private_key", "privateKey", "aws_secret_access_key", "jwt",
    "sessionid", "tokens", "signing_key", "encryptionKey", "national_id", "nationalId", "NATIONAL-ID", "iban",
]  # fmt: skip


@pytest.mark.parametrize("name", FIELDS)
@pytest.mark.parametrize(
    "value", [SECRET, [SECRET], {"a": SECRET}, SECRET.encode()], ids=["text", "list", "dict", "bytes"]
)
def test_fields_of_such_names_are_hidden_at_any_depth(name: str, value: Any) -> None:
    for told in (
        lines(data={name: value}),
        lines(data={"outer": [{"inner": {name: value}}]}),
        lines("%s", {name: value}) if type(value) is str else "***",
    ):
        assert SECRET not in told
        assert "***" in told


TEXTS = [
    f"postgresql://app:{SECRET}@db:5432/shop",
    f"postgresql://app:p@ss{SECRET}@db:5432/shop",
    f"postgresql://app:{SECRET}/with/slashes@db/shop",
    f"redis://:{SECRET}@cache:6379/0",
    f"postgresql+asyncpg://app:{SECRET}@h1:1,h2:2/shop",
    f"host=db user=app password={SECRET} dbname=shop",
    f"host=db password='{SECRET} with space' dbname=shop",
    f"https://x.test/callback?code=1&access_token={SECRET}&state=2",
    f"Authorization: Bearer {SECRET}",
    f"Authorization: Basic {SECRET}==",
    f"{{'Authorization': 'Token {SECRET}'}}",
    f'{{"authorization": "Bearer {SECRET}", "accept": "*"}}',
    f"[(b'authorization', b'Bearer {SECRET}')]",
    f"Cookie: theme=dark; sessionid={SECRET}; other={SECRET}",
    f"curl -H 'X-Api-Key: {SECRET}'",
    f"sent bearer {SECRET}.x",
    f"token {JWT} was refused",
    f"PASSWORD={SECRET}",
    f"DB_PASSWORD: {SECRET}",
    f"connect(password='{SECRET}')",
    f'{{"a": {{"client_secret": "{SECRET}"}}}}',
    f"password => {SECRET}",
    f"api-key={SECRET}",
    f"key sk-proj-{SECRET}1234567890",
    f"pushed with ghp_{SECRET}1234567890abcdef",
    f"slack xoxb-123456-{SECRET}",
    f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----",
    f"-----BEGIN RSA PRIVATE KEY-----\n{SECRET}",
]


@pytest.mark.parametrize("text", TEXTS)
def test_texts_that_hold_a_secret(text: str) -> None:
    try:
        raise RuntimeError(text)
    except RuntimeError as error:
        info = raised(error)
    for told in (
        lines(text),
        lines("it was %s", text),
        lines(data={"dsn": text}),
        lines(data={"list": [{"deep": text}]}),
        lines(data={text: 1}),
        lines(exc_info=info),
        lines(stack_info=text),
        lines(data={"error": RuntimeError(text), "bytes": text.encode()}),
        lines(tenant_id=text),
    ):
        assert SECRET not in told, told
        assert "***" in told


HARMLESS = [
    "http://shop:8080/orders?mail=ann@x.test",
    "see https://x.test/@someone/page",
    "postgresql://app@db/shop",
    "max_tokens: 512",
    "the token was refused",
    "a bearer of news",
    "task-1234567890123456",
    "keyboard: on, monkey: 3",
    "passed 3 of 4",
    "the cookie, which was large, is gone",
    "mail ann@x.test",
    "tokens=512",
]


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("value", [SECRET, f'a"{SECRET}', f"it's \\{SECRET}", f"{SECRET}, {SECRET}"])
def test_json_inside_of_a_string_inside_of_a_string(value: str, depth: int) -> None:
    text = json.dumps({"token": value, "user": "bob", "Authorization": f"Basic {SECRET}"})
    for _ in range(depth):
        text = json.dumps(text)
    assert SECRET not in Secrets().without_in(text)
    assert "bob" in Secrets().without_in(text)
    assert SECRET not in lines(data={"body": text})


@pytest.mark.parametrize("text", HARMLESS)
def test_texts_that_hold_none_stay(text: str) -> None:
    assert parsed(as_json.format(record(text)))["message"] == text


def test_counts_and_absence_are_told() -> None:
    data = {"max_tokens": 512, "tokens": 3, "password": None, "has_password": True, "tokenizer": "bpe", "key": "k"}
    assert parsed(as_json.format(record(data=data)))["data"] == data


def test_a_number_may_be_a_secret() -> None:
    assert parsed(as_json.format(record(data={"password": 1234})))["data"] == {"password": "***"}


def test_names_that_are_not_english() -> None:
    rules = ["contraseña", "密码", "пароль"]
    for formatter in (
        SomaStackJSONFormatter(service="shop", secrets=rules),
        SomaStackFormatter(service="shop", emoji=True, colour=False, secrets=rules),
    ):
        for name in ("contraseña", "CONTRASEÑA", "mi_contraseña", "密码", "пароль", "ПАРОЛЬ", "Пароль"):
            assert SECRET not in formatter.format(record(data={name: SECRET}))
            assert SECRET not in formatter.format(record(f"{name}={SECRET}"))


def test_a_name_may_be_long() -> None:
    assert SECRET not in lines(data={"x" * 5000 + "_password": SECRET})


def test_secret_types_are_hidden_under_any_name() -> None:
    told = lines("%s", SecretStr(SECRET), a=SecretStr(SECRET), data={"b": [SecretBytes(SECRET.encode())]})
    assert SECRET not in told
    assert parsed(as_json.format(record(a=SecretStr(SECRET))))["data"] == {"a": "***"}


def test_a_secret_is_hidden_where_the_cut_goes_through_it() -> None:
    for at in range(0, 600, 7):
        text = "x" * at + f" postgresql://app:{SECRET}@db/shop " + "y" * 3000
        short = SomaStackJSONFormatter(service="shop", limit=1000).format(record(text, data={"dsn": text}))
        assert "hunter2" not in short
        assert "hunter2" not in SomaStackFormatter(service="shop", limit=300, text_limit=300).format(
            record(text, data={"dsn": text})
        )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("separator", ["_", "-", " ", ".", ""])
def test_the_quick_look_finds_every_name(name: str, separator: str) -> None:
    """It decides whether a line is looked at at all."""
    rules = Secrets()
    for spelled in (
        name.replace(" ", separator),
        name.title().replace(" ", separator),
        name.upper().replace(" ", separator),
    ):
        assert rules.is_secret(spelled), spelled
        assert rules.suspected(f'{{"{spelled}":1}}'), spelled


def test_long_texts_take_time_in_proportion() -> None:
    """No pattern goes back and forth: a hundred times the text must not take forever."""
    for text in ("password" * 20_000, "://" * 30_000 + "@", "://a:" * 20_000, "://a:" * 20_000 + " @", "eyJ" * 30_000, "authorization: " * 9_000,
                 "-----BEGIN PRIVATE KEY-----" * 3_000, 'token="' + "\\" * 90_000, "bearer " * 10_000, "secret   " * 10_000):  # fmt: skip
        lines(text)
