"""Reports on a family: tables for a terminal, JSON for programs, and one HTML page.

Everything is computed from typed records and the family's plan; no log is read and torch is not imported. `collect`
reads the records, `tables` and `figures` prepare them for display, `page` writes the page. All of it works while the
family is still training.
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
