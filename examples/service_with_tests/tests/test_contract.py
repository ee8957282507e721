"""What this service writes stays readable."""

from __future__ import annotations

from pathlib import Path

from parcels.app import application
from soma_common import SomaConfig
from soma_common.testing import assert_compatible


def test_schemas_models_upcasters_and_handlers_match() -> None:
    assert_compatible(application(SomaConfig()), schemas=Path(__file__).parents[1] / "schemas")
