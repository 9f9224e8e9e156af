"""The base class of every section: frozen, keyword-only, and closed to unknown keys."""

from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

Seed = Annotated[int, Field(ge=0, lt=2**32)]
"""A seed; numpy, which orders the data, takes no larger one."""


class Section(BaseModel):
    """A frozen section of a family.yaml; unknown keys are errors, and so are infinite numbers and NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, defer_build=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _check_truth(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse a truth value where a number or text is wanted: pydantic would take true for 1."""
        if isinstance(value, bool) and not _takes_bool(cls.model_fields[str(info.field_name)].annotation):
            raise ValueError(
                "yaml reads a bare yes, no, on, off, true or false as a truth value: write a number, or text in quotes"
            )
        return value


def _takes_bool(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_bool(argument) for argument in get_args(annotation))
