"""The examples of sagas run as their readers run them, and print what they say."""

from __future__ import annotations

from pathlib import Path

from tests.example_runs import printed_by


def test_the_order_saga_keeps_its_books(tmp_path: Path) -> None:
    assert printed_by("order_saga.py", tmp_path) == [
        "o-1: Ada, your lamp is on its way: parcel-1",
        "o-2: compensated because of charge: soma_common.errors.StepRefused Bob has 5.00.",
        "o-3: stuck because of ship: soma_common.errors.OutcomeUnknown the carrier fell silent.",
        "Ada 416.00, Bob 5.00, bank -505.00, shop 84.00; together 0",
        "somebody calls the carrier: it has the parcel",
        "o-3: Ada, your lamp is on its way: parcel-2",
        "  done reserve ",
        "  done charge ",
        "  begun ship ",
        "  unknown ship ",
        "  stuck  ",
        "  done ship by anna: by telephone",
        "  done tell ",
        "  ended  ",
        "Ada 416.00, Bob 5.00, bank -505.00, shop 84.00; together 0",
        "lamps left: 8",
    ]


def test_a_django_project_starts_sagas_inside_atomic(tmp_path: Path) -> None:
    assert printed_by("-m examples.django_shop", tmp_path) == [
        "rolled back: the browser went away",
        "sagas begun: 3",
        "order-1 paid",
        "order-2 compensated because of reserve: soma_common.errors.StepRefused sold out.",
        "order-3 compensated because of collect: soma_common.errors.StepRefused the card was declined.",
        "1 lamp delivered",
        "2 lamp placed",
        "3 desk cancelled",
        "{'desk': 5, 'lamp': 0}",
    ]
