"""Draw docs/figures/rooms.svg, the picture of the rooms and their imports, from the code.

    python -m tools.docs.rooms_picture

A room stands above all that it imports. Arrows that follow from others are left out: where a room imports two others
of which one imports the other, only the arrow to the upper one is drawn. What any room may use (single files, and
`records`) is a bar at the bottom, and `cli`, which imports every room, is a bar at the top. `tests/house` compares the
picture with the code.
"""

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from tools.docs.package_imports import ROOT, import_graph, modules, reachable, room_of

PICTURE = ROOT / "docs" / "figures" / "rooms.svg"
TOP, GROUND = "cli", "records"
WIDTH, MARGIN, GAP = 980, 20, 16
TITLE, ROW, LEVEL_GAP = 26, 16, 46
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2933; }
  .title { font-weight: 600; }
  .part { font-size: 11.5px; fill: #52606d; }
  .room { fill: #f5f7fa; stroke: #7b8794; }
  .ground { fill: #e4e7eb; stroke: #9aa5b1; }
  .arrow { fill: none; stroke: #627d98; stroke-width: 1.3; marker-end: url(#head); }
  #head path { fill: #627d98; }
  @media (prefers-color-scheme: dark) {
    text { fill: #f0f4f8; } .part { fill: #bcccdc; } .room { fill: #243b53; stroke: #829ab1; }
    .ground { fill: #102a43; stroke: #627d98; } .arrow { stroke: #9fb3c8; } #head path { fill: #9fb3c8; }
  }
"""


@dataclass
class Box:
    """A room as it is drawn: its sub-rooms are lines of text in it."""

    name: str
    parts: tuple[str, ...]
    level: int
    x: float = 0.0
    y: float = 0.0

    @property
    def width(self) -> float:
        """Wide enough for the longest line."""
        return max(7.6 * len(self.name), *(6.4 * len(part) for part in self.parts), 0) + 24

    @property
    def height(self) -> float:
        """High enough for all lines."""
        return TITLE + 6 + ROW * len(self.parts)


def room_graph() -> dict[str, set[str]]:
    """Room -> the rooms that it imports; the single files of the package are the room ''."""
    folders = {room_of(name) for name in modules() if name.startswith("megagrow.") and name.count(".") > 1}
    graph: dict[str, set[str]] = {room: set() for room in folders}
    for module, others in import_graph().items():
        room = room_of(module)
        if room in folders:
            graph[room] |= {room_of(other) for other in others if room_of(other) in folders} - {room}
    return graph


def reduced(graph: Mapping[str, set[str]]) -> dict[str, set[str]]:
    """A graph without the arrows that follow from others."""
    return {
        room: {other for other in others if not any(other in reachable(graph, third) for third in others - {other})}
        for room, others in graph.items()
    }


def sub_rooms(room: str) -> tuple[str, ...]:
    """The folders in a room, each after all that it imports."""
    prefix = f"megagrow.{room}."
    names = {name.removeprefix(prefix).split(".")[0] for name in modules() if name.startswith(prefix)}
    folders = sorted(name for name in names if (ROOT / "megagrow" / room / name).is_dir())
    graph = {
        name: {
            other.removeprefix(prefix).split(".")[0]
            for module, others in import_graph().items()
            if module.startswith(f"{prefix}{name}.") or module == f"{prefix}{name}"
            for other in others
            if other.startswith(prefix)
        }
        for name in folders
    }
    return tuple(sorted(folders, key=lambda name: (len(set(reachable(graph, name)) - {name}), name)))


def boxes(graph: Mapping[str, set[str]]) -> dict[str, Box]:
    """The rooms between the top and the ground, each placed one level above the highest that it imports."""
    levels: dict[str, int] = {}

    def level(room: str) -> int:
        if room not in levels:
            levels[room] = 1 + max((level(other) for other in graph[room]), default=-1)
        return levels[room]

    placed = {room: Box(room, sub_rooms(room), level(room)) for room in sorted(graph) if room not in (TOP, GROUND)}
    rows = [[box for box in placed.values() if box.level == number] for number in range(max(levels.values()) + 1)]
    y = float(MARGIN + TITLE + 10 + LEVEL_GAP)
    for row in reversed(rows):
        for box in row:
            box.y = y
        y += max((box.height for box in row), default=0) + LEVEL_GAP
    arrows = [(placed[room], placed[other]) for room, others in visible_arrows(graph).items() for other in others]
    orders = itertools.product(*(itertools.permutations(row) for row in rows))

    def tangle(order: Iterable[Sequence[Box]]) -> float:
        _lay_out(order)
        return _tangle(arrows, list(placed.values()))

    _lay_out(min(orders, key=tangle))
    return placed


def visible_arrows(graph: Mapping[str, set[str]]) -> dict[str, list[str]]:
    """The arrows that are drawn, by room."""
    rooms = [room for room in graph if room not in (TOP, GROUND)]
    return {room: sorted(others) for room, others in sorted(reduced({r: graph[r] - {GROUND} for r in rooms}).items())}


def _lay_out(rows: Iterable[Sequence[Box]]) -> None:
    """Spread the rooms of each row evenly, in their order."""
    for row in rows:
        space = (WIDTH - 2 * MARGIN - sum(box.width for box in row)) / (len(row) + 1)
        x = MARGIN + space
        for box in row:
            box.x = x
            x += box.width + space


def _tangle(arrows: Sequence[tuple[Box, Box]], all_boxes: Sequence[Box]) -> float:
    """How hard a layout is to read: the arrows' sideways lengths, and a penalty for each that runs behind a room."""
    total = 0.0
    for upper, lower in arrows:
        (x1, y1), (x2, y2) = _ends(upper, lower)
        total += abs(x2 - x1)
        for box in all_boxes:
            if lower.level < box.level < upper.level:
                inside = [box.x - 4 < x < box.x + box.width + 4 for x in _crossings(x1, y1, x2, y2, box)]
                total += 600 * any(inside)
    return total


def _crossings(x1: float, y1: float, x2: float, y2: float, box: Box) -> list[float]:
    """Where an arrow is, sideways, at the heights of a room."""
    heights = (box.y, box.y + box.height / 2, box.y + box.height)
    shares = [min(max((y - y1) / (y2 - y1), 0.0), 1.0) for y in heights]
    return [x1 + (x2 - x1) * share * share * (3 - 2 * share) for share in shares]


def _ends(upper: Box, lower: Box) -> tuple[tuple[float, float], tuple[float, float]]:
    """An arrow's ends: on the lower edge of a room, and on the upper edge of one that it imports."""
    share = (lower.x + lower.width / 2 - upper.x - upper.width / 2) / WIDTH
    begin = (upper.x + upper.width * (0.5 + 0.4 * share), upper.y + upper.height)
    return begin, (lower.x + lower.width * (0.5 - 0.4 * share), lower.y)


def draw() -> str:
    """The picture as SVG."""
    graph = room_graph()
    placed = boxes(graph)
    files = sorted(path.stem for path in (ROOT / "megagrow").glob("*.py") if not path.stem.startswith("__"))
    ground = max(box.y + box.height for box in placed.values()) + LEVEL_GAP / 2
    height = ground + TITLE + ROW + MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" role="img" '
        'aria-label="The rooms of megagrow and their imports">',
        f"<style>{STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        '<path d="M0,1 L8,4 L0,7 z"/></marker></defs>',
        *_bar(MARGIN, "room", TOP, "one module a verb; imports every room, each when its verb is asked for"),
    ]
    for room, others in visible_arrows(graph).items():
        lines += [_arrow(placed[room], placed[other]) for other in others]
    for box in placed.values():
        lines += _room(box)
    lines += [*_bar(ground, "ground", "what any room may use", ", ".join([GROUND + "/", *files])), "</svg>"]
    return "\n".join(lines) + "\n"


def _bar(y: float, kind: str, title: str, text: str) -> list[str]:
    return [
        f'<rect class="{kind}" x="{MARGIN}" y="{y:.0f}" width="{WIDTH - 2 * MARGIN}" height="{TITLE + 10}" rx="6"/>',
        f'<text x="{MARGIN + 12}" y="{y + 23:.0f}"><tspan class="title">{escape(title)}</tspan>'
        f'<tspan class="part" dx="12">{escape(text)}</tspan></text>',
    ]


def _room(box: Box) -> list[str]:
    lines = [
        f'<rect class="room" x="{box.x:.1f}" y="{box.y:.1f}" '
        f'width="{box.width:.1f}" height="{box.height:.1f}" rx="6"/>',
        f'<text class="title" x="{box.x + 12:.1f}" y="{box.y + 20:.1f}">{escape(box.name)}</text>',
    ]
    for number, part in enumerate(reversed(box.parts)):  # what imports the others is on top here, too
        y = box.y + TITLE + 10 + ROW * number
        lines.append(f'<text class="part" x="{box.x + 12:.1f}" y="{y:.1f}">{escape(part)}</text>')
    return lines


def _arrow(upper: Box, lower: Box) -> str:
    (x1, y1), (x2, y2) = _ends(upper, lower)
    middle = (y1 + y2) / 2
    curve = f"M{x1:.1f},{y1:.1f} C{x1:.1f},{middle:.1f} {x2:.1f},{middle:.1f} {x2:.1f},{y2:.1f}"
    return f'<path class="arrow" d="{curve}"/>'


def main() -> None:
    """Write the picture."""
    PICTURE.write_text(draw(), encoding="utf-8")
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
