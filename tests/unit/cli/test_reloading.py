"""``worker --reload``: which files count, and what a change does."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

from soma_common.cli.reloading import difference, files
from tests.cli_support import environment
from tests.waiting import wait_until


def test_python_files_that_somebody_writes_are_seen(tmp_path: Path) -> None:
    for name in (
        "app.py",
        "shop/a.py",
        ".git/b.py",
        "__pycache__/c.py",
        "env/pyvenv.cfg",
        "env/d.py",
        "node_modules/e.py",
        "f.txt",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert set(files(tmp_path)) == {"app.py", str(Path("shop") / "a.py")}


def test_a_difference_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("1")
    before = files(tmp_path)
    assert difference(before, files(tmp_path)) == ""
    (tmp_path / "a.py").write_text("22")
    assert difference(before, files(tmp_path)) == "a.py"
    (tmp_path / "a.py").unlink()
    assert difference(before, files(tmp_path)) == "a.py"


def test_a_link_in_a_circle_and_a_file_that_cannot_be_read_are_passed_over(tmp_path: Path) -> None:
    (tmp_path / "circle").symlink_to(tmp_path)
    (tmp_path / "broken.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / "a.py").write_text("")
    assert set(files(tmp_path)) == {"a.py"}


def test_a_process_begins_anew_after_a_change_and_drains_before(tmp_path: Path) -> None:
    """The supervisor itself, with a small program in place of a worker."""
    (tmp_path / "child.py").write_text(
        textwrap.dedent("""
        import signal, sys, time
        def end(*_):
            with open("said", "a") as said: said.write("drained\\n")
            sys.exit(0)
        signal.signal(signal.SIGTERM, end)
        with open("said", "a") as said: said.write("began\\n")
        while True: time.sleep(0.05)
    """)
    )
    script = (
        "import sys; from soma_common.cli import reloading; "
        "s = reloading._Supervisor(reloading.Path.cwd(), [], 10.0); s._command = [sys.executable, 'child.py']; sys.exit(s.run())"
    )
    said = tmp_path / "said"
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        wait_until(lambda: said.exists() and said.read_text() == "began\n", what="the first")
        time.sleep(0.6)
        (tmp_path / "other.py").write_text("x = 1\n")
        wait_until(lambda: said.read_text() == "began\ndrained\nbegan\n", what="the second")
        process.send_signal(signal.SIGTERM)
        assert "other.py: begins anew" in process.communicate(timeout=30)[1]
        assert process.returncode == 0
        assert said.read_text() == "began\ndrained\nbegan\ndrained\n"
    finally:
        process.kill()
        process.wait()
