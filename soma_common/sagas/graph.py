"""Definitions of sagas as boxes that can be drawn, and drawn as Mermaid flowcharts: text in, text out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final

from soma_common.errors import ValidationError
from soma_common.sagas.models import Saga
from soma_common.sagas.parameters import Call
from soma_common.sagas.steps import Ask, ForEach, Parallel, Part, SagaStep, Signal, SubSaga, Timer, When

_INDENT: Final = "    "
# Opening and closing of a node, by what it stands for.
_SHAPES: Final = {
    "end": ("([", "])"), "step": ("[", "]"), "pivot": ("{{", "}}"), "when": ("{", "}"), "wait": ("(", ")"),
    "gate": ("((", "))"),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Box:
    """A part as it is drawn.

    ``inner``: the series inside of it. ``undo``: the name of its compensation. ``step``: the last part of its path in
    a journal, where it has one.
    """

    kind: str
    label: str = ""
    undo: str | None = None
    inner: tuple[tuple[Box, ...], ...] = ()
    step: str = ""


Series = tuple[Box, ...]
_Exit = tuple[str, str]  # a node, and what stands on the edge that leaves it


def mermaid(saga: Saga) -> str:
    """A definition as a Mermaid flowchart.

    Steps are boxes (``tx``: their effect and its record are one commit), pivots hexagons, conditions diamonds, timers
    and signals rounded. Dashed edges are compensations, in the order in which they run; behind a pivot there are none.
    """
    return _drawn(f"{saga.name} v{saga.version}", boxes_of(saga), "")


def boxes_of(saga: Saga) -> Series:
    """A definition as boxes, for whoever draws them."""
    return _boxes(saga, saga.parts)


def mermaid_of_shape(name: str, version: int, shape: Sequence[Any]) -> str:
    """The same of what the database knows of a definition (see :func:`shape`): kinds and names, no compensations.

    Raises:
        ValidationError: it is no shape.
    """
    boxes = boxes_of_shape(name, shape)
    return _drawn(f"{name} v{version}", boxes, "%% As workers registered it: without compensations.\n")


def boxes_of_shape(name: str, shape: Sequence[Any]) -> Series:
    """What the database knows of a definition as boxes.

    Raises:
        ValidationError: it is no shape.
    """
    try:
        return _shaped(shape)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValidationError(
            f"The database says of saga {name!s:.100} what cannot be drawn.", cure="pass --app MODULE:NAME."
        ) from error


def _drawn(title: str, boxes: Series, comment: str) -> str:
    drawing = _Drawing()
    begin = drawing.node("end", title)
    exits = drawing.series(boxes, [(begin, "")])
    drawing.join(exits, drawing.node("end", "completed"))
    drawing.backward(boxes, [begin])
    lines = "\n".join([f"{_INDENT}{line}" for line in (*drawing.nodes, *drawing.edges)])
    return f"flowchart TD\n{comment and _INDENT + comment}{lines}\n"


@dataclass(slots=True)
class _Drawing:
    """Lines of a flowchart: nodes first, inside of their subgraphs, then the edges between them."""

    nodes: list[str] = field(default_factory=list)
    edges: list[str] = field(default_factory=list)
    _depth: int = 0
    _numbers: Iterator[int] = field(default_factory=lambda: count(1))
    _places: dict[int, str] = field(default_factory=dict)  # of steps with a compensation

    def node(self, kind: str, label: str) -> str:
        """A new node; its name."""
        name, (opening, closing) = f"n{next(self._numbers)}", _SHAPES[kind]
        self._line(f'{name}{opening}"{_escaped(label)}"{closing}')
        return name

    def join(self, exits: Sequence[_Exit], to: str) -> None:
        """Edges from what came before."""
        for node, label in exits:
            self.edges.append(f'{node} -->|"{_escaped(label)}"| {to}' if label else f"{node} --> {to}")

    def series(self, boxes: Series, exits: list[_Exit]) -> list[_Exit]:
        """Parts that follow each other; what leads out of the last one."""
        for box in boxes:
            exits = self._box(box, exits)
        return exits

    def _box(self, box: Box, exits: list[_Exit]) -> list[_Exit]:
        if box.kind == "parallel":
            return self._parallel(box, exits)
        if box.kind == "group":
            self._open(box.label)
            inside = self.series(box.inner[0], exits)
            self._close()
            return inside
        node = self.node(box.kind, box.label)
        self.join(exits, node)
        self._places[id(box)] = node
        if box.kind != "when":
            return [(node, "")]
        then, otherwise = box.inner
        return self.series(then, [(node, "yes")]) + self.series(otherwise, [(node, "no")])

    def _parallel(self, box: Box, exits: list[_Exit]) -> list[_Exit]:
        self._open("at once")
        fork = self.node("gate", "+")
        self.join(exits, fork)
        ends = [end for branch in box.inner for end in self.series(branch, [(fork, "")])]
        meet = self.node("gate", "+")
        self.join(ends, meet)
        self._close()
        return [(meet, "")]

    def backward(self, boxes: Series, before: list[str] | None) -> list[str] | None:
        """Edges of compensations. ``before``: what is undone next after the first of these; None: no way back.

        The same for what follows these parts.
        """
        for box in boxes:
            if before is not None:
                before = self._back(box, before)
        return before

    def _back(self, box: Box, before: list[str]) -> list[str] | None:
        if box.kind == "when":
            ways = [self.backward(way, before) for way in box.inner]
            open_ways = [way for way in ways if way is not None]
            return list(dict.fromkeys(node for way in open_ways for node in way)) if open_ways else None
        if box.kind in ("parallel", "group"):  # the last branch is undone first
            found: list[str] | None = before
            for series in box.inner:
                found = None if found is None else self.backward(series, found)
            return found
        if box.undo is not None:
            node = self._places[id(box)]
            self.edges += [f'{node} -. "{_escaped(box.undo)}" .-> {to}' for to in before]
            before = [node]
        return None if box.kind == "pivot" else before

    def _open(self, label: str) -> None:
        self._line(f'subgraph g{next(self._numbers)}["{_escaped(label)}"]')
        self._depth += 1

    def _close(self) -> None:
        self._depth -= 1
        self._line("end")

    def _line(self, text: str) -> None:
        self.nodes.append(_INDENT * self._depth + text)


def _boxes(saga: Saga, parts: Sequence[Part]) -> Series:
    return tuple(_box(saga, part) for part in parts)


def _box(saga: Saga, part: Part) -> Box:
    match part:
        case Parallel():
            return Box("parallel", inner=tuple(_boxes(saga, branch) for branch in part.branches))
        case When():
            return _when(part.name, _boxes(saga, part.then), _boxes(saga, part.otherwise))
        case ForEach():
            return _loop(part.name, part.at_once, _boxes(saga, part.body))
        case SubSaga():
            return _sub_saga(part.name, part.saga.name, part.saga.version, _boxes(part.saga, part.saga.parts))
        case SagaStep():
            return _step(part, saga.calls[part.name])
        case Timer():
            wait = "" if callable(part.wait) else f", {part.wait:g} s"
            return Box("wait", f"timer {part.name}{wait}", step=part.name)
        case Signal():
            most = "" if part.timeout_seconds is None else f", at most {part.timeout_seconds:g} s"
            return Box("wait", f"signal {part.name}{most}", step=part.name)
        case Ask():
            return Box("wait", f"ask {part.name}", _undo(part), step=part.name)


def _step(part: SagaStep, call: Call) -> Box:
    marks = [mark for mark, there in (("tx", call.transactional), ("pivot", part.pivot)) if there]
    label = f"{part.name} ({', '.join(marks)})" if marks else part.name
    return Box("pivot" if part.pivot else "step", label, _undo(part), step=part.name)


def _undo(part: SagaStep | Ask) -> str | None:
    return None if part.compensation is None else f"undo: {getattr(part.compensation, '__name__', 'yes')}"


def _when(name: str, then: Series, otherwise: Series) -> Box:
    return Box("when", f"{name}?", inner=(then, otherwise), step=name)


def _loop(name: str, at_once: int, body: Series) -> Box:
    return Box("group", f"for each {name}" + (f", {at_once} at once" if at_once > 1 else ""), inner=(body,))


def _sub_saga(name: str, saga: str, version: int, parts: Series) -> Box:
    own = "" if name == saga else f"{name}: "
    return Box("group", f"{own}saga {saga} v{version}", inner=(parts,))


def _shaped(shape: Sequence[Any]) -> Series:
    return tuple(_of_shape(*part) for part in shape)


def _of_shape(kind: str, *more: Any) -> Box:
    match kind, more:
        case "parallel", branches:
            return Box("parallel", inner=tuple(map(_shaped, branches)))
        case "when", (str(name), then, otherwise):
            return _when(name, _shaped(then), _shaped(otherwise))
        case "for-each", (str(name), body):
            return _loop(name, 1, _shaped(body))
        case "saga", (str(name), saga, version, parts):
            return _sub_saga(name, saga, version, _shaped(parts))
        case "pivot", (str(name),):
            return Box("pivot", f"{name} (pivot)", step=name)
        case "step", (str(name),):
            return Box("step", name, step=name)
        case "timer" | "signal" | "ask", (str(name),):
            return Box("wait", f"{kind} {name}", step=name)
        case _:
            raise ValueError(kind)


def _escaped(text: str) -> str:
    """Text as it may stand in a label between quotes: what could be markup is named by its number."""
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)
    return "".join(c if c.isalnum() or c in " -_.,:?+()/" else f"#{ord(c)};" for c in shown)
