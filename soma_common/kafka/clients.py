"""The one place that turns an address and its security settings into arguments of aiokafka's clients."""

from __future__ import annotations

import ssl
from typing import Any

from soma_common.config import KafkaSecurity
from soma_common.errors import BrokerUnavailable, ConfigurationError

_PLAIN = KafkaSecurity()
_CHECK = "check that the broker runs, SOMASTACK_KAFKA_BOOTSTRAP, and the security settings SOMASTACK_KAFKA_*."


def client_arguments(bootstrap: str, security: KafkaSecurity = _PLAIN) -> dict[str, Any]:
    """Keyword arguments for a producer, consumer or admin client of aiokafka.

    Raises:
        ConfigurationError: SASL without a user or password, or a CA file that cannot be read.
    """
    if not bootstrap:
        raise ConfigurationError("No Kafka address.", cure="set SOMASTACK_KAFKA_BOOTSTRAP to host:port,host:port.")
    arguments: dict[str, Any] = {
        "bootstrap_servers": [broker.strip() for broker in bootstrap.split(",")],
        "security_protocol": security.protocol,
    }
    if security.protocol in ("SSL", "SASL_SSL"):
        arguments["ssl_context"] = _tls(security)
    if security.protocol.startswith("SASL"):
        if not security.username or not security.password:
            raise ConfigurationError(
                f"{security.protocol} needs a user and a password.",
                cure="set SOMASTACK_KAFKA_USERNAME and SOMASTACK_KAFKA_PASSWORD or SOMASTACK_KAFKA_PASSWORD_FILE.",
            )
        arguments["sasl_mechanism"] = security.mechanism
        arguments["sasl_plain_username"] = security.username
        arguments["sasl_plain_password"] = security.password
    return arguments


def unreachable(bootstrap: str, error: BaseException) -> BrokerUnavailable:
    """The library's error for a broker that does not answer; the password is in neither message nor cause."""
    return BrokerUnavailable(f"Kafka at {bootstrap} does not answer: {_words(error)}.", cure=_CHECK)


def _words(error: BaseException) -> str:
    return (str(error).strip().rstrip(".").splitlines() or [type(error).__name__])[0]


def _tls(security: KafkaSecurity) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=security.ca_file)
    except (OSError, ssl.SSLError) as error:
        raise ConfigurationError(
            f"SOMASTACK_KAFKA_CA_FILE cannot be read: {error}.", cure="name a file of PEM certificates."
        ) from error
