"""What happened, shown: tables for a terminal, JSON for programs, and one HTML page for everybody.

All of it is read from typed records and from the family's plan; nothing here looks at a log or imports torch.
`collect` reads, `tables` and `figures` shape, `page` writes. It works while the family is still training.
"""

from megagrow.report.collect import FamilyResult, StageResult, collect
from megagrow.report.page import render_page, write_report
from megagrow.report.tables import Column, Table, as_json, family_table, plan_table, render_table

__all__ = [
    "Column",
    "FamilyResult",
    "StageResult",
    "Table",
    "as_json",
    "collect",
    "family_table",
    "plan_table",
    "render_page",
    "render_table",
    "write_report",
]
