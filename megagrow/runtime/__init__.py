"""Runs Megatron-Core on this machine: processes, devices, and replacements for CUDA kernels.

`start` is the entry point. It adapts Megatron-Core to this machine (`cpu`, `adam`), joins the process group, divides it
into tensor, pipeline, context and data-parallel groups and seeds every random generator. Afterwards the model and
training rooms use Megatron-Core as on any GPU node.
"""

from megagrow.runtime.process import Ranks, reset, start, stop

__all__ = ["Ranks", "reset", "start", "stop"]
