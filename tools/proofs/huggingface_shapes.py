"""Models of published shapes, with random weights, are grown in one command and compared in both series of
transformers.

    python -m tools.proofs.huggingface_shapes --directory /scratch

Makes a Qwen2.5-0.5B-shaped and a Llama-3.2-1B-shaped model (fp32), grows each in depth and in width, and prints the
largest difference of the logits of 48 tokens and the time of the command. The parents were written by transformers 5,
whose `rope_parameters` the older series does not read, so all children are compared with what that says of them. Needs
`make test`'s directories of transformers, about 16 GB of memory and 25 GB of disk.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]
SERIES = ("hf4", "hf")
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
SHAPES: dict[str, tuple[str, dict[str, Any], list[str]]] = {
    "Qwen2.5-0.5B": (
        "Qwen2",
        {"vocab_size": 151936, "hidden_size": 896, "num_hidden_layers": 24, "num_attention_heads": 14,
         "num_key_value_heads": 2, "intermediate_size": 4864, "max_position_embeddings": 32768,
         "tie_word_embeddings": True},
        ["model.num_layers=30", "model.hidden_size=1024", "model.num_attention_heads=16", "model.ffn_hidden_size=5632"],
    ),
    "Llama-3.2-1B": (
        "Llama",
        {"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 16, "num_attention_heads": 32,
         "num_key_value_heads": 8, "intermediate_size": 8192, "max_position_embeddings": 131072,
         "tie_word_embeddings": True, "rope_parameters": _LLAMA3},
        ["model.num_layers=20", "model.hidden_size=2304", "model.num_attention_heads=40", "model.ffn_hidden_size=9216"],
    ),
}  # fmt: skip


def make(place: Path, family: str, config: dict[str, Any]) -> None:
    """Write a random model, in a process of its own, whose memory ends with it."""
    program = (
        "import json, sys, torch, transformers; torch.manual_seed(0); family, place, config = sys.argv[1:];"
        "config = getattr(transformers, family + 'Config')(**json.loads(config));"
        "getattr(transformers, family + 'ForCausalLM')(config).float().save_pretrained(place)"
    )
    given = {**os.environ, "PYTHONPATH": str(Path(sys.prefix) / "hf")}
    words = [sys.executable, "-W", "ignore", "-c", program, family, str(place), json.dumps(config)]
    subprocess.run(words, check=True, env=given, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def logits(series: str, place: Path, ids: list[list[int]]) -> torch.Tensor:
    """Logits of a model in a series of transformers."""
    given = {**os.environ, "PYTHONPATH": str(Path(sys.prefix) / series), "PYTHONSAFEPATH": "1"}
    words = [sys.executable, "-W", "ignore", str(ROOT / "tests/huggingface/series.py"), str(place)]
    request = json.dumps({"texts": [], "ids": ids})
    done = subprocess.run(words, input=request, env=given, capture_output=True, text=True, check=True)
    (said,) = json.loads(done.stdout)["models"].values()
    return torch.tensor(said["logits"])


def main() -> None:
    """Grow and compare both shapes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--directory", type=Path, required=True, help="on the disk to be used; emptied of the models")
    parser.add_argument("--workers", default="2")
    given = parser.parse_args()
    for name, (family, config, larger) in SHAPES.items():
        parent, child = given.directory / f"{name}-parent", given.directory / f"{name}-larger"
        for place in (parent, child):
            shutil.rmtree(place, ignore_errors=True)
        make(parent, family, config)
        started = time.monotonic()
        words = ["convert", str(parent), str(child), "--to", "huggingface", "--workers", given.workers, *larger]
        subprocess.run([sys.executable, "-m", "megagrow", *words], check=True)
        seconds = time.monotonic() - started
        ids = torch.randint(0, config["vocab_size"], (1, 48), generator=torch.Generator().manual_seed(1)).tolist()
        sizes = [sum(file.stat().st_size for file in place.glob("*.safetensors")) / 1e9 for place in (parent, child)]
        apart = []
        one = logits("hf", parent, ids)
        for series in SERIES:
            other = logits(series, child, ids)
            apart.append(f"{float((one - other).abs().max()):.1e} of {float(one.abs().max()):.2f} in {series}")
        print(f"{name}: {sizes[0]:.2f} -> {sizes[1]:.2f} GB in {seconds:.1f} s; logits apart {', '.join(apart)}")
        for place in (parent, child):
            shutil.rmtree(place)


if __name__ == "__main__":
    main()
