"""The verb operators: the registered growth operators as a table, also included in docs/operators.md."""

from typing import TYPE_CHECKING

from megagrow.cli.output import show

if TYPE_CHECKING:
    from megagrow.growth.operators import Operator


def show_operators(as_json: bool) -> None:
    """Print every registered operator."""
    from megagrow.report.tables import Column, Table

    columns = (
        Column("name", "operator"),
        Column("axes", "axes"),
        Column("exactness", "the function"),
        Column("summary", "what it does", "prose", shown=False),
        Column("paper", "source", "prose"),
    )
    rows = tuple((name, " ".join(axes), exactness, summary, paper) for name, axes, exactness, summary, paper in _rows())
    defaults = "Defaults: hidden, ffn and head zero_pad, layer identity, moments asymmetric (docs/operators.md)."
    show(Table(title="growth operators", columns=columns, rows=rows, footnotes=(defaults,)), json=as_json)


def markdown() -> str:
    """The registry as a Markdown table."""
    lines = ["| operator | axes | the function | what it does | source |", "|---|---|---|---|---|"]
    for name, axes, exactness, summary, paper in _rows():
        lines.append(f"| `{name}` | {', '.join(axes)} | {exactness} | {summary} | {paper} |")
    return "\n".join(lines)


def _rows() -> list[tuple[str, list[str], str, str, str]]:
    """One row per operator, exactness and paper, with all axes that share them."""
    merged: dict[tuple[str, str, str], tuple[list[str], str]] = {}
    for operator in all_operators():
        key = (operator.name, operator.exactness.value, operator.paper.split(",")[0])
        axes, _ = merged.setdefault(key, ([], operator.summary))
        axes.append(operator.axis)
    papers = {(o.name, o.exactness.value, o.paper.split(",")[0]): o.paper for o in reversed(all_operators())}
    return [(key[0], axes, key[1], summary, papers[key]) for key, (axes, summary) in merged.items()]


def all_operators() -> "list[Operator]":
    """All operators, exact ones first."""
    from megagrow.growth.maps import Exactness
    from megagrow.growth.operators import operators

    axes, exactness = ("hidden", "ffn", "head", "layer", "vocab", "expert"), list(Exactness)
    return sorted(operators(), key=lambda o: (exactness.index(o.exactness), o.name, axes.index(o.axis)))
