"""Verbs on a cluster, none of which needs torch: launch, status, cancel, logs, and the one that scripts ask."""

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.cli.family.overview import check_export, check_growth
from megagrow.cli.output import console, show
from megagrow.config import Family, load
from megagrow.config.paths import FamilyPaths
from megagrow.errors import DataError, LaunchError

if TYPE_CHECKING:
    from megagrow.launch.status import JobStatus
    from megagrow.report.tables import Table

_TAIL_BLOCK = 2**16


def launch_family(file: Path, overrides: list[str], dry_run: bool, scripts: Path | None) -> None:
    """Submit a family's jobs, or with `dry_run` print their scripts or write them into a directory."""
    from megagrow.atomic import write_whole
    from megagrow.launch.submit import launch
    from megagrow.launch.submit import scripts as render_scripts

    if scripts is not None and not dry_run:
        raise LaunchError("--scripts is for --dry-run: a launch keeps its scripts in the family's save directory")
    family = load(file, overrides)
    check_growth(family)
    check_export(family)
    if not dry_run:
        _check_corpus(family)
        submitted = launch(family, lambda line: print(line, file=sys.stderr, flush=True))
        print(f"{len(submitted)} job(s) submitted; `megagrow status {file}` shows how they go")
        return
    texts = render_scripts(family, file, tuple(overrides), scripts or FamilyPaths(family).jobs)
    for path, text in texts.items():
        if scripts is None:
            print(f"### {path}\n{text}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, text)
            print(path)


def show_status(file: Path, overrides: list[str], watch: float | None, as_json: bool) -> None:
    """Print where every job stands; with `watch`, again every so many seconds until all is done."""
    from megagrow.launch.graph import family_jobs
    from megagrow.launch.status import family_status

    family = load(file, overrides)
    jobs = family_jobs(family, file, tuple(overrides))
    if watch is None or as_json:
        show(status_table(family, *family_status(family, jobs)), json=as_json)
        return
    from rich.live import Live

    from megagrow.report.tables import render_table

    with Live(console=console(), auto_refresh=False) as live:
        while True:
            states, remark = family_status(family, jobs)
            live.update(render_table(status_table(family, states, remark)), refresh=True)
            if all(state.state == "finished" for state in states):
                return
            time.sleep(watch)


def cancel_jobs(file: Path, overrides: list[str], names: list[str]) -> None:
    """Take jobs from the queue, all of the family where none is named."""
    from megagrow.launch.submit import cancel

    canceled = cancel(load(file, overrides), file, names)
    for name, number in canceled.items():
        print(f"{name}: job {number} canceled")
    if not canceled:
        print("nothing of it is in the queue")


def show_log(file: Path, overrides: list[str], name: str, lines: int, follow: bool) -> None:
    """Print the end of a job's newest log, and with `follow` what comes after."""
    from megagrow.launch.graph import family_jobs
    from megagrow.launch.status import newest_log

    family = load(file, overrides)
    path = newest_log(family, family_jobs(family, file, tuple(overrides)), name)
    if path is None:
        raise LaunchError(f"{name} has no log yet: `megagrow status {file}` says what it waits for")
    with open(path, "rb") as stream:
        end = stream.seek(0, 2)
        stream.seek(max(0, end - _TAIL_BLOCK))
        tail = stream.read().decode(errors="replace").splitlines(keepends=True)
        print("".join(tail[-lines:]), end="", flush=True)
        while follow:
            more = stream.read()
            print(more.decode(errors="replace"), end="", flush=True)
            if not more:
                time.sleep(0.5)


def answer_script(file: Path, overrides: list[str], name: str, ended: int | None) -> None:
    """Print the one word that a job's script goes by, and its reason on standard error."""
    from megagrow.launch import attempts
    from megagrow.launch.graph import family_jobs

    family = load(file, overrides)
    job = attempts.find_job(family_jobs(family, file, tuple(overrides)), name)
    answer, reason = attempts.begin(family, job) if ended is None else attempts.ended(family, job, ended)
    print(reason, file=sys.stderr)
    print(answer.value)


def status_table(family: Family, states: list["JobStatus"], remark: str = "") -> "Table":
    """Every job as a row: people get clock times, JSON seconds since the epoch."""
    from megagrow.report.tables import Column, Table

    columns = (
        Column("job", "job"),
        Column("state", "state"),
        Column("job_id", "number"),
        Column("progress", "step"),
        Column("iteration", "iteration", "integer", shown=False),
        Column("iterations", "iterations", "integer", shown=False),
        Column("tokens_per_second", "tokens/s", "count"),
        Column("ends_at", "ends about"),
        Column("ends", "ends", "seconds", shown=False),
        Column("checkpoint", "saved", "integer"),
        Column("why", "why", "prose"),
    )
    rows = tuple(
        (s.job, s.state, s.job_id, _progress(s), s.iteration, s.iterations, s.tokens_per_second)
        + (None if s.ends is None else f"{datetime.fromtimestamp(s.ends):%b %d %H:%M}", s.ends, s.checkpoint)
        + (s.why or "",)
        for s in states
    )
    return Table(title=f"jobs of {family.name}", columns=columns, rows=rows, footnotes=(remark,) if remark else ())


def _progress(state: "JobStatus") -> str | None:
    return f"{state.iteration or 0:,}/{state.iterations:,}" if state.iterations is not None else None


def _check_corpus(family: Family) -> None:
    """Refuse a corpus or tokenizer that is not there; prepared data needs neither any more."""
    from megagrow.data.text import input_state
    from megagrow.data.tokenizer import named_file

    if FamilyPaths(family).prepared.is_file():
        return
    for source in family.data.sources:
        input_state(source)
    file = named_file(family.tokenizer)
    if file is not None and not file.is_file():
        raise DataError(f"tokenizer {file} does not exist: correct tokenizer.tokenizer_model")
