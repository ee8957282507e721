"""What commands say of errors on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys

import pytest


@pytest.mark.parametrize("command", [("events", "list"), ("dlq", "list")])
@pytest.mark.parametrize(("no_color", "red"), [("1", False), ("", True)])
def test_no_color_is_obeyed(command: tuple[str, ...], no_color: str, red: bool) -> None:
    main, end = pty.openpty()
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SOMA")}
    env = clean | {"NO_COLOR": no_color, "TERM": "xterm-256color"}
    subprocess.run(
        [sys.executable, "-m", "soma_common.cli.main", *command], env=env, stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL, stderr=end, timeout=60, check=False,
    )  # fmt: skip
    os.close(end)
    told = os.read(main, 65536).decode()
    os.close(main)
    assert "Error: Whose" in told
    assert ("\x1b[" in told) == red
