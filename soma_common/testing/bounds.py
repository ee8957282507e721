"""The constraints of a field as numbers: pydantic's and annotated-types' words for them, in one place."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from decimal import Decimal
from typing import Any

import annotated_types
from pydantic.fields import FieldInfo


class Bounds:
    """What a field allows. A bound that is not set is None; ``above`` and ``below`` are exclusive."""

    def __init__(self, metadata: Iterable[Any]) -> None:
        self.least: Any = None
        self.most: Any = None
        self.above: Any = None
        self.below: Any = None
        self.multiple: Any = None
        self.min_size: int | None = None
        self.max_size: int | None = None
        self.pattern: str | None = None
        self.places: int | None = None
        for each in _flat(metadata):
            self._take(each)

    def _take(self, each: Any) -> None:
        match each:
            case annotated_types.Ge(ge=value):
                self.least = value
            case annotated_types.Gt(gt=value):
                self.above = value
            case annotated_types.Le(le=value):
                self.most = value
            case annotated_types.Lt(lt=value):
                self.below = value
            case annotated_types.MultipleOf(multiple_of=value):
                self.multiple = value
            case annotated_types.MinLen(min_length=value):
                self.min_size = value
            case annotated_types.MaxLen(max_length=value):
                self.max_size = value
            case _:  # pydantic's own, which has no public name
                pattern = getattr(each, "pattern", None)
                self.pattern = getattr(pattern, "pattern", pattern) or self.pattern
                places = getattr(each, "decimal_places", None)
                self.places = self.places if places is None else places

    def sizes(self, usual: int) -> tuple[int, int]:
        """The least and the most elements; ``usual`` where only the least, or nothing, is said."""
        least = self.min_size or 0
        most = least + usual if self.max_size is None else min(self.max_size, least + usual)
        return least, most

    def integers(self, lowest: int, highest: int) -> tuple[int, int]:
        """The least and the most integer, both inclusive, within those of a kind."""
        low = max(
            lowest,
            lowest if self.least is None else math.ceil(self.least),
            lowest if self.above is None else math.floor(self.above) + 1,
        )
        high = min(
            highest,
            highest if self.most is None else math.floor(self.most),
            highest if self.below is None else math.ceil(self.below) - 1,
        )
        return low, high

    def low(self) -> Any:
        """The lower bound, inclusive or not; None without."""
        return self.least if self.least is not None else self.above

    def high(self) -> Any:
        """The upper bound, inclusive or not; None without."""
        return self.most if self.most is not None else self.below

    def allows(self, value: Any) -> bool:
        """Whether a value is within the bounds that are exclusive, or of a step."""
        if self.above is not None and not value > self.above:
            return False
        if self.below is not None and not value < self.below:
            return False
        return self.multiple is None or not Decimal(str(value)) % Decimal(str(self.multiple))

    def allows_text(self, value: str) -> bool:
        """Whether a text is no longer and no shorter than it may be, matches, and can be kept."""
        if "\0" in value or any("\ud800" <= sign <= "\udfff" for sign in value):
            return False
        if not (self.min_size or 0) <= len(value) <= (math.inf if self.max_size is None else self.max_size):
            return False
        return self.pattern is None or re.search(self.pattern, value) is not None


def _flat(metadata: Iterable[Any]) -> Iterator[Any]:
    for each in metadata:
        if isinstance(each, FieldInfo):
            yield from _flat(each.metadata)
        elif isinstance(each, annotated_types.GroupedMetadata):
            yield from _flat(each)
        else:
            yield each
