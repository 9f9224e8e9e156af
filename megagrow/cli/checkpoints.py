"""Verbs on checkpoints: convert, verify, inspect."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import Progress

from megagrow import records
from megagrow.cli.terminal import show
from megagrow.cli.training import stage_index
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.errors import LaunchError

if TYPE_CHECKING:
    from megagrow.report.tables import Table


def convert_checkpoint(
    file: Path, overrides: list[str], stage: str, source: Path | None, save: Path | None, workers: int, as_json: bool
) -> None:
    """Grow a checkpoint into a stage."""
    family = load(file, overrides)
    index = stage_index(family, stage)
    source = source or _last_of_parent(family, index)
    from megagrow.checkpoint.expand import How, Target, expand

    wanted = family.stages[index]
    target = Target(
        stage=wanted.name,
        shape=wanted.model,
        layout=wanted.parallel,
        growth=wanted.growth,
        precision=wanted.precision,
        seed=family.seed,
    )
    paths = FamilyPaths(family)
    with Progress(console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("convert", total=None)
        record = expand(
            source,
            save or paths.stage(index).checkpoints,
            target,
            How(contents=family.checkpoint.verify_on_load, workers=workers),
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    if save is None and record not in list(records.read(paths.records)):
        records.append(paths.records, record)
    if as_json:
        print(record.model_dump_json(indent=1))
        return
    operators = ", ".join(f"{axis} {name}" for axis, name in record.operators.items()) or "nothing grows"
    print(f"{record.source} -> {record.target}")
    print(f"{operators}; moments {record.moments}; {'exact' if record.exact else 'does not preserve the function'}")
    print(
        f"{record.tensors} tensors, {record.bytes_read / 1e6:,.1f} MB read, {record.bytes_written / 1e6:,.1f} MB "
        f"written, {record.seconds:.1f} s"
    )


def verify_checkpoint(
    path: Path, overrides: list[str], stage: str | None, parent: Path | None, as_json: bool, *, deep: bool
) -> int:
    """Print the findings on a checkpoint; return 0 if it is whole (with `deep`: and what it promises), else 2."""
    from megagrow.checkpoint.verify import verify

    family = None
    if stage is not None:
        family = load(path, overrides)
        index = stage_index(family, stage)
        path = _newest(family, index)
        if parent is None and index > 0 and path.name == "iter_0000000":
            parent = _newest(family, index - 1)
    findings = verify(path, None if deep else parent)  # deep asks for the descent itself: a reshard is one too
    record = None
    if deep and not findings.faults:
        from megagrow.cli.deep import run_deep

        record = run_deep(path, parent, family)
    if as_json:
        seen = {"deep": record.model_dump(mode="json")} if record else {}
        print(json.dumps({"checkpoint": str(path), **vars(findings), **seen}, indent=1))
    else:
        for check in findings.checks:
            print(f"ok    {check}")
        for fault in findings.faults:
            print(f"megagrow: error: {fault}", file=sys.stderr)
        print(f"{path}: {findings.tensors} tensors, {findings.values:,} values, {len(findings.faults)} faults")
        if record:
            from megagrow.cli.deep import show_deep

            show_deep(record)
    return 2 if findings.faults or (record and record.verdict == "broken") else 0


def inspect_checkpoint(path: Path, tensors: bool, as_json: bool) -> None:
    """Print what a checkpoint is."""
    from megagrow.checkpoint.manifest import read_manifest
    from megagrow.checkpoint.novelty import read_novelty
    from megagrow.checkpoint.torch_dist import Reader

    reader = Reader(path)
    manifest = read_manifest(path)
    listed = [
        {"key": key, "shape": list(info.shape), "dtype": str(info.dtype).removeprefix("torch."), "bytes": info.bytes}
        for key, info in sorted(reader.tensors.items())
    ]
    novelty = read_novelty(path)
    content = {
        **manifest.model_dump(mode="json"),
        "what_is_new": novelty,
        "tensors": listed if tensors else len(listed),
    }
    content["bytes"] = sum(info.bytes for info in reader.tensors.values())
    if as_json:
        print(json.dumps(content, indent=1))
        return
    show(_summary(path, content))
    if tensors:
        _print_tensors(listed)


def _summary(path: Path, content: dict[str, Any]) -> "Table":
    """What a checkpoint is, a line each."""
    from megagrow.report.tables import Column, Table, human

    shape, novelty = content["shape"], content["what_is_new"]
    sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups", "vocab_size")
    layout = {key: value for key, value in content["layout"].items() if value not in (None, 1, False)}
    rows = {
        "stage": f"{content['stage']} of family {content['family']}, iteration {content['iteration']}",
        "shape": _pairs({name: shape[name] for name in sizes if shape[name] is not None}),
        "layout": _pairs(layout) or "one process",
        "precision": content["precision"] + (", with Adam's state" if content["optimizer"] else ""),
        "position": f"{content['consumed_tokens']:,} tokens, {content['consumed_samples']:,} samples of the family",
        "size": human(content["bytes"], "bytes"),
    }
    for ancestor in content["lineage"]:
        rows[f"grown from {ancestor['stage']}"] = (
            f"iteration {ancestor['iteration']} by {_pairs(ancestor['operators'])}; moments {ancestor['moments']}; "
            f"{'exact' if ancestor['exact'] else 'not exact'}"
        )
    if novelty:
        grown = {"layers": novelty["layers"], **novelty["axes"]}
        axes = [f"{name} {axis['from']}->{axis['to']}" for name, axis in grown.items() if axis["from"] != axis["to"]]
        layers = ", ".join(str(index) for index, new in enumerate(novelty["layers"]["new"]) if new)
        rows["new"] = ", ".join(axes) + (f"; new layers: {layers}" if layers else "")
    columns = (Column("what", ""), Column("value", "", "prose"))
    return Table(title=str(path), columns=columns, rows=tuple(rows.items()))


def _pairs(values: dict[str, Any]) -> str:
    return " ".join(f"{name}={value}" for name, value in values.items())


def _print_tensors(listed: list[dict[str, Any]]) -> None:
    """A line each, names last and whole: they are longer than a terminal's columns, and are there to be searched."""
    shapes = [" x ".join(map(str, row["shape"])) for row in listed]
    width = max(map(len, shapes), default=0)
    print(f"\n{'bytes':>15}  {'type':<8}  {'shape':<{width}}  tensor")
    for row, shape in zip(listed, shapes, strict=True):
        print(f"{row['bytes']:>15,}  {row['dtype']:<8}  {shape:<{width}}  {row['key']}")


def _last_of_parent(family: Family, index: int) -> Path:
    if index == 0:
        raise LaunchError(f"stage {family.stages[0].name!r} is the first: it grows from nothing; give --source")
    return _newest(family, index - 1)


def _newest(family: Family, index: int) -> Path:
    paths = FamilyPaths(family).stage(index)
    last = paths.last_iteration()
    if last is None:
        raise LaunchError(
            f"{paths.checkpoints}: stage {family.stages[index].name!r} has no checkpoint yet; train it first"
        )
    return paths.checkpoints / f"iter_{last:07d}"
