"""Compare the speed of two versions of megagrow in one run: conversions and training steps, in turns.

    git worktree add /tmp/old COMMIT
    python -m tools.benchmark.versions --old /tmp/old --directory /scratch --rounds 5

Both versions run through their command line, first the one and then the other, round by round, so that whatever else
the machine does disturbs both alike. A ratio below 1 means that this checkout is faster. CPU time is that of the
command and its workers; it says more than wall time where others share the machine. Each version converts a source that
it wrote itself, of the same values: an older version may not read what a newer one writes.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
JOBS = {
    "reshard TP1 -> TP2 PP2": ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"],
    "depth x2, weights only": ["--no-optimizer", "model.num_layers=8", "growth.layer=stack"],
    "width 1024 -> 1280 (zero_pad)": [
        "model.hidden_size=1280", "model.ffn_hidden_size=3584", "model.num_attention_heads=20", "--workers", "2",
    ],
}  # fmt: skip
SOURCE = """
import sys
from pathlib import Path
from megagrow.config import ModelShape
from tools.benchmark.convert import make_source
make_source(Path(sys.argv[1]), ModelShape(
    num_layers=4, hidden_size=1024, ffn_hidden_size=2816, num_attention_heads=16, num_query_groups=4,
    kv_channels=64, vocab_size=32000, seq_length=1024,
))
"""
TRAINING = ["budget.tokens_per_parameter=0.15", "evaluation.eval_samples=16"]


def timed(package: Path, arguments: list[str], directory: Path) -> tuple[float, float]:
    """Run a version's command line; return its wall and CPU seconds."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    before, begin = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "megagrow", *arguments], cwd=directory, env=environment, capture_output=True, text=True
    )
    wall, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
    if done.returncode:
        sys.exit(f"{package}: megagrow {' '.join(arguments)}: exit code {done.returncode}\n{done.stderr}")
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def conversions(versions: dict[str, Path], directory: Path, rounds: int, skip: bool) -> None:
    """Time every job in turns and print a row for each; with `skip`, this checkout compares no checksums."""
    flags = {"old": [], "new": ["--skip-checksums"] if skip else []}
    sources = {name: directory / f"source-{name}" / "iter_0000100" for name in versions}
    for name, package in versions.items():
        if not sources[name].is_dir():
            environment = {**os.environ, "PYTHONPATH": str(package)}
            command = [sys.executable, "-c", SOURCE, str(sources[name])]
            subprocess.run(command, cwd=package, env=environment, check=True)
    for job, arguments in JOBS.items():
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
        for _ in range(rounds):
            for name, package in versions.items():
                target = directory / "target"
                shutil.rmtree(target, ignore_errors=True)
                seconds[name].append(
                    timed(package, ["convert", str(sources[name]), str(target), *flags[name], *arguments], directory)
                )
        show(job, seconds)


def training(versions: dict[str, Path], directory: Path, rounds: int) -> None:
    """Train the demo's first stage for a few steps in turns, and compare the seconds of a step."""
    steps: dict[str, list[tuple[float, float]]] = {name: [] for name in versions}
    for _ in range(rounds):
        for name, package in versions.items():
            save = directory / f"train-{name}"
            shutil.rmtree(save, ignore_errors=True)
            overrides = [*TRAINING, f"save={save}"]
            family = str(package / "examples/demo/family.yaml")
            timed(package, ["data", family, *overrides], directory)
            _, cpu = timed(package, ["train", family, "--stage", "small", *overrides], directory)
            lines = (save / "small" / "records.jsonl").read_text().splitlines()
            rates = [record["tokens_per_second"] for record in map(json.loads, lines) if record["kind"] == "step"]
            steps[name].append((1.0 / statistics.median(rates), cpu))
    show("a training step (wall), the whole job (CPU)", steps)


def show(job: str, seconds: dict[str, list[tuple[float, float]]]) -> None:
    """Print the medians of the paired ratios, this checkout over the old one."""
    pairs = list(zip(seconds["new"], seconds["old"], strict=True))
    wall = statistics.median(new[0] / old[0] for new, old in pairs)
    cpu = statistics.median(new[1] / old[1] for new, old in pairs)
    print(f"{job}: new over old {wall:.3f} wall, {cpu:.3f} CPU, {len(pairs)} pairs", flush=True)


def main() -> None:
    """Measure both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old", type=Path, required=True, help="checkout of the other version")
    parser.add_argument("--directory", type=Path, required=True, help="scratch space of about 5 GB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--skip-checksums",
        action="store_true",
        help="this checkout compares none, as the versions did before it had them",
    )
    given = parser.parse_args()
    given.directory.mkdir(parents=True, exist_ok=True)
    versions = {"old": given.old.resolve(), "new": ROOT}
    conversions(versions, given.directory.resolve(), given.rounds, given.skip_checksums)
    training(versions, given.directory.resolve(), given.rounds)


if __name__ == "__main__":
    main()
