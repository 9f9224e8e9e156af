"""The verbs for a cluster, which need no torch: launch, status, cancel, logs, and job, which scripts call."""

import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.cli.family.overview import check_export, check_growth
from megagrow.cli.output import announce, console, show
from megagrow.config import Family, load
from megagrow.config.cluster import Container
from megagrow.config.family import STDLIB
from megagrow.config.paths import FamilyPaths
from megagrow.errors import DataError, LaunchError

if TYPE_CHECKING:
    from megagrow.launch.status import JobStatus
    from megagrow.report.tables import Table

_TAIL_BLOCK = 2**16


def launch_family(file: Path, overrides: list[str], dry_run: bool, scripts: Path | None) -> None:
    """Submit a family's jobs; with `dry_run`, print their scripts or write them to a directory instead."""
    from megagrow.files.atomic import write_atomically
    from megagrow.launch.submit import launch, render_scripts

    if scripts is not None and not dry_run:
        raise LaunchError("--scripts needs --dry-run: a launch writes its scripts to the family's save directory")
    family = load(file, overrides)
    check_growth(family)
    check_export(family)
    if not dry_run:
        _check_corpus(family)
        submitted = launch(family, announce)
        print(f"{len(submitted)} job(s) submitted; `megagrow status {file}` shows their progress")
        return
    texts = render_scripts(family, file, tuple(overrides), scripts or FamilyPaths(family).jobs)
    for path, text in texts.items():
        if scripts is None:
            print(f"### {path}\n{text}")
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)
            print(path)


def show_status(file: Path, overrides: list[str], watch: float | None, as_json: bool) -> None:
    """Print the state of every job; with `watch`, again after that many seconds, until all jobs are finished."""
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
    """Cancel the named jobs, or all of the family if none is named."""
    from megagrow.launch.submit import cancel

    canceled = cancel(load(file, overrides), file, names)
    for name, number in canceled.items():
        print(f"{name}: job {number} canceled")
    if not canceled:
        print("none of its jobs is in the queue")


def show_log(file: Path, overrides: list[str], name: str, lines: int, follow: bool) -> None:
    """Print the end of a job's newest log; with `follow`, keep printing new lines."""
    from megagrow.launch.graph import family_jobs
    from megagrow.launch.status import newest_log

    family = load(file, overrides)
    path = newest_log(family, family_jobs(family, file, tuple(overrides)), name)
    if path is None:
        raise LaunchError(f"{name} has no log yet: `megagrow status {file}` shows what it waits for")
    with open(path, "rb") as stream:
        end = stream.seek(0, 2)
        stream.seek(max(0, end - _TAIL_BLOCK))
        tail = stream.read().decode(errors="replace").splitlines(keepends=True)
        print("".join(tail[-lines:]), end="", flush=True)
        while follow:
            new_text = stream.read()
            print(new_text.decode(errors="replace"), end="", flush=True)
            if not new_text:
                time.sleep(0.5)


def answer_script(file: Path, overrides: list[str], name: str, ended: int | None) -> None:
    """Print the decision for a job's script as one word, and its reason on standard error."""
    from megagrow.launch import attempts
    from megagrow.launch.graph import family_jobs

    family = load(file, overrides)
    job = attempts.find_job(family_jobs(family, file, tuple(overrides)), name)
    if ended is None:
        decision, reason = attempts.decide_at_start(family, job)
    else:
        decision, reason = attempts.decide_at_end(family, job, ended)
    print(reason, file=sys.stderr)
    print(decision.value)


def status_table(family: Family, states: list["JobStatus"], remark: str = "") -> "Table":
    """A table with a row per job; times are clock times for people, seconds since the epoch in JSON."""
    from megagrow.launch.status import set_aside_notes
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
    footnotes = ((remark,) if remark else ()) + set_aside_notes(family)
    return Table(title=f"jobs of {family.name}", columns=columns, rows=rows, footnotes=footnotes)


def _progress(state: "JobStatus") -> str | None:
    return f"{state.iteration or 0:,}/{state.iterations:,}" if state.iterations is not None else None


def _check_corpus(family: Family) -> None:
    """Reject a missing corpus or tokenizer; data that is already prepared needs neither.

    Jobs in a container may see files that this node does not: what no mount shows is left to the data job, which is
    the first and fails at once.
    """
    from megagrow.data.files import input_state
    from megagrow.data.tokenizer import named_file

    if FamilyPaths(family).prepared.is_file():
        return
    container = Container() if family.cluster is None else family.cluster.container
    unseen = []

    def seen(path: str) -> str | None:
        """The path on this node; notes it if only jobs can check it."""
        there = path if path == STDLIB else container.host_path(path)
        if there is None:
            unseen.append(path)
        return there

    for source in family.data.sources:
        paths = tuple(there for path in source.paths if (there := seen(path)) is not None)
        prefix = None if source.prefix is None else seen(source.prefix)
        if paths or prefix:
            input_state(source.model_copy(update={"paths": paths, "prefix": prefix}))
    model = family.tokenizer.tokenizer_model
    if model is not None and (there := seen(str(model))) is not None:
        file = named_file(family.tokenizer.model_copy(update={"tokenizer_model": Path(there)}))
        if file is not None and not file.is_file():
            raise DataError(f"tokenizer {file} does not exist: correct tokenizer.tokenizer_model")
    if unseen:
        announce(f"not checked here, because only the container shows it (the data job will): {', '.join(unseen)}")
