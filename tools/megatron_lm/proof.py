"""Stock Megatron-LM trains, megagrow converts and grows, stock Megatron-LM goes on: every claim with its figure.

    git clone --branch core_v0.16.1 https://github.com/NVIDIA/Megatron-LM /tmp/megatron-lm
    python -m tools.megatron_lm.proof --megatron /tmp/megatron-lm --write

Megatron-LM's `pretrain_gpt.py` runs on CPU with stand-ins for CUDA (`rank.py`), on a model of 0.1 M parameters.
It needs six, requests, tqdm, einops and psutil besides what megagrow has; `--extra` names a directory with them. The
program compiles one file in C++ on its first run, or takes the one in the installed megatron-core.
"""

import argparse
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tools.megatron_lm.rank import STEPS

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "figures" / "stock_megatron.md"
STOCK = (
    "--transformer-impl local --distributed-backend gloo --no-persist-layer-norm --no-gradient-accumulation-fusion "
    "--no-masked-softmax-fusion --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-rope-fusion"
).split()
"""What a run without CUDA and transformer-engine needs."""
SIZES = {"num-layers": 2, "hidden-size": 64, "ffn-hidden-size": 176, "num-attention-heads": 4, "num-query-groups": 2}
KIND = (
    "--group-query-attention --kv-channels 16 --swiglu --normalization RMSNorm --position-embedding-type rope "
    "--disable-bias-linear --untie-embeddings-and-output-weights --max-position-embeddings 64"
).split()
DEEPER, WIDER = {"num-layers": 4}, {"hidden-size": 96, "ffn-hidden-size": 256, "num-attention-heads": 6}
RATES = "--lr 3e-3 --min-lr 3e-4 --lr-decay-style cosine --lr-warmup-fraction 0.1".split()
RUN = (
    "--seq-length 64 --attention-dropout 0 --hidden-dropout 0 --micro-batch-size 2 --global-batch-size 8 "
    "--weight-decay 0.1 --clip-grad 1.0 --adam-beta2 0.95 --use-distributed-optimizer --tokenizer-type NullTokenizer "
    "--vocab-size 255 --make-vocab-size-divisible-by 64 --split 90,10,0 --log-interval 1 --eval-interval 1000 "
    "--eval-iters 0 --ckpt-format torch_dist"
).split()
HALF, WHOLE = 20, 40
TP2 = ["--tensor-model-parallel-size", "2"]
Step = dict[str, float]
FAMILY: dict[str, Any] = {
    "name": "tiny", "data": {"split": "90,10,0"}, "checkpoint": {"save_interval": HALF},
    "defaults": {
        "precision": "fp32", "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "schedule": {"max_lr": 3e-3, "min_lr_ratio": 0.1, "lr_warmup_fraction": 0.1}, "train_tokens": HALF * 8 * 64,
    },
}  # fmt: skip
MODEL = {
    "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 176, "num_attention_heads": 4, "num_query_groups": 2,
    "vocab_size": 256, "seq_length": 64, "make_vocab_size_divisible_by": 64, "kv_channels": 16,
}  # fmt: skip


@dataclass
class Bench:
    """A directory of runs, and what was found in them.

    Attributes:
        megatron: a checkout of Megatron-LM.
        place: where everything is written.
        extra: directory with packages that only Megatron-LM imports.
        rows: claim, figure, and whether it holds.
        commands: what was run, in order.
        remarks: what else a user should know, with its figure.
    """

    megatron: Path
    place: Path
    extra: Path | None
    rows: list[tuple[str, str, bool]] = field(default_factory=list)
    commands: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def train(self, name: str, flags: list[str], *, ranks: int = 1, until: int = WHOLE) -> list[Step]:
        """Run pretrain_gpt.py; return its steps."""
        steps = self.place / f"{name}.jsonl"
        steps.unlink(missing_ok=True)
        launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), "--standalone"]
        program = [str(ROOT / "tools/megatron_lm/rank.py"), str(self.megatron)]
        data = ["--data-path", str(self.place / "bytes"), "--data-cache-path", str(self.place / "cache")]
        words = [*RUN, *flags, *data, "--train-iters", str(until)]
        paths = [str(each) for each in (self.megatron, ROOT, self.extra) if each is not None]
        given = {**os.environ, "PYTHONPATH": ":".join(paths), "OMP_NUM_THREADS": "1", STEPS: str(steps)}
        given |= {"CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        self.commands.append(f"torchrun --nproc-per-node {ranks} pretrain_gpt.py " + self.readable(flags))
        self.run([*launch, *program, *STOCK, *words], name, given)
        found = [json.loads(line) for line in steps.read_text().splitlines()]
        return [step for number, step in enumerate(found) if step["iteration"] not in _iterations(found[:number])]

    def megagrow(self, name: str, *words: Any) -> str:
        """Run `megagrow`; return what it printed."""
        given = [str(word) for word in words]
        self.commands.append("megagrow " + self.readable(given))
        return self.run([sys.executable, "-m", "megagrow", *given], name, {**os.environ, "OMP_NUM_THREADS": "1"})

    def run(self, command: list[str], name: str, environment: dict[str, str]) -> str:
        """Run a command and keep what it printed in `<name>.log`; RuntimeError if it fails."""
        done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        log = self.place / f"{name}.log"
        log.write_text(f"{done.stdout}\n{done.stderr}")
        if done.returncode:
            raise RuntimeError(f"{name}: exit {done.returncode}; see {log}")
        return done.stdout

    def holds(self, claim: str, figure: str, truth: bool) -> None:
        """Keep and print a finding."""
        self.rows.append((claim, figure, truth))
        print(f"{'holds' if truth else 'FAILS'}: {claim}: {figure}", flush=True)

    def readable(self, words: list[str]) -> str:
        """A command without this machine's paths."""
        return " ".join(words).replace(f"{self.place}/", "")


def _iterations(steps: list[dict[str, Any]]) -> set[int]:
    return {step["iteration"] for step in steps}


def _sizes(**changed: int) -> list[str]:
    sizes = {**SIZES, **{name.replace("_", "-"): value for name, value in changed.items()}}
    return [word for name, value in sizes.items() for word in (f"--{name}", str(value))]


def _flags(sizes: dict[str, int] | None = None, *more: str, rates: list[str] = RATES) -> list[str]:
    """Flags of a run: the model's, the schedule's, and others."""
    return [*_sizes(**(sizes or {})), *KIND, *rates, *more]


def _overrides(sizes: dict[str, int]) -> list[str]:
    return [f"model.{name.replace('-', '_')}={value}" for name, value in sizes.items()]


def _apart(one: list[Step], other: list[Step], key: str) -> float:
    """The largest difference of a figure, over steps that both have."""
    pairs = [(a[key], b[key]) for a in one for b in other if a["iteration"] == b["iteration"]]
    assert pairs, "no step in common"
    return max(abs(a - b) for a, b in pairs)


def _worst(one: list[Step], other: list[Step], key: str) -> float:
    """The largest difference of a figure relative to its largest value, over steps that both have."""
    return _apart(one, other, key) / max(abs(step[key]) for step in other)


def write_bytes(prefix: Path) -> None:
    """Write the project's own pages as documents of bytes: a .bin/.idx pair of ids below 255."""
    import torch
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for file in sorted((ROOT / "docs").glob("*.md")):
        for text in file.read_text().split("\n\n"):
            ids = torch.tensor([min(byte, 254) for byte in text.encode()] + [255])
            builder.add_document(ids, [len(ids)])
    builder.finalize(f"{prefix}.idx")


def continued(bench: Bench) -> list[Step]:
    """A run is interrupted, resharded and goes on in another layout; return the uninterrupted run's steps."""
    kept = bench.place / "parent"
    whole = bench.train("parent", _flags({}, *TP2, "--save", str(kept), "--save-interval", str(HALF)), ranks=2)
    at_half = kept / f"iter_{HALF:07d}"
    bench.megagrow("reshard", "convert", at_half, bench.place / "resharded", "parallel.data_parallel_size=2")
    steps = bench.train("resharded", _flags({}, "--load", str(bench.place / "resharded"), "--no-load-rng"), ranks=2)
    other = bench.place / "reshardable"  # of the first one, Megatron-LM loads the optimizer under TP2 alone
    saved = ["--save", str(other), "--save-interval", str(HALF), "--dist-ckpt-optim-fully-reshardable"]
    bench.train("reshardable", _flags({}, *TP2, *saved, "--exit-interval", str(HALF)), ranks=2)
    own = bench.train("own_reshard", _flags({}, "--load", str(other), "--no-load-rng"), ranks=2)
    bench.remarks.append(
        "Megatron-LM's own reshard needs `--dist-ckpt-optim-fully-reshardable` when it saves. Without it, as in the "
        "run above, it refuses the optimizer under another TP or PP; megagrow reads it."
    )
    bench.megagrow("same_layout", "convert", at_half, bench.place / "same", "parallel.tensor_model_parallel_size=2")
    same = bench.train("same", _flags({}, *TP2, "--load", str(bench.place / "same"), "--no-load-rng"), ranks=2)
    for found, others, claim in (
        (same, whole, "converted and not resharded (TP2)| the uninterrupted run's"),
        (steps, own, "resharded TP2 -> DP2| those of Megatron-LM's own reshard"),
    ):
        how, whose = claim.split("|")
        apart = [_apart(found, others, key) for key in ("loss", "norm", "rate")]
        bench.holds(
            f"{how} at step {HALF}: losses, gradient norms and rates of the next {len(found)} steps are{whose}",
            ", ".join(f"{each:.1e}" for each in apart) + " apart, at most",
            len(found) == WHOLE - HALF and max(apart) < 1e-5,
        )
    loss, norm = _worst(steps, whole, "loss"), _worst(steps, whole, "norm")
    bench.holds(
        "resharded TP2 -> DP2: losses are the uninterrupted run's, and gradient norms but for rounding in two layouts",
        f"{loss:.1e} and {norm:.1e} of the largest",
        loss < 1e-5 and norm < 1e-4,
    )
    return whole


def grown(bench: Bench, whole: list[Step]) -> None:
    """The half-trained model grows in depth, in width, and in both, and goes on with its moments."""
    source = bench.place / "parent" / f"iter_{HALF:07d}"
    new = ["--finetune", "--no-load-optim", "--no-load-rng", "--load", str(bench.place / "parent_at_half")]
    bench.megagrow("at_half", "convert", source, bench.place / "parent_at_half")
    (first,) = bench.train("parent_first", _flags({}, *new), until=1)
    for name, sizes in (("deeper", DEEPER), ("wider", WIDER), ("both", DEEPER | WIDER)):
        made = bench.place / name
        bench.megagrow(f"grow_{name}", "convert", source, made, *_overrides(sizes))
        load = ["--load", str(made), "--no-load-rng", "--override-opt-param-scheduler"]
        steps = bench.train(name, _flags(sizes, *load), until=HALF)
        apart = abs(steps[0]["loss"] - first["loss"])
        bench.holds(
            f"{name}: the first loss is the parent's on the same batch",
            f"{steps[0]['loss']:.6f} against {first['loss']:.6f}, {apart:.1e} apart",
            steps[0]["iteration"] == 1 and apart < 1e-5,
        )
        worst = max(step["loss"] for step in steps)
        bench.holds(
            f"{name}: no spike in {len(steps)} steps with the parent's moments and a fresh schedule",
            f"at most {worst:.4f}, at the end {steps[-1]['loss']:.4f}",
            worst < steps[0]["loss"] + 0.1 and steps[-1]["loss"] < steps[0]["loss"],
        )
        if name == "wider":
            slow_moments(bench, sizes)
        if name == "deeper":
            other_rate(bench, load, sizes, steps)
    kept = bench.place / "kept"
    bench.megagrow("grow_kept", "convert", source, kept, *_overrides(DEEPER), "--schedule", "continue")
    steps = bench.train("kept", _flags(DEEPER, "--load", str(kept), "--no-load-rng"))
    apart = abs(steps[0]["loss"] - whole[HALF]["loss"])
    bench.holds(
        f"--schedule continue: step {HALF + 1} has the uninterrupted run's batch, loss and rate",
        f"loss {apart:.1e} apart, rates {_worst(steps, whole, 'rate'):.1e} relative",
        steps[0]["iteration"] == HALF + 1 and apart < 1e-5 and _worst(steps, whole, "rate") < 1e-9,
    )


def slow_moments(bench: Bench, sizes: dict[str, int]) -> None:
    """What Megatron-LM's default for Adam's second moment does to a model that grew in width."""
    slow, kept = ["--adam-beta2", "0.999"], bench.place / "slow_parent"
    bench.train("slow_parent", _flags({}, *slow, "--save", str(kept), "--save-interval", str(HALF)), until=HALF)
    bench.megagrow("grow_slow", "convert", kept, bench.place / "slow_wider", *_overrides(sizes))
    load = ["--load", str(bench.place / "slow_wider"), "--no-load-rng", "--override-opt-param-scheduler"]
    steps = bench.train("slow_wider", _flags(sizes, *load, *slow), until=HALF)
    worst = max(steps, key=lambda step: step["loss"])
    bench.remarks.append(
        "All these runs have `--adam-beta2 0.95`. With Megatron-LM's default of 0.999 in both runs the wider model's "
        f"loss begins at {steps[0]['loss']:.2f}, reaches {worst['loss']:.2f} at step {worst['iteration']:.0f} and ends "
        f"at {steps[-1]['loss']:.2f}: second moments of new entries begin at zero beside a step count that says they "
        "are warm, and the longer their memory, the larger the first updates of new entries. Lower the rate, warm it "
        "up for longer, or use 0.95."
    )


def other_rate(bench: Bench, load: list[str], sizes: dict[str, int], usual: list[Step]) -> None:
    """The script's `--lr` holds, not the one that the checkpoint was trained with."""
    third = ["--lr", "1e-3", "--min-lr", "1e-4", *RATES[4:]]
    steps = bench.train("other_rate", _flags(sizes, *load, rates=third), until=HALF)
    worst = max(abs(one["rate"] * 3 / other["rate"] - 1) for one, other in zip(steps, usual, strict=True))
    bench.holds(
        "another --lr is the one that is printed",
        f"peak {max(step['rate'] for step in steps):.1e} for --lr 1e-3; {worst:.0e} from a third of the other run's",
        worst < 1e-9,
    )


def write_family(bench: Bench, name: str, **stage: Any) -> Path:
    """A family of one stage on the same data; return its file."""
    stages = [{"name": "small", "model": MODEL, **stage}]
    tree = {**FAMILY, "save": str(bench.place / name), "stages": stages}
    tree["data"] = {**tree["data"], "sources": [{"name": "bytes", "prefix": str(bench.place / "bytes")}]}
    file = bench.place / f"{name}.yaml"
    file.write_text(yaml.safe_dump(tree, sort_keys=False))
    return file


def own_family(bench: Bench) -> None:
    """A family's own checkpoint goes on in Megatron-LM, and what that made is loaded into a family again."""
    bench.megagrow("family", "run", write_family(bench, "family"))
    load = ["--load", str(bench.place / "family/small/checkpoints")]
    longer = ["--override-opt-param-scheduler", "--no-load-rng"]
    kept = ["--save", str(bench.place / "back"), "--save-interval", str(WHOLE)]
    by_args = bench.train("by_args", [*RATES, *load, *longer, "--use-checkpoint-args", *kept, *TP2], ranks=2)
    by_flags = bench.train("by_flags", _flags({}, *load, *longer))
    apart = [_worst(by_args, by_flags, key) for key in ("loss", "norm", "rate")]
    bench.holds(
        f"a family's checkpoint of step {HALF} goes on by --use-checkpoint-args at TP2 and by flags at TP1, alike",
        ", ".join(f"{worst:.1e}" for worst in apart) + " relative, at most, of losses, norms and rates",
        [step["iteration"] for step in by_args] == list(range(HALF + 1, WHOLE + 1)) and max(apart) < 1e-5,
    )
    last = [json.loads(line) for line in (bench.place / "family/small/records.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in last if record["kind"] == "step"]
    bench.holds(
        "and without a spike",
        f"step {HALF} in megagrow {losses[-1]:.4f}, step {HALF + 1} there {by_flags[0]['loss']:.4f}, step {WHOLE} "
        f"{by_flags[-1]['loss']:.4f}",
        by_flags[0]["loss"] < losses[-1] + 0.2 and by_flags[-1]["loss"] < losses[-1],
    )
    bench.megagrow("loaded", "run", write_family(bench, "returned", load=str(bench.place / "back")))
    bench.megagrow("deep", "verify", bench.place / "returned/small/checkpoints")
    lines = [json.loads(line) for line in (bench.place / "returned/small/records.jsonl").read_text().splitlines()]
    back = [record["loss"] for record in lines if record["kind"] == "step"]
    bench.holds(
        "what Megatron-LM trained is loaded into a family (stages.0.load) and trains on there",
        f"first loss {back[0]:.4f}, last of {len(back)} {back[-1]:.4f}",
        len(back) == HALF and max(back) < by_flags[0]["loss"],
    )


def page(bench: Bench, version: str) -> str:
    """The findings as a page."""
    head = f"""# Stock Megatron-LM beside megagrow

`python -m tools.megatron_lm.proof --megatron DIR --write` made this page with Megatron-LM {version}, on CPU.
A model of 0.1 M parameters (RMSNorm, swiglu, rotary, 4 heads, 2 groups, fp32), batches of 8 samples of 64 bytes.

| claim | figure | |
|---|---|---|"""
    rows = [f"| {claim} | {figure} | {'holds' if truth else 'fails'} |" for claim, figure, truth in bench.rows]
    flags = " ".join([*STOCK, *RUN])
    tail = f"\n## Commands\n\nEvery `pretrain_gpt.py` has these flags, too:\n\n```\n{flags}\n```\n\n```\n"
    return "\n".join([head, *rows, "", *bench.remarks, tail + "\n".join(bench.commands) + "\n```\n"])


def prepare(bench: Bench) -> None:
    """Make the directory, the data, and Megatron-LM's compiled helper where it is missing."""
    shutil.rmtree(bench.place, ignore_errors=True)
    bench.place.mkdir(parents=True)
    write_bytes(bench.place / "bytes")
    found = importlib.util.find_spec("megatron.core.datasets.helpers_cpp")
    if found is not None and found.origin is not None:
        shutil.copy(found.origin, bench.megatron / "megatron/core/datasets")


def main() -> None:
    """Run everything; exit 1 if a claim does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megatron", type=Path, required=True, help="checkout of Megatron-LM")
    parser.add_argument(
        "--place", type=Path, default=Path("/tmp/stock-megatron"), help="directory of the runs, made new"
    )
    parser.add_argument("--extra", type=Path, help="directory with packages that only Megatron-LM imports")
    parser.add_argument("--write", action="store_true", help=f"write {PAGE.relative_to(ROOT)}")
    given = parser.parse_args()
    bench = Bench(given.megatron.resolve(), given.place.resolve(), given.extra and given.extra.resolve())
    prepare(bench)
    steps: list[Callable[[], None]] = [lambda: grown(bench, continued(bench)), lambda: own_family(bench)]
    for each in steps:
        each()
    described = subprocess.run(
        ["git", "-C", str(bench.megatron), "describe", "--tags", "--always"], capture_output=True, text=True
    )
    if given.write:
        PAGE.write_text(page(bench, described.stdout.strip() or "of an unknown version"))
    sys.exit(not all(truth for _, _, truth in bench.rows))


if __name__ == "__main__":
    main()
