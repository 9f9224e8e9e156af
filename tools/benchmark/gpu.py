"""What one bare GPU can check of megagrow: losses, a stop and its resume, growth, speed and memory.

Everything goes through the commands that a user gives. The first family (3 to 17 M parameters, fp32) answers whether
CUDA trains as the CPU does, whether a run that was stopped goes on bit for bit, and whether a grown model starts at
its parent's loss. The second (325 M, bf16, sequences of 2048) gives tokens/s, MFU and memory, and is grown once.

    tools/benchmark/gpu.sh runs/gpu --peak 989e12

`--peak` is the GPU's dense bf16 rate in FLOP/s, from its datasheet; without it no MFU is printed. On a machine without
a GPU, `--tiny` goes through the same steps with models that a CPU can train.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from megagrow import records
from megagrow.records import EvalRecord, StepRecord

Answer = dict[str, Any]
GROWN = "loss after growth less the parent's"
CPU_STEPS = 60
"""Steps that the CPU and the GPU both train from the same weights."""


@dataclass
class Bench:
    """Where the families are, and what was found."""

    directory: Path
    tiny: bool
    peak: float | None
    answers: Answer = field(default_factory=dict)

    def megagrow(self, *arguments: str) -> None:
        """Run a command of megagrow; RuntimeError with the end of its output if it fails."""
        with self.start(*arguments) as process:
            output, _ = process.communicate()
        if process.returncode:
            raise RuntimeError(f"megagrow {' '.join(arguments)} exited with {process.returncode}:\n{output[-3000:]}")

    def start(self, *arguments: str, cpu: bool = False) -> "subprocess.Popen[str]":
        """Start a command of megagrow, on the CPU alone if `cpu`."""
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if cpu else {})
        return subprocess.Popen(
            [sys.executable, "-m", "megagrow", *arguments],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def family(self, name: str, settings: Answer) -> Path:
        """Write a family.yaml that saves to a directory of its own."""
        path = self.directory / f"{name}.yaml"
        path.write_text(yaml.safe_dump({"name": name, "save": str(self.directory / name), **settings}))
        return path


def main(argv: list[str] | None = None) -> int:
    """Go through the checks; one that fails is written down, and the others still run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path, help="for the families and results.json; must be new")
    parser.add_argument("--peak", type=float, help="the GPU's dense bf16 FLOP/s, for MFU")
    parser.add_argument("--tiny", action="store_true", help="models that a CPU can train")
    checks = {check.__name__: check for check in (small_family, resume, against_cpu, large_family)}
    parser.add_argument("--only", choices=checks, nargs="+", help="some checks; the middle two need the first")
    arguments = parser.parse_args(argv)
    arguments.directory.mkdir(parents=True)
    bench = Bench(arguments.directory.resolve(), arguments.tiny, arguments.peak)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    bench.answers["environment"] = {"gpu": gpu, "torch": torch.__version__, "python": sys.version.split()[0]}
    failed = 0
    for name in arguments.only or checks:
        started = time.monotonic()
        try:
            answer: Answer = checks[name](bench)
        except Exception as error:  # the next checks do not depend on this one
            failed, answer = failed + 1, {"failed": str(error)}
        answer["seconds"] = round(time.monotonic() - started, 1)
        bench.answers[name] = answer
        print(name, json.dumps(answer, indent=1), flush=True)
        (bench.directory / "results.json").write_text(json.dumps(bench.answers, indent=1) + "\n")
    return 1 if failed else 0


def small_family(bench: Bench) -> Answer:
    """A family of three sizes, grown twice in width and depth, in fp32."""
    path = bench.family("small", _small(bench))
    bench.megagrow("run", str(path))
    return _stages(bench, "small", ["first", "second", "third"])


def resume(bench: Bench) -> Answer:
    """The first stage again, stopped by SIGTERM and resumed: it must end in the same checkpoint, bit for bit."""
    path = bench.family("resumed", _small(bench))
    _copy_data(bench, "small", "resumed")
    with bench.start("train", str(path), "--stage", "first") as process:
        while process.poll() is None and len(_steps(bench, "resumed", "first")) < CPU_STEPS // 2:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate()
    stopped_at = len(_steps(bench, "resumed", "first"))
    if process.returncode or not 0 < stopped_at < 2 * CPU_STEPS:
        raise RuntimeError(f"exit code {process.returncode} after {stopped_at} steps: not stopped in its middle")
    bench.megagrow("train", str(path), "--stage", "first")
    whole, resumed = (_newest(bench, name, "first") for name in ("small", "resumed"))
    difference = subprocess.run(
        [sys.executable, "-m", "megagrow", "diff", str(whole), str(resumed)], capture_output=True, text=True
    )
    losses = [[step.loss for step in _steps(bench, name, "first")] for name in ("small", "resumed")]
    return {
        "exit code of the stopped run": process.returncode,
        "stopped after step": stopped_at,
        "losses equal bit for bit": losses[0] == losses[1],
        "diff": difference.stdout.strip().splitlines()[-3:],
        "diff's exit code": difference.returncode,
        "end of the stopped run": output.strip().splitlines()[-1:],
    }


def against_cpu(bench: Bench) -> Answer:
    """The first stage on the CPU, from the same weights over the same samples."""
    path = bench.family("cpu", _small(bench))
    _copy_data(bench, "small", "cpu")
    with bench.start("train", str(path), "--stage", "first", cpu=True) as process:
        while process.poll() is None and len(_steps(bench, "cpu", "first")) < CPU_STEPS:
            time.sleep(0.2)
        process.terminate()
        process.communicate()
    ours, theirs = (_steps(bench, name, "first")[:CPU_STEPS] for name in ("small", "cpu"))
    apart = [abs(a.loss - b.loss) for a, b in zip(ours, theirs, strict=False)]
    return {
        "steps compared": len(apart),
        "apart in nats, step 1": apart[0],
        "apart in nats, steps 1-10 at most": max(apart[:10]),
        "apart in nats, all at most": max(apart),
        "loss at the last step, GPU and CPU": [ours[len(apart) - 1].loss, theirs[-1].loss],
    }


def large_family(bench: Bench) -> Answer:
    """A 325 M model in bf16, grown to twice its layers: speed, MFU, memory."""
    path = bench.family("large", _large(bench))
    with _peak_memory() as memory:
        bench.megagrow("run", str(path))
    return _stages(bench, "large", ["first", "second"]) | {"GPU memory in use at most, GiB": round(memory[0], 2)}


def table(answers: Answer) -> str:
    """The Markdown of docs/performance.md for what was found."""
    small, large, cpu, resumed = (answers[n] for n in ("small_family", "large_family", "against_cpu", "resume"))
    stopped, memory = resumed["stopped after step"], large["GPU memory in use at most, GiB"]
    same = resumed["losses equal bit for bit"] and resumed["diff's exit code"] == 0
    rows = [
        (
            "loss on the GPU against the CPU, fp32, steps 1-10",
            f"{cpu['apart in nats, steps 1-10 at most']:.1e} nats apart",
        ),
        (f"the same, steps 1-{cpu['steps compared']}", f"{cpu['apart in nats, all at most']:.1e} nats apart"),
        (f"stopped at step {stopped} and resumed, against a run through", "equal bit for bit" if same else "NOT equal"),
    ]
    for family, stage, what in (
        (small, "second", "3.1 M to 6.4 M, fp32, all axes"),
        (small, "third", "6.4 M to 16.6 M, fp32, all axes"),
        (large, "second", "325 M to 633 M, bf16, layers"),
    ):
        rows.append((f"loss after growth less the parent's, {what}", f"{family[stage][GROWN]:.1e} nats"))
    for stage, what in (("first", "325 M, 24 layers"), ("second", "633 M, 48 layers")):
        rate, flops, mfu = (large[stage][key] for key in ("tokens/s", "TFLOP/s", "MFU"))
        rows.append((f"speed, {what}, bf16", f"{rate:,} tokens/s, {flops:.0f} TFLOP/s, MFU {100 * mfu:.0f} %"))
    rows.append(("GPU memory in use at most, both", f"{memory:.1f} GiB"))
    return "\n".join(f"| {what} | {value} |" for what, value in rows)


def _small(bench: Bench) -> Answer:
    widths = ((16, 32, 2), (16, 48, 3), (16, 64, 4)) if bench.tiny else ((32, 192, 6), (32, 256, 8), (32, 384, 12))
    names = ("first", "second", "third")
    steps = 2 * CPU_STEPS
    length, batch = (32, 8) if bench.tiny else (256, 32)
    return {
        "tokenizer": {"tokenizer_type": "SentencePiece"},
        "data": {"sources": [{"name": "stdlib", "paths": ["python-stdlib"]}], "split": "949,50,1"},
        "evaluation": {"eval_interval": steps, "eval_samples": 64},
        "checkpoint": {"save_interval": steps},
        "defaults": {
            "model": {"vocab_size": 512 if bench.tiny else 2048, "seq_length": length},
            "batch": {"micro_batch_size": batch, "global_batch_size": batch},
            "schedule": {"max_lr": 1e-3, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.05},
            "precision": "fp32",
            "train_tokens": steps * length * batch,
        },
        "stages": [
            {
                "name": name,
                "model": {
                    "num_layers": 6 + 2 * number,
                    "hidden_size": hidden,
                    "ffn_hidden_size": 8 * hidden // 3 // 16 * 16,
                    "num_attention_heads": heads,
                    "num_query_groups": 1,
                    "kv_channels": channels,
                },  # fmt: skip
            }
            | (
                {"growth": {axis: "zero_pad" for axis in ("hidden", "ffn", "head")} | {"layer": "identity"}}
                if number
                else {}
            )
            for number, (name, (channels, hidden, heads)) in enumerate(zip(names, widths, strict=True))
        ],
    }


def _large(bench: Bench) -> Answer:
    layers, hidden, ffn, heads, length, vocabulary = (
        (2, 64, 192, 2, 64, 512) if bench.tiny else (24, 1024, 2816, 16, 2048, 8192)
    )
    micro, batch, steps = (2, 4, 4) if bench.tiny else (8, 32, 40)
    model = {
        "hidden_size": hidden, "ffn_hidden_size": ffn, "num_attention_heads": heads,
        "vocab_size": vocabulary, "seq_length": length, "untie_embeddings_and_output_weights": True,
    }  # fmt: skip
    return {
        "tokenizer": {"tokenizer_type": "SentencePiece"},
        "data": {"sources": [{"name": "stdlib", "paths": ["python-stdlib"]}], "split": "949,50,1"},
        "evaluation": {"eval_interval": steps, "eval_samples": 32},
        "checkpoint": {"save_interval": steps},
        "defaults": {
            "model": model,
            "batch": {"micro_batch_size": micro, "global_batch_size": batch},
            "schedule": {"max_lr": 3e-4, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.1},
            "precision": "bf16",
            "train_tokens": steps * batch * length,
        },
        "stages": [
            {"name": "first", "model": {"num_layers": layers}},
            {"name": "second", "model": {"num_layers": 2 * layers}, "growth": {"layer": "identity"}},
        ],
    }


def _stages(bench: Bench, family: str, names: list[str]) -> Answer:
    """Per stage: the losses around its growth, tokens/s and MFU, each the median of steps after the first ten."""
    answer: Answer = {}
    before: float | None = None
    for name in names:
        steps = _steps(bench, family, name)
        evaluations = [r for r in _records(bench, family, name) if isinstance(r, EvalRecord)]
        settled = steps[10:] or steps
        rate = statistics.median(step.tokens_per_second for step in settled)
        flops = (steps[-1].flops / len(steps)) / (steps[-1].consumed_tokens - steps[-2].consumed_tokens) * rate
        row: Answer = {
            "steps": len(steps), "tokens/s": round(rate), "TFLOP/s": round(flops / 1e12, 2),
            "validation loss, first and last": [evaluations[0].loss, evaluations[-1].loss],
        }  # fmt: skip
        if bench.peak:
            row["MFU"] = round(flops / bench.peak, 4)
        if before is not None:
            row[GROWN] = evaluations[0].loss - before
        before = evaluations[-1].loss
        answer[name] = row
    return answer


def _records(bench: Bench, family: str, stage: str) -> list[records.Record]:
    path = bench.directory / family / stage / "records.jsonl"
    return list(records.read(path)) if path.exists() else []


def _steps(bench: Bench, family: str, stage: str) -> list[StepRecord]:
    return [r for r in _records(bench, family, stage) if isinstance(r, StepRecord)]


def _newest(bench: Bench, family: str, stage: str) -> Path:
    return max((bench.directory / family / stage / "checkpoints").glob("iter_*"))


def _copy_data(bench: Bench, source: str, target: str) -> None:
    """Give a family the tokenizer and the tokens that another has made."""
    shutil.copytree(bench.directory / source / "data", bench.directory / target / "data")


@contextmanager
def _peak_memory() -> Iterator[list[float]]:
    """Watch the GPU's memory in use, in GiB, as nvidia-smi shows it; the list's one entry is the most seen."""
    peak, ended = [0.0], threading.Event()

    def watch() -> None:
        while torch.cuda.is_available() and not ended.wait(0.2):
            free, total = torch.cuda.mem_get_info()
            peak[0] = max(peak[0], (total - free) / 2**30)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield peak
    finally:
        ended.set()
        watcher.join()


if __name__ == "__main__":
    sys.exit(main())
