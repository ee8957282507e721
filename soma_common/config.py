"""The settings of an application, read from the environment in this one place."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from soma_common.deployment import MODE_VARIABLES, DeployMode, parse_mode
from soma_common.errors import ConfigurationError

_SERVICE = re.compile(r"^[a-z][a-z0-9_-]{0,99}$")
_TOPIC = re.compile(r"^(?!\.{1,2}$)[A-Za-z0-9._-]{1,249}$")
_MOST_SECRET = 64 * 1024  # characters of a file
_BROKER = re.compile(r"^(\[[0-9a-fA-F:]+\]|[A-Za-z0-9._-]+):(\d{1,5})$")


@dataclass(frozen=True, slots=True, kw_only=True)
class KafkaSecurity:
    """TLS and SASL for Kafka; the password is read from a file or the environment and never printed."""

    protocol: str = "PLAINTEXT"
    mechanism: str = "PLAIN"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_file: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SomaConfig:
    """What an application needs to know to run.

    Args:
        mode: standalone, somastack or k8s.
        service_id: the name of this service; part of every event, of topics and of consumer groups.
        postgres_dsn: the database that holds the log. Empty in standalone: the embedded one in ``folder``.
        postgres_pooler: True behind a transaction pooler such as PgBouncer (no prepared statements then).
        pool_size: most database connections of this process.
        kafka_bootstrap: ``host:port,host:port``. Empty in standalone.
        registry_url: Apicurio Registry. Empty: JSON without a registry.
        registry_token: bearer token for the registry, or None.
        topic: where events go unless the application routes them itself; empty: ``soma.<service_id>.events``.
        folder: files of the embedded database and of caches.
        exactly_once: relay in Kafka transactions.
        instance: a name of this process that survives its restarts (static membership in Kafka's groups), or None.
        otlp_endpoint: the collector to which ``Soma.run`` and ``somastack relay`` send spans, where no provider is set;
            empty: none.
        health_port: where ``Soma.run`` serves health and metrics; 0 chooses a free port, None serves none.
    """

    mode: DeployMode = DeployMode.STANDALONE
    service_id: str = "service"
    postgres_dsn: str = field(default="", repr=False)
    postgres_pooler: bool = False
    pool_size: int = 10
    kafka_bootstrap: str = ""
    kafka_security: KafkaSecurity = field(default_factory=KafkaSecurity)
    registry_url: str = ""
    registry_token: str | None = field(default=None, repr=False)
    topic: str = ""
    folder: Path = Path(".soma")
    exactly_once: bool = False
    instance: str | None = None
    health_port: int | None = None
    otlp_endpoint: str = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "mode", parse_mode(self.mode))
        object.__setattr__(self, "topic", check_topic("topic", self.topic or f"soma.{self.service_id}.events"))

    @property
    def uses_kafka(self) -> bool:
        """Whether events go through Kafka; in standalone consumers read the log itself."""
        return self.mode is not DeployMode.STANDALONE

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None, *, service_id: str | None = None) -> SomaConfig:
        """The settings in environment variables (see docs/reference/configuration.md).

        Raises:
            ConfigurationError: a variable is missing or wrong; the message names it.
        """
        given = os.environ if env is None else env
        mode = _mode(given)
        service = service_name(given, service_id)
        return cls(
            mode=mode,
            service_id=service,
            postgres_dsn=_postgres(given, mode),
            postgres_pooler=_choice(given, "SOMASTACK_POSTGRES_POOLER", "none", ("none", "transaction"))
            == "transaction",
            pool_size=number_of(given, "SOMA_POOL_SIZE", 10, 1, 1000),
            kafka_bootstrap=_kafka(given, mode),
            kafka_security=_security(given),
            registry_url=_registry(given, mode),
            registry_token=secret_of(given, "SOMASTACK_REGISTRY_TOKEN"),
            topic=check_topic("SOMA_TOPIC", given.get("SOMA_TOPIC", f"soma.{service}.events")),
            folder=_folder(given),
            exactly_once=_choice(given, "SOMA_EXACTLY_ONCE", "false", ("false", "true")) == "true",
            instance=_instance(given),
            health_port=number_of(given, "SOMA_HEALTH_PORT", 0, 0, 65535) if given.get("SOMA_HEALTH_PORT") else None,
            otlp_endpoint=given.get("SOMASTACK_JAEGER_ENDPOINT", ""),
        )


def service_name(env: Mapping[str, str], given: str | None = None) -> str:
    """The name of this service: what is given, else ``SOMA_SERVICE_ID``, else "service".

    Raises:
        ConfigurationError: it is no name that a service can have.
    """
    name = given or env.get("SOMA_SERVICE_ID", "service")
    if not _SERVICE.fullmatch(name):
        raise ConfigurationError(
            f"SOMA_SERVICE_ID {name!r:.120} is not a service name.",
            cure="use lower-case letters, digits, - and _.",
        )
    return name


def otlp_endpoint(env: Mapping[str, str] | None = None) -> str:
    """Where spans go by OTLP: the stack's own variable, else OpenTelemetry's; empty when neither is set."""
    given = os.environ if env is None else env
    return given.get("SOMASTACK_JAEGER_ENDPOINT") or given.get("OTEL_EXPORTER_OTLP_ENDPOINT") or ""


def check_topic(what: str, name: str) -> str:
    """The name itself when Kafka takes a topic of it.

    Raises:
        ConfigurationError: it is none; the message says where it was given.
    """
    if not isinstance(name, str) or not _TOPIC.fullmatch(name):
        raise ConfigurationError(
            f"{what}: {name!r:.300} is no name of a topic.", cure="use letters, digits, dots, _ and -, at most 249."
        )
    return name


def _mode(env: Mapping[str, str]) -> DeployMode:
    for name in MODE_VARIABLES:
        if env.get(name):
            return parse_mode(env[name])
    return DeployMode.STANDALONE


def _postgres(env: Mapping[str, str], mode: DeployMode) -> str:
    dsn = secret_of(env, "SOMASTACK_POSTGRES_DSN") or ""
    if not dsn and mode is not DeployMode.STANDALONE:
        raise _missing("SOMASTACK_POSTGRES_DSN", mode, "postgresql://user:password@postgres:5432/somastack")
    if dsn and not _is_address(dsn, ("postgresql", "postgres")):
        raise ConfigurationError(
            "SOMASTACK_POSTGRES_DSN is not a PostgreSQL address.",
            cure="write it as postgresql://user:password@host:5432/database.",
        )
    return dsn


def _kafka(env: Mapping[str, str], mode: DeployMode) -> str:
    text = env.get("SOMASTACK_KAFKA_BOOTSTRAP", "")
    if mode is DeployMode.STANDALONE:
        return ""
    if not text:
        raise _missing("SOMASTACK_KAFKA_BOOTSTRAP", mode, "kafka:9092")
    brokers = [part.strip().removeprefix("kafka://") for part in text.split(",") if part.strip()]
    for broker in brokers:
        found = _BROKER.fullmatch(broker)
        if found is None or not 0 < int(found[2]) < 65536:
            raise ConfigurationError(
                f"SOMASTACK_KAFKA_BOOTSTRAP has {broker!r:.120}.", cure="write host:port, several joined by commas."
            )
    if not brokers:
        raise _missing("SOMASTACK_KAFKA_BOOTSTRAP", mode, "kafka:9092")
    return ",".join(brokers)


def _registry(env: Mapping[str, str], mode: DeployMode) -> str:
    url = env.get("SOMASTACK_REGISTRY_URL", "")
    if mode is DeployMode.STANDALONE:
        return ""
    if url and not (_is_address(url, ("http", "https")) and urlsplit(url).hostname):
        raise ConfigurationError(
            f"SOMASTACK_REGISTRY_URL {url!r:.120} is not a web address.", cure="write http://apicurio:8085 or the like."
        )
    return url.rstrip("/")


def _instance(env: Mapping[str, str]) -> str | None:
    name = env.get("SOMA_INSTANCE") or None
    if name is not None and not _TOPIC.fullmatch(name):  # Kafka takes the same names
        raise ConfigurationError(
            f"SOMA_INSTANCE is {name!r:.120}.", cure="use letters, digits, dots, _ and -, such as the name of a pod."
        )
    return name


def _folder(env: Mapping[str, str]) -> Path:
    text = env.get("SOMA_FOLDER", ".soma")
    if not text.strip():
        raise ConfigurationError("SOMA_FOLDER is empty.", cure="name a folder, or leave the variable out.")
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigurationError(f"SOMA_FOLDER {text!r:.200}: {error}", cure="write the whole path.") from error


def _is_address(text: str, schemes: tuple[str, ...]) -> bool:
    """Whether this is an address of such a scheme, with ports that are ports. PostgreSQL's may name several hosts."""
    try:
        parts = urlsplit(text)
        hosts = parts.netloc.rpartition("@")[2].split(",")
        ports = [urlsplit(f"//{host}").port for host in hosts]
        return parts.scheme in schemes and 0 not in ports
    except ValueError:
        return False


def _security(env: Mapping[str, str]) -> KafkaSecurity:
    protocols = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
    mechanisms = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
    return KafkaSecurity(
        protocol=_choice(env, "SOMASTACK_KAFKA_PROTOCOL", "PLAINTEXT", protocols),
        mechanism=_choice(env, "SOMASTACK_KAFKA_MECHANISM", "SCRAM-SHA-512", mechanisms),
        username=env.get("SOMASTACK_KAFKA_USERNAME"),
        password=secret_of(env, "SOMASTACK_KAFKA_PASSWORD"),
        ca_file=env.get("SOMASTACK_KAFKA_CA_FILE"),
    )


def secret_of(env: Mapping[str, str], name: str) -> str | None:
    """A value, or the content of the file that NAME_FILE names; None where neither is set.

    Raises:
        ConfigurationError: the file cannot be read, is empty, or is too large for a secret. An empty one is an error,
            for without a secret some doors stand open.
    """
    path = env.get(f"{name}_FILE")
    if not path:
        return env.get(name)
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(_MOST_SECRET + 1).strip()
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or no path at all
        raise ConfigurationError(f"{name}_FILE cannot be read: {error}.", cure="check path and rights.") from error
    if not text or len(text) > _MOST_SECRET:
        what = "is empty" if not text else f"has more than {_MOST_SECRET:,} characters"
        raise ConfigurationError(f"The file of {name}_FILE {what}.", cure="write the secret, and nothing else, there.")
    return text


def _choice(env: Mapping[str, str], name: str, default: str, known: tuple[str, ...]) -> str:
    value = env.get(name, default)
    for choice in known:
        if value.lower() == choice.lower():
            return choice
    raise ConfigurationError(f"{name} is {value!r:.80}.", cure=f"use one of: {', '.join(known)}.")


def number_of(env: Mapping[str, str], name: str, default: int, least: int, most: int) -> int:
    """A whole number within bounds; the default where the variable is not set.

    Raises:
        ConfigurationError: it is none.
    """
    text = env.get(name, str(default))
    if not (text.isascii() and text.isdigit() and least <= int(text[:9]) <= most and len(text) < 10):
        raise ConfigurationError(f"{name} is {text!r:.80}.", cure=f"use a whole number from {least} to {most}.")
    return int(text)


def _missing(name: str, mode: DeployMode, example: str) -> ConfigurationError:
    return ConfigurationError(f"{name} is missing in mode {mode}.", cure=f"set it, for example to {example}.")
