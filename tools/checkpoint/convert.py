"""megagrow's converter under the options of Megatron-LM's tools/checkpoint/convert.py.

    python tools/checkpoint/convert.py --load-dir runs/a --save-dir runs/b --target-tensor-parallel-size 4

What is in `--load-dir` is found out, so `--loader` and `--megatron-path` are taken and not needed. `--saver` says what
is written: `torch_dist` (the default, with Adam's state), `mcore`, `core` or `megatron` for mp_rank files as
Megatron-LM's own tool writes them, `hf` for Hugging Face. Everything else: `megagrow convert --help`.
"""

import argparse
import sys

from megagrow.cli.main import main

_FORMATS = {
    "torch_dist": "torch_dist",
    "mcore": "legacy",
    "core": "legacy",
    "megatron": "legacy",
    "hf": "huggingface",
    "huggingface": "huggingface",
}
_SIZES = {
    "target_tensor_parallel_size": "tensor_model_parallel_size",
    "target_pipeline_parallel_size": "pipeline_model_parallel_size",
    "target_expert_parallel_size": "expert_model_parallel_size",
}


def arguments(given: list[str]) -> list[str]:
    """The command line of `megagrow convert` that does what Megatron-LM's options ask for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-type", choices=["GPT"], default="GPT")
    parser.add_argument("--loader", help="not needed")
    parser.add_argument("--saver", choices=sorted(_FORMATS), default="torch_dist")
    parser.add_argument("--load-dir", required=True)
    parser.add_argument("--save-dir", required=True)
    parser.add_argument("--megatron-path", help="not needed")
    parser.add_argument("--target-tensor-parallel-size", type=int)
    parser.add_argument("--target-pipeline-parallel-size", type=int)
    parser.add_argument("--target-expert-parallel-size", type=int)
    options, further = parser.parse_known_args(given)
    sizes = [(name, getattr(options, option)) for option, name in _SIZES.items()]
    layout = [f"parallel.{name}={size}" for name, size in sizes if size is not None]
    if (options.target_tensor_parallel_size or 1) > 1 and (options.target_expert_parallel_size or 1) > 1:
        layout.append("parallel.sequence_parallel=true")
    if (options.target_expert_parallel_size or 1) > 1:
        layout.append(f"parallel.data_parallel_size={options.target_expert_parallel_size}")
    return ["convert", options.load_dir, options.save_dir, *layout, "--to", _FORMATS[options.saver], *further]


if __name__ == "__main__":
    sys.argv = [sys.argv[0], *arguments(sys.argv[1:])]
    main()
