"""Bare Megatron-Core loads every conversion, and trains on from it exactly as from its own reshard.

One program, without megagrow in its process, saves a mixture of experts in each layout on four ranks and later loads
all that `megagrow convert` made of it (`tests/distributed/ranks/bare.py`). Where the two layouts chain optimizers
differently, Megatron-Core cannot reshard its own checkpoint; there its own groups are put in by hand.
"""

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.ranks.families import verb
from tests.distributed.ranks.launcher import ROOT

TP2, PP2, EP2 = ({f"{name}_parallel_size": 2} for name in ("tensor_model", "pipeline_model", "expert_model"))
LAYOUTS: dict[str, dict[str, Any]] = {
    "DP4": {},
    "TP2": TP2 | {"sequence_parallel": True},
    "EP2": EP2,
    "TP2 EP2 ETP1": TP2 | EP2 | {"expert_tensor_parallel_size": 1, "sequence_parallel": True},
    "PP2 EP2": PP2 | EP2,
}
DENSE = {"dense TP2": TP2}
GROWN = ["model.num_moe_experts=4", "model.moe_ffn_hidden_size=48", "model.moe_router_topk=2"]
SECONDS = 480
Losses = dict[str, dict[str, dict[str, dict[str, list[list[float]]]]]]


def models() -> dict[str, Any]:
    """The models that the program saves and loads, by name."""
    return {
        "mixture": {
            "experts": True, "layouts": LAYOUTS, "sources": list(LAYOUTS), "targets": dict.fromkeys(LAYOUTS, [*LAYOUTS])
        },
        "dense": {"experts": False, "layouts": DENSE, "sources": list(DENSE), "targets": {}},
        "grown": {
            "experts": True, "layouts": LAYOUTS, "sources": [], "targets": dict.fromkeys(LAYOUTS, ["dense TP2"])
        },
    }  # fmt: skip


def convert_all(place: Path) -> None:
    """Convert each source into each layout, and the dense one into a mixture in each layout."""
    for source, target in itertools.product(LAYOUTS, LAYOUTS):
        convert(place / "sources" / "mixture" / source, place / "converted" / "mixture" / target / source, target)
    for target in LAYOUTS:
        convert(place / "sources/dense/dense TP2", place / "converted" / "grown" / target / "dense TP2", target, *GROWN)


def convert(source: Path, made: Path, target: str, *more: str) -> None:
    layout = {**LAYOUTS[target]}
    inside = 4 // layout.get("tensor_model_parallel_size", 1) // layout.get("pipeline_model_parallel_size", 1)
    sizes = [f"parallel.{name}={str(size).lower()}" for name, size in {**layout, "data_parallel_size": inside}.items()]
    said = verb("convert", source, made, *sizes, *more)
    assert said.code == 0, said.text


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> Losses:
    """Losses and gradient norms after each load, by model, target and source."""
    place = tmp_path_factory.mktemp("bare")
    (place / "payload.json").write_text(json.dumps({"world": 4, "models": models()}))
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    environment.pop("PYTHONPATH", None)
    with open(place / "output", "wb") as output:
        program = subprocess.Popen(
            [sys.executable, str(ROOT / "tests/distributed/ranks/bare.py"), str(place)],
            env=environment, stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        wait_for(place / "saved", program)
        convert_all(place)
        (place / "converted.done").touch()
        code = program.wait(timeout=SECONDS)
    finally:
        program.kill()
        program.wait()
        text = (place / "output").read_text(errors="replace")
    assert code == 0, text[-6000:]
    said: Losses = json.loads((place / "result.json").read_text())
    return said


def wait_for(file: Path, program: subprocess.Popen) -> None:
    """Wait for a file, as long as the program runs that makes it."""
    deadline = time.monotonic() + SECONDS
    while not file.exists():
        text = (file.parent / "output").read_text(errors="replace")
        assert program.poll() is None and time.monotonic() < deadline, text[-6000:]
        time.sleep(0.05)


# issue 12: B7
@pytest.mark.parametrize("target", LAYOUTS)
def test_megatron_goes_on_from_a_conversion_as_from_its_own_reshard(target: str, losses: Losses) -> None:
    found = losses["mixture"][target]
    assert list(found) == list(LAYOUTS)
    for source, each in found.items():
        assert each["converted"] == each["direct"], f"{source} -> {target}"
        assert len({loss for loss, _ in each["converted"]}) == 3
    first = found["DP4"]["converted"]
    assert all(each["converted"] == first for each in found.values()), "the source's layout leaves a trace"


# issue 12: B7
def test_megatron_goes_on_alike_in_every_layout(losses: Losses) -> None:
    for model, source in (("mixture", "DP4"), ("grown", "dense TP2")):
        first = [loss for loss, _ in losses[model]["DP4"][source]["converted"]]
        for target, found in losses[model].items():
            told = found[source]["converted"]
            assert [loss for loss, _ in told] == pytest.approx(first, rel=2e-5), (model, target)
