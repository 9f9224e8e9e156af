"""The verb verify: check a checkpoint, and with --deep compare it with its parent."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megagrow.cli.output import say, show_error
from megagrow.cli.stages import newest_checkpoint, stage_index
from megagrow.config import load
from megagrow.config.paths import FamilyPaths

if TYPE_CHECKING:
    from megagrow.evaluate.named_tokens import NamedTokens


def verify_checkpoint(
    path: Path,
    overrides: list[str],
    stage: str | None,
    parent: Path | None,
    as_json: bool,
    tokens: "NamedTokens | None",
) -> int:
    """Print the findings on a checkpoint; return 2 if a check failed or a promise was found broken, else 0.

    With `tokens`, it is also run beside its parent.
    """
    from megagrow.checkpoint.formats import resolve_directory
    from megagrow.checkpoint.proof.verify import verify

    family, shape = None, None
    if stage is not None:
        family = load(path, overrides)
        index = stage_index(family, stage)
        shape = family.stages[index].model
        path = newest_checkpoint(family, index)
        if parent is None and index > 0 and path == FamilyPaths(family).stage(index).first_checkpoint:
            parent = newest_checkpoint(family, index - 1)
    path = resolve_directory(path)
    # verify_deep checks the ancestry itself, and also accepts reshards
    findings = verify(path, None if tokens is not None else parent, shape=shape)
    record = None
    if tokens is not None and not findings.faults:
        from megagrow.cli.checkpoint.deep import run_deep

        record = run_deep(path, parent, family, tokens)
    if as_json:
        deep_result = {"deep": record.model_dump(mode="json")} if record else {}
        print(json.dumps({"checkpoint": str(path), **vars(findings), **deep_result}, indent=1))
    else:
        for check in findings.checks:
            say(f"ok    {check}")
        for left in findings.unchecked:
            say(f"not checked: {left}")
        for fault in findings.faults:
            show_error(fault)
        say(f"{path}: {findings.tensors} tensors, {findings.values:,} values, {len(findings.faults)} faults")
        if record:
            from megagrow.cli.checkpoint.deep import show_deep

            show_deep(record)
    return 2 if findings.faults or (record and record.verdict == "broken") else 0
