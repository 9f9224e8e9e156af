"""The verb verify, and where a stage's newest checkpoint is."""

import json
import sys
from pathlib import Path

from megagrow.cli.stages import newest, stage_index
from megagrow.config import load


def verify_checkpoint(
    path: Path, overrides: list[str], stage: str | None, parent: Path | None, as_json: bool, *, deep: bool
) -> int:
    """Print the findings on a checkpoint; return 0 if it is whole (with `deep`: and what it promises), else 2."""
    from megagrow.checkpoint.proof.verify import verify

    family = None
    if stage is not None:
        family = load(path, overrides)
        index = stage_index(family, stage)
        path = newest(family, index)
        if parent is None and index > 0 and path.name == "iter_0000000":
            parent = newest(family, index - 1)
    findings = verify(path, None if deep else parent)  # deep asks for the descent itself: a reshard is one too
    record = None
    if deep and not findings.faults:
        from megagrow.cli.checkpoint.deep import run_deep

        record = run_deep(path, parent, family)
    if as_json:
        seen = {"deep": record.model_dump(mode="json")} if record else {}
        print(json.dumps({"checkpoint": str(path), **vars(findings), **seen}, indent=1))
    else:
        for check in findings.checks:
            print(f"ok    {check}")
        for fault in findings.faults:
            print(f"megagrow: error: {fault}", file=sys.stderr)
        print(f"{path}: {findings.tensors} tensors, {findings.values:,} values, {len(findings.faults)} faults")
        if record:
            from megagrow.cli.checkpoint.deep import show_deep

            show_deep(record)
    return 2 if findings.faults or (record and record.verdict == "broken") else 0
