"""The distribution: it builds, passes twine, and works in an empty environment."""

from __future__ import annotations

import json
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.xdist_group("wheel")  # one worker, so that what they share is made once

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "build", "--wheel", "--outdir", str(folder), str(ROOT))
    return next(folder.glob("*.whl"))


def test_twine_accepts_it(wheel: Path) -> None:
    assert "PASSED" in _run(sys.executable, "-m", "twine", "check", "--strict", str(wheel))


def test_it_holds_the_library_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert "soma_common/py.typed" in names
    assert "soma_common/sql/migrations/0001_event_log.sql" in names
    console = ROOT / "soma_common" / "console"
    parts = [part for kind in ("templates", "static") for part in (console / kind).iterdir()]
    assert len(parts) > 20
    assert {str(part.relative_to(ROOT)) for part in parts} <= set(names)
    assert {name.split("/")[0] for name in names} == {
        "soma_common",
        f"soma_common-{wheel.name.split('-')[1]}.dist-info",
    }
    assert not [name for name in names if "__pycache__" in name or "/tests/" in name]


def test_it_works_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "env", with_pip=True)
    python = str(tmp_path / "env" / "bin" / "python")
    _run(python, "-m", "pip", "install", "--quiet", str(wheel))
    script = (
        "import soma_common, json; names = [n for n in soma_common.__all__ if getattr(soma_common, n) is not None]; "
        "print(json.dumps(names))"
    )
    assert json.loads(_run(python, "-c", script)) == json.loads(_run(sys.executable, "-c", script))
    somastack = str(tmp_path / "env" / "bin" / "somastack")
    assert "Commands:" in _run(somastack, "--help")
    bare = subprocess.run([somastack, "console"], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert "The console needs " in bare.stderr
    assert "pip install 'soma-common[console]'" in bare.stderr
    _run(python, "-m", "pip", "install", "--quiet", f"{wheel}[console]")
    _run(
        python,
        "-c",
        "import soma_common.console.serving, soma_common.console.rendering as r; r.environment().get_template('base.html')",
    )


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(command[0]).parent)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
