"""Names in a family's directory. No stage may have one of those beside the stages: its directory would take the place.

They are apart from `paths` because a `Family` checks the names of its stages, and `paths` is about a checked family.
"""

DATA = "data"
JOBS = "jobs"
LOCK = "lock"
RECORDS = "records.jsonl"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"

BESIDE_STAGES = {
    DATA: "the directory of the prepared data",
    JOBS: "the directory of the cluster's jobs",
    LOCK: "the lock of the run at work on the family",
    RECORDS: "the records of the family",
    REPORT: "the report",
}
"""Names in `<save>` that are no stage's, and what has them."""
