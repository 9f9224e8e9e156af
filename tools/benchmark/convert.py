"""Measure the converter against the disk, cp, torch's DCP and mergekit, in one run on one machine.

    python -m tools.benchmark.convert --directory /scratch --layers 16 --hidden 2048 --rounds 3
    python -m tools.benchmark.convert --directory /scratch --only mergekit --mergekit /path/to/venv/bin/mergekit-yaml

Makes a random Llama-like checkpoint with Adam's state (14 bytes a parameter), and does each job on it: reshard, depth
doubled, width 2048 -> 2560, both. The *floor* of a job is one thread that reads as many bytes cold and writes as many,
to the disk, as the job does; a second floor has four threads, each with a request in flight. Both are paired with every
run. Wall time includes the start of all programs. Memory is the sum of the resident sets of all processes of the job,
sampled. On a virtual machine the share of time that was stolen from it is printed: a run with more than a few percent
says little. mergekit's own job is depth doubled, weights only. `--checksums` runs each job with its blocks' checksums
compared and not compared, in turns.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock

import psutil
import torch

from megagrow.checkpoint.directory import Manifest, integrity, iterations, write_manifest
from megagrow.checkpoint.tensors import extra_state_keys, optimizer_key, tensor_kinds
from megagrow.config import ModelShape, ParallelLayout
from tools.reference.torch_dist_writer import Writer

BLOCK = 8 << 20
IN_FLIGHT = 4
"""Threads of the second floor: each has one request in flight."""
CONVERT = [sys.executable, "-m", "megagrow", "convert"]
DCP = """
import sys, torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
dcp_to_torch_save(sys.argv[1], sys.argv[2])
"""


@dataclass
class Seen:
    """The runs of one job.

    Attributes:
        name: of the job.
        seconds, floors, flights, memory: wall time, its paired floors of one thread and of several, and peak bytes, of
            each run.
        stolen: share of all cores' time that the hypervisor gave to other machines meanwhile, of each run.
        read, written: bytes of the job.
    """

    name: str
    read: int
    written: int
    seconds: list[float] = field(default_factory=list)
    floors: list[float] = field(default_factory=list)
    flights: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    memory: list[int] = field(default_factory=list)
    stolen: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Median of wall time over its own floor of one thread."""
        return statistics.median(a / b for a, b in zip(self.seconds, self.floors, strict=True))

    @property
    def flight_ratio(self) -> float:
        """Median of wall time over its own floor of several threads."""
        return statistics.median(a / b for a, b in zip(self.seconds, self.flights, strict=True))


def make_source(path: Path, shape: ModelShape) -> int:
    """Write a random checkpoint with Adam's state; return its parameters."""
    staging = iterations.new_staging(path)
    writer, count = Writer(staging), 0
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(1)) * 0.02
    for kind in tensor_kinds(shape):
        for layer in range(shape.num_layers) if kind.per_layer else (None,):
            size = kind.layer_shape(shape)
            values = pool.roll(7919 * count).repeat(-(-torch.Size(size).numel() // pool.numel()))
            values = values[: torch.Size(size).numel()].view(size)
            count += 1
            states = {kind.key: values.bfloat16(), optimizer_key("param", kind.key): values}
            states |= {optimizer_key("exp_avg", kind.key): values * 0.1}
            states |= {optimizer_key("exp_avg_sq", kind.key): values.square()}
            corner = (0,) * len(size) if layer is None else (layer, *(0,) * len(size))
            for key, state in states.items():
                writer.put(key, kind.global_shape(shape), corner, state if layer is None else state.unsqueeze(0))
    for key in extra_state_keys(shape):
        writer.put_object(key, [None])
    writer.finish({"iteration": 100, "optimizer": {"optimizer": {"param_groups": [{"step": 100}]}}})
    said = {"position": {}, "consumed_samples": 0, "consumed_tokens": 0, "flops": 0.0}
    write_manifest(
        staging,
        Manifest(
            family="benchmark", stage="source", iteration=100, shape=shape, layout=ParallelLayout(), precision="bf16",
            **said,
        ),
    )  # fmt: skip
    integrity.seal(staging)
    iterations.publish(staging, path)
    return sum(torch.Size(kind.global_shape(shape)).numel() for kind in tensor_kinds(shape))


def cold(path: Path) -> None:
    """Make sure that a directory's files are on the disk and not in memory."""
    os.sync()
    for file in (entry for entry in path.rglob("*") if entry.is_file()):
        handle = os.open(file, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def floor(source: Path, scratch: Path, read: int, written: int, threads: int = 1) -> float:
    """Seconds in which a program reads and writes so many bytes, interleaved, with a request a thread in flight."""
    cold(source)
    begun = time.perf_counter()
    with ExitStack() as files:
        out = files.enter_context(open(scratch, "wb", buffering=0))
        os.posix_fallocate(out.fileno(), 0, max(written, 1))
        requests, taking = _requests(source, files, read, written), Lock()

        def work() -> None:
            buffer = memoryview(bytearray(BLOCK))
            while True:
                with taking:
                    handle, offset, size = next(requests, (None, 0, 0))
                if size == 0:
                    return
                if handle is None:
                    os.pwrite(out.fileno(), buffer[:size], offset)
                else:
                    os.preadv(handle, [buffer[:size]], offset)

        with ThreadPoolExecutor(threads) as pool:
            for each in [pool.submit(work) for _ in range(threads)]:
                each.result()
        os.fdatasync(out.fileno())
    taken = time.perf_counter() - begun
    scratch.unlink()
    return taken


def _requests(source: Path, files: ExitStack, read: int, written: int) -> Iterator[tuple[int | None, int, int]]:
    """Blocks to read, as (file, offset, bytes), and to write, as (None, offset, bytes), in a job's proportion."""
    blocks, left_read, left_written = _blocks(source, files), read, written
    while left_read > 0 or left_written > 0:
        if left_read > 0:
            block = next(blocks)
            left_read -= block[2]
            yield block
        # as many bytes of writing for each byte of reading as in the whole job
        while left_written > 0 and (left_read <= 0 or left_written / written > left_read / max(read, 1)):
            size = min(BLOCK, left_written)
            yield None, written - left_written, size
            left_written -= size


def _blocks(source: Path, files: ExitStack) -> Iterator[tuple[int, int, int]]:
    """The blocks of a directory's files, again and again."""
    paths = sorted((entry for entry in source.rglob("*") if entry.is_file()), key=lambda entry: entry.name)
    opened = [files.enter_context(open(path, "rb", buffering=0)) for path in paths]
    sizes = [os.fstat(stream.fileno()).st_size for stream in opened]
    while True:
        for stream, size in zip(opened, sizes, strict=True):
            for offset in range(0, size, BLOCK):
                yield stream.fileno(), offset, min(BLOCK, size - offset)


def watch(command: Sequence[str]) -> tuple[float, float, int]:
    """Run a command; return its seconds, CPU seconds, and the peak of the resident sets of its processes."""
    before, begun = os.times(), time.perf_counter()
    process = psutil.Popen([str(part) for part in command], stdout=subprocess.DEVNULL)
    peak = 0
    while True:
        peak = max(peak, _resident(process))  # which takes time of a core: not too often
        with suppress(psutil.TimeoutExpired):
            process.wait(0.1)
            break
    taken, after = time.perf_counter() - begun, os.times()
    if process.returncode:
        raise SystemExit(f"{' '.join(map(str, command))}: exit code {process.returncode}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return taken, cpu, peak


def _resident(process: psutil.Process) -> int:
    total = 0
    try:
        for one in [process, *process.children(recursive=True)]:
            try:
                total += one.memory_info().rss
            except psutil.NoSuchProcess:
                continue
    except psutil.NoSuchProcess:
        pass
    return total


def measure(
    seen: Seen, source: Path, place: Path, command: Sequence[str], rounds: int, clear: Callable[[], None]
) -> Seen:
    """Run a job and its floor in turn, and add what was seen."""
    for _ in range(rounds):
        clear()
        seen.floors.append(floor(source, place / "floor.bin", seen.read, seen.written))
        seen.flights.append(floor(source, place / "floor.bin", seen.read, seen.written, IN_FLIGHT))
        cold(source)
        before = psutil.cpu_times().steal
        taken, cpu, peak = watch(command)
        seen.stolen.append((psutil.cpu_times().steal - before) / taken / (os.cpu_count() or 1))
        seen.seconds.append(taken)
        seen.cpu.append(cpu)
        seen.memory.append(peak)
        clear()
    return seen


def show(seen: Seen) -> Seen:
    """Print a job's line."""
    print(
        f"{seen.name:<34} {seen.read / 1e9:6.2f} + {seen.written / 1e9:6.2f} GB  "
        f"{statistics.median(seen.seconds):7.1f} s  {seen.ratio:5.2f} x floor  "
        f"{seen.flight_ratio:5.2f} x floor of {IN_FLIGHT} threads  "
        f"cpu {statistics.median(seen.cpu):6.1f} s  {max(seen.memory) / 2**20:6.0f} MiB  "
        f"stolen {max(seen.stolen):4.0%}",
        flush=True,
    )
    return seen


def forecast(command: Sequence[str]) -> tuple[int, int]:
    """Bytes that a conversion reads and writes, by its own plan."""
    plan = json.loads(subprocess.run([*command, "--dry-run", "--json"], check=True, capture_output=True).stdout)
    return plan["bytes_read"], plan["bytes_written"]


def jobs(shape: ModelShape) -> dict[str, list[str]]:
    """Overrides of each job."""
    ratio = 1.25
    wide = {
        "hidden_size": int(shape.hidden_size * ratio),
        "ffn_hidden_size": int(shape.ffn_hidden_size * ratio),
        "num_attention_heads": int(shape.num_attention_heads * ratio),
        "num_query_groups": int(shape.groups * ratio),
        "kv_channels": shape.head_dim,
    }
    width = [f"source.kv_channels={shape.head_dim}", *(f"model.{name}={value}" for name, value in wide.items())]
    depth = [f"model.num_layers={2 * shape.num_layers}", "growth.layer=stack"]
    return {
        "reshard TP1 -> TP4 PP2": ["parallel.tensor_model_parallel_size=4", "parallel.pipeline_model_parallel_size=2"],
        "depth x2 (stack)": depth,
        "width x1.25 (balanced)": [*width, "growth.hidden=balanced", "growth.ffn=balanced", "growth.head=balanced"],
        "width x1.25 (zero_pad)": width,
        "both": [*width, *depth],
    }


def run(options: argparse.Namespace) -> list[Seen]:
    """Make the source, do the jobs, print a line each."""
    place: Path = options.directory / "megagrow-benchmark"
    source, target = place / "source" / "iter_0000100", place / "target"
    shape = ModelShape(
        num_layers=options.layers,
        hidden_size=options.hidden,
        ffn_hidden_size=options.hidden * 11 // 4 // 128 * 128,
        num_attention_heads=options.hidden // 64,
        num_query_groups=options.hidden // 256,
        vocab_size=32000,
        seq_length=2048,
    )
    count = make_source(source, shape) if not source.is_dir() else 0
    size = sum(file.stat().st_size for file in source.iterdir())
    print(f"source: {count / 1e9 or size / 14e9:.2f} B parameters, {size / 1e9:.2f} GB; {os.cpu_count()} cores")

    def clear() -> None:
        shutil.rmtree(target, ignore_errors=True)

    found: list[Seen] = []
    wanted = {name: given for name, given in jobs(shape).items() if options.only in name}
    for name, given in wanted.items():
        for workers in options.workers:
            command = [*CONVERT, source, target, *given, "--workers", workers, *options.extra]
            read, written = forecast(command)
            seen = Seen(f"{name}, {workers} workers", read, written)
            if options.checksums:
                found += with_and_without_checksums(seen, source, place, command, options.rounds, clear)
            else:
                found.append(show(measure(seen, source, place, command, options.rounds, clear)))
    if options.only in "cp":
        command = ["cp", "-r", source, target]
        found.append(show(measure(Seen("cp -r", size, size), source, place, command, options.rounds, clear)))
    if options.only in "dcp":
        one = place / "target.pt"
        command = [sys.executable, "-W", "ignore", "-c", DCP, source, one]
        found.append(show(measure(Seen("torch dcp_to_torch_save", size, size), source, place, command, 1, clear)))
        one.unlink(missing_ok=True)
    if options.mergekit and options.only in "mergekit":
        found += against_mergekit(options, place, source, shape, clear)
    shutil.rmtree(place) if not options.keep else None
    return found


def with_and_without_checksums(
    seen: Seen, source: Path, place: Path, command: Sequence[str], rounds: int, clear: Callable[[], None]
) -> list[Seen]:
    """The same job with the source's checksums compared and not, in turns."""
    without = Seen(f"{seen.name}, no checksums", seen.read, seen.written)
    for _ in range(rounds):
        measure(seen, source, place, command, 1, clear)
        measure(without, source, place, [*command, "--skip-checksums"], 1, clear)
    times = statistics.median(a / b for a, b in zip(seen.seconds, without.seconds, strict=True))
    cpu = statistics.median(a / b for a, b in zip(seen.cpu, without.cpu, strict=True))
    for each in (seen, without):
        show(each)
    print(f"with checksums {times:.3f} of the wall time and {cpu:.3f} of the CPU time (medians of {rounds} pairs)")
    return [seen, without]


def against_mergekit(
    options: argparse.Namespace, place: Path, source: Path, shape: ModelShape, clear: Callable[[], None]
) -> list[Seen]:
    """mergekit's own job, depth doubled in bfloat16 without moments, by it and by us, from the same files."""
    plain, target = place / "huggingface", place / "target"
    if not plain.is_dir():
        subprocess.run([*CONVERT, source, plain, "--to", "huggingface"], check=True)
    ours = [*CONVERT, str(plain), str(target), *jobs(shape)["depth x2 (stack)"], "--workers", "2"]
    read, written = forecast(ours)
    layers = [{"sources": [{"model": str(plain), "layer_range": [0, shape.num_layers]}]}] * 2
    plan = place / "merge.yaml"
    plan.write_text(json.dumps({"slices": layers, "merge_method": "passthrough", "dtype": "bfloat16"}))
    lazy = ["--lazy-unpickle", "--out-shard-size", "1B", "--no-copy-tokenizer"]
    merge = [options.mergekit, str(plan), str(target), *lazy]
    one = Seen("mergekit's job: megagrow", read, written)
    other = Seen("mergekit's job: mergekit, lazy", read, written)
    for _ in range(options.rounds):  # in turn, since what else a machine does comes and goes
        measure(one, plain, place, ours, 1, clear)
        measure(other, plain, place, merge, 1, clear)
    times = statistics.median(b / a for a, b in zip(one.seconds, other.seconds, strict=True))
    for seen in (one, other):
        show(seen)
    print(f"megagrow is {times:.2f} times as fast (median of {options.rounds} pairs)")
    return [one, other]


def main() -> None:
    """Parse and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to be measured")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", nargs="+", default=["1", "2"])
    parser.add_argument("--only", default="", help="jobs whose name has this in it")
    parser.add_argument("--checksums", action="store_true", help="each job with checksums compared and not, in turns")
    parser.add_argument("--mergekit", help="the program mergekit-yaml of an environment that has it")
    parser.add_argument("--keep", action="store_true", help="leave the source for another run")
    parser.add_argument("--extra", nargs="*", default=[], help="further options of megagrow convert")
    options = parser.parse_args()
    run(options)


if __name__ == "__main__":
    main()
