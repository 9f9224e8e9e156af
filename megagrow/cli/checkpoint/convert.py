"""The verb convert: into or out of a stage of a family, or from directory to directory; or only the plan of it."""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, DownloadColumn, TimeRemainingColumn, TransferSpeedColumn

from megagrow import records
from megagrow.cli.arguments import user_path
from megagrow.cli.checkpoint.conversion_options import Options, parse_bytes
from megagrow.cli.checkpoint.source import open_source
from megagrow.cli.output import progress_bar, say, show, show_note
from megagrow.cli.stages import newest_checkpoint, stage_index
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.config.target import ConversionRequest, target_of
from megagrow.errors import CheckpointError, DataError, LaunchError

if TYPE_CHECKING:
    from megagrow.convert.run import TargetSpec
    from megagrow.convert.work import RunOptions
    from megagrow.records import ConversionRecord

_MOST_NAMED = 10
_CHECKSUMS = {
    "blocks": "every block that was read has its checksum",
    "files": "every file of the source has its checksum",
    "skipped": "checksums were not compared",
    "none": "the source has no checksums to compare",
    "unknown": "whether its checksums were compared is not recorded",
}
"""What is printed for each `Compared`."""


def convert(
    first: Path,
    rest: list[str],
    *,
    stage: str | None,
    source: Path | None,
    save: Path | None,
    to: str,
    tokenizer: Path | None,
    options: Options,
) -> None:
    """Convert a checkpoint, with a family.yaml or from directory to directory."""
    _check_schedule(options.schedule, is_plain=to == "torch_dist" and first.is_dir())
    if first.is_dir():
        if stage or source or save:
            raise LaunchError(
                "--stage, --source and --save need a family.yaml; from a directory use: convert SOURCE TARGET"
            )
        if not rest or "=" in rest[0]:
            raise LaunchError(f"convert {first}: no target directory; use: megagrow convert {first} TARGET")
        target = user_path(Path(rest[0]))
        assert target is not None
        _convert_directory(first, target, rest[1:], to, tokenizer, options)
        return
    if not first.is_file():
        raise LaunchError(f"{first}: neither a family.yaml nor a checkpoint directory")
    if stage is None:
        raise LaunchError(f"convert {first}: no stage; add --stage NAME")
    if to != "torch_dist":
        _export_stage(first, rest, stage, source, save, to, tokenizer, options)
        return
    _grow_into_stage(first, rest, stage, source, save, options)


def _check_schedule(schedule: str, *, is_plain: bool) -> None:
    if schedule not in ("fresh", "continue"):
        raise LaunchError(f"--schedule {schedule}: use fresh or continue")
    if schedule == "continue" and not is_plain:
        raise LaunchError(
            "--schedule continue is for a checkpoint that goes on in Megatron-LM: convert SOURCE TARGET; a stage of a "
            "family has a schedule of its own, and an export has none"
        )


def _grow_into_stage(
    file: Path, overrides: list[str], stage: str, source: Path | None, save: Path | None, options: Options
) -> None:
    """Grow the previous stage's newest checkpoint, or `source`, into a stage, and record the conversion."""
    family = load(file, overrides)
    index = stage_index(family, stage)
    source = _source_of_stage(family, index, source)
    from megagrow.history import refuse_edits

    refuse_edits(family, but=(index,))  # the stage itself is compared with its target, which --overwrite replaces
    options.begin(source)
    from megagrow.convert.run import TargetSpec

    grown = family.stages[index]
    target = TargetSpec(
        stage=grown.name,
        shape=grown.model,
        layout=grown.parallel,
        growth=grown.growth,
        precision=grown.precision,
        seed=family.seed,
        optimizer=options.optimizer,
        family=family.name,
        load=None if grown.load is None else str(grown.load),
        ignored_arguments=options.ignored_arguments,
    )
    paths = FamilyPaths(family)
    directory = save or paths.stage(index).checkpoints
    if options.dry_run:
        _show_plan(source, directory, target, options)
        return
    verify = family.checkpoint.verify_on_load
    try:
        record = _grow(source, directory, target, options, contents=verify)
    except (CheckpointError, FileNotFoundError) as error:
        is_parents = index > 0 and source == paths.stage(index - 1).checkpoints / source.name
        if verify and is_parents and not paths.stage(index).last_iteration() and str(source) in str(error):
            _set_parent_aside(family, index, source)
        raise
    if save is None and record not in list(records.read(paths.records)):
        records.append(paths.records, record)
    _show_record(record, options)


def _set_parent_aside(family: Family, index: int, source: Path) -> None:
    """If a parent's checkpoint is damaged, set it aside, so that the next run trains its last steps again.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    from megagrow.checkpoint.directory import integrity, iterations, recovery
    from megagrow.convert.work import worker_rank

    try:
        integrity.check(source)
    except CheckpointError as error:
        iteration = recovery.fall_back(source.parent) if worker_rank().rank == 0 else None
        if iteration is None:
            raise
        shutil.rmtree(iterations.conversion_staging(FamilyPaths(family).stage(index).first_checkpoint), True)
        raise CheckpointError(
            f"{error}; it is set aside, and {family.stages[index - 1].name!r} is back at iteration {iteration}; "
            "run the same command again"
        ) from None


def _export_stage(
    file: Path,
    overrides: list[str],
    stage: str,
    source: Path | None,
    save: Path | None,
    to: str,
    tokenizer: Path | None,
    options: Options,
) -> None:
    """Export a stage's newest checkpoint, or `source`, with the family's tokenizer next to it."""
    family = load(file, overrides)
    index = stage_index(family, stage)
    exported, paths = family.stages[index], FamilyPaths(family).stage(index)
    if source is None:
        from megagrow.history import refuse_edits

        refuse_edits(family)
        source = newest_checkpoint(family, index)
    options.begin(source)
    target = save or paths.exported(to)
    request = ConversionRequest(
        source=exported.model,
        model=exported.model,
        parallel=exported.parallel,
        precision=exported.precision,
        stage=exported.name,
    )
    _export(source, target, request, to, tokenizer or _tokenizer(family), options)


def _tokenizer(family: Family) -> Path | None:
    """The tokenizer of the family's tokens; None if the family was given tokens without one."""
    from megagrow.data.record import read_prepared
    from megagrow.data.tokenizer import named_file

    try:
        return read_prepared(family).tokenizer
    except DataError:
        return named_file(
            family.tokenizer
        )  # the prepared tokens may be gone, but a tokenizer named in the yaml may still exist


def _convert_directory(
    source: Path, target: Path, overrides: list[str], to: str, tokenizer: Path | None, options: Options
) -> None:
    """Convert one directory to another; settings that are not overridden are the source's."""
    options.begin(source)
    from megagrow.checkpoint.formats import precision_of, resolve_directory
    from megagrow.convert.run import TargetSpec

    source = resolve_directory(source)
    opened = open_source(
        source,
        overrides,
        optimizer=options.optimizer and to == "torch_dist",
        ignored_arguments=options.ignored_arguments,
    )
    precision = precision_of(opened.source)
    assert opened.shape is not None
    known: dict[str, Any] = {"precision": precision, "parallel": {}, "source": opened.shape.model_dump()}
    request = target_of(known, overrides)
    if request.precision == "fp32" != precision:  # of any other change a note says what is rounded
        show_note(f"weights are cast from {precision} to {request.precision}")
    if to != "torch_dist":
        _export(source, target, request, to, tokenizer, options)
        return
    spec = TargetSpec(
        stage=request.stage,
        shape=request.model,
        layout=request.parallel,
        growth=request.growth,
        precision=request.precision,
        seed=request.seed,
        source_shape=request.source,
        optimizer=options.optimizer,
        schedule=options.schedule,  # type: ignore[arg-type]  # one of the two, by the check in `convert`
        ignored_arguments=options.ignored_arguments,
    )
    if options.dry_run:
        _show_plan(source, target, spec, options)
        return
    _show_record(_grow(source, target, spec, options), options)


def _export(
    source: Path, target: Path, request: ConversionRequest, to: str, tokenizer: Path | None, options: Options
) -> None:
    from megagrow.convert.run import export_checkpoint, order_export
    from megagrow.report.tables import exactness_text, operators_text

    if to not in ("huggingface", "legacy"):
        raise LaunchError(f"--to {to}: unknown format; choose torch_dist, huggingface or legacy")
    if options.dry_run:
        raise LaunchError(f"--dry-run --to {to}: only conversions to torch_dist are planned without being made")
    if to == "legacy" and request.model != request.source:
        raise CheckpointError("--to legacy cannot grow: convert to torch_dist first, then convert the result to legacy")
    order = order_export(
        source,
        to,  # type: ignore[arg-type]  # one of the two, by the check above
        request.precision,
        request.parallel,
        request.source,
        tokenizer,
        options.ignored_arguments,
        large=request.model,
        growth=request.growth,
        seed=request.seed,
    )
    with _convert_bar() as progress:
        done = export_checkpoint(order, target, _run_options(options), progress)
    for note in (*done.notes, *_notes_on_values(done.non_finite)):
        show_note(note)
    if options.as_json:
        print(json.dumps({**dataclasses.asdict(done), "target": str(done.target)}, indent=1))
        return
    say(f"{source} -> {done.target}")
    grown = f"{operators_text(done.operators)}; " if done.operators else ""
    print(f"{done.format}; {grown}{exactness_text(done.exact, done.storage)}")
    print(f"{done.bytes / 1e6:,.1f} MB written, {done.seconds:.1f} s; {_CHECKSUMS[done.checksums]}")


def _grow(
    source: Path, save: Path, target: "TargetSpec", options: Options, *, contents: bool = True
) -> "ConversionRecord":
    from megagrow.convert.run import convert_checkpoint

    with _convert_bar() as progress:
        return convert_checkpoint(source, save, target, _run_options(options, contents=contents), progress)


def _run_options(options: Options, *, contents: bool = True) -> "RunOptions":
    from megagrow.convert.work import RunOptions

    return RunOptions(
        contents=contents,
        checksums=not options.skip_checksums,
        allow_non_finite=options.allow_non_finite,
        workers=options.workers,
        memory=parse_bytes(options.memory),
        sha256=options.sha256,
        overwrite=options.overwrite,
        restart=options.restart,
        warmup=options.warmup,
    )


def _convert_bar() -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar in bytes, with rate and time left."""
    return progress_bar("convert", BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())


def _show_record(record: "ConversionRecord", options: Options) -> None:
    from megagrow.report.tables import exactness_text, operators_text

    for note in (*record.notes, *_notes_on_values(record.non_finite)):
        show_note(note)
    if options.as_json:
        print(record.model_dump_json(indent=1))
        return
    if record.moments == "none":
        moments = "; no moments"
    else:
        moments = f"; moments {record.moments}" if record.operators else ""
    say(f"{record.source} -> {record.target}")
    print(f"{operators_text(record.operators) or 'no growth'}{moments}; {exactness_text(record.exact, record.storage)}")
    print(
        f"{record.tensors} tensors, {record.bytes_read / 1e6:,.1f} MB read, {record.bytes_written / 1e6:,.1f} MB "
        f"written, {record.seconds:.1f} s; {_CHECKSUMS[record.checksums]}"
    )


def _notes_on_values(non_finite: Mapping[str, int]) -> Iterator[str]:
    """Say which tensors have values that are not finite, the first of them by name."""
    shown = list(non_finite.items())[:_MOST_NAMED]
    yield from (f"{name}: {count:,} values are NaN or infinite, and are carried over" for name, count in shown)
    if len(non_finite) > _MOST_NAMED:
        yield f"{len(non_finite) - _MOST_NAMED} more tensors have such values; --json lists them"


def _show_plan(source: Path, save: Path, target: "TargetSpec", options: Options) -> None:
    """Print what a conversion would do, and how long it would take at the disk's rate measured now."""
    from megagrow.convert.run import forecast
    from megagrow.report.tables import exactness_text, facts_table, human

    plan = forecast(source, save, target, options.workers, parse_bytes(options.memory))
    for note in plan.notes:
        show_note(note)
    if options.as_json:
        print(json.dumps(dataclasses.asdict(plan), indent=1))
        return
    facts = {
        "growth": plan.operators or "none: the checkpoint is only resharded",
        "function": exactness_text(plan.exact, plan.storage),
        "tensors": f"{plan.tensors:,} in {plan.chunks:,} chunks",
        "weights": f"{plan.copied:,} copied, {plan.grown:,} grown, {plan.fresh:,} fresh, {plan.zero:,} zero",
        "files": f"{plan.files:,} in {plan.units:,} units, {human(plan.largest_file, 'bytes')} at most",
        "reads": human(plan.bytes_read, "bytes"),
        "writes": f"{human(plan.bytes_written, 'bytes')} ({human(plan.free, 'bytes')} are free)",
        "memory": f"{human(plan.memory, 'bytes')} at most, for {options.workers} workers, in pieces of "
        f"{plan.piece_values:,} values",
        "time": f"about {plan.seconds:,.0f} s, at {human(plan.rate, 'bytes')} per second as measured just now",
    }
    show(facts_table(f"{source} -> {save}", facts))


def _source_of_stage(family: Family, index: int, given: Path | None) -> Path:
    """The checkpoint that a stage begins with: the one given, the one it loads, or the newest of the stage before."""
    load = family.stages[index].load
    if given is not None and load is not None and given.resolve() != load.resolve():
        raise LaunchError(f"--source {given} is not stages.{index}.load {load}; leave out one of them")
    if given is not None or load is not None:
        return given or load  # type: ignore[return-value]  # one of them is not None
    if index == 0:
        raise LaunchError(
            f"stage {family.stages[0].name!r} is the first and has no stage to grow from; set stages.0.load, or give "
            "--source"
        )
    return newest_checkpoint(family, index - 1)
