"""The contract test of a service: each rule broken once, and told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from soma_common import Payload, PayloadModels, Soma, SomaConfig
from soma_common.errors import ConfigurationError
from soma_common.events.upcasting import Upcasters
from soma_common.schemas.avro import event_schemas
from soma_common.schemas.files import write
from soma_common.testing import assert_compatible


class Placed(Payload, event_type="order.placed"):
    cents: int


class PlacedMore(Payload, event_type="order.placed"):
    cents: int
    currency: str = "EUR"


class PlacedLess(Payload, event_type="order.placed"):
    cents: int
    currency: str


class Placed2(Payload, event_type="order.placed", version=2):
    amount: int


def _soma(*models: type[Payload], steps: dict[Any, Any] | None = None) -> Soma:
    return Soma(SomaConfig(), models=PayloadModels(*models), upcasters=Upcasters(steps or {}))


def _handling(soma: Soma, model: type[Payload]) -> Soma:
    @soma.handler(model, consumer="billing")
    async def bill(event: Any, ctx: Any) -> None: ...

    return soma


def _to_v2(payload: dict[str, Any]) -> dict[str, Any]:
    return {"amount": payload["cents"]}


def _written(folder: Path, *models: type[Payload]) -> Path:
    write(folder, event_schemas(models))
    return folder


def test_a_service_in_order(tmp_path: Path) -> None:
    assert_compatible(_handling(_soma(Placed), Placed), schemas=_written(tmp_path, Placed))


def test_a_file_that_is_missing_and_one_too_many(tmp_path: Path) -> None:
    folder = _written(tmp_path, Placed2)
    with pytest.raises(AssertionError) as caught:
        assert_compatible(_soma(Placed), schemas=folder)
    assert str(caught.value).splitlines() == [
        "2 things do not match:",
        "  order.placed.v1.avsc is missing; `somastack schemas write` writes it",
        "  order.placed.v2.avsc belongs to no model; remove it",
    ]


def test_a_model_that_grew_by_a_default_is_written_again(tmp_path: Path) -> None:
    folder = _written(tmp_path, Placed)
    with pytest.raises(AssertionError, match="order.placed.v1.avsc differs from its model; `somastack schemas write`"):
        assert_compatible(_soma(PlacedMore), schemas=folder)
    assert_compatible(_soma(PlacedMore), schemas=_written(tmp_path, PlacedMore))


def test_a_model_that_cannot_read_what_was_written_is_a_new_version(tmp_path: Path) -> None:
    folder = _written(tmp_path, Placed)
    with pytest.raises(AssertionError, match=r"payload.currency: new, and without a default; make it a new version"):
        assert_compatible(_soma(PlacedLess), schemas=folder)


def test_an_old_version_needs_upcasters_whether_its_model_is_there_or_not(tmp_path: Path) -> None:
    folder = _written(tmp_path, Placed, Placed2)
    for models in ((Placed, Placed2), (Placed2,)):
        with pytest.raises(AssertionError, match="order.placed v1 is upcast to v1, and its newest model is v2"):
            assert_compatible(_soma(*models), schemas=folder)
        assert_compatible(_soma(*models, steps={("order.placed", 1): _to_v2}), schemas=folder)


def test_a_handler_takes_the_newest_model_that_the_application_knows(tmp_path: Path) -> None:
    steps = {("order.placed", 1): _to_v2}
    folder = _written(tmp_path, Placed, Placed2)
    with pytest.raises(AssertionError, match=r"billing: .*bill takes order.placed v1, and the newest is v2"):
        assert_compatible(_handling(_soma(Placed, Placed2, steps=steps), Placed), schemas=folder)
    with pytest.raises(AssertionError, match=r"billing: .*bill takes PlacedMore, which the application does not know"):
        assert_compatible(_handling(_soma(Placed, Placed2, steps=steps), PlacedMore), schemas=folder)


def test_what_another_service_writes_must_be_readable(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    soma = _handling(_soma(PlacedLess), PlacedLess)
    _written(mine, PlacedLess)
    with pytest.raises(AssertionError, match=r"theirs/order.placed.v1.avsc: payload.currency: new, and without"):
        assert_compatible(soma, schemas=mine, consumes=[_written(theirs, Placed)])
    assert_compatible(soma, schemas=mine, consumes=[_written(tmp_path / "same", PlacedLess)])
    with pytest.raises(AssertionError, match=r"v2.avsc: it writes order.placed v2, and the newest model here is v1"):
        assert_compatible(soma, schemas=mine, consumes=[_written(tmp_path / "ahead", PlacedLess, Placed2)])


def test_folders_and_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="There is no folder"):
        assert_compatible(_soma(Placed), schemas=tmp_path / "nowhere")
    folder = _written(tmp_path / "bad", Placed)
    for garbage in (
        b"\xff{",
        b"",
        b'{"type": "record"}',
        b"[[[",
        b'{"type": "record", "name": "x", "fields": 7}',
        b"[" * 9999,
    ):
        (folder / "order.placed.v1.avsc").write_bytes(garbage)
        with pytest.raises(ConfigurationError, match=r"order.placed.v1.avsc is no schema"):
            assert_compatible(_soma(Placed), schemas=folder)
