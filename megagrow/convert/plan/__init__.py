"""The plan of a conversion: its tasks, how each is carried out, and how they are cut into files. Pure."""

from megagrow.convert.plan.order import (
    DTYPE_OF_PRECISION,
    SOURCE_FILES,
    FileState,
    Format,
    Order,
    StoredPrecision,
    changed_files,
    file_states,
    same_settings,
)
from megagrow.convert.plan.plan import ConversionPlan, Task, kept_keys, plan_conversion, type_notes
from megagrow.convert.plan.recipe import Recipe, is_silenced
from megagrow.convert.plan.storage import Storage, describe_cast
from megagrow.convert.plan.tiling import TaskPart, chunks, reading_rank, units

__all__ = [
    "ConversionPlan",
    "DTYPE_OF_PRECISION",
    "FileState",
    "Format",
    "Order",
    "StoredPrecision",
    "Recipe",
    "Storage",
    "SOURCE_FILES",
    "Task",
    "TaskPart",
    "changed_files",
    "chunks",
    "describe_cast",
    "file_states",
    "is_silenced",
    "kept_keys",
    "plan_conversion",
    "reading_rank",
    "type_notes",
    "same_settings",
    "units",
]
