"""Hash every file of a set of conversions, so that two versions of megagrow can be compared byte for byte.

    python -m tools.proofs.conversion_hashes --package OLD_CHECKOUT --sources D --output old.json
    python -m tools.proofs.conversion_hashes --package . --sources D --output new.json --compare old.json

The sources are made once, by the first package that is asked: two tiny families, one dense and one with experts, each
trained for a few steps, so that what is converted are real Megatron-Core checkpoints with Adam's state. All else goes
through the command line of the package under test, because names inside the package may differ between versions.
`conversion.json` and `integrity.json` hold times of day and are left out; `megagrow.json` is compared without paths.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LEFT_OUT = {"conversion.json", "integrity.json"}
DENSE = {"num_layers": 2, "hidden_size": 32, "ffn_hidden_size": 80, "num_attention_heads": 4, "num_query_groups": 2}
MIXTURE = DENSE | {"num_moe_experts": 4, "moe_router_topk": 2, "moe_ffn_hidden_size": 40}
SIZES = {"vocab_size": 320, "make_vocab_size_divisible_by": 64, "seq_length": 32, "kv_channels": 8}
TP2, PP2 = "parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"
WIDER = ["model.hidden_size=48", "model.ffn_hidden_size=112", "model.num_attention_heads=6"]
DEEPER = ["model.num_layers=6"]
EXPERTS = ["model.num_moe_experts=4", "model.moe_router_topk=2", "model.moe_ffn_hidden_size=80"]
BALANCED = ["growth.hidden=balanced", "growth.ffn=balanced", "growth.head=balanced"]

# Name -> (source, arguments). A source is a trained family or an earlier conversion of this table.
CONVERSIONS: dict[str, tuple[str, list[str]]] = {
    "dense resharded": ("dense", [TP2, PP2]),
    "dense deeper, copied": ("dense", ["--no-optimizer", *DEEPER, "growth.layer=stack"]),
    "dense wider, exact": ("dense", [*WIDER, *BALANCED, TP2]),
    "dense wider, random": ("dense", [*WIDER, *DEEPER, PP2, "growth.moments=asymmetric", "growth.layer=identity"]),
    "dense wider, random, two workers": ("dense", [*WIDER, *DEEPER, PP2, "growth.noise=0.1", "--workers", "2"]),
    "dense direct and reset": ("dense", [*WIDER, "growth.hidden=direct", "growth.ffn=direct", "growth.moments=reset"]),
    "dense in bf16": ("dense", ["precision=bf16", "--sha256"]),
    "dense to legacy": ("dense", ["--to", "legacy", TP2, PP2]),
    "dense from legacy": ("dense to legacy", [*DEEPER, "growth.layer=interpose"]),
    "dense to Hugging Face": ("dense", ["--to", "huggingface"]),
    "dense from Hugging Face": ("dense to Hugging Face", [*WIDER, *BALANCED, "--workers", "2"]),
    "dense to a mixture": ("dense", EXPERTS),
    "mixture resharded": ("mixture", [TP2, "parallel.sequence_parallel=true", "--workers", "2"]),
    "mixture wider": ("mixture", [*WIDER, *DEEPER]),
    "mixture to Hugging Face": ("mixture", ["--to", "huggingface"]),
    "mixture from Hugging Face": ("mixture to Hugging Face", [PP2]),
}  # fmt: skip


def run(package: Path, *arguments: str) -> None:
    """Run megagrow's command line from a checkout; exit with what it printed where it fails."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "megagrow", *arguments], cwd=package, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"megagrow {' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")


def make_source(package: Path, directory: Path, name: str, model: dict[str, Any]) -> None:
    """Train one tiny model for four steps, with its checkpoint in `directory/name`."""
    chance = random.Random(7)
    words = ["".join(chance.choices("abcdefghijklmnop", k=5)) for _ in range(120)]
    text = directory / f"{name}.jsonl"
    lines = (json.dumps({"text": " ".join(chance.choices(words, k=80))}) for _ in range(200))
    text.write_text("".join(line + "\n" for line in lines))
    stage = {
        "name": name, "model": SIZES | model, "batch": {"micro_batch_size": 2, "global_batch_size": 8},
        "schedule": {"max_lr": 3e-3}, "precision": "fp32", "train_tokens": 4 * 8 * SIZES["seq_length"],
    }  # fmt: skip
    family = {
        "name": name, "save": str(directory / f"{name}.family"), "stages": [stage],
        "data": {"sources": [{"name": "made", "paths": [str(text)]}], "split": "90,9,1", "workers": 1},
    }  # fmt: skip
    file = directory / f"{name}.yaml"
    file.write_text(json.dumps(family))  # JSON is YAML
    run(package, "data", str(file))
    run(package, "train", str(file), "--stage", name)
    os.rename(directory / f"{name}.family" / name / "checkpoints", directory / name)


def hashed_files(directory: Path) -> Iterator[tuple[str, str]]:
    """Yield (relative name, sha256) of each file of a conversion that must not depend on time or place."""
    for file in sorted(path for path in directory.rglob("*") if path.is_file()):
        if file.name in LEFT_OUT:
            continue
        content = file.read_bytes()
        if file.name == "megagrow.json":
            content = json.dumps(without_paths(json.loads(content)), sort_keys=True).encode()
        yield str(file.relative_to(directory)), hashlib.sha256(content).hexdigest()


def without_paths(value: Any) -> Any:
    """A manifest without the places where its ancestors lay."""
    if isinstance(value, dict):
        return {name: without_paths(item) for name, item in value.items() if name != "path"}
    return [without_paths(item) for item in value] if isinstance(value, list) else value


def hash_conversions(package: Path, sources: Path) -> dict[str, dict[str, str]]:
    """Make every conversion of the table; return the hashes of its files."""
    found: dict[str, dict[str, str]] = {}
    temporary = sources / "conversions"  # always the same: a checkpoint remembers the directory that it was read from
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        for name, (source, arguments) in CONVERSIONS.items():
            made = temporary / name.replace(" ", "_").replace(",", "")
            start = sources / source
            if source in CONVERSIONS:
                start = temporary / source.replace(" ", "_").replace(",", "")
            run(package, "convert", str(start), str(made), *arguments)
            found[name] = dict(hashed_files(made))
            print(f"{name}: {len(found[name])} files", flush=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return found


def differences(one: dict[str, dict[str, str]], other: dict[str, dict[str, str]]) -> list[str]:
    """Name each file that differs, or is missing on one side."""
    return [
        f"{conversion}: {file}"
        for conversion in sorted({*one, *other})
        for file in sorted({*one.get(conversion, {}), *other.get(conversion, {})})
        if one.get(conversion, {}).get(file) != other.get(conversion, {}).get(file)
    ]


def main() -> None:
    """Hash, and compare where asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, required=True, help="checkout whose megagrow converts")
    parser.add_argument("--sources", type=Path, required=True, help="trained sources; made there if missing")
    parser.add_argument("--output", type=Path, required=True, help="where to write the hashes, as JSON")
    parser.add_argument("--compare", type=Path, help="hashes of another version, to be equal to")
    given = parser.parse_args()
    package, sources = given.package.resolve(), given.sources.resolve()
    sources.mkdir(parents=True, exist_ok=True)
    for name, model in (("dense", DENSE), ("mixture", MIXTURE)):
        if not (sources / name).is_dir():
            shutil.rmtree(sources / f"{name}.family", ignore_errors=True)
            make_source(package, sources, name, model)
    found = hash_conversions(package, sources)
    given.output.write_text(json.dumps(found, indent=1) + "\n")
    if given.compare:
        different = differences(json.loads(given.compare.read_text()), found)
        total = sum(map(len, found.values()))
        print(f"{len(found)} conversions, {total} files, {len(different)} differ", *different, sep="\n  ")
        sys.exit(bool(different))


if __name__ == "__main__":
    main()
