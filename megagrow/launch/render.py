"""A job becomes an sbatch script that a person can read, and give by hand.

What Slurm must know is computed here, line by line; what the script does stands in `templates/job.sbatch.j2`, once
for all kinds of jobs. Values from a family.yaml are quoted for the shell where they enter the template.
"""

import shlex
from functools import cache
from pathlib import Path

import jinja2

from megagrow.config import Family
from megagrow.config.cluster import Container
from megagrow.config.paths import FamilyPaths
from megagrow.launch import slurm
from megagrow.launch.graph import Job
from megagrow.launch.resources import Resources, cluster_of, resources


def script_name(job: Job) -> str:
    """File name of a job's script."""
    return f"{job.name}.sbatch"


def render(family: Family, job: Job, script: Path) -> str:
    """Return the text of a job's script.

    Args:
        family: that the job is of; it has a cluster section.
        job: from `family_jobs`: its arguments name the family.yaml that the nodes will read.
        script: where the text will lie; it names itself to people and to its successor.
    """
    cluster, asked = cluster_of(family), resources(family, job)
    container = _container(cluster.container, asked)
    inside = '"${container[@]}" ' if container else ""
    # a container that srun makes needs srun; any other command runs on the batch script's own node
    near = f"srun --nodes=1 --ntasks=1 {inside}" if cluster.container.runtime == "pyxis" else inside
    cpus = f" --cpus-per-task={asked.cpus_per_task}" if asked.cpus_per_task else ""  # srun does not inherit it
    # the file and its overrides stand behind the verb; --stage and what follows belong to the verb alone
    cut = job.arguments.index("--stage") if "--stage" in job.arguments else len(job.arguments)
    return _template().render(
        family=family,
        job=job,
        asked=asked,
        cluster=cluster,
        script=script,
        jobs=FamilyPaths(family).jobs,
        options=options(family, job, asked),
        python=cluster.python,
        container=container,
        inside=inside,
        near=near,
        cpus=cpus,
        words=shlex.join(job.arguments),
        family_words=shlex.join(job.arguments[1:cut]),
    )


def _container(container: Container, asked: Resources) -> tuple[str, ...]:
    """Words of bash that stand before a command, behind srun's options; none where there is no container."""
    image, mounts = shlex.quote(str(container.image)), container.mounts
    if container.runtime == "apptainer":
        binds = [f"--bind {shlex.quote(mount)}" for mount in mounts]
        return (
            *("apptainer", "exec"), *(["--nv"] if asked.gpus_per_node else []),
            *('--pwd "$PWD"', '--bind "$PWD"', *binds, image),
        )  # fmt: skip
    if container.runtime == "pyxis":
        places = ",".join(["$PWD:$PWD", *(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)])
        return f"--container-image={image}", f'--container-mounts="{places}"', '--container-workdir="$PWD"'
    return ()


def options(family: Family, job: Job, asked: Resources) -> tuple[str, ...]:
    """The #SBATCH lines of a job."""
    cluster = cluster_of(family)
    named = {
        "--job-name": f"{family.name}-{job.name}",
        "--comment": slurm.comment(family, job.name),
        "--account": asked.account,
        "--partition": asked.partition,
        "--qos": asked.qos,
        "--nodes": asked.nodes,
        "--ntasks": asked.tasks if asked.nodes is None else None,
        "--ntasks-per-node": None if asked.nodes is None else 1,
        "--gpus-per-node": asked.gpus_per_node or None,
        "--cpus-per-task": asked.cpus_per_task,
        "--mem": asked.memory,
        "--time": asked.time,
        "--output": FamilyPaths(family).jobs / f"{job.name}-%j.log",
        "--open-mode": "append",
        "--signal": f"B:USR1@{cluster.signal_before_seconds}",
        "--kill-on-invalid-dep": "yes",
    }
    lines = [f"{name}={_option(str(value))}" for name, value in named.items() if value is not None]
    return (*lines, "--requeue" if cluster.requeue else "--no-requeue", *asked.extra)


def _option(value: str) -> str:
    """Slurm reads quotes in #SBATCH lines as the shell does."""
    return value if value == shlex.quote(value) else f'"{value}"'


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megagrow.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # bash, not HTML: the filter `sh` quotes
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template("job.sbatch.j2")
