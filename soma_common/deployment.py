"""The three run modes and the names they go by."""

from __future__ import annotations

from enum import StrEnum

from soma_common.errors import ConfigurationError


class DeployMode(StrEnum):
    """Where the application runs; set by ``SOMA_DEPLOY_MODE``."""

    STANDALONE = "standalone"
    SOMASTACK = "somastack"
    K8S = "k8s"


# Names found in the Soma services' own settings, and what they mean here (REQUIREMENTS B).
ALIASES = {
    "full_local": DeployMode.STANDALONE,
    "local": DeployMode.STANDALONE,
    "dev": DeployMode.STANDALONE,
    "test_ci": DeployMode.STANDALONE,
    "test": DeployMode.STANDALONE,
    "soma_stack": DeployMode.SOMASTACK,
    "stack": DeployMode.SOMASTACK,
    "aaas": DeployMode.SOMASTACK,
    "kubernetes": DeployMode.K8S,
    "prod_distributed": DeployMode.K8S,
    "prod": DeployMode.K8S,
}

# The variables that may name the mode, first match wins.
MODE_VARIABLES = ("SOMA_DEPLOY_MODE", "SA01_DEPLOYMENT_MODE", "SOMASTACK_SOFTWARE_MODE")


def parse_mode(name: str) -> DeployMode:
    """The mode a name stands for, whatever its case.

    Raises:
        ConfigurationError: the name is unknown; the message lists the known ones.
    """
    key = name.strip().lower().replace("-", "_")
    if key in DeployMode._value2member_map_:
        return DeployMode(key)
    if key in ALIASES:
        return ALIASES[key]
    known = ", ".join([*DeployMode, *(alias.upper() for alias in ALIASES)])
    raise ConfigurationError(f"Unknown deployment mode {name!r}.", cure=f"set SOMA_DEPLOY_MODE to one of: {known}.")
