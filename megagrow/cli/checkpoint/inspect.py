"""The verbs inspect and diff: describe a checkpoint of any format, and compare two."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.tree import Tree

from megagrow.cli.output import console, progress_bar, say, show
from megagrow.log import printable

if TYPE_CHECKING:
    from megagrow.checkpoint.index import OpenCheckpoint
    from megagrow.checkpoint.proof.diff import Difference
    from megagrow.report.tables import Table

_SHAPE_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "vocab_size",
)


def inspect_checkpoint(path: Path, tensors: bool, as_json: bool, ignored_arguments: tuple[str, ...] = ()) -> None:
    """Print a description of a checkpoint."""
    from megagrow.checkpoint.directory import MANIFEST, read_manifest
    from megagrow.checkpoint.formats import open_checkpoint, resolve_directory
    from megagrow.checkpoint.tensors import NEW_PARAMETERS, read_growth_record
    from megagrow.convert.run import read_conversion_record

    path = resolve_directory(path)
    opened = open_checkpoint(path, ignored_arguments=ignored_arguments)
    manifest = read_manifest(path).model_dump(mode="json") if (path / MANIFEST).is_file() else _foreign_manifest(opened)
    is_ours = (path / MANIFEST).is_file() or (path / NEW_PARAMETERS).is_file()
    growth = read_growth_record(path) if is_ours else None
    made = read_conversion_record(path)
    listed = _listed(opened)
    content = {
        **manifest,
        "format": opened.format,
        "what_is_new": growth,
        "conversion": made.model_dump(mode="json") if made else None,
        "notes": list(opened.notes),
        "tensors": listed if tensors else len(listed),
        "values": sum(info.bytes // info.dtype.itemsize for info in opened.source.tensors.values()),
        "bytes": sum(info.bytes for info in opened.source.tensors.values()),
        "chunks": sum(len(info.chunks) for info in opened.source.tensors.values()),
    }
    if as_json:
        print(json.dumps(content, indent=1, default=str))
        return
    show(_summary(path, content))
    if tensors:
        console().print(_tree(listed))


def diff_checkpoints(
    one: Path, other: Path, every: bool, as_json: bool, ignored_arguments: tuple[str, ...] = ()
) -> int:
    """Print the differences of two checkpoints; return 0 if all tensors are equal, else 1."""
    from megagrow.checkpoint.formats import open_checkpoint, resolve_directory
    from megagrow.checkpoint.proof.diff import compare_checkpoints

    first, second = (
        open_checkpoint(resolve_directory(path), ignored_arguments=ignored_arguments).source for path in (one, other)
    )
    with progress_bar("diff") as progress:
        found = list(compare_checkpoints(first, second, progress))
    unequal = [row for row in found if row.verdict != "equal"]
    if as_json:
        print(json.dumps([asdict(row) for row in found], indent=1))
    else:
        for row in found if every else unequal:
            say(f"{row.verdict:<18}  {row.key}{_details(row)}")
        print(f"{len(found) - len(unequal)} of {len(found)} tensors equal")
    return 1 if unequal else 0


def _details(row: "Difference") -> str:
    parts = [row.types] if row.types else []
    if row.verdict == "differs":
        at = ", ".join(map(str, row.where))
        parts += [
            f"max difference {row.largest:.6g} at [{at}]",
            f"relative {row.relative:.3g}",
            f"{row.differing:,} of {row.values:,} values",
        ]
    return ": " + ", ".join(parts) if parts else ""


def _foreign_manifest(opened: "OpenCheckpoint") -> dict[str, Any]:
    """The manifest's fields as far as they are known for a checkpoint that megagrow did not write."""
    iteration = opened.common.get("iteration")
    return {
        "iteration": int(iteration) if iteration is not None else None,
        "shape": opened.shape.model_dump(mode="json") if opened.shape else None,
        "layout": opened.layout.model_dump(mode="json") if opened.layout else None,
        "optimizer": any("optimizer." in key for key in opened.source.tensors),
        "lineage": [],
    }


def _listed(opened: "OpenCheckpoint") -> list[dict[str, Any]]:
    return [
        {"key": key, "shape": list(info.shape), "dtype": str(info.dtype), "bytes": info.bytes}
        for key, info in sorted(opened.source.tensors.items())
    ]


def _summary(path: Path, content: dict[str, Any]) -> "Table":
    """A description of a checkpoint, one fact per row."""
    from megagrow.report.tables import facts_table, human

    rows = {"format": content["format"]}
    if "stage" in content:
        rows["stage"] = f"{content['stage']} of family {content['family']}, iteration {content['iteration']}"
    elif content["iteration"] is not None:
        rows["iteration"] = str(content["iteration"])
    shape, layout = content["shape"], content["layout"]
    if shape:
        rows["shape"] = _pairs({name: shape[name] for name in _SHAPE_FIELDS if shape[name] is not None})
    else:
        rows["shape"] = "not in the checkpoint"
    if layout:
        sizes = {key: value for key, value in layout.items() if value not in (None, 1, False)}
        rows["layout"] = _pairs(sizes) or "one process"
    rows["moments"] = "with Adam's state" if content["optimizer"] else "none: weights only"
    if "precision" in content:
        rows["precision"] = content["precision"]
        rows["position"] = (
            f"{content['consumed_tokens']:,} tokens, {content['consumed_samples']:,} samples of the family"
        )
    count = content["tensors"] if isinstance(content["tensors"], int) else len(content["tensors"])
    size = human(content["bytes"], "bytes")
    rows["tensors"] = f"{count} in {content['chunks']} chunks, {content['values']:,} values, {size}"
    rows |= _ancestry(content)
    for number, note in enumerate(content["notes"], start=1):
        rows[f"note {number}"] = note
    return facts_table(str(path), rows)


def _ancestry(content: dict[str, Any]) -> dict[str, str]:
    """The ancestors of a checkpoint, how it was converted if it was, and what is new in it."""
    from megagrow.report.tables import exactness_text

    rows = {}
    for ancestor in content["lineage"]:
        rows[f"grown from {ancestor['stage']}"] = (
            f"iteration {ancestor['iteration']} by {_pairs(ancestor['operators'])}; moments {ancestor['moments']}; "
            f"{exactness_text(ancestor['exact'], ancestor['storage'])}"
        )
    if (made := content["conversion"]) and not made["operators"]:
        rows["resharded"] = exactness_text(made["exact"], made["storage"])
    if growth := content["what_is_new"]:
        grown = {"layers": growth["layers"], **growth["axes"]}
        axes = [f"{name} {axis['from']}->{axis['to']}" for name, axis in grown.items() if axis["from"] != axis["to"]]
        layers = ", ".join(str(index) for index, new in enumerate(growth["layers"]["new"]) if new)
        rows["new"] = ", ".join(axes) + (f"; new layers: {layers}" if layers else "")
    return rows


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _tree(listed: list[dict[str, Any]]) -> Tree:
    """A tree of the tensors, by the parts of their names."""
    root = Tree("tensors", guide_style="dim")
    branches: dict[tuple[str, ...], Tree] = {(): root}
    for row in listed:
        *parents, leaf = row["key"].split(".")
        for depth in range(1, len(parents) + 1):
            path = tuple(parents[:depth])
            if path not in branches:
                branches[path] = branches[path[:-1]].add(escape(printable(path[-1])))
        shape = " x ".join(map(str, row["shape"]))
        branches[tuple(parents)].add(f"{escape(printable(leaf))}  [{shape}] {row['dtype']}, {row['bytes']:,} bytes")
    return root
