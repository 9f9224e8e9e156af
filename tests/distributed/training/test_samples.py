"""Samples of output in README and docs are what their commands print, but for the numbers of a run.

The demo itself takes minutes, so the commands run on a demo with a hundredth of its tokens.
"""

import re
from pathlib import Path

import pytest

from tools.docs.samples import PAGES, Sample, run, samples, without_numbers

SHORT = ("budget.tokens_per_parameter=0.05", "evaluation.eval_samples=16")
SAMPLES = list(samples())


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory in which a short demo has run."""
    directory = tmp_path_factory.mktemp("demo")
    run("megagrow run examples/demo/family.yaml", directory, *SHORT)
    return directory


def on_the_newest(command: str, directory: Path) -> str:
    """A command with its iterations replaced by those that the short demo has."""
    for named in re.findall(r"runs/demo/\w+/checkpoints/iter_\d+", command):
        checkpoints = directory / Path(named).parent
        newest = (checkpoints / "latest_checkpointed_iteration.txt").read_text()
        command = command.replace(named, f"{Path(named).parent}/iter_{int(newest):07d}")
    return command


def test_pages_have_samples() -> None:
    assert {"demo", "plan"} <= {sample.name for sample in SAMPLES}
    markers = sum(page.read_text(encoding="utf-8").count("<!-- sample:") for page in PAGES)
    assert markers == 2 * len(SAMPLES), "a marker without its partner, or without a fenced block"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda sample: f"{sample.page.name}:{sample.name}")
def test_a_sample_is_what_its_command_prints(sample: Sample, demo: Path) -> None:
    more = SHORT if "examples/demo" in sample.command else ()
    found = run(on_the_newest(sample.command, demo), demo, *more)
    # as sets: a table of other numbers may be as wide as to be cut in two, which repeats a column
    assert set(without_numbers(found)) == set(without_numbers(sample.output))


def test_only_numbers_are_masked() -> None:
    assert without_numbers("loss  3.12 nats, 1,572 of 204 k\n───── -1.5e-8\n\n") == "loss # nats, # of # ─ #".split()
    assert without_numbers("iter_0000470 TP2 4->6") != without_numbers("iter_0000470 TP2 4=>6")
