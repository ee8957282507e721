"""The starter project in a fresh environment, from the wheel: made by its command, installed, tested, run."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest

from tests.cli_support import environment
from tests.fresh_environment import FreshEnvironment


@pytest.mark.timeout(900)
def test_it_is_made_installed_tested_and_run(tmp_path: Path) -> None:
    fresh = FreshEnvironment.make(tmp_path)
    bare = [str(fresh.bin / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*bare, str(fresh.wheel)], check=True, timeout=600)
    said = fresh.run("somastack", "new", "my-shop", cwd=tmp_path)
    assert "pip install -e '.[test]'" in said
    project = tmp_path / "my-shop"
    fresh.install(project)
    passed = re.search(r"^(\d+) passed", fresh.run("python", "-m", "pytest", "-q", cwd=project), re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) == 5
    folder = Path(f"/tmp/soma-new-{uuid4().hex[:8]}")
    try:
        _run_it(fresh, project, folder)
    finally:
        _in(fresh, project, folder, "somastack down --volumes --yes")
        for left in folder.iterdir():
            left.unlink()
        folder.rmdir()


def _run_it(fresh: FreshEnvironment, project: Path, folder: Path) -> None:
    """What the README of the project says, in its order."""
    assert "export SOMA_FOLDER" in _in(fresh, project, folder, "somastack up")
    assert "is placed" in _in(fresh, project, folder, "python -m my_shop")
    script = (
        "somastack worker my_shop.app:soma & worker=$!; "
        "for _ in $(seq 300); do somastack saga list --all-tenants --all | grep -q completed && break; sleep 0.2; done; sleep 1; "
        "kill -TERM $worker; wait $worker; echo code $?"
    )
    assert _in(fresh, project, folder, script).rstrip().endswith("code 0")
    assert "completed" in _in(fresh, project, folder, "somastack saga list --all-tenants --all")
    assert "0 failed, 0 to look at" in _in(fresh, project, folder, "somastack doctor")


def _in(fresh: FreshEnvironment, project: Path, folder: Path, script: str) -> str:
    env = environment(SOMA_FOLDER=str(folder), PATH=f"{fresh.bin}:{os.environ['PATH']}")
    del env["PYTHONPATH"]
    done = subprocess.run(
        ["bash", "-c", script], cwd=project, env=env, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
