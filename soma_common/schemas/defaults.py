"""Default values: from their JSON form to the form that Avro schemas write them in."""

from __future__ import annotations

from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from soma_common.schemas.forms import full_name, json_type, kind_of, literal_field, logical_of, to_datum

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def default_first(kind: Any, value: Any) -> Any:
    """The union with the default's branch in front, where Avro wants it; other types as they are.

    Raises:
        ValueError: no branch takes this default.
    """
    if not isinstance(kind, list):
        return kind
    branch = _branch_of(kind, value)
    return [branch, *(other for other in kind if other is not branch)]


def avro_default(kind: Any, value: Any) -> Any:
    """A default's JSON form as Avro schemas write it: times as numbers, bytes as one character each.

    Raises:
        ValueError: the type cannot hold this value exactly.
    """
    name = kind_of(kind)
    if name == "union":
        branch = _branch_of(kind, value)
        if branch is not kind[0]:
            raise ValueError(f"{value!r:.60} is not of the union's first type")
        return avro_default(branch, value)
    if name == "record":
        return {field["name"]: _field_default(field, value) for field in kind["fields"]}
    if name == "array":
        return [avro_default(kind["items"], each) for each in value]
    if name == "map":
        return {key: avro_default(kind["values"], each) for key, each in value.items()}
    return _scalar(kind, value)


def _field_default(field: dict[str, Any], value: Any) -> Any:
    if not isinstance(value, dict) or field["name"] not in value:
        raise ValueError(f"{value!r:.60} lacks {field['name']}")
    return avro_default(field["type"], value[field["name"]])


def _scalar(kind: Any, value: Any) -> Any:
    try:
        convert = to_datum(kind, {})
        datum = value if convert is None else convert(value)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{value!r:.60} cannot be held exactly") from error
    if isinstance(datum, bytes):
        return datum.decode("latin-1")
    if not isinstance(datum, date | time):
        return datum
    return _number(datum, logical_of(kind))


def _number(moment: date | time, logical: str | None) -> int:
    if isinstance(moment, datetime):
        aware = moment if logical == "timestamp-micros" else moment.replace(tzinfo=UTC)
        return (aware - _EPOCH) // _MICROSECOND
    if isinstance(moment, date):
        return moment.toordinal() - _EPOCH.toordinal()
    clock = timedelta(hours=moment.hour, minutes=moment.minute, seconds=moment.second, microseconds=moment.microsecond)
    return clock // _MICROSECOND


def _branch_of(branches: list[Any], value: Any) -> Any:
    fitting = [branch for branch in branches if json_type(branch) in {type(value), object}]
    records = [branch for branch in fitting if kind_of(branch) == "record"]
    if len(records) > 1:
        field, tags = literal_field(records) or ("", {})
        fitting = [record for record in records if tags.get(value.get(field)) == full_name(record)]
    if not fitting:
        raise ValueError(f"{value!r:.60} fits no type of the union")
    return fitting[0]
