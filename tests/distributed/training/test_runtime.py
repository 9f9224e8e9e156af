"""The runtime room on real processes: what is replaced without CUDA, Adam, groups, and no orphans."""

import os
import subprocess
import sys
import time
from typing import Any

import pytest

from megagrow.errors import LaunchError
from tests.distributed.ranks.launcher import ROOT, run_ranks


def test_cuda_stays_untouched_and_cpu_is_patched_once() -> None:
    (seen,) = run_ranks("tests.distributed.training.test_runtime:patching", 1, prepare=False)
    assert seen["with_cuda"] == () and seen["changed_with_cuda"] == []
    assert seen["first"] == seen["table"] and len(seen["first"]) > 20
    assert seen["second"] == () and seen["reasons"]
    assert seen["seeded_alike"] and seen["zeros_device"] == "cpu" and seen["type"] == "torch.cuda.FloatTensor"


def patching(payload: None) -> dict[str, object]:
    import torch

    from megagrow.runtime import cpu

    real = torch.cuda.is_available
    owners = [(patch, cpu.owner_of(patch)) for patch in cpu.patches()]
    before = [getattr(owner, patch.name, None) for patch, owner in owners]
    torch.cuda.is_available = lambda: True
    with_cuda = cpu.install()
    changed = [patch.label for (patch, owner), was in zip(owners, before, strict=True)
               if getattr(owner, patch.name, None) is not was]  # fmt: skip
    torch.cuda.is_available = real
    first, second = cpu.install(), cpu.install()
    torch.cuda.manual_seed(7)
    drawn = torch.rand(3)
    torch.manual_seed(7)
    return {
        "with_cuda": with_cuda,
        "changed_with_cuda": changed,
        "first": first,
        "second": second,
        "table": tuple(patch.label for patch in cpu.patches()),
        "reasons": all(patch.why for patch in cpu.patches()),
        "seeded_alike": torch.equal(drawn, torch.rand(3)),
        "zeros_device": torch.zeros(2, device="cuda").device.type,
        "type": torch.ones(2).type(),
    }


@pytest.mark.parametrize("adam_w", [True, False])
def test_adam_is_torchs_adam(adam_w: bool) -> None:
    import torch

    from megagrow.runtime.adam import Adam

    torch.manual_seed(0)
    start = [torch.randn(5, 7), torch.randn(3), torch.randn(2, 2, 2)]
    ours = [torch.nn.Parameter(values.clone()) for values in start]
    theirs = [torch.nn.Parameter(values.clone()) for values in start]
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    mine = Adam(ours, adam_w_mode=adam_w, **settings)
    other = (torch.optim.AdamW if adam_w else torch.optim.Adam)(theirs, foreach=False, **settings)
    for step in range(6):
        for optimizer in (mine, other):
            optimizer.param_groups[0]["lr"] = 1e-2 / (step + 1)
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        other.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        assert set(mine.state[a]) == {"exp_avg", "exp_avg_sq"}
        torch.testing.assert_close(mine.state[a]["exp_avg_sq"], other.state[b]["exp_avg_sq"])
    assert mine.param_groups[0]["step"] == 6


def test_adam_resumes_bit_equal_whatever_the_threads_and_close_in_any_cut() -> None:
    import torch

    from megagrow.runtime.adam import Adam

    torch.manual_seed(0)
    size, parts = 100_003, [13, 50_000, 49_990]
    start, grads = torch.randn(size), [torch.randn(size) for _ in range(4)]
    threads = torch.get_num_threads()

    def train(cut: list[int], resume_at: int | None, threads: int) -> torch.Tensor:
        torch.set_num_threads(threads)
        params = [torch.nn.Parameter(part.clone()) for part in start.split(cut)]
        optimizer = Adam(params, lr=1e-2)
        for index, grad in enumerate(grads):
            if index == resume_at:
                state = optimizer.state_dict()
                optimizer = Adam(params, lr=1e-2)
                optimizer.load_state_dict(state)
            for parameter, part in zip(params, grad.split(cut), strict=True):
                parameter.grad = part.clone()
            optimizer.step()
        assert optimizer.param_groups[0]["step"] == 4
        return torch.cat([parameter.detach() for parameter in params])

    try:
        reference = train([size], None, 1)
        assert torch.equal(reference, train([size], 2, 1))
        assert torch.equal(reference, train([size], 2, 2))
        # The last few entries of a tensor are not vectorized, so a cut may move a rounding, and no more.
        torch.testing.assert_close(reference, train(parts, 2, 2), rtol=1e-6, atol=1e-7)
    finally:
        torch.set_num_threads(threads)


def test_groups_seeds_and_restart() -> None:
    both = run_ranks("tests.distributed.training.test_runtime:layouts", 2)
    tensor, pipeline, data = ([rank[name] for rank in both] for name in ("tensor", "pipeline", "data"))
    assert [(r.tensor_rank, r.tensor_size, r.data_size) for r in tensor] == [(0, 2, 1), (1, 2, 1)]
    assert [(r.is_first_stage, r.is_last_stage) for r in pipeline] == [(True, False), (False, True)]
    assert [(r.data_rank, r.data_size, r.is_main) for r in data] == [(0, 2, True), (1, 2, False)]
    for rank in both:
        assert rank["wrong"].startswith("2 process(es), but tensor x pipeline x context = 4")
        assert "torchrun --nproc-per-node 4" in rank["wrong"]
        assert "data 3 needs 3" in rank["wrong_data"]
        assert rank["again"] == rank["draw"], "a restarted layout must draw the same random numbers"
    assert both[0]["draw"] != both[1]["draw"], "tensor ranks must drop out different neurons"


def layouts(payload: None) -> dict[str, object]:
    import torch
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    from megagrow import runtime

    def draw() -> list[float]:
        with get_cuda_rng_tracker().fork():
            return torch.rand(2).tolist()

    out: dict[str, object] = {}
    for name, sizes in (("wrong", {"tensor_model_parallel_size": 4}), ("wrong_data", {"data_parallel_size": 3})):
        with pytest.raises(LaunchError) as error:
            runtime.start(**sizes)
        out[name] = str(error.value)
    out["tensor"] = runtime.start(tensor_model_parallel_size=2, seed=5)
    out["draw"] = draw()
    runtime.reset()
    out["pipeline"] = runtime.start(pipeline_model_parallel_size=2)
    runtime.reset()
    out["data"] = runtime.start(data_parallel_size=2)
    runtime.reset()
    runtime.start(tensor_model_parallel_size=2, seed=5)
    out["again"] = draw()
    return out


def test_a_process_is_a_world_without_torchrun() -> None:
    text = (
        "from megagrow import runtime; import torch.distributed as dist\n"
        "ranks = runtime.start(); print(ranks.world_size, ranks.device, ranks.needs_data, dist.get_backend())\n"
        "runtime.stop(); runtime.stop(); print(dist.is_initialized())"
    )
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "MASTER_ADDR")}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=environment | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.stdout.splitlines() == ["1 cpu True gloo", "False"], done.stderr


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="prctl is Linux's")
def test_a_killed_launcher_leaves_no_orphan() -> None:
    child = "import time; from megagrow.parent_death import die_with_parent as d; d({}); print('on', flush=True); "
    launcher = (
        "import os, subprocess, sys, time\n"
        f"child = {child!r}.format(os.getpid()) + 'time.sleep(60)'\n"
        "running = subprocess.Popen([sys.executable, '-c', child], stdout=subprocess.PIPE, text=True)\n"
        "running.stdout.readline(); print(running.pid, flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", launcher], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert process.stdout is not None
    orphan = int(process.stdout.readline())
    assert _alive(orphan)
    process.kill()
    process.wait()
    until = time.monotonic() + 10
    while _alive(orphan) and time.monotonic() < until:
        time.sleep(0.05)
    assert not _alive(orphan)


def test_a_rank_whose_parent_is_gone_ends_at_once() -> None:
    text = "from megagrow.parent_death import die_with_parent; die_with_parent(1); print('alive')"
    done = subprocess.run(
        [sys.executable, "-c", text], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == -9 and "alive" not in done.stdout


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in ("Z", "X")
    except FileNotFoundError:
        return False
