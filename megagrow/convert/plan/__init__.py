"""The plan of a conversion: tasks, how each is carried out, and how they are cut into files. Pure."""

from megagrow.convert.plan.order import DTYPES, Format, Order, Precision, fingerprint
from megagrow.convert.plan.plan import Conversion, Task, plan_conversion
from megagrow.convert.plan.recipe import is_copy, is_plain, silenced
from megagrow.convert.plan.tiling import Part, chunks, rank, units

__all__ = [
    "Conversion",
    "DTYPES",
    "Format",
    "Order",
    "Part",
    "Precision",
    "Task",
    "chunks",
    "fingerprint",
    "is_copy",
    "is_plain",
    "plan_conversion",
    "rank",
    "silenced",
    "units",
]
