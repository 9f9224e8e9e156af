"""A whole conversion: check the source, make the files, publish the target."""

from megagrow.convert.run.convert import TargetSpec, convert_checkpoint
from megagrow.convert.run.dry_run import forecast
from megagrow.convert.run.export import export_checkpoint, order_export

__all__ = ["TargetSpec", "forecast", "convert_checkpoint", "export_checkpoint", "order_export"]
