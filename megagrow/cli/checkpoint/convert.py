"""The verb convert: into a stage of a family, or from any checkpoint to any other, with a plan first if asked."""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

from megagrow import records
from megagrow.cli.output import show
from megagrow.cli.stages import newest, stage_index
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.config.target import ConversionRequest, target_of
from megagrow.errors import CheckpointError, ConfigError, DataError, LaunchError

if TYPE_CHECKING:
    from megagrow.convert.early import Warmup
    from megagrow.convert.run import TargetSpec
    from megagrow.records import ConversionRecord

_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


@dataclass(frozen=True)
class Options:
    """What the command line says beside source and target."""

    workers: int = 1
    memory: str = "1GiB"
    overwrite: bool = False
    restart: bool = False
    sha256: bool = False
    optimizer: bool = True
    dry_run: bool = False
    as_json: bool = False
    warmup: "Warmup | None" = None

    def begin(self, source: Path) -> None:
        """Start reading the source ahead, unless that was done before, while the rest is imported."""
        if self.warmup is not None and not self.dry_run:
            self.warmup.begin(source)


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
    """Convert, by a family.yaml or from directory to directory."""
    if first.is_dir():
        if stage or source or save:
            raise LaunchError("--stage, --source and --save go with a family.yaml; from a directory: SOURCE TARGET")
        if not rest or "=" in rest[0]:
            raise LaunchError(f"convert {first}: where to? Give a target directory: megagrow convert {first} TARGET")
        _between(first, Path(rest[0]), rest[1:], to, tokenizer, options)
        return
    if not first.is_file():
        raise LaunchError(f"{first}: neither a family.yaml nor the directory of a checkpoint")
    if stage is None:
        raise LaunchError(f"convert {first}: into which stage? Give --stage NAME")
    if to != "torch_dist":
        _out_of_stage(first, rest, stage, source, save, to, tokenizer, options)
        return
    _into_stage(first, rest, stage, source, save, options)


def _into_stage(
    file: Path, overrides: list[str], stage: str, source: Path | None, save: Path | None, options: Options
) -> None:
    family = load(file, overrides)
    index = stage_index(family, stage)
    source = source or _last_of_parent(family, index)
    options.begin(source)
    from megagrow.convert.run import TargetSpec

    wanted = family.stages[index]
    target = TargetSpec(
        stage=wanted.name,
        shape=wanted.model,
        layout=wanted.parallel,
        growth=wanted.growth,
        precision=wanted.precision,
        seed=family.seed,
        optimizer=options.optimizer,
    )
    paths = FamilyPaths(family)
    where = save or paths.stage(index).checkpoints
    if options.dry_run:
        _show_plan(source, where, target, options)
        return
    check = family.checkpoint.verify_on_load
    try:
        record = _expand(source, where, target, options, contents=check)
    except (CheckpointError, FileNotFoundError) as error:
        own = index > 0 and source == paths.stage(index - 1).checkpoints / source.name
        if check and own and not paths.stage(index).last_iteration() and str(source) in str(error):
            _fall_back(family, index, source)
        raise
    if save is None and record not in list(records.read(paths.records)):
        records.append(paths.records, record)
    _tell(record, options)


def _fall_back(family: Family, index: int, source: Path) -> None:
    """Where a conversion failed because its parent is damaged: set that aside, so that its last steps are trained anew.

    Raises:
        CheckpointError: that is what happened.
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
            f"{error}; it is set aside, and {family.stages[index - 1].name!r} stands at iteration {iteration} again: "
            "the same run goes on"
        ) from None


def _out_of_stage(
    file: Path,
    overrides: list[str],
    stage: str,
    source: Path | None,
    save: Path | None,
    to: str,
    tokenizer: Path | None,
    options: Options,
) -> None:
    """Export a stage's newest checkpoint, with the family's tokenizer beside it."""
    family = load(file, overrides)
    index = stage_index(family, stage)
    wanted, paths = family.stages[index], FamilyPaths(family).stage(index)
    source = source or newest(family, index)
    options.begin(source)
    target = save or paths.exported(to)
    same = ConversionRequest(
        source=wanted.model, model=wanted.model, parallel=wanted.parallel, precision=wanted.precision, stage=wanted.name
    )
    _export(source, target, same, to, tokenizer or _tokenizer(family), options)


def _tokenizer(family: Family) -> Path | None:
    """The tokenizer that the family's tokens were made with; None where they came as tokens."""
    from megagrow.data.prepare import read_prepared
    from megagrow.data.tokenizer import named_file

    try:
        return read_prepared(family).tokenizer
    except DataError:
        return named_file(family.tokenizer)  # the tokens may be gone; a named tokenizer need not be


def _between(
    source: Path, target: Path, overrides: list[str], to: str, tokenizer: Path | None, options: Options
) -> None:
    options.begin(source)
    from megagrow.checkpoint.formats import open_checkpoint, precision_of, resolve
    from megagrow.convert.run import TargetSpec

    source = resolve(source)
    opened = open_checkpoint(source, optimizer=options.optimizer and to == "torch_dist")
    precision = precision_of(opened.source)
    known: dict[str, Any] = {"precision": precision, "parallel": {}}
    if opened.shape is not None:
        known["source"] = opened.shape.model_dump()
    elif not any(text.startswith("source.") for text in overrides):
        raise ConfigError(
            f"{source}: does not say its model's shape; give source.num_layers=..., source.hidden_size=..., "
            "source.ffn_hidden_size=..., source.num_attention_heads=..., source.vocab_size=..., source.seq_length=..."
        )
    wanted = target_of(known, overrides)
    for note in opened.notes:
        print(f"megagrow: {note}", file=sys.stderr)
    if wanted.precision != precision:
        print(f"megagrow: weights are cast from {precision} to {wanted.precision}", file=sys.stderr)
    if to != "torch_dist":
        _export(source, target, wanted, to, tokenizer, options)
        return
    aim = TargetSpec(
        stage=wanted.stage,
        shape=wanted.model,
        layout=wanted.parallel,
        growth=wanted.growth,
        precision=wanted.precision,
        seed=wanted.seed,
        source_shape=wanted.source,
        optimizer=options.optimizer,
    )
    if options.dry_run:
        _show_plan(source, target, aim, options)
        return
    _tell(_expand(source, target, aim, options, contents=False), options)


def _export(
    source: Path, target: Path, wanted: ConversionRequest, to: str, tokenizer: Path | None, options: Options
) -> None:
    from megagrow.convert.run import export_checkpoint, order_export

    if to not in ("huggingface", "legacy"):
        raise LaunchError(f"--to {to}: unknown format; use torch_dist, huggingface or legacy")
    if wanted.model != wanted.source:
        raise CheckpointError(f"--to {to} does not grow: convert to torch_dist first, then that to {to}")
    order = order_export(source, to, wanted.precision, wanted.parallel, wanted.model, tokenizer)  # type: ignore[arg-type]
    with _progress() as progress:
        done = export_checkpoint(order, target, _how(options, contents=False), progress)
    for note in done.notes:
        print(f"megagrow: {note}", file=sys.stderr)
    if options.as_json:
        print(json.dumps({**asdict(done), "target": str(done.target)}, indent=1))
        return
    print(f"{source} -> {done.target}")
    print(f"{done.format}, {done.bytes / 1e6:,.1f} MB written, {done.seconds:.1f} s")


def _expand(source: Path, save: Path, target: "TargetSpec", options: Options, *, contents: bool) -> "ConversionRecord":
    from megagrow.convert.run import convert_checkpoint

    with _progress() as progress:
        return convert_checkpoint(source, save, target, _how(options, contents=contents), progress)


def _how(options: Options, *, contents: bool) -> Any:
    from megagrow.convert.work import RunOptions

    return RunOptions(
        contents=contents,
        workers=options.workers,
        memory=parse_bytes(options.memory),
        sha256=options.sha256,
        overwrite=options.overwrite,
        restart=options.restart,
        warmup=options.warmup,
    )


@contextmanager
def _progress() -> Iterator[Callable[[int, int], None]]:
    """A bar with rate and time left, where somebody watches."""
    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task("convert", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def parse_bytes(text: str) -> int:
    """Bytes of a size as people write it: 512MiB, 1g, 2GB, 1073741824; ConfigError for anything else."""
    number = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = number[-1:] if number[-1:].isalpha() else ""
    try:
        size = int(float(number.removesuffix(unit)) * _UNITS[unit])
        if size <= 0:
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise ConfigError(f"--memory {text}: not a size; write it as 1GiB or 512MiB") from None
    return size


def _tell(record: "ConversionRecord", options: Options) -> None:
    if options.as_json:
        print(record.model_dump_json(indent=1))
        return
    operators = ", ".join(f"{axis} {name}" for axis, name in record.operators.items()) or "nothing grows"
    print(f"{record.source} -> {record.target}")
    print(f"{operators}; moments {record.moments}; {'exact' if record.exact else 'does not preserve the function'}")
    print(
        f"{record.tensors} tensors, {record.bytes_read / 1e6:,.1f} MB read, {record.bytes_written / 1e6:,.1f} MB "
        f"written, {record.seconds:.1f} s"
    )


def _show_plan(source: Path, save: Path, target: "TargetSpec", options: Options) -> None:
    """What a conversion would do, and how long it would take at the rate that this disk shows now."""
    from megagrow.convert.run import forecast
    from megagrow.report.tables import Column, Table, human

    seen = forecast(source, save, target, options.workers, parse_bytes(options.memory))
    if options.as_json:
        print(json.dumps(asdict(seen), indent=1))
        return
    rows = (
        ("grows", seen.operators or "nothing: it is resharded"),
        ("exact", "yes" if seen.exact else "no: the function changes"),
        ("tensors", f"{seen.tensors:,} in {seen.chunks:,} chunks"),
        ("weights", f"{seen.copied:,} copied, {seen.grown:,} grown, {seen.fresh:,} fresh, {seen.zero:,} zero"),
        ("files", f"{seen.files:,} in {seen.units:,} units, {human(seen.largest_file, 'bytes')} at most"),
        ("reads", human(seen.bytes_read, "bytes")),
        ("writes", f"{human(seen.bytes_written, 'bytes')} ({human(seen.free, 'bytes')} are free)"),
        (
            "memory",
            f"{human(seen.memory, 'bytes')} at most, {options.workers} workers, pieces of {seen.piece_values:,}",
        ),
        ("time", f"about {seen.seconds:,.0f} s, at {human(seen.rate, 'bytes')} a second as measured just now"),
    )
    columns = (Column("what", ""), Column("value", "", "prose"))
    show(Table(title=f"{source} -> {save}", columns=columns, rows=rows))


def _last_of_parent(family: Family, index: int) -> Path:
    if index == 0:
        raise LaunchError(f"stage {family.stages[0].name!r} is the first: it grows from nothing; give --source")
    return newest(family, index - 1)
