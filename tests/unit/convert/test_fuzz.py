"""Mutated checkpoints: a conversion fails with one line or gives the right values, and runs no code.

70 mutations here; `MEGAGROW_FUZZ=300` makes 350, each drawn by its number.
"""

import os
import pickle
import random
import resource
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from megagrow.checkpoint.directory import iterations
from megagrow.checkpoint.formats.torch_dist.read import TorchDistReader
from megagrow.config import GrowthConfig, ParallelLayout
from megagrow.convert.run import TargetSpec, convert_checkpoint, export_checkpoint, order_export
from megagrow.convert.work import RunOptions
from megagrow.errors import CheckpointError, UserError
from megagrow.tracker import TRACKER
from tests.reference import mutations
from tests.unit.torch_dist import test_flat_optimizer as test_dp_reshardable
from tests.unit.torch_dist import test_gathered_optimizer as test_gathered
from tests.unit.torch_dist.test_flat_optimizer import dense_of_engine, parts
from tools.reference.tiny_checkpoint import SMALL, random_state, shape, write_checkpoint

EXAMPLES = int(os.environ.get("MEGAGROW_FUZZ", "60"))
SHARES = {"sealed": 6, "bare": 3, "flat": 6, "gathered": 6, "huggingface": 6, "legacy": 6}
"""One in this many examples is of the kind."""
KINDS = {
    "sealed": mutations.TORCH_DIST,
    "bare": mutations.TORCH_DIST,
    "flat": mutations.TORCH_DIST,
    "gathered": mutations.TORCH_DIST,
    "huggingface": mutations.HUGGING_FACE,
    "legacy": mutations.LEGACY,
}
MOST_MEMORY = 96 << 20
"""Most bytes that a conversion of a mutated checkpoint of 100 kB may allocate."""
TP2 = ParallelLayout(tensor_model_parallel_size=2)
OF = shape(SMALL)


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same weights in every format; only the sealed one has checksums."""
    root = tmp_path_factory.mktemp("sources")
    sealed = write_checkpoint(root / "sealed", OF, random_state(OF))
    bare = root / "bare"
    shutil.copytree(sealed, bare)
    for name in ("megagrow.json", "integrity.json"):
        (bare / name).unlink()
    found = {"sealed": sealed, "bare": bare}
    state = random_state(OF)
    found["flat"] = test_dp_reshardable.write(root / "flat", state, parts(dense_of_engine, OF))
    found["gathered"] = test_gathered.write(root / "gathered", state, test_gathered.content(state))
    for to in ("huggingface", "legacy"):
        layout = TP2 if to == "legacy" else ParallelLayout()
        done = export_checkpoint(order_export(sealed, to, "fp32", layout, OF, None), root / to, RunOptions())  # type: ignore[arg-type]  # one of the literals
        found[to] = done.target
    return found


def converted(source: Path, save: Path) -> dict[str, Tensor]:
    """All values of the source after a conversion for two ranks."""
    target = TargetSpec(
        stage="same", shape=OF, layout=TP2, growth=GrowthConfig(), precision="fp32", seed=7, source_shape=OF
    )
    convert_checkpoint(source, save, target)
    (iteration,) = iterations.published(save)
    reader = TorchDistReader(iterations.iteration_path(save, iteration))
    return {key: reader.read_whole(key) for key in reader.tensors}


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutated_checkpoint_gives_one_line_or_the_right_values(
    sources: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    right = converted(sources[kind], tmp_path / "right")
    ends: Counter[str] = Counter()
    for number in range(EXAMPLES // SHARES[kind]):
        mutate = KINDS[kind][number % len(KINDS[kind])]
        chance, marker = random.Random(f"{kind} {number}"), tmp_path / "code was run"
        source, save = tmp_path / f"{number}" / sources[kind].name, tmp_path / f"{number}" / "save"
        shutil.copytree(sources[kind], source)
        changeable = mutate(source, chance, marker)
        what = f"{kind} {number} ({mutate.__name__})"
        try:
            with bounded(what):
                found = converted(source, save)
        except UserError as error:
            assert "\n" not in str(error) and str(source) in str(error), f"{what}: {error}"
            assert "Memory" not in str(error) and "alloc" not in str(error), f"{what}: memory was requested: {error}"
            assert not iterations.published(save) and not (save / TRACKER).exists(), what
            ends["refused"] += 1
        except Exception as error:
            raise AssertionError(f"{what}: a crash") from error
        else:
            changed = check_values(found, right, changeable, what, bits=1 if mutate is mutations.flip else 8)
            ends["values differ, as they may" if changed else "right values"] += 1
            assert kind != "sealed" or not changed, what
        assert not marker.exists(), f"{what}: code of a checkpoint was run"
        shutil.rmtree(tmp_path / f"{number}")
    print(kind, dict(ends))
    assert ends["refused"] >= EXAMPLES // SHARES[kind] // 4, "mutations must be noticed"


def check_values(found: dict[str, Tensor], right: dict[str, Tensor], bytes_changed: int, what: str, bits: int) -> int:
    """Assert that no more values differ than bytes were changed on the disk, each in at most `bits` per byte.

    Returns the number of different values.
    """
    assert found.keys() == right.keys(), what
    changed: dict[str, int] = {}
    for key, values in right.items():
        assert found[key].shape == values.shape and found[key].dtype == values.dtype, f"{what}: {key}"
        difference = found[key].contiguous().view(torch.int32) ^ values.contiguous().view(torch.int32)
        for word in difference[difference != 0].tolist():
            changed[key] = changed.get(key, 0) + 1
            assert (word & 0xFFFFFFFF).bit_count() <= bits * bytes_changed, f"{what}: {key}"
    # the model's own weights are made from the masters, so one changed value may appear twice
    once = {key: count for key, count in changed.items() if f"optimizer.state.param.{key}" not in found}
    assert sum(once.values()) <= bytes_changed, f"{what}: {changed}"
    for key, count in changed.items():
        if key not in once:
            assert count == changed[f"optimizer.state.param.{key}"], f"{what}: {changed}"
    return sum(changed.values())


@contextmanager
def bounded(what: str) -> Iterator[None]:
    """Assert that this process grows by at most MOST_MEMORY; a hard limit protects the machine."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_status("VmSize") + (4 << 30), hard))
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = _status("VmRSS")
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        grown = _status("VmHWM") - before
        assert grown < MOST_MEMORY, f"{what}: took {grown >> 20} MiB"


def _status(name: str) -> int:
    """A value of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) << 10


def test_the_bound_on_memory_notices(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="too much: took"), bounded("too much"):
        assert b"x" * (2 * MOST_MEMORY)  # far above, since what earlier tests left may be freed meanwhile


def test_the_hostile_pickles_do_run_code_when_loaded(tmp_path: Path) -> None:
    for seed in range(6):
        pickle.loads(pickle.dumps(mutations.hostile(random.Random(seed), tmp_path / "ran")))
        assert (tmp_path / "ran").exists()
        (tmp_path / "ran").unlink()


@pytest.mark.parametrize("name", ["integrity.json", "megagrow.json"])
def test_removing_a_file_does_not_disable_checksums(sources: dict[str, Path], tmp_path: Path, name: str) -> None:
    source = Path(shutil.copytree(sources["sealed"], tmp_path / "source"))
    content = bytearray((source / "__0_0.distcp").read_bytes())
    content[-3000] ^= 1
    (source / "__0_0.distcp").write_bytes(content)
    (source / name).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        converted(source, tmp_path / "save")
