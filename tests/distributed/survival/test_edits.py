"""A family.yaml that is edited after a stage has begun: refused with both values, by every verb that reads it.

One family is built once: `small` finished, `large` grown from it and not trained. Copies of it are in other states.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.distributed.ranks import families
from tests.distributed.ranks.families import LLAMA, TOKENS_PER_STEP
from tests.reference.command import error_of, megagrow

pytestmark = pytest.mark.timeout(900)
STEPS, SAVED = 6, 3
SIZES = LLAMA | {"num_layers": 2}
CLUSTER = "cluster.retries=1"  # `launch` needs the section
OVERRIDE = "stages.0.schedule.override_opt_param_scheduler=true"
EDITS = {
    "batch": ("stages.0.batch.global_batch_size=16", "batch.global_batch_size=8, not 16"),
    "precision": ("stages.0.precision=bf16", "precision=fp32, not bf16"),
    "shape": ("stages.0.model.init_method_std=0.01", "model.init_method_std=0.02, not 0.01"),
    "peak": ("stages.0.schedule.max_lr=1e-3", "max_lr=0.003, not 0.001"),
    "decay": ("stages.0.schedule.lr_decay_style=linear", "schedule.lr_decay_style=cosine, not linear"),
    "steps": (f"stages.0.train_tokens={5 * TOKENS_PER_STEP}", "iterations=6, not 5"),
    "seed": ("seed=7", "seed=1234, not 7"),
    "name": ("name=other", "name=tiny, not other"),
    "split": ("data.split='80,19,1'", "data.split=90,9,1, not 80,19,1"),
    "text": ("data.sources.0.weight=2.0", "data.sources.0.weight=1.0, not 2.0"),
    "tokenizer": ("tokenizer.model_type=unigram", "tokenizer.model_type=bpe, not unigram"),
}
GROWN = {
    "moments": ("stages.1.growth.moments=reset", "growth.moments=asymmetric, not reset"),
    "operator": ("stages.1.growth.new_layers=copy", "growth.new_layers=fresh, not copy"),
    "shape": ("stages.1.model.num_layers=4", "model.num_layers=3, not 4"),
    "precision": ("stages.1.precision=bf16", "precision=fp32, not bf16"),
}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The family.yaml of the family, which keeps everything beside it."""
    root = tmp_path_factory.mktemp("edits")
    tokens = STEPS * TOKENS_PER_STEP
    small = families.stage("small", SIZES, train_tokens=tokens)
    large = families.stage("large", SIZES | {"num_layers": 3}, train_tokens=tokens)
    text = families.write_text(root / "text.jsonl", 100)
    file = families.write_family(root / "built", text, [small, large], checkpoint={"save_interval": SAVED, "keep": 7})
    for line in (["data", file], ["train", file, "--stage", "small"], ["convert", file, "--stage", "large"]):
        done = megagrow(*line)
        assert done.returncode == 0, done.stderr
    return file


@pytest.fixture(scope="module")
def begun(built: Path) -> str:
    """An override: the family with `small` at its first checkpoint, and nothing grown from it."""
    save = families.rewind(built.with_suffix(""), built.with_name("begun"), "small", SAVED)
    path = save / "small" / "records.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line).get("iteration", STEPS) <= SAVED]
    path.write_text("".join(kept))
    shutil.rmtree(save / "large")
    return f"save={save}"


# issue 12: D15
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_a_finished_stage_is_refused_by_the_report(edit: str, built: Path) -> None:
    override, words = EDITS[edit]
    line = error_of(megagrow("report", built, override))
    assert "stages.0 ('small') is finished and was trained with" in line and words in line, line


# issue 12: D15
@pytest.mark.parametrize("edit", GROWN)
def test_an_edit_of_a_stage_that_is_grown_and_not_trained_is_refused(edit: str, built: Path) -> None:
    override, words = GROWN[edit]
    for verb in (("status", built), ("report", built)):
        line = error_of(megagrow(*verb, override))
        assert "stages.1 ('large') is at iteration 0 and was made with" in line and words in line, line
        assert "megagrow convert FAMILY --stage large --overwrite" in line


# issue 12: D15
@pytest.mark.parametrize("verb", ["status", "run", "launch"])
@pytest.mark.parametrize("edit", ["batch", "precision", "peak"])
def test_every_verb_refuses_an_edit_of_a_stage_in_training(verb: str, edit: str, built: Path, begun: str) -> None:
    override, words = EDITS[edit]
    more = [CLUSTER, "--dry-run"] if verb == "launch" else []
    line = error_of(megagrow(verb, built, begun, override, *more))
    assert f"stages.0 ('small') is at iteration {SAVED} and was trained with" in line and words in line, line


# issue 12: D15
@pytest.mark.parametrize(
    ("stage", "override", "words"),
    [
        ("small", *EDITS["batch"]),
        ("small", *EDITS["precision"]),
        ("large", *GROWN["moments"]),
        ("large", *GROWN["precision"]),
        ("large", *EDITS["seed"]),
    ],
)
def test_training_refuses_what_the_report_refuses(
    stage: str, override: str, words: str, built: Path, begun: str
) -> None:
    where = [begun] if stage == "small" else []
    assert words in error_of(megagrow("train", built, "--stage", stage, *where, override))


# issue 12: D15
def test_data_that_was_prepared_from_another_text_is_refused(built: Path, begun: str, tmp_path: Path) -> None:
    save = tmp_path / "save"
    shutil.copytree(begun.removeprefix("save="), save, symlinks=True)
    prepared = save / "data" / "prepared.json"
    tree = json.loads(prepared.read_text())
    tree["sources"]["made"]["tokens"] += 1
    prepared.write_text(json.dumps(tree))
    assert "prepared.made=" in error_of(megagrow("status", built, f"save={save}"))


# issue 12: D15
def test_what_does_not_make_weights_may_change(built: Path, begun: str) -> None:
    free = ["evaluation.eval_interval=3", "checkpoint.keep=3", "training.non_finite=skip", "data.workers=2"]
    assert megagrow("report", built, *free).returncode == 0
    assert megagrow("status", built, begun, *free, "stages.0.recompute_granularity=full").returncode == 0
    assert megagrow("status", built, begun, "stages.0.schedule.max_lr=1e-3", OVERRIDE).returncode == 0
    assert (
        megagrow("status", built, "stages.1.schedule.max_lr=1e-3", "stages.1.batch.global_batch_size=4").returncode == 0
    )


# issue 12: D15
def test_a_finished_stage_may_get_more_tokens_and_its_records_say_what_was_spent(built: Path, tmp_path: Path) -> None:
    save = tmp_path / "more"
    shutil.copytree(built.with_suffix(""), save, symlinks=True)
    more = [f"save={save}", f"stages.0.train_tokens={9 * TOKENS_PER_STEP}"]
    assert "set stages.0.schedule.override_opt_param_scheduler=true" in error_of(megagrow("report", built, *more))
    before = _row(megagrow("report", built, "--json").stdout, 0)
    done = megagrow("train", built, "--stage", "small", *more, OVERRIDE)
    assert done.returncode == 0, done.stderr
    report = megagrow("report", built, *more, OVERRIDE, "--json").stdout
    row, child = _row(report, 0), _row(report, 1)
    assert (row["state"], row["iterations"], row["tokens"]) == ("finished", 9, 9 * TOKENS_PER_STEP)
    assert row["flops"] == pytest.approx(before["flops"] * 9 / STEPS)
    assert child["loss_before_growth"] == before["loss_at_end"], "the loss of the checkpoint that it grew from"
    assert "iterations=9, not 6" in error_of(megagrow("report", built, f"save={save}")), "the edit was taken back"
    manifest = json.loads((save / "small" / "checkpoints" / "iter_0000009" / "megagrow.json").read_text())
    history = manifest["history"]
    assert (history["state"], history["iteration"], history["tokens"]) == ("finished", 9, 9 * TOKENS_PER_STEP)
    assert [(change["iteration"], change["key"], change["after"]) for change in history["changes"]] == [
        (STEPS, "iterations", 9)
    ]


# issue 12: D15
def test_the_history_is_written_at_the_begin_and_carried_by_every_checkpoint(built: Path) -> None:
    small, large = built.with_suffix("") / "small", built.with_suffix("") / "large"
    histories: list[dict[str, Any]] = [
        json.loads((small / "checkpoints" / f"iter_{iteration:07d}" / "megagrow.json").read_text())["history"]
        for iteration in (SAVED, STEPS)
    ]
    assert [(history["state"], history["tokens"]) for history in histories] == [
        ("training", SAVED * TOKENS_PER_STEP),
        ("finished", STEPS * TOKENS_PER_STEP),
    ]
    assert (
        histories[0]["settings"]
        == histories[1]["settings"]
        == json.loads((small / "history.json").read_text())["settings"]
    )
    assert histories[0]["settings"]["batch"] == yaml.safe_load(built.read_text())["stages"][0]["batch"]
    grown = json.loads((large / "checkpoints" / "iter_0000000" / "megagrow.json").read_text())["history"]
    assert (grown["state"], grown["origin"]["stage"], grown["origin"]["iteration"]) == ("grown", "small", STEPS)
    assert "batch" not in grown["settings"] and grown["settings"]["growth"]["moments"] == "asymmetric"


# issue 12: D15
def test_an_older_checkpoint_is_compared_in_what_it_records(built: Path, begun: str, tmp_path: Path) -> None:
    save = tmp_path / "older"
    shutil.copytree(begun.removeprefix("save="), save, symlinks=True)
    path = save / "small" / "checkpoints" / f"iter_{SAVED:07d}" / "megagrow.json"
    manifest = json.loads(path.read_text())
    del manifest["history"]
    path.write_text(json.dumps(manifest))
    where = f"save={save}"
    for edit in ("precision", "peak", "steps"):
        override, words = EDITS[edit]
        assert words in error_of(megagrow("status", built, where, override))
    unknown = "stages.0.batch.micro_batch_size=4"
    assert megagrow("status", built, where, unknown).returncode == 0, "an older checkpoint has no batch"
    assert "batch.micro_batch_size=2, not 4" in error_of(megagrow("status", built, begun, unknown))


# issue 12: D15
def test_a_stage_may_be_grown_again_with_other_settings(built: Path, tmp_path: Path) -> None:
    save = tmp_path / "again"
    shutil.copytree(built.with_suffix(""), save, symlinks=True)
    line = ("convert", built, "--stage", "large", f"save={save}", GROWN["moments"][0])
    done = megagrow(*line, "--overwrite")
    assert done.returncode == 0, done.stderr
    assert megagrow("status", built, f"save={save}", GROWN["moments"][0]).returncode == 0
    assert EDITS["seed"][1] in error_of(megagrow(*line, EDITS["seed"][0], "--overwrite")), "its parent had another seed"


# issue 12: D15
def test_a_stage_of_an_equal_shape_begins_at_its_own_iteration_0(built: Path, tmp_path: Path) -> None:
    save = tmp_path / "equal"
    shutil.copytree(built.with_suffix(""), save, symlinks=True)
    shutil.rmtree(save / "large")
    more = (f"save={save}", "stages.1.model.num_layers=2")
    tracker = save / "large" / "checkpoints" / "latest_checkpointed_iteration.txt"
    assert megagrow("convert", built, *more, "--stage", "large").returncode == 0
    assert tracker.read_text() == "0", "it has not been trained"
    assert megagrow("train", built, *more, "--stage", "large").returncode == 0
    taken = [json.loads(line) for line in (save / "large" / "records.jsonl").read_text().splitlines()]
    assert [record["iteration"] for record in taken if record["kind"] == "step"] == list(range(1, STEPS + 1))


def _row(report: str, index: int) -> dict[str, Any]:
    row: dict[str, Any] = json.loads(report)["rows"][index]
    return row
