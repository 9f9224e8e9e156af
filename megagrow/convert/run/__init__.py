"""A whole conversion: check the source, make the files, publish the target."""

from megagrow.convert.run.convert import convert_checkpoint, read_conversion_record
from megagrow.convert.run.dry_run import forecast
from megagrow.convert.run.export import export_checkpoint, order_export
from megagrow.convert.run.target import TargetSpec

__all__ = [
    "TargetSpec",
    "convert_checkpoint",
    "export_checkpoint",
    "forecast",
    "order_export",
    "read_conversion_record",
]
