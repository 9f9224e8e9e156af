"""Where Megatron-Core meets the machine: processes, devices, and what stands in for CUDA kernels.

`start` is the one door. It makes Megatron-Core run on this machine (`cpu`, `adam`), joins the process group, cuts
it into tensor, pipeline, context and data-parallel groups and seeds every generator. After it, the model and
training rooms use Megatron-Core as on any GPU node.
"""

from megagrow.runtime.process import Ranks, reset, start, stop

__all__ = ["Ranks", "reset", "start", "stop"]
