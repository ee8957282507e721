"""The page that tells where a killed process was."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples.flights.stages import Board, Stage
from tests.waiting import wait_until

WORKER = """
import sys, time
from pathlib import Path
from examples.flights.stages import Board, Stage
board = Board(Path(sys.argv[1]))
while True:
    board.enter(Stage.HANDLING, steps=1)
    board.enter(Stage.COMMITTED)
"""


@pytest.fixture
def board(tmp_path: Path) -> Board:
    return Board(tmp_path / "stage")


def started(tmp_path: Path) -> subprocess.Popen[bytes]:
    """A worker that goes round between two stages."""
    root = Path(__file__).parents[2]
    return subprocess.Popen([sys.executable, "-c", WORKER, str(tmp_path / "stage")], cwd=root)


def test_the_stage_outlives_the_process(tmp_path: Path, board: Board) -> None:
    board.reset()
    with started(tmp_path) as worker:
        wait_until(lambda: board.steps > 100)
        os.kill(worker.pid, signal.SIGKILL)
    assert board.stage in (Stage.HANDLING, Stage.COMMITTED)
    assert board.steps > 100


def test_a_wished_stage_is_where_the_process_waits(tmp_path: Path, board: Board) -> None:
    board.reset(hold=Stage.COMMITTED)
    with started(tmp_path) as worker:
        wait_until(lambda: board.held)
        os.kill(worker.pid, signal.SIGKILL)
    assert (board.stage, board.steps) == (Stage.COMMITTED, 1)


def test_a_released_process_goes_on(tmp_path: Path, board: Board) -> None:
    board.reset(hold=Stage.COMMITTED)
    with started(tmp_path) as worker:
        wait_until(lambda: board.held)
        board.release()
        wait_until(lambda: board.steps > 10)
        os.kill(worker.pid, signal.SIGKILL)


def test_a_reset_forgets(board: Board) -> None:
    board.enter(Stage.PUBLISHING, steps=7)
    board.reset()
    assert (board.stage, board.steps, board.held) == (Stage.STARTING, 0, False)


def test_every_stage_has_words() -> None:
    assert len({stage.text for stage in Stage}) == len(Stage)
