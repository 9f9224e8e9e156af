"""What a user may write as a name, a path or a number in family.yaml, through the command line."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.reference.command import error_of, megagrow
from tests.unit.family.test_config import TREE


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A family.yaml in a directory of its own."""
    return write(tmp_path)


def write(place: Path, text: str = "", **top: Any) -> Path:
    tree = {**TREE, "save": str(place / "save"), "budget": {"tokens_per_parameter": 1}, **top}
    (place / "family.yaml").write_text(yaml.safe_dump(tree) + text)
    return place / "family.yaml"


# issue 12: D17
@pytest.mark.parametrize("name", ["lock", "records.jsonl", "report.html", "data", "jobs"])
def test_a_stage_cannot_have_the_name_of_a_file_beside_it(name: str, file: Path) -> None:
    line = error_of(megagrow("plan", file, f"stages.0.name={name}"))
    assert f"stages.0.name '{name}' is taken: <save>/{name} is the" in line, line
    assert megagrow("plan", file, f"stages.0.name={name}2").returncode == 0


# issue 12: D18
def test_a_tilde_is_the_home_directory(file: Path, tmp_path: Path) -> None:
    done = megagrow("report", file, "save=~/runs/x", cwd=tmp_path, HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "home" / "runs" / "x" / "report.html").is_file() and not (tmp_path / "~").exists()
    # the shell leaves this one as it is
    (tmp_path / "home" / "family.yaml").write_text(file.read_text())
    assert megagrow("plan", "~/family.yaml", cwd=tmp_path, HOME=str(tmp_path / "home")).returncode == 0
    line = error_of(megagrow("inspect", "~/no", cwd=tmp_path, HOME=str(tmp_path / "home")))
    assert f"{tmp_path}/home/no" in line
    assert "there is no user 'nobody-here'" in error_of(megagrow("plan", file, "save=~nobody-here/x"))


# issue 12: D18
@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("save=$SCRATCH/x", "save"),
        ("data.sources.0.paths=[$SCRATCH/text]", "data.sources.0.paths.0"),
        ("data.sources=[{prefix: $SCRATCH/text}]", "data.sources.0.prefix"),
        ("tokenizer.tokenizer_model=$SCRATCH/t.model", "tokenizer.tokenizer_model"),
        ("cluster.container={runtime: apptainer, image: x.sif, mounts: [$SCRATCH]}", "cluster.container.mounts.0"),
    ],
)
def test_a_variable_is_refused_in_every_path(override: str, key: str, file: Path, tmp_path: Path) -> None:
    for verb in ("plan", "report"):
        line = error_of(megagrow(verb, file, override, cwd=tmp_path))
        assert f"{key}: " in line and "variables are not expanded here" in line, line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["family.yaml"]


# issue 12: D18
@pytest.mark.parametrize(
    "line",
    [
        ["convert", "{file}", "--stage", "large", "--source=$SCRATCH/x"],
        ["convert", "{file}", "--stage", "large", "--save=$SCRATCH/x"],
        ["convert", "{place}", "$SCRATCH/x"],
        ["verify", "$SCRATCH/x"],
        ["diff", "{place}", "$SCRATCH/x"],
    ],
)
def test_a_variable_is_refused_on_the_command_line(line: list[str], file: Path, tmp_path: Path) -> None:
    words = [word.format(file=file, place=tmp_path) if "{" in word else word for word in line]
    assert "'$SCRATCH/x' has a $" in error_of(megagrow(*words, cwd=tmp_path))


# issue 12: D18
@pytest.mark.parametrize(
    ("paths", "save"),
    [
        (["corpus"], "corpus/run"),
        (["corpus"], "corpus"),
        (["."], "runs/x"),
        (["corpus/**/*.jsonl"], "corpus/a/run"),
        (["corpus/*"], "corpus/run"),
        (["corpus/*/*.jsonl"], "corpus/run"),
        (["link"], "corpus/run"),
        (["other", "corpus/"], "link/run"),
    ],
)
def test_a_save_inside_the_corpus_is_refused(paths: list[str], save: str, tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    (tmp_path / "link").symlink_to("corpus")
    file = write(tmp_path, save=save, data={"sources": [{"name": "mine", "paths": paths}]})
    line = error_of(megagrow("plan", file, cwd=tmp_path))
    assert f"save '{save}' is inside the corpus" in line and "of source 'mine'" in line, line


# issue 12: D18
@pytest.mark.parametrize(
    ("paths", "save"),
    [
        (["corpus"], "corpus/.run"),
        (["corpus"], "corpus2"),
        (["run/corpus"], "run"),
        (["corpus/*.txt"], "corpus/run"),
        (["corpus/*/*.txt"], "corpus/run"),
        (["corpus/**/*.jsonl"], "runs"),
        (["python-stdlib"], "python-stdlib/x"),
        (["a.txt"], "a"),
    ],
)
def test_a_save_beside_the_corpus_is_taken(paths: list[str], save: str, tmp_path: Path) -> None:
    file = write(tmp_path, save=save, data={"sources": [{"paths": paths}]})
    assert megagrow("plan", file, cwd=tmp_path).returncode == 0


# issue 12: D18
def test_a_seed_has_an_upper_bound(file: Path, tmp_path: Path) -> None:
    line = error_of(megagrow("plan", file, "seed=4294967296"))
    assert "seed: Input should be less than 4294967296, not 4294967296" in line, line
    assert megagrow("plan", file, "seed=4294967295").returncode == 0


# issue 12: D18
@pytest.mark.parametrize(
    ("text", "key", "words"),
    [
        ("seed: 0123", "seed", "yaml reads a bare 0123 as the number 83: write text in quotes"),
        ("seed: 1:40:00", "seed", "yaml reads a bare 1:40:00 as the number 6000: write text in quotes"),
        ("seed: yes", "seed", "yaml reads a bare yes, no, on, off, true or false as a truth value"),
        ("training: {time_limit_minutes: 1:40}", "training.time_limit_minutes", "a bare 1:40 as the number 100"),
        ("checkpoint: {save_interval: 010}", "checkpoint.save_interval", "a bare 010 as the number 8"),
        ("evaluation: {eval_samples: 089}", "evaluation.eval_samples", "a bare 089 as text in one version only"),
        ("trackers: {wandb: {project: no}}", "trackers.wandb.project", "text in quotes, not False"),
        ("trackers: {wandb: {project: 123}}", "trackers.wandb.project", "not 123: write it in quotes"),
        ("trackers: {wandb: {project: 2026-01-02}}", "trackers.wandb.project", "not 2026-01-02: write it in quotes"),
        ("cluster: {environment: {on: x}}", "the key on is not text", "write it in quotes"),
    ],
)
def test_what_yaml_would_read_as_another_value_asks_for_quotes(text: str, key: str, words: str, tmp_path: Path) -> None:
    line = error_of(megagrow("plan", write(tmp_path, text)))
    assert key in line and words in line, line


# issue 12: D18
def test_a_time_needs_no_quotes_and_a_switch_may_be_a_word(tmp_path: Path) -> None:
    text = (
        "cluster: {time: 1:40:00, jobs: {data: {time: 24:00:00}}, environment: {WHEN: '0123'}}\n"
        "trackers: {tensorboard: yes}\ntraining: {hang_timeout_seconds: 1e3}\n"
    )
    done = megagrow("launch", write(tmp_path, text), "--dry-run")
    assert done.returncode == 0, done.stderr
    assert "#SBATCH --time=1:40:00" in done.stdout and "#SBATCH --time=24:00:00" in done.stdout
    assert megagrow("plan", write(tmp_path), "cluster.time=1:40:00").returncode == 0


# issue 12: D18
def test_a_number_is_finite(file: Path) -> None:
    assert "should be a finite number" in error_of(megagrow("plan", file, "budget.tokens_per_parameter=.inf"))
