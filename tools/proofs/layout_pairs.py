"""Is a converted checkpoint Megatron's own? Every pair of layouts, tensors and losses, bit for bit.

    python -m tools.proofs.layout_pairs --write

A tiny model is trained for three steps. Megatron-Core then loads it in every layout and saves it there: the sources.
Each is converted into every layout, and must hold the tensors that Megatron-Core itself saved in that layout. So all
conversions into a layout are one checkpoint, wherever they came from, and training from it needs to be seen once.
Sources (all, or `--direct` of them) are loaded there directly, with Megatron-Core's own reshard, and the losses of
three more steps must be the very same numbers. From the index follows what each rank reads to load.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from megagrow.checkpoint.directory import integrity, iterations
from megagrow.checkpoint.formats.torch_dist import TorchDistReader
from megagrow.checkpoint.index import Box, volume
from megagrow.checkpoint.proof.diff import compare_checkpoints
from megagrow.config import GrowthConfig, ModelShape, ParallelLayout
from megagrow.convert.run import TargetSpec, convert_checkpoint
from megagrow.convert.targets import OBJECTS
from megagrow.convert.work import RunOptions
from tools.reference.forked_ranks import forked, on_ranks, prepare
from tools.reference.tiny_megatron import STEPS, Losses, Model

PAGE = Path(__file__).parents[2] / "docs" / "figures" / "layout_pairs.md"
DENSE = {
    "num_layers": 8, "hidden_size": 32, "ffn_hidden_size": 64, "num_attention_heads": 8, "num_query_groups": 4,
    "kv_channels": 8, "vocab_size": 120, "make_vocab_size_divisible_by": 8, "seq_length": 16,
}  # fmt: skip
MIXTURE = DENSE | {"num_moe_experts": 4, "moe_ffn_hidden_size": 32, "moe_shared_expert_intermediate_size": 24}
MODELS = {"dense": DENSE, "mixture of experts": MIXTURE}
Sizes = dict[str, int]


class Unlike(AssertionError):
    """Something is not as this tool takes for granted."""


@dataclass(frozen=True)
class Pair:
    """A conversion and how it compares with what Megatron-Core saved in the target's layout: tensors in all, keys of
    those that differ, and a hash of all its data files.
    """

    source: str
    target: str
    tensors: int
    differing: tuple[str, ...]
    files: str


@dataclass(frozen=True)
class Reads:
    """What a rank reads to load a checkpoint: from how many files and unbroken ranges, bytes of values that its tensors
    have and of all chunks that they meet, and the files that it reads from end to end at once.
    """

    files: int
    ranges: int
    needed: int
    read: int
    whole: frozenset[str]


@dataclass(frozen=True)
class Row:
    """One layout as a target: losses after loading the conversion, after loading each source directly, reads by rank,
    and data files of the conversion that their rank does not read from end to end.
    """

    name: str
    ranks: int
    converted: Losses
    direct: dict[str, Losses]
    reads: tuple[Reads, ...]
    reads_directly: tuple[Reads, ...]
    torn: tuple[str, ...]

    @property
    def equal(self) -> str:
        """`15 of 15`: sources from which training goes on with the very same losses."""
        return f"{len(self.direct) - len(self.unequal)} of {len(self.direct)}"

    @property
    def unequal(self) -> list[str]:
        """Sources from which training goes on otherwise."""
        return [name for name, losses in self.direct.items() if losses != self.converted]


@dataclass(frozen=True)
class Proof:
    """All that was found of one model."""

    model: str
    pairs: tuple[Pair, ...]
    rows: tuple[Row, ...]

    @property
    def faults(self) -> list[str]:
        """What is not as it must be."""
        into: dict[str, set[str]] = {}
        for pair in self.pairs:
            into.setdefault(pair.target, set()).add(pair.files)
        return [
            *(f"{pair.source} -> {pair.target}: {pair.differing[:3]} differ" for pair in self.pairs if pair.differing),
            *(f"-> {target}: {len(files)} different sets of files" for target, files in into.items() if len(files) > 1),
            *(f"{row.name}: other losses than from {row.unequal}" for row in self.rows if row.unequal),
            *(f"{row.name}: {row.torn} are not read from end to end" for row in self.rows if row.torn),
        ]


def layouts(experts: bool) -> list[Sizes]:
    """Every combination that the issue asks for, those too that Megatron-Core cannot run.

    Two data-parallel ranks, so that the optimizer is cut: where experts are, and wherever that makes few processes.
    """
    return [
        sizes(tensor, pipeline, virtual, expert, 2 if expert == 2 or tensor * pipeline <= 4 else 1, experts)
        for expert in ((1, 2) if experts else (1,))
        for tensor in (1, 2, 4)
        for pipeline in (1, 2, 4)
        for virtual in (1, 2)
    ]


def sizes(
    tensor: int = 1, pipeline: int = 1, virtual: int = 1, expert: int = 1, data: int = 1, experts: bool = False
) -> Sizes:
    """A layout's sizes under Megatron's names; a mixture of experts cut by tensor rank needs sequence_parallel."""
    return {
        "tensor_model_parallel_size": tensor,
        "pipeline_model_parallel_size": pipeline,
        "expert_model_parallel_size": expert,
        "data_parallel_size": data,
        **({"virtual_pipeline_model_parallel_size": virtual} if virtual > 1 else {}),
        **({"sequence_parallel": True} if experts and tensor > 1 else {}),
    }  # fmt: skip


def name_of(layout: Sizes) -> str:
    """`TP2 PP2 VPP2`; how much data parallelism is beside the point."""
    short = {"tensor_model": "TP", "pipeline_model": "PP", "virtual_pipeline_model": "VPP", "expert_model": "EP"}
    named = [(word, layout.get(f"{long}_parallel_size", 1)) for long, word in short.items()]
    return " ".join(f"{word}{size}" for word, size in named if size > 1 or word == "TP")


def begin(shape: ModelShape, layout: ParallelLayout, path: Path) -> Losses:
    """On each rank: train a fresh model, and save it."""
    model = Model(shape, layout, fresh=True)
    losses = model.train(0)
    model.save(path)
    return losses


def save_again(shape: ModelShape, layout: ParallelLayout, origin: Path, path: Path) -> None:
    """On each rank: load the trained model in this layout, and save it."""
    model = Model(shape, layout)
    model.load(origin)
    model.save(path)


def go_on(
    shape: ModelShape, layout: ParallelLayout, converted: Path, sources: dict[str, Path], first: Path
) -> tuple[Losses, dict[str, Losses], Reads, Reads]:
    """On each rank: load the conversion and train; load each source and train; say what is read of it or `first`."""
    model = Model(shape, layout)
    model.load(converted)
    losses = model.train(STEPS)
    direct = {}
    for name, path in sources.items():
        model.load(path)
        direct[name] = model.train(STEPS)
    needs = sorted(set(model.needs()))
    return losses, direct, reads(needs, TorchDistReader(converted)), reads(needs, TorchDistReader(first))


def refusal(layout: Sizes) -> str:
    """What Megatron-Core says to a layout that it cannot run."""
    from megagrow import runtime

    try:
        runtime.start(**{name: size for name, size in layout.items() if name != "sequence_parallel"})
    except RuntimeError as error:
        return str(error)
    raise Unlike(f"Megatron-Core runs {name_of(layout)}")


def reads(needs: Sequence[tuple[str, Box]], checkpoint: TorchDistReader) -> Reads:
    """What has to be read of a checkpoint for some parts of its tensors: a chunk that is met is read as a whole."""
    needed, values, places = 0, {}, []
    for key, box in needs:
        info = checkpoint.tensors[key]
        needed += volume(box) * info.dtype.itemsize
        for chunk in info.chunks:
            if all(a < d and c < b for (a, b), (c, d) in zip(box, chunk.box, strict=True)):
                values[key, chunk.box] = volume(chunk.box) * info.dtype.itemsize
                places.append((chunk.path, chunk.offset, chunk.offset + chunk.length))
    ranges: list[tuple[str, int, int]] = []
    for path, start, stop in sorted(set(places)):
        if ranges and ranges[-1][0] == path and ranges[-1][2] == start:
            ranges[-1] = (path, ranges[-1][1], stop)
        else:
            ranges.append((path, start, stop))
    whole = {path for path, start, stop in ranges if not start and stop == (checkpoint.path / path).stat().st_size}
    files = len({path for path, _, _ in ranges})
    return Reads(files, len(ranges), needed, sum(values.values()), frozenset(whole))


def convert(shape: ModelShape, source: Path, layout: ParallelLayout, save: Path) -> Path:
    """Reshard as `megagrow convert` does; return the directory that was made."""
    target = TargetSpec("pairs", shape, layout, GrowthConfig(), "fp32", seed=0)
    convert_checkpoint(source, save, target, RunOptions(contents=False, sha256=False))
    return iterations.iteration_path(save, STEPS)


def convert_all(shape: ModelShape, root: Path, jobs: Sequence[tuple[str, str, ParallelLayout, bool]]) -> list[Pair]:
    """Convert (source, target, its layout, whether to keep it), and compare with Megatron-Core's own.

    Conversions into a layout whose files have the same bytes are compared once.
    """
    found: list[Pair] = []
    for source, target, layout, keep in jobs:
        save = root / "converted" / target / source
        made = convert(shape, root / "sources" / source, layout, save)
        files = _hash(made)
        same = next((pair for pair in found if (pair.target, pair.files) == (target, files)), None)
        if same is None:
            own = TorchDistReader(root / "sources" / target)
            differences = list(compare_checkpoints(own, TorchDistReader(made)))
            differing = tuple(each.key for each in differences if each.verdict != "equal" or each.types)
            same = Pair(source, target, len(differences), differing, files)
        found.append(replace(same, source=source))
        if not keep:
            shutil.rmtree(save)
    return found


def _hash(made: Path) -> str:
    """One hash of a conversion's index and data files."""
    told = json.loads((made / integrity.INTEGRITY).read_text())["files"]
    data = sorted((name, *entry.values()) for name, entry in told.items() if name.endswith((".distcp", ".metadata")))
    return hashlib.sha256(repr(data).encode()).hexdigest()


def prove(name: str, shape: ModelShape, cuts: Sequence[Sizes], root: Path, workers: int = 2, direct: int = 0) -> Proof:
    """Convert between each two of some layouts, and train from what was made.

    Args:
        name, shape: the model.
        cuts: the layouts; the model is trained in the first.
        root: directory for all checkpoints.
        workers: processes that convert.
        direct: sources that are loaded directly into each layout, its own and others spread evenly; 0: all.

    Raises:
        RankFailed: what Megatron-Core could not do. All else that is wrong is among the proof's faults.
    """
    prepare()
    layout_of = {name_of(cut): ParallelLayout(**cut) for cut in cuts}
    names = list(layout_of)
    origin = root / "origin"
    first = layout_of[names[0]]
    tell(f"{name}: trained, {on_ranks(first.world_size, begin, shape, first, origin)[0]}")
    for cut, layout in layout_of.items():
        on_ranks(layout.world_size, save_again, shape, layout, origin, root / "sources" / cut)
    tell(f"{name}: saved in {len(names)} layouts")
    # the one that is kept to be loaded comes from a layout as unlike as there is
    kept = {target: names[-1] if target != names[-1] else names[0] for target in names}
    jobs = [(one, other, layout_of[other], kept[other] == one) for other in names for one in names]
    parts = forked([partial(convert_all, shape, root, jobs[worker::workers]) for worker in range(workers)])
    pairs = tuple(pair for part in parts for pair in part)
    tell(f"{name}: {len(pairs)} conversions, {sum(bool(pair.differing) for pair in pairs)} differ")
    rows = []
    for index, (target, layout) in enumerate(layout_of.items()):
        converted = iterations.iteration_path(root / "converted" / target / kept[target], STEPS)
        sources = {cut: root / "sources" / cut for cut in _spread(names, index, direct or len(names))}
        said = on_ranks(layout.world_size, go_on, shape, layout, converted, sources, root / "sources" / names[0])
        rows.append(_row(target, layout.world_size, said, converted))
        tell(f"{name}: {target} on {layout.world_size} ranks: {rows[-1].equal} equal")
    return Proof(name, pairs, tuple(rows))


def _spread(names: Sequence[str], index: int, count: int) -> list[str]:
    """So many of the names from that of an index on, evenly round."""
    return [names[(index + step * len(names) // count) % len(names)] for step in range(min(count, len(names)))]


def _row(name: str, ranks: int, said: list[Any], converted: Path) -> Row:
    losses, direct = said[0][:2]
    assert len({repr(other[:2]) for other in said}) == 1, "ranks disagree on the losses"
    found, directly = zip(*(each[2:] for each in said), strict=True)
    own = [path.name for path in converted.glob("*.distcp") if path.name != OBJECTS]
    torn = tuple(file for file in own if file not in found[int(file.split("_")[2])].whole)
    return Row(name, ranks, losses, direct, found, directly, torn)


def tell(line: str) -> None:
    """Say how far it is."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


# ---- the page ----


def page(proof: Proof, refused: dict[str, str]) -> str:
    """A model's part of the page, in markdown."""
    names, same = {pair.target for pair in proof.pairs}, [pair for pair in proof.pairs if not pair.differing]
    files = {(pair.target, pair.files) for pair in proof.pairs}
    runs = sum(len(row.direct) for row in proof.rows)
    equal = runs - sum(len(row.unequal) for row in proof.rows)
    tensors = max(pair.tensors for pair in proof.pairs)
    lines = [
        f"## {proof.model}",
        "",
        f"{len(same)} of {len(proof.pairs)} conversions between {len(names)} layouts have the {tensors} tensors that "
        f"Megatron-Core saved in the target's layout, bit for bit; index and data files of {len(names)} targets came "
        f"in {len(files)} versions, so a source's layout leaves no trace. {equal} of {runs} direct loads continue "
        f"with the same {STEPS} losses and gradient norms as the conversion, bit for bit.",
        "",
        f"| layout | ranks | direct loads equal | loss of step {STEPS + 1} | of step {2 * STEPS} | needs, kB | "
        "reads | files | ranges | directly: reads | files | ranges |",
        "|" + "---|" * 12,
    ]
    for row in proof.rows:
        said = [row.name, row.ranks, row.equal, *(f"{row.converted[at][0]:.10f}" for at in (0, -1))]
        said.append(f"{max(each.needed for each in row.reads) / 1000:,.0f}")
        for found in (row.reads, row.reads_directly):
            said.append(f"{max(each.read / each.needed for each in found):.2f} x")
            said += [max(each.files for each in found), max(each.ranges for each in found)]
        lines.append(f"| {' | '.join(map(str, said))} |")
    lines += ["", "Not run, because Megatron-Core refuses them:", ""] if refused else []
    return "\n".join([*lines, *(f"- {name}: {reason}" for name, reason in refused.items())])


def write(model: str, text: str) -> None:
    """Write a model's part between its two marks of the page."""
    begin, end = f"<!-- {model}:begin -->", f"<!-- {model}:end -->"
    old = PAGE.read_text(encoding="utf-8")
    assert begin in old and end in old, f"{PAGE}: no marks for {model}"
    PAGE.write_text(re.sub(f"{begin}.*{end}", lambda _: f"{begin}\n{text}\n{end}", old, flags=re.DOTALL))


def main() -> int:
    """Entry point; return 0 if all is as it must be."""
    parser = argparse.ArgumentParser(description="Convert between every two layouts; compare with Megatron-Core's own.")
    parser.add_argument("models", nargs="*", choices=[[], *MODELS], default=[], help="default: both")
    parser.add_argument("--direct", type=int, default=0, help="sources loaded directly into each layout; default: all")
    parser.add_argument("--most-ranks", type=int, default=32, help="leave out layouts of more ranks, and say so")
    parser.add_argument("--workers", type=int, default=2, help="processes that convert")
    parser.add_argument("--root", type=Path, help="existing directory for the checkpoints; default: a temporary one")
    parser.add_argument("--write", action="store_true", help="write what is found into docs/figures/layout_pairs.md")
    asked = parser.parse_args()
    prepare()
    faults = []
    for name in asked.models or MODELS:
        cuts = layouts(experts="num_moe_experts" in MODELS[name])
        refused = {name_of(cut): on_ranks(_world(cut), refusal, cut)[0] for cut in cuts if not _runs(cut)}
        with tempfile.TemporaryDirectory(prefix="layout-pairs-", dir=asked.root) as root:
            cuts = [cut for cut in cuts if _runs(cut)]
            large = [name_of(cut) for cut in cuts if _world(cut) > asked.most_ranks]
            cuts = [cut for cut in cuts if _world(cut) <= asked.most_ranks]
            proof = prove(name, ModelShape(**MODELS[name]), cuts, Path(root), asked.workers, asked.direct)
        text = page(proof, refused)
        if large:
            text += f"\n\nLeft out, for they take more than {asked.most_ranks} ranks: {', '.join(large)}."
        print(text, *proof.faults, sep="\n", flush=True)
        faults += proof.faults
        if asked.write and not proof.faults:
            write(name, text)
    return 1 if faults else 0


def _runs(cut: Sizes) -> bool:
    """Whether Megatron-Core can run a layout: virtual stages are of a pipeline. `refusal` proves what this denies."""
    return cut.get("virtual_pipeline_model_parallel_size", 1) == 1 or cut["pipeline_model_parallel_size"] > 1


def _world(cut: Sizes) -> int:
    return cut["tensor_model_parallel_size"] * cut["pipeline_model_parallel_size"] * cut["data_parallel_size"]


if __name__ == "__main__":
    sys.exit(main())
