"""Definitions of sagas as pictures: shapes with places, which a template writes as SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from soma_common.sagas.graph import Box, Series

_HIGH, _GAP, _SIDE = 34.0, 26.0, 24.0
_LETTER: Final = 7.4  # units of a letter's width, about
_LEAST: Final = 96.0
_MOST_LABEL: Final = 44
_PAD: Final = 14.0
_UNDO: Final = 18.0


@dataclass(frozen=True, slots=True)
class Shape:
    """A box, a diamond, a hexagon, a frame or a dot, around its middle."""

    kind: str
    x: float
    y: float
    width: float
    height: float
    label: str = ""
    undo: str = ""
    state: str = ""

    @property
    def points(self) -> str:
        """The corners of those that have some."""
        x, y, w, h = self.x, self.y, self.width / 2, self.height / 2
        if self.kind == "when":
            corners = [(x - w, y), (x, y - h), (x + w, y), (x, y + h)]
        else:
            corners = [
                (x - w, y),
                (x - w + 10, y - h),
                (x + w - 10, y - h),
                (x + w, y),
                (x + w - 10, y + h),
                (x - w + 10, y + h),
            ]
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)


@dataclass(frozen=True, slots=True)
class Line:
    """From one shape to another, with a word."""

    x1: float
    y1: float
    x2: float
    y2: float
    label: str = ""

    @property
    def path(self) -> str:
        """Down, across, down."""
        middle = (self.y1 + self.y2) / 2
        return f"M{self.x1:.1f} {self.y1:.1f}V{middle:.1f}H{self.x2:.1f}V{self.y2:.1f}"


@dataclass(slots=True)
class Picture:
    """A drawn definition."""

    shapes: list[Shape] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)
    width: float = 0
    height: float = 0


def picture(title: str, boxes: Series, states: Mapping[str, str] | None = None) -> Picture:
    """A definition drawn from top to bottom. ``states``: how steps stand, by name."""
    draw = _Draw(states or {})
    body = (Box("end", title), *boxes, Box("end", "completed"))
    width, height = _size(body)
    draw.series(body, width / 2 + _PAD, _PAD, [])
    return Picture(draw.shapes, draw.lines, width + 2 * _PAD, height + 2 * _PAD)


@dataclass(slots=True)
class _Draw:
    states: Mapping[str, str]
    shapes: list[Shape] = field(default_factory=list)
    lines: list[Line] = field(default_factory=list)

    def series(self, boxes: Sequence[Box], x: float, y: float, exits: list[Line]) -> list[Line]:
        """Boxes below each other, from this height on; the loose ends of the last one."""
        for box in boxes:
            exits = self.box(box, x, y, exits)
            y += _size((box,))[1] + _GAP
        return exits

    def box(self, box: Box, x: float, y: float, exits: list[Line]) -> list[Line]:
        width, height = _size((box,))
        if box.kind == "parallel":
            return self._parallel(box, x, y, width, height, exits)
        if box.kind == "group":
            self.shapes.insert(0, Shape("frame", x, y + height / 2, width, height, _cut(box.label)))
            return self.series(box.inner[0], x, y + _HIGH, exits)
        own = Shape(box.kind, x, y + _HIGH / 2, _own_width(box), _HIGH, _cut(box.label), _cut(box.undo or ""),
                    self.states.get(box.step, ""))  # fmt: skip
        self.shapes.append(own)
        self._join(exits, x, y)
        if box.kind != "when":
            return [Line(x, y + height, x, y + height)]
        return self._ways(box, x, y + _HIGH, width, height - _HIGH)

    def _ways(self, box: Box, x: float, y: float, width: float, height: float) -> list[Line]:
        ends, left = [], x - width / 2
        for way, word in zip(box.inner, ("yes", "no"), strict=True):
            wide = max(_size(way)[0], _LEAST)
            middle = left + wide / 2
            start = [Line(x, y, middle, y, word)]
            found = self.series(way, middle, y + _GAP, start) if way else start
            ends += [Line(e.x1, e.y1, middle, y + height, e.label) for e in found]
            left += wide + _SIDE
        return ends

    def _parallel(self, box: Box, x: float, y: float, width: float, height: float, exits: list[Line]) -> list[Line]:
        self.shapes.insert(0, Shape("frame", x, y + height / 2, width, height, "at once"))
        top, bottom = y + _HIGH, y + height - 16
        self.shapes += [Shape("gate", x, top, 14, 14), Shape("gate", x, bottom, 14, 14)]
        self._join(exits, x, top - 7)
        left = x - width / 2 + _PAD
        for branch in box.inner:
            wide = max(_size(branch)[0], _LEAST)
            ends = self.series(branch, left + wide / 2, top + 7 + _GAP, [Line(x, top + 7, x, top + 7)])
            self._join(ends, x, bottom - 7)
            left += wide + _SIDE
        return [Line(x, bottom + 7, x, bottom + 7)]

    def _join(self, exits: list[Line], x: float, y: float) -> None:
        self.lines += [Line(end.x1, end.y1, x, y, end.label) for end in exits]


def _own_width(box: Box) -> float:
    extra = 44 if box.kind in ("when", "pivot") else 28
    return max(_LEAST, len(_cut(box.label)) * _LETTER + extra)


def _size(boxes: Sequence[Box]) -> tuple[float, float]:
    """How wide and how high a series is."""
    sizes = [_box_size(box) for box in boxes]
    return max((w for w, _ in sizes), default=_LEAST), sum(h for _, h in sizes) + _GAP * max(0, len(sizes) - 1)


def _box_size(box: Box) -> tuple[float, float]:
    if box.kind == "group":
        width, height = _size(box.inner[0])
        return max(width, len(_cut(box.label)) * _LETTER) + 2 * _PAD, height + _HIGH + _PAD
    if box.kind == "parallel":
        sizes = [_size(branch) for branch in box.inner]
        wide = sum(max(w, _LEAST) for w, _ in sizes) + _SIDE * (len(sizes) - 1) + 2 * _PAD
        return wide, max(h for _, h in sizes) + _HIGH + 2 * _GAP + 30
    if box.kind == "when":
        sizes = [_size(way) for way in box.inner]
        wide = sum(max(w, _LEAST) for w, _ in sizes) + _SIDE
        return max(wide, _own_width(box)), _HIGH + max(h for _, h in sizes) + 2 * _GAP
    undo = len(_cut(box.undo or "")) * _LETTER * 0.86 + 12 if box.undo else 0
    return _own_width(box) + 2 * undo, _HIGH


def _cut(label: str) -> str:
    return label if len(label) <= _MOST_LABEL else f"{label[: _MOST_LABEL - 1]}…"
