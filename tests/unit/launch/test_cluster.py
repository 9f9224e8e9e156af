"""The resources a family requests, the scripts rendered from them, and what is rejected; needs no Slurm."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from megagrow.cli.family.cluster import _check_corpus
from megagrow.config import Family, load
from megagrow.config.cluster import Container
from megagrow.errors import ConfigError, DataError, UserError
from megagrow.launch.graph import Job, family_jobs
from megagrow.launch.preflight import check_family
from megagrow.launch.render import render, script_name
from megagrow.launch.resources import bytes_per_rank, check_memory, job_resources
from megagrow.launch.slurm import Queued, _gpus_in, job_comment, job_of, parse_time_limit
from megagrow.launch.submit import render_scripts
from megagrow.plan import count_parameters
from tests.unit.family.test_config import TREE
from tools.docs.package_imports import ROOT

EXAMPLE = Path("examples/llama_1b_to_8b")
GPU = {"partition": "gpu", "gpus_per_node": 8, "account": "us", "time": "12:00:00", "cpus_per_task": 96}


def write(place: Path, section: Any = None, **stage: Any) -> Path:
    tree = {**TREE, "save": str(place / "save"), "budget": {"tokens_per_parameter": 1}}
    tree["cluster"] = GPU if section is None else section
    tree["stages"] = [
        {"name": "small", "train_tokens": 1280},
        {"name": "large", "model": {"hidden_size": 24}, **stage},
    ]
    (place / "family.yaml").write_text(yaml.safe_dump(tree))
    return place / "family.yaml"


def load_family(place: Path, section: Any = None, **stage: Any) -> tuple[Family, dict[str, Job]]:
    file = write(place, section, **stage)
    family = load(file)
    return family, {job.name: job for job in family_jobs(family, file)}


def script(family: Family, job: Job) -> str:
    return render(family, job, Path("jobs") / script_name(job))


def options(text: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in text.splitlines() if line.startswith("#SBATCH ")]


# Requested resources


def test_nodes_follow_from_the_layout(tmp_path: Path) -> None:
    batch = {"micro_batch_size": 1, "global_batch_size": 32}
    family, jobs = load_family(tmp_path, None, parallel={"data_parallel_size": 32}, batch=batch)
    request = job_resources(family, jobs["train-large"])
    assert (request.nodes, request.tasks, request.ranks_per_node, request.gpus_per_node) == (4, 4, 8, 8)
    request = job_resources(family, jobs["train-small"])
    assert (request.nodes, request.ranks_per_node, request.gpus_per_node) == (1, 1, 1), "no more GPUs than ranks"
    request = job_resources(family, jobs["convert-large"])
    assert (request.nodes, request.tasks, request.gpus_per_node) == (1, 1, 0)


def test_ranks_that_do_not_fill_nodes_are_refused_with_sizes_that_would(tmp_path: Path) -> None:
    batch = {"micro_batch_size": 1, "global_batch_size": 36}
    family, jobs = load_family(tmp_path, None, parallel={"data_parallel_size": 12}, batch=batch)
    with pytest.raises(UserError, match=r"stage 'large': 12 ranks \(DP12\) do not fill nodes of 8: .* 8 or 16"):
        check_family(family, tuple(jobs.values()))


def test_the_most_specific_setting_wins(tmp_path: Path) -> None:
    cluster = GPU | {
        "sbatch_extra": ["--exclusive"],
        "without_gpu": {"partition": "cpu", "cpus_per_task": 4},
        "jobs": {"convert": {"memory": "64G", "partition": "fat", "sbatch_extra": ["--constraint=big"]}},
        "convert_tasks": 3,
    }
    family, jobs = load_family(tmp_path, cluster, cluster={"time": "2-00:00:00", "partition": "long"})
    found = {name: job_resources(family, job) for name, job in jobs.items()}
    partitions = {name: request.partition for name, request in found.items()}
    assert partitions == {
        "data": "cpu", "train-small": "gpu", "convert-large": "fat", "verify-large": "cpu", "train-large": "long",
        "report": "cpu",
    }  # fmt: skip
    assert found["train-large"].time == "2-00:00:00" and found["train-small"].time == "12:00:00"
    assert found["convert-large"].memory == "64G" and found["convert-large"].tasks == 3
    assert found["convert-large"].extra == ("--exclusive", "--constraint=big")
    assert {request.account for request in found.values()} == {"us"}
    lines = options(script(family, jobs["convert-large"]))
    assert "--ntasks=3" in lines and lines[-2:] == ["--exclusive", "--constraint=big"]
    assert not any(line.startswith(("--nodes", "--gpus")) for line in lines)


def test_too_little_memory_is_refused_with_the_numbers(tmp_path: Path) -> None:
    family, jobs = load_family(tmp_path, GPU | {"memory_per_gpu": 1e-6})
    with pytest.raises(
        UserError, match=r"stage 'small': weights, gradients and optimizer need .* GB, but cluster\.memory"
    ):
        check_memory(family, jobs["train-small"])
    family, jobs = load_family(tmp_path, {"memory": "1K", "ranks_per_node": 1})
    with pytest.raises(UserError, match="the memory of a node is 0.0 GB"):
        check_memory(family, jobs["train-small"])
    for enough in ({"memory": "1G"}, {"memory": "0"}, {"memory_per_gpu": 1, "gpus_per_node": 1}):
        family, jobs = load_family(tmp_path, enough)
        check_memory(family, jobs["train-small"])


def test_bytes_per_rank_are_those_of_the_distributed_optimizer() -> None:
    stages = load(ROOT / EXAMPLE / "family.yaml").stages
    total = count_parameters(stages[0].model).total
    assert bytes_per_rank(stages[0]) == pytest.approx(total * (2 + 4 + 12 / 16)), "DP16 cuts masters and moments"
    model = stages[3].model
    table = model.padded_vocab_size * model.hidden_size
    layers = count_parameters(model).total - 2 * table
    fullest = (layers / 2 + table) / 4
    assert bytes_per_rank(stages[3]) == pytest.approx(fullest * 6.75), "TP4 PP2 DP16: half the layers and one table"


# What a cluster section may contain


@pytest.mark.parametrize(
    ("cluster", "words"),
    [
        ({"environment": {"WANDB_API_KEY": "x"}}, "WANDB_API_KEY looks like a secret"),
        ({"environment": {"HF_TOKEN": "x"}}, "export it in the shell"),
        ({"setup": ["export MY_SECRET=abc"]}, "setup: MY_SECRET looks like a secret"),
        ({"environment": {"PATH": "/x:$PATH"}}, "move what bash should expand to setup"),
        ({"environment": {"A B": "x"}}, "'A B' is not a variable name"),
        ({"time": 86400}, 'write it in quotes: time: "24:00:00"'),
        ({"time": "1 day"}, "cluster.time"),
        ({"partition": "gpu; rm -r /"}, "cluster.partition"),
        ({"container": {"runtime": "pyxis"}}, "runtime pyxis needs an image"),
        ({"container": {"image": "a.sif"}}, "need a runtime"),
        ({"container": {"runtime": "pyxis", "image": "a.sqsh"}}, "write ./a.sqsh"),
        ({"sbatch_extra": ["exclusive"]}, "'exclusive' is not an sbatch option"),
        ({"jobs": {"train": {"partitoin": "x"}}}, "did you mean partition?"),
        ({"partiton": "x"}, "did you mean partition?"),
    ],
)
def test_an_invalid_section_is_one_line(tmp_path: Path, cluster: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, cluster))
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_what_only_looks_like_a_secret_passes(tmp_path: Path) -> None:
    fine = {
        "environment": {"TOKENIZERS_PARALLELISM": "false", "KEYBOARD": "x"},
        "setup": ["export WANDB_API_KEY=$(cat ~/.wandb)"],
    }
    assert load(write(tmp_path, fine)).cluster is not None


def test_a_family_without_a_cluster_is_rejected_with_the_keys_to_set(tmp_path: Path) -> None:
    file = write(tmp_path)
    tree = yaml.safe_load(file.read_text())
    del tree["cluster"]
    file.write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match="no `cluster` section: set at least cluster.gpus_per_node"):
        render_scripts(load(file), file, (), tmp_path)


# Scripts


def test_the_examples_scripts_are_what_launch_renders() -> None:
    file = ROOT / EXAMPLE / "family.yaml"
    texts = render_scripts(load(file), EXAMPLE / "family.yaml", (), EXAMPLE / "slurm")
    on_disk = {EXAMPLE / "slurm" / path.name: path.read_text() for path in (ROOT / EXAMPLE / "slurm").iterdir()}
    hint = f"megagrow launch {EXAMPLE}/family.yaml --dry-run --scripts {EXAMPLE}/slurm"
    assert texts == on_disk, f"render them again: {hint}"


CONTAINERS: list[dict[str, Any]] = [
    {},
    {"runtime": "pyxis", "image": "/images/mega.sqsh", "mounts": ["/data", "/a:/b"]},
    {"runtime": "apptainer", "image": "mega.sif", "mounts": ["/data"]},
]


@pytest.mark.parametrize("requeue", [True, False])
@pytest.mark.parametrize("container", CONTAINERS, ids=["none", "pyxis", "apptainer"])
def test_every_script_passes_shellcheck(tmp_path: Path, container: dict[str, Any], requeue: bool) -> None:
    awkward = tmp_path / "a dir with 'quotes'"
    awkward.mkdir()
    cluster = GPU | {
        "container": container,
        "requeue": requeue,
        "modules": ["cuda/12.8"],
        "environment": {"NCCL_DEBUG": "a 'b'"},
        "setup": ["source /opt/site.sh"],
        "convert_tasks": 2,
    }
    family, jobs = load_family(awkward, cluster)
    for job in jobs.values():
        (tmp_path / script_name(job)).write_text(script(family, job))
    assert shutil.which("shellcheck"), "make system installs it"
    line = ["shellcheck", *map(str, tmp_path.glob("*.sbatch"))]
    # SC1091: the site's file does not exist here
    done = subprocess.run([*line, "--exclude=SC1091"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_script_of_training_has_what_the_field_expects(tmp_path: Path) -> None:
    batch = {"micro_batch_size": 1, "global_batch_size": 16}
    family, jobs = load_family(tmp_path, GPU, parallel={"data_parallel_size": 16}, batch=batch)
    text = script(family, jobs["train-large"])
    assert options(text) == [
        "--job-name=tiny-train-large", f"--comment=megagrow:{tmp_path}/save:train-large", "--account=us",
        "--partition=gpu", "--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=8", "--cpus-per-task=96",
        "--time=12:00:00", f"--output={tmp_path}/save/jobs/train-large-%j.log", "--open-mode=append",
        "--signal=B:USR1@300", "--kill-on-invalid-dep=yes", "--requeue",
    ]  # fmt: skip
    for words in (
        "# train-large of the family tiny: ",
        'MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "srun --kill-on-bad-exit=1 --cpus-per-task=96 --label ",
        "-m megagrow.runtime.torchrun --nnodes=2 --nproc-per-node=8",
        f"-m megagrow train {tmp_path}/family.yaml --stage large &",
        'kill -USR1 "$step"',
        'scontrol requeue "$SLURM_JOB_ID"',
    ):
        assert words in text
    assert "container" not in text


def test_containers_stand_before_everything_of_megagrow(tmp_path: Path) -> None:
    family, jobs = load_family(tmp_path, GPU | {"container": CONTAINERS[1]})
    text = script(family, jobs["verify-large"])
    assert '--container-mounts="$PWD:$PWD,/data:/data,/a:/b"' in text
    assert 'srun --nodes=1 --ntasks=1 "${container[@]}" \\\n    python -m megagrow job' in text
    family, jobs = load_family(tmp_path, GPU | {"container": CONTAINERS[2]})
    text = script(family, jobs["train-large"])
    assert 'container=(apptainer exec --nv --pwd "$PWD" --bind "$PWD" --bind /data mega.sif)' in text
    assert '  "${container[@]}" \\\n    python -m megagrow job' in text
    assert "--nv" not in script(family, jobs["verify-large"])


@pytest.mark.parametrize(
    ("number", "mount", "word"),
    [(1, False, "--no-container-mount-home"), (1, True, " --container-mount-home"), (2, False, "exec --nv --no-home")],
)
def test_home_is_mounted_as_asked(tmp_path: Path, number: int, mount: bool, word: str) -> None:
    family, jobs = load_family(tmp_path, GPU | {"container": CONTAINERS[number]})
    unset = script(family, jobs["train-large"])
    assert "mount-home" not in unset and "--no-home" not in unset
    family, jobs = load_family(tmp_path, GPU | {"container": CONTAINERS[number] | {"mount_home": mount}})
    assert word in script(family, jobs["train-large"])


def test_mount_home_needs_a_container(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="mount_home needs a runtime"):
        load_family(tmp_path, GPU | {"container": {"mount_home": False}})


@pytest.mark.parametrize(
    ("inside", "host"),
    [
        ("/data/a.txt", "/data/a.txt"),
        ("/a/x/*.txt", "/b/x/*.txt"),
        ("/a/deep/x", "/c/x"),
        ("/opt/corpus", None),
        ("/database", None),
        ("here.txt", "CWD/here.txt"),
        ("CWD/here.txt", "CWD/here.txt"),
    ],
)
def test_the_host_has_a_path_of_the_container_where_the_mounts_say(inside: str, host: str | None) -> None:
    mounts = ("/data", "/b:/a:ro", "/c:/a/deep")
    container = Container(runtime="pyxis", image="/i.sqsh", mounts=mounts)
    here = str(Path.cwd())
    expected = None if host is None else host.replace("CWD", here)
    assert container.host_path(inside.replace("CWD", here)) == expected
    assert Container().host_path(inside) == inside


def test_data_of_the_container_is_checked_through_the_mounts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "there").mkdir()
    container = {"runtime": "pyxis", "image": "/i.sqsh", "mounts": [f"{tmp_path}/there:/corpus"]}
    family, _ = load_family(tmp_path, GPU | {"container": container})

    def check(*paths: str) -> None:
        source = family.data.sources[0].model_copy(update={"paths": paths})
        _check_corpus(family.model_copy(update={"data": family.data.model_copy(update={"sources": (source,)})}))

    (tmp_path / "there" / "a.txt").write_text("text")
    check("/corpus/a.txt")
    assert "not checked" not in capsys.readouterr().err
    with pytest.raises(DataError, match="there/b.txt"):
        check("/corpus/b.txt")
    check("/only/inside.txt", "/corpus/a.txt")
    assert "/only/inside.txt" in capsys.readouterr().err

    (tmp_path / "there" / "tokenizer").mkdir()
    tokenizer = family.tokenizer.model_copy(
        update={"tokenizer_type": "HuggingFace", "tokenizer_model": Path("/corpus/tokenizer")}
    )
    family = family.model_copy(update={"tokenizer": tokenizer})
    with pytest.raises(DataError, match=r"there/tokenizer/tokenizer.json does not exist"):
        check("/corpus/a.txt")
    (tmp_path / "there" / "tokenizer" / "tokenizer.json").write_text("{}")
    check("/corpus/a.txt")


def test_overrides_reach_every_command_of_a_script(tmp_path: Path) -> None:
    file = write(tmp_path)
    family = load(file, ["seed=7"])
    for path, text in render_scripts(family, file, ("seed=7",), tmp_path).items():
        commands = [line for line in text.splitlines() if " -m megagrow " in line]
        assert len(commands) == 2 and all("seed=7" in line for line in commands), path


# Parsing


def test_jobs_are_known_by_comment_and_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family, _ = load_family(tmp_path)

    def row(text: str, directory: Path) -> Queued:
        return Queued("1", "PENDING", text, str(directory), "N/A", "", "None")

    assert job_of(family, row(job_comment(family, "data"), Path("/elsewhere"))) == "data"
    assert job_of(family, row("mine:runs/x:data", tmp_path)) is None
    monkeypatch.chdir(tmp_path)
    relative = family.model_copy(update={"save": Path("save")})
    assert job_of(relative, row(job_comment(relative, "data"), tmp_path)) == "data"
    assert job_of(relative, row(job_comment(relative, "data"), tmp_path.parent)) is None, "another family of that name"


@pytest.mark.parametrize(
    ("text", "count"),
    [("(null)", 0), ("gpu:8", 8), ("gpu:h100:8(S:0-1),nvme:1", 8), ("gpu:a:2,gpu:b:2(S:0)", 4), ("gpu", 1)],
)
def test_gpus_of_a_node_are_read(text: str, count: int) -> None:
    assert _gpus_in(text) == count


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("90", 5400), ("1:30", 90), ("2:00:00", 7200), ("1-12", 129600), ("1-00:30", 88200), ("1-0:0:5", 86405)],
)
def test_times_are_read_as_slurm_does(text: str, wanted: float) -> None:
    assert parse_time_limit(text) == wanted and parse_time_limit("UNLIMITED") > wanted


def test_iterations_without_a_tracker_are_refused(tmp_path: Path) -> None:
    family, jobs = load_family(tmp_path)
    (family.save / "small" / "checkpoints" / "iter_0000010").mkdir(parents=True)
    check_family(family, tuple(jobs.values()))  # what a kill before the first tracker leaves: training takes it
    (family.save / "small" / "checkpoints" / "iter_0000020").mkdir(parents=True)
    with pytest.raises(UserError, match="has iter_0000020 but no latest_checkpointed_iteration.txt"):
        check_family(family, tuple(jobs.values()))


def test_a_save_directory_that_cannot_be_created_is_rejected(tmp_path: Path) -> None:
    family, jobs = load_family(tmp_path)
    family.save.write_text("a file")
    with pytest.raises(UserError, match="is a file: choose another directory"):
        check_family(family, tuple(jobs.values()))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [(["launch", "FILE", "--dry-run"], "#SBATCH"), (["status", "FILE"], "waiting"), (["plan", "FILE"], "plan of")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_login_node_needs_no_torch(tmp_path: Path, arguments: list[str], words: str) -> None:
    line = [str(write(tmp_path)) if word == "FILE" else word for word in arguments]
    program = (
        "import sys; sys.modules.update(torch=None, megatron=None); "
        f"sys.argv = ['megagrow', *{line!r}]; from megagrow.cli.main import main; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and words in done.stdout, done.stderr
    assert not (tmp_path / "save").exists(), "these verbs write nothing"
