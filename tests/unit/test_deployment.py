"""Names of the run modes."""

from __future__ import annotations

import pytest

from soma_common.config import SomaConfig
from soma_common.deployment import ALIASES, MODE_VARIABLES, DeployMode, parse_mode
from soma_common.errors import ConfigurationError


@pytest.mark.parametrize(("name", "mode"), [*((mode.value, mode) for mode in DeployMode), *ALIASES.items()])
def test_every_name_in_any_case(name: str, mode: DeployMode) -> None:
    for spelling in (name, name.upper(), f" {name.title()} ", name.replace("_", "-")):
        assert parse_mode(spelling) is mode


@pytest.mark.parametrize("name", ["", "cloud", "stand alone"])
def test_unknown_names(name: str) -> None:
    with pytest.raises(ConfigurationError, match="TEST_CI"):
        parse_mode(name)


@pytest.mark.parametrize("variable", MODE_VARIABLES)
def test_every_variable_names_the_mode(variable: str) -> None:
    assert SomaConfig.from_env({variable: "test_ci"}).mode is DeployMode.STANDALONE
    assert SomaConfig.from_env({"SOMA_DEPLOY_MODE": "", variable: "dev"}).mode is DeployMode.STANDALONE
