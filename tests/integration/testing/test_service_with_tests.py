"""The example service installs the wheel into a fresh environment, and its own tests pass there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.fresh_environment import ROOT, FreshEnvironment, copied


@pytest.mark.timeout(900)
def test_it_passes_its_tests_in_a_fresh_environment(tmp_path: Path) -> None:
    fresh = FreshEnvironment.make(tmp_path)
    project = copied(ROOT / "examples" / "service_with_tests", tmp_path / "parcels")
    fresh.install(project)
    where = fresh.run("python", "-c", "import soma_common; print(soma_common.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(tmp_path)
    output = fresh.run("python", "-m", "pytest", "-q", cwd=project)
    passed = re.search(r"^(\d+) passed", output, re.MULTILINE)
    assert passed is not None, output
    assert int(passed[1]) == 8
    assert "soma servers used: postgres 18" in output
