"""Derive a model's shape and layout from the arguments that Megatron-LM saves in its checkpoints, and back.

Megatron-LM saves its whole command line, several hundred settings by name. Some of them change the function that a
model computes in ways that `ModelShape` cannot express; `argument_check` refuses those. The error names each
unsupported argument, and each required one that is missing.
"""

from argparse import Namespace
from collections.abc import Collection, Mapping
from typing import Any

from pydantic import ValidationError

from megagrow.checkpoint.formats.megatron_common.argument_check import check_arguments
from megagrow.checkpoint.index import DType
from megagrow.config import UNEVEN, ModelShape, ParallelLayout
from megagrow.errors import CheckpointError

_REQUIRED = ("num_layers", "hidden_size", "num_attention_heads", "padded_vocab_size", "seq_length")
_RUN_ONLY = ("rank", "local_rank", "world_size")
_KEPT_FROM_SOURCE = (
    "attention_dropout", "hidden_dropout", "bias_gelu_fusion", "moe_aux_loss_coeff", "moe_grouped_gemm",
    "moe_router_load_balancing_type", "add_position_embedding", "use_rotary_position_embeddings",
)  # fmt: skip
"""Arguments that `arguments_of` has to set and whose value in the source is the better one."""
_NOT_PLAIN = ("megatron.", "signal.", "numpy.", "pathlib.", "_io.", "ModelType.", "Signals.", "Attn", "CudaGraphScope.")
"""Prefixes of the text that `pickles.plain` makes of objects and enums."""


def shape_of_arguments(args: Mapping[str, Any], where: str = "args", ignored: Collection[str] = ()) -> ModelShape:
    """Return the shape of a model that Megatron-LM trained with these arguments.

    The vocabulary is the tokenizer's if the arguments contain it, else the padded one. `padded_vocab_size` is exact.

    Args:
        args: by name, as in the `args` Namespace of any Megatron-LM since 2022.
        where: source of the arguments, for errors.
        ignored: arguments that Megatron-LM does not have and the user knows to be harmless.

    Raises:
        CheckpointError: an argument is missing, or turns on a feature that `ModelShape` cannot express.
    """
    missing = [name for name in _REQUIRED if args.get(name) is None]
    if missing:
        raise CheckpointError(
            f"{where}: missing {', '.join(missing)}; the model's shape cannot be derived without them"
        )
    check_arguments(args, where, ignored)
    swiglu, norm = bool(args.get("swiglu", False)), args.get("normalization") or "LayerNorm"
    heads, experts = args["num_attention_heads"], args.get("num_experts")
    fields: dict[str, Any] = {
        "num_layers": args["num_layers"],
        "hidden_size": args["hidden_size"],
        "ffn_hidden_size": args.get("ffn_hidden_size") or _default_width(args["hidden_size"], swiglu),
        "num_attention_heads": heads,
        # --num-query-groups defaults to 1, which takes effect only with --group-query-attention
        "num_query_groups": args.get("num_query_groups") if args.get("group_query_attention") else heads,
        "kv_channels": args.get("kv_channels"),
        "seq_length": args["seq_length"],
        "max_position_embeddings": args.get("max_position_embeddings"),
        "normalization": norm,
        "layernorm_epsilon": args.get("norm_epsilon") or args.get("layernorm_epsilon") or 1e-5,
        "swiglu": swiglu,
        "openai_gelu": not swiglu and _tanh_gelu(args),
        "add_bias_linear": _biases(args),
        "add_qkv_bias": bool(args.get("add_qkv_bias", False)) and not _biases(args),
        "untie_embeddings_and_output_weights": bool(args.get("untie_embeddings_and_output_weights", False)),
        "qk_layernorm": bool(args.get("qk_layernorm", False)),
        "attention_dropout": args.get("attention_dropout", 0.1),
        "hidden_dropout": args.get("hidden_dropout", 0.1),
        "init_method_std": args.get("init_method_std", 0.02),
        **_vocabulary(args),
        **_positions(args),
        **(_experts(args, where) if experts else {}),
    }
    try:
        return ModelShape(**fields)
    except ValidationError as error:
        first = error.errors()[0]
        what = " ".join(": ".join([*map(str, first["loc"]), first["msg"]]).split())
        raise CheckpointError(f"{where}: not a model that megagrow supports: {what}") from None


def layout_of_arguments(args: Mapping[str, Any], where: str = "args") -> ParallelLayout:
    """Return the layout that a checkpoint with these arguments was written in; CheckpointError if it is invalid."""
    tensor = args.get("tensor_model_parallel_size") or 1
    pipeline = args.get("pipeline_model_parallel_size") or 1
    expert_tensor = args.get("expert_tensor_parallel_size") if args.get("num_experts") else None
    virtual = args.get("virtual_pipeline_model_parallel_size") if pipeline > 1 else None
    uneven = {name: args[name] for name in UNEVEN if args.get(name)} if pipeline > 1 else {}
    try:
        return ParallelLayout(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            virtual_pipeline_model_parallel_size=virtual if virtual and virtual > 1 else None,
            context_parallel_size=args.get("context_parallel_size") or 1,
            expert_model_parallel_size=args.get("expert_model_parallel_size") or 1,
            expert_tensor_parallel_size=expert_tensor if expert_tensor != tensor else None,
            data_parallel_size=args.get("data_parallel_size") or 1,
            sequence_parallel=bool(args.get("sequence_parallel", False)) and tensor > 1,
            **uneven,
        )
    except (ValidationError, TypeError) as error:
        raise CheckpointError(f"{where}: not a valid layout: {' '.join(str(error).split())[:200]}") from None


def arguments_of(shape: ModelShape, layout: ParallelLayout, dtype: DType) -> dict[str, Any]:
    """Return the arguments from which Megatron-LM builds a model of this shape with `--use-checkpoint-args`."""
    rope = shape.position_embedding_type == "rope"
    args: dict[str, Any] = {
        name: getattr(shape, name)
        for name in (
            "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length", "vocab_size",
            "make_vocab_size_divisible_by", "padded_vocab_size", "normalization", "position_embedding_type",
            "rotary_base", "rotary_percent", "swiglu", "openai_gelu", "add_bias_linear", "add_qkv_bias",
            "untie_embeddings_and_output_weights", "qk_layernorm", "attention_dropout", "hidden_dropout",
            "init_method_std",
        )
    }  # fmt: skip
    args |= {
        "group_query_attention": shape.groups != shape.num_attention_heads,
        "num_query_groups": shape.groups,
        "kv_channels": shape.head_dim,
        "max_position_embeddings": shape.positions,
        "norm_epsilon": shape.layernorm_epsilon,
        "layernorm_epsilon": shape.layernorm_epsilon,  # its name since core_v0.16
        "add_position_embedding": True,  # Megatron-LM's default, also with rotary positions; its loader compares it
        "use_rotary_position_embeddings": rope,
        "rotary_interleaved": False,
        "use_rope_scaling": shape.rope_scaling_factor is not None,
        "rope_scaling_factor": shape.rope_scaling_factor or 8.0,
        "apply_layernorm_1p": False,
        "layernorm_zero_centered_gamma": False,
        "apply_query_key_layer_scaling": False,
        "squared_relu": False,
        "bias_gelu_fusion": shape.openai_gelu and shape.add_bias_linear,
        "params_dtype": dtype,
        "bf16": dtype == DType.BFLOAT16,
        "fp16": dtype == DType.FLOAT16,
        "tensor_model_parallel_size": layout.tensor_model_parallel_size,
        "pipeline_model_parallel_size": layout.pipeline_model_parallel_size,
        "virtual_pipeline_model_parallel_size": layout.virtual_pipeline_model_parallel_size,
        "context_parallel_size": layout.context_parallel_size,
        "expert_model_parallel_size": layout.expert_model_parallel_size,
        "expert_tensor_parallel_size": layout.expert_tensor,
        "data_parallel_size": layout.data_parallel_size,
        "sequence_parallel": layout.sequence_parallel,
        "num_layers_per_virtual_pipeline_stage": None,
        "num_virtual_stages_per_pipeline_rank": None,
        **{name: getattr(layout, name) for name in UNEVEN},
        "num_experts": shape.num_moe_experts,
    }
    if shape.num_moe_experts is not None:
        args |= {
            "moe_ffn_hidden_size": shape.mlp_width,
            "moe_router_topk": shape.moe_router_topk,
            "moe_router_load_balancing_type": "aux_loss",
            "moe_aux_loss_coeff": shape.moe_aux_loss_coeff,
            "moe_shared_expert_intermediate_size": shape.moe_shared_expert_intermediate_size,
            "moe_grouped_gemm": False,
            "moe_router_pre_softmax": False,
            "moe_layer_freq": 1,
        }
    return args


def carried_arguments(
    carried: Mapping[str, Any], shape: ModelShape, layout: ParallelLayout, dtype: DType, **overrides: Any
) -> Namespace:
    """Return the arguments of a converted checkpoint as the `Namespace` that Megatron-LM reads.

    Args:
        carried: arguments of the source. Those that do not describe the model are kept, if they were plain values.
        shape, layout, dtype: of the target.
        overrides: arguments that take precedence over all others.
    """
    kept = {
        name: value
        for name, value in carried.items()
        if not (isinstance(value, str) and value.startswith(_NOT_PLAIN)) and name not in _RUN_ONLY
    }
    better = {name: kept[name] for name in _KEPT_FROM_SOURCE if name in kept}
    return Namespace(**{**kept, **arguments_of(shape, layout, dtype), **better, **overrides})


def _default_width(hidden: int, swiglu: bool) -> int:
    """Megatron-LM's default of --ffn-hidden-size: 4 times hidden, with SwiGLU two thirds of that in steps of 64."""
    return int((4 * hidden * 2 / 3) / 64) * 64 if swiglu else 4 * hidden


def _biases(args: Mapping[str, Any]) -> bool:
    return bool(args.get("add_bias_linear", not args.get("disable_bias_linear", False)))


def _tanh_gelu(args: Mapping[str, Any]) -> bool:
    """Whether GELU uses the tanh approximation, as it always does when fused with the bias."""
    asked = bool(args.get("openai_gelu", False)) and not _builds_core_models(args)
    return asked or bool(args.get("bias_gelu_fusion", False) and _biases(args))


def _builds_core_models(args: Mapping[str, Any]) -> bool:
    """Whether a run of Megatron-LM saved these arguments that built Megatron-Core's model.

    That model never reads --openai-gelu, which only Megatron-LM's own older models did.
    """
    if args.get("rank") is None:
        return False  # not saved by a run; megagrow's conversions drop it
    if args.get("use_legacy_models") is not None:
        return not args["use_legacy_models"]
    if args.get("use_mcore_models") is not None:
        return bool(args["use_mcore_models"])
    return "ckpt_format" in args  # neither in the first versions nor in the newest, which have no other models


def _vocabulary(args: Mapping[str, Any]) -> dict[str, int]:
    """Vocabulary size, and the multiple that pads it to exactly the rows in the checkpoint."""
    padded, tokens = args["padded_vocab_size"], args.get("vocab_size")
    multiple = args.get("make_vocab_size_divisible_by") or 1
    if tokens is not None and args.get("tokenizer_type") == "NullTokenizer":
        tokens += 1  # --vocab-size does not count its end-of-document token
    if tokens is None or tokens > padded:
        tokens = padded
    # Megatron-LM pads to a multiple of this times the tensor-parallel size
    tried = (multiple, multiple * (args.get("tensor_model_parallel_size") or 1))
    fits = (each for each in tried if -(-tokens // each) * each == padded)
    return {"vocab_size": tokens, "make_vocab_size_divisible_by": next(fits, padded)}


def _positions(args: Mapping[str, Any]) -> dict[str, Any]:
    kind = args.get("position_embedding_type")
    if args.get("use_rotary_position_embeddings"):
        kind = "rope"
    elif kind is None:
        kind = "learned_absolute" if args.get("add_position_embedding", True) else "none"
    if kind != "rope":
        return {"position_embedding_type": kind}
    scaled = args.get("rope_scaling_factor", 8.0) if args.get("use_rope_scaling") else None
    return {
        "position_embedding_type": kind,
        "rotary_base": args.get("rotary_base") or 10000,
        "rotary_percent": args.get("rotary_percent") or 1.0,
        "rope_scaling_factor": scaled,
    }


def _experts(args: Mapping[str, Any], where: str) -> dict[str, Any]:
    every = args.get("moe_layer_freq", 1)
    if every != 1 and not (isinstance(every, list) and all(each == 1 for each in every)):
        raise CheckpointError(
            f"{where}: moe_layer_freq {every}: models that mix dense and expert layers are not supported"
        )
    coefficient = args.get("moe_aux_loss_coeff") or 0.0
    if isinstance(coefficient, list):  # newer versions: one for each kind of loss
        coefficient = coefficient[0] if coefficient else 0.0
    return {
        "num_moe_experts": args["num_experts"],
        "moe_ffn_hidden_size": args.get("moe_ffn_hidden_size"),
        "moe_router_topk": args.get("moe_router_topk") or 2,
        "moe_aux_loss_coeff": coefficient,
        "moe_shared_expert_intermediate_size": args.get("moe_shared_expert_intermediate_size"),
    }
