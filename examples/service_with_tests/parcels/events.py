"""What happens to parcels."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from soma_common import Payload, PayloadModels
from soma_common.events.upcasting import Upcasters


class ParcelAcceptedV1(Payload, event_type="parcel.accepted", version=1):
    """As it was until grams were wanted."""

    parcel: str
    kilograms: float


class ParcelAccepted(Payload, event_type="parcel.accepted", version=2):
    """Somebody handed a parcel in."""

    parcel: str
    grams: Annotated[int, Field(gt=0, le=31_500)]
    express: bool = False


class ParcelBilled(Payload, event_type="parcel.billed"):
    """Its price was written."""

    parcel: str
    cents: int


def _in_grams(payload: dict[str, Any]) -> dict[str, Any]:
    return {"parcel": payload["parcel"], "grams": max(1, round(payload["kilograms"] * 1000))}


MODELS = PayloadModels(ParcelAcceptedV1, ParcelAccepted, ParcelBilled)
UPCASTERS = Upcasters({("parcel.accepted", 1): _in_grams}, models=MODELS)
