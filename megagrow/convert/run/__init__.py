"""A whole conversion: check the source, make the files, publish the target."""

from megagrow.convert.run.dry_run import dry_run
from megagrow.convert.run.expand import Target, expand
from megagrow.convert.run.export import export, order_export

__all__ = ["Target", "dry_run", "expand", "export", "order_export"]
