"""The Slurm settings of a family: where its jobs may run, for how long, and in which environment.

Only settings that Slurm needs are here. The number of nodes of a stage follows from its layout and the ranks per
node, so it cannot be specified twice. Settings are resolved from general to specific: the section itself,
`without_gpu` for jobs that need no GPU, `jobs` for one kind of job, and a stage's own `cluster` for its training.
Secrets are rejected: every setting is rendered into scripts that others can read.
"""

import re
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from megagrow.config.base import Section
from megagrow.config.user_paths import UserText, expand_path

JobKind = Literal["data", "train", "convert", "verify", "export", "report"]

_WORD = r"^[^\s\"'`$\\]+$"
_TIME = r"^(\d+-\d+(:\d{1,2}){0,2}|\d+(:\d{1,2}){0,2})$"
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SECRET = re.compile(r"(^|_)(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIALS?)(_|$)", re.IGNORECASE)
_ASSIGNED = re.compile(r"\b([A-Za-z_][A-Za-z0-9_]*)=[\"']?[^\s\"'$`;]")
"""Assignment of a literal in a line of bash. A value from `$(cat file)` or another variable reveals no secret."""


class JobResources(Section):
    """Slurm settings that one kind of job may override; unset ones are inherited from the section above."""

    account: str | None = Field(None, pattern=_WORD)
    partition: str | None = Field(None, pattern=_WORD)
    qos: str | None = Field(None, pattern=_WORD)
    time: str | None = Field(None, pattern=_TIME, description='time limit per start: "HH:MM:SS" or "D-HH:MM:SS"')
    cpus_per_task: int | None = Field(None, gt=0, description="cores per task; a training task is a whole node")
    memory: str | None = Field(
        None, pattern=r"^\d+[KMGT]?$", description='memory per node, as for sbatch --mem: "64G"; "0": all of it'
    )
    sbatch_extra: tuple[str, ...] = Field((), description="additional sbatch options, such as --constraint=h100")

    @field_validator("time", mode="before")
    @classmethod
    def _check_quoted(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            raise ValueError('write it in quotes: time: "24:00:00"')  # Slurm takes a number for minutes
        return value

    @field_validator("sbatch_extra")
    @classmethod
    def _check_options(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for option in value:
            if not option.startswith("-") or "\n" in option:
                raise ValueError(f"{option!r} is not an sbatch option: write one per entry, such as --constraint=h100")
        return value


class Container(Section):
    """The container that jobs run in. The working directory is mounted at its own path."""

    runtime: Literal["none", "pyxis", "apptainer"] = Field("none", description="pyxis: enroot images, started by srun")
    image: str | None = Field(None, pattern=_WORD, description="enroot image name or file, or a .sif file")
    mounts: tuple[UserText, ...] = Field((), description="host paths, or host:inside")
    mount_home: bool | None = Field(None, description="whether HOME is mounted; unset: as the runtime is configured")

    @field_validator("image")
    @classmethod
    def _expand_image(cls, value: str | None) -> str | None:
        return None if value is None else str(expand_path(value))

    @field_validator("mounts")
    @classmethod
    def _check_mounts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for mount in value:
            if not re.match(_WORD, mount) or "," in mount:
                raise ValueError(f"{mount!r} is not a mount: write a path or host:inside, without blanks or commas")
        return value

    @model_validator(mode="after")
    def _check_image(self) -> Self:
        if self.runtime != "none" and self.image is None:
            raise ValueError(f"runtime {self.runtime} needs an image")
        if self.runtime == "none" and (self.image or self.mounts):
            raise ValueError(f"image {self.image} and mounts need a runtime: pyxis or apptainer")
        if self.runtime == "none" and self.mount_home is not None:
            raise ValueError("mount_home needs a runtime: pyxis or apptainer")
        if self.runtime == "pyxis" and self.image and self.image.endswith(".sqsh") and "/" not in self.image:
            raise ValueError(f"pyxis takes image {self.image} for a registry name: write ./{self.image}")
        return self

    def host_path(self, inside: str) -> str | None:
        """Return the host's path of a path that jobs use, by the mounts; None if this shows none.

        None does not mean that jobs cannot see the path: it may be part of the image, or the site may mount it for
        every container.
        """
        if self.runtime == "none":
            return inside
        here = str(Path.cwd())
        pairs = [(here, here), *((mount.split(":") * 2)[:2] for mount in self.mounts)]
        path = Path(here) / inside
        found = [(host, target) for host, target in pairs if path.is_relative_to(target)]
        if not found:
            return None
        host, target = max(found, key=lambda pair: len(Path(pair[1]).parts))  # the innermost mount covers the others
        return str(Path(here) / host / path.relative_to(target))


class Cluster(JobResources):
    """The Slurm cluster that `megagrow launch` submits jobs to."""

    time: str = Field("04:00:00", pattern=_TIME, description='time limit per start: "HH:MM:SS" or "D-HH:MM:SS"')
    gpus_per_node: int = Field(0, ge=0, description="GPUs per node for training; 0: train on CPUs")
    ranks_per_node: int | None = Field(
        None, gt=0, description="training ranks per node; default: gpus_per_node, or 1 if that is 0"
    )
    memory_per_gpu: float | None = Field(
        None, gt=0, description="GB of one GPU; if set, a stage whose weights and optimizer need more is rejected"
    )
    without_gpu: JobResources = Field(JobResources(), description="settings for every kind of job but train")
    jobs: dict[JobKind, JobResources] = Field(
        {}, description="settings per kind of job; only a stage's own cluster section overrides them"
    )
    convert_tasks: int = Field(1, gt=0, description="srun tasks that share a conversion")
    signal_before_seconds: int = Field(
        300,
        gt=0,
        le=65535,
        description="seconds before the time limit at which ranks are signaled to save; one step and one save must fit",
    )
    requeue: bool = Field(True, description="requeue an unfinished job; false: it submits a successor instead")
    retries: int = Field(3, ge=0, description="further starts without progress before a job counts as failed")
    python: UserText = Field("python", pattern=_WORD, description="interpreter on the nodes, or in the container")
    container: Container = Container()
    modules: tuple[str, ...] = Field((), description="modules for `module load`")
    environment: dict[str, str] = Field(
        {}, description="variables that are exported literally, such as NCCL's; no keys or tokens"
    )
    setup: tuple[str, ...] = Field(
        (), description="lines of bash that run before the job: activate a venv, set an address"
    )

    @field_validator("modules")
    @classmethod
    def _check_modules(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for module in value:
            if not re.match(_WORD, module):
                raise ValueError(f"{module!r} is not a module name")
        return value

    @model_validator(mode="after")
    def _check_no_secrets(self) -> Self:
        for name, value in self.environment.items():
            if not _NAME.fullmatch(name):
                raise ValueError(f"environment: {name!r} is not a variable name")
            if re.search(r"[$`\n]", value):
                raise ValueError(
                    f"environment: {name}={value!r} is exported literally; move what bash should expand to setup"
                )
        assigned = [name for line in self.setup for name in _ASSIGNED.findall(line)]
        for section, names in (("environment", list(self.environment)), ("setup", assigned)):
            for name in names:
                if _SECRET.search(name):
                    raise ValueError(
                        f"{section}: {name} looks like a secret, and others can read scripts and records: "
                        "export it in the shell that runs `megagrow launch`; sbatch passes it on"
                    )
        return self
