"""``python -m examples.choreography``: three processes, three databases, one broker."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from soma_common.testing.backends import KafkaHandle, PostgresHandle

ROOT = Path(__file__).parents[3]
PRINTED = """\
order A-1: completed, as 3 services see it
  orders/accept   done
  orders/confirm  done
  payment/charge  done
  stock/reserve   done
  traces of its events: 1
order A-2: compensated, as 3 services see it
  orders/accept   done, undone
  payment/charge  failed
  stock/reserve   done, undone
  because of payment/charge: the card of Bob is declined
  traces of its events: 1
orders:  A-1 confirmed, A-2 cancelled
stock:   9 pieces free
payment: A-1 4200 cents
"""


@pytest.mark.timeout(300)
def test_one_order_goes_through_and_one_is_undone(soma_postgres: PostgresHandle, soma_kafka: KafkaHandle) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("SOMA_", "SOMASTACK_"))}
    theirs = {
        "PYTHONPATH": str(ROOT), "SOMA_TEST_BACKEND": "auto", "SOMA_TEST_POSTGRES_DSN": soma_postgres.dsn,
        "SOMA_TEST_KAFKA_BOOTSTRAP": soma_kafka.bootstrap,
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "examples.choreography"], cwd=ROOT, env=clean | theirs,
        capture_output=True, text=True, timeout=280, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, PRINTED), done.stderr
