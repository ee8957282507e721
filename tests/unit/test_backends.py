"""The choice of backend: external, docker, local; a forced one that is impossible is an error."""

from __future__ import annotations

import pytest

from soma_common.errors import ConfigurationError, ServerUnavailable
from soma_common.testing.backends import ADDRESSES, Backend, ExternalKafka, ExternalRegistry, Service, choose
from soma_common.testing.lane.ports import free_port
from soma_common.testing.run import ServerRun


def _engine() -> bool:
    return True


def _no_engine() -> bool:
    return False


@pytest.mark.parametrize("service", list(Service))
def test_auto_takes_an_address_before_an_engine_before_the_lane(service: Service) -> None:
    given = {ADDRESSES[service]: "somewhere:1"}
    assert choose(service, given, engine=_engine) is Backend.EXTERNAL
    assert choose(service, {}, engine=_engine) is Backend.DOCKER
    assert choose(service, {}, engine=_no_engine) is Backend.LOCAL


def test_an_empty_address_is_none() -> None:
    assert choose(Service.KAFKA, {"SOMA_TEST_KAFKA_BOOTSTRAP": ""}, engine=_no_engine) is Backend.LOCAL


@pytest.mark.parametrize("word", ["local", "LOCAL ", "Local"])
def test_forced_choice_wins_over_addresses(word: str) -> None:
    env = {"SOMA_TEST_BACKEND": word, "SOMA_TEST_KAFKA_BOOTSTRAP": "somewhere:1"}
    assert choose(Service.KAFKA, env, engine=_engine) is Backend.LOCAL


def test_unknown_word_names_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match=r"SOMA_TEST_BACKEND=podman is unknown.*auto, external, docker or"):
        choose(Service.KAFKA, {"SOMA_TEST_BACKEND": "podman"})


def test_forced_docker_without_an_engine_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="no container engine answers"):
        choose(Service.KAFKA, {"SOMA_TEST_BACKEND": "docker"}, engine=_no_engine)


def test_forced_external_without_an_address_is_an_error() -> None:
    with pytest.raises(ConfigurationError, match="set SOMA_TEST_REGISTRY_URL"):
        choose(Service.REGISTRY, {"SOMA_TEST_BACKEND": "external"})


def test_an_external_broker_that_is_away_is_an_error_not_a_skip() -> None:
    with pytest.raises(ServerUnavailable, match="No Kafka broker answers at 127"):
        ExternalKafka(f"127.0.0.1:{free_port()}")
    with pytest.raises(ServerUnavailable, match="No Kafka broker answers at nonsense"):
        ExternalKafka("nonsense")


def test_an_external_registry_that_is_away_is_an_error() -> None:
    run = ServerRun({"SOMA_TEST_REGISTRY_URL": f"http://127.0.0.1:{free_port()}"})
    with pytest.raises(ServerUnavailable, match="No schema registry answers"):
        run.registry()
    run.close()
    assert ExternalRegistry("http://host:8085/").address == "host:8085"


def test_an_external_database_that_is_away_is_an_error() -> None:
    run = ServerRun({"SOMA_TEST_POSTGRES_DSN": f"postgresql://u:secret@127.0.0.1:{free_port()}/db"})
    with pytest.raises(ServerUnavailable, match="No PostgreSQL answers at 127") as caught:
        run.postgres()
    assert "secret" not in str(caught.value)
    run.close()
