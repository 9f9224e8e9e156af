"""What a family asks of a Slurm cluster: where its jobs may run, for how long, and what stands around them.

Only what Slurm must be told is here. How many nodes a stage takes follows from its layout and the ranks of a node,
so it cannot be said twice. Settings narrow down in one order: the section, `without_gpu` for the jobs that need
none, `jobs` for one kind, and a stage's own `cluster` for its training. Nothing secret may stand here: all of it is
rendered into scripts that others can read.
"""

import re
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megagrow.config.base import Section

JobKind = Literal["data", "train", "convert", "verify", "export", "report"]

_WORD = r"^[^\s\"'`$\\]+$"
_TIME = r"^(\d+-\d+(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})$"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_ASSIGNED = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=[\"']?[^\s\"'$`;]")
"""An assignment of a literal in a line of bash: what comes from `$(cat file)` or another variable is no secret here."""


class JobResources(Section):
    """What one kind of job may ask differently; what is not said is taken from the section above."""

    account: str | None = Field(None, pattern=_WORD)
    partition: str | None = Field(None, pattern=_WORD)
    qos: str | None = Field(None, pattern=_WORD)
    time: str | None = Field(None, pattern=_TIME, description='limit of one start: "HH:MM:SS" or "D-HH:MM:SS"')
    cpus_per_task: int | None = Field(None, gt=0, description="cores of a task; a training task is a whole node")
    memory: str | None = Field(None, pattern=r"^\d+[KMGT]?$", description='of a node, as --mem has it: "64G"; "0": all')
    sbatch_extra: tuple[str, ...] = Field((), description="further options of sbatch, such as --constraint=h100")

    @field_validator("time", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        if isinstance(value, int):
            # yaml reads 24:00:00 as a number to the base of 60, which Slurm would then take for minutes
            raise ValueError('write it in quotes: time: "24:00:00"')
        return value

    @field_validator("sbatch_extra")
    @classmethod
    def _are_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"{option!r} is no option of sbatch: write one a line, such as --constraint=h100")
        return value


class Container(Section):
    """What the jobs run in. The working directory is mounted under its own name."""

    runtime: Literal["none", "pyxis", "apptainer"] = Field("none", description="pyxis: enroot images by srun")
    image: str | None = Field(None, pattern=_WORD, description="enroot's name or file, or a .sif file")
    mounts: tuple[str, ...] = Field((), description="host path, or host:inside")

    @field_validator("mounts")
    @classmethod
    def _are_paths(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for mount in value:
            if not re.match(_WORD, mount) or "," in mount:
                raise ValueError(f"{mount!r} is no mount: write a path or host:inside, without blanks and commas")
        return value

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.runtime != "none" and self.image is None:
            raise ValueError(f"runtime {self.runtime} needs an image")
        if self.runtime == "none" and (self.image or self.mounts):
            raise ValueError(f"image {self.image} and mounts need a runtime: pyxis or apptainer")
        if self.runtime == "pyxis" and self.image and self.image.endswith(".sqsh") and "/" not in self.image:
            raise ValueError(f"pyxis takes image {self.image} for a name in a registry: write ./{self.image}")
        return self


class Cluster(JobResources):
    """A Slurm cluster."""

    time: str = Field("04:00:00", pattern=_TIME, description='limit of one start: "HH:MM:SS" or "D-HH:MM:SS"')
    gpus_per_node: int = Field(0, ge=0, description="that training takes of a node; 0: it runs on CPUs")
    ranks_per_node: int | None = Field(None, gt=0, description="of training; default: gpus_per_node, or 1")
    memory_per_gpu: float | None = Field(
        None, gt=0, description="GB of one GPU; given, a stage whose weights and optimizer need more is refused"
    )
    without_gpu: JobResources = Field(JobResources(), description="data, convert, verify and report")
    jobs: dict[JobKind, JobResources] = Field({}, description="one kind of job: it goes before all but a stage's own")
    convert_tasks: int = Field(1, gt=0, description="tasks of srun that share a conversion")
    signal_before_seconds: int = Field(
        300, gt=0, le=65535, description="before the time limit ranks are told to save: one step and one save must fit"
    )
    requeue: bool = Field(
        True, description="an unfinished job goes back into the queue; false: it submits a successor instead"
    )
    retries: int = Field(3, ge=0, description="further starts that a job gets without any progress; then it has failed")
    python: str = Field("python", pattern=_WORD, description="interpreter on the nodes, or in the container")
    container: Container = Container()
    modules: tuple[str, ...] = Field((), description="of `module load`")
    environment: dict[str, str] = Field({}, description="exported as it stands, NCCL's variables for instance; no keys")
    setup: tuple[str, ...] = Field(
        (), description="lines of bash before the job's own: activate a venv, fix an address"
    )

    @field_validator("modules")
    @classmethod
    def _are_words(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for module in value:
            if not re.match(_WORD, module):
                raise ValueError(f"{module!r} is no name of a module")
        return value

    @model_validator(mode="after")
    def _keeps_no_secret(self) -> Self:
        for name, value in self.environment.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"environment: {name!r} is no name of a variable")
            if re.search(r"[$`\n]", value):
                raise ValueError(
                    f"environment: {name}={value!r} is exported as it stands; what bash expands is for setup"
                )
        assigned = [name for line in self.setup for name in _ASSIGNED.findall(line)]
        for place, names in (("environment", list(self.environment)), ("setup", assigned)):
            for name in names:
                if _SECRET.search(name):
                    raise ValueError(
                        f"{place}: {name} looks like a secret, and scripts and records are read by others: "
                        "export it in the shell that launches; sbatch hands it on"
                    )
        return self
