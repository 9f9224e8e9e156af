"""Renders a job as an sbatch script that a person can read and submit by hand.

The #SBATCH lines are computed here; the commands are in `templates/job.sbatch.j2`, one template for all kinds of jobs.
Values from a family.yaml are quoted for the shell where they enter the template.
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
from megagrow.launch.resources import Resources, cluster_of, job_resources


def script_name(job: Job) -> str:
    """File name of a job's script."""
    return f"{job.name}.sbatch"


def render(family: Family, job: Job, script: Path) -> str:
    """Return the text of a job's script.

    Args:
        family: the family that the job belongs to; it has a cluster section.
        job: a job from `family_jobs`; its arguments name the family.yaml that the nodes will read.
        script: the path that the text will be written to; the script names it to people and to its successor.
    """
    cluster, request = cluster_of(family), job_resources(family, job)
    container = _container(cluster.container, request)
    in_container = '"${container[@]}" ' if container else ""
    # pyxis containers exist only under srun; any other command runs directly on the batch script's node
    run_here = f"srun --nodes=1 --ntasks=1 {in_container}" if cluster.container.runtime == "pyxis" else in_container
    # srun does not inherit this option from sbatch
    cpus = f" --cpus-per-task={request.cpus_per_task}" if request.cpus_per_task else ""
    # arguments are the verb, the file, its overrides, then options of the verb alone, which start with --stage
    end = job.arguments.index("--stage") if "--stage" in job.arguments else len(job.arguments)
    return _template().render(
        family=family,
        job=job,
        request=request,
        cluster=cluster,
        script=script,
        jobs=FamilyPaths(family).jobs,
        options=sbatch_options(family, job, request),
        python=cluster.python,
        container=container,
        in_container=in_container,
        run_here=run_here,
        cpus=cpus,
        arguments=shlex.join(job.arguments),
        family_arguments=shlex.join(job.arguments[1:end]),
    )


def _container(container: Container, request: Resources) -> tuple[str, ...]:
    """The bash words that go before a command, after srun's options, to run it in the container; empty without one."""
    image, mounts = shlex.quote(str(container.image)), container.mounts
    if container.runtime == "apptainer":
        binds = [f"--bind {shlex.quote(mount)}" for mount in mounts]
        return (
            *("apptainer", "exec"), *(["--nv"] if request.gpus_per_node else []),
            *(["--no-home"] if container.mount_home is False else []),
            *('--pwd "$PWD"', '--bind "$PWD"', *binds, image),
        )  # fmt: skip
    if container.runtime == "pyxis":
        mount_list = ",".join(["$PWD:$PWD", *(mount if ":" in mount else f"{mount}:{mount}" for mount in mounts)])
        home = {None: (), True: ("--container-mount-home",), False: ("--no-container-mount-home",)}
        return (
            f"--container-image={image}", f'--container-mounts="{mount_list}"', '--container-workdir="$PWD"',
            *home[container.mount_home],
        )  # fmt: skip
    return ()


def sbatch_options(family: Family, job: Job, request: Resources) -> tuple[str, ...]:
    """The #SBATCH lines of a job."""
    cluster = cluster_of(family)
    values = {
        "--job-name": f"{family.name}-{job.name}",
        "--comment": slurm.job_comment(family, job.name),
        "--account": request.account,
        "--partition": request.partition,
        "--qos": request.qos,
        "--nodes": request.nodes,
        "--ntasks": request.tasks if request.nodes is None else None,
        "--ntasks-per-node": None if request.nodes is None else 1,
        "--gpus-per-node": request.gpus_per_node or None,
        "--cpus-per-task": request.cpus_per_task,
        "--mem": request.memory,
        "--time": request.time,
        "--output": FamilyPaths(family).jobs / f"{job.name}-%j.log",
        "--open-mode": "append",
        "--signal": f"B:USR1@{cluster.signal_before_seconds}",
        "--kill-on-invalid-dep": "yes",
    }
    lines = [f"{name}={_option(str(value))}" for name, value in values.items() if value is not None]
    return (*lines, "--requeue" if cluster.requeue else "--no-requeue", *request.extra)


def _option(value: str) -> str:
    """Quote a value for a #SBATCH line, where Slurm reads quotes as the shell does."""
    return value if value == shlex.quote(value) else f'"{value}"'


@cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("megagrow.launch"),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # the output is bash, not HTML; the filter `sh` quotes
    )
    environment.filters["sh"] = lambda value: shlex.quote(str(value))
    return environment.get_template("job.sbatch.j2")
