"""FP8 mixture-of-experts for PyTorch."""

from importlib import import_module

from octomoe.core.activations import (
    GELU,
    GELU_TANH,
    RELU2,
    SILU,
    SWIGLU_OAI,
    Activation,
    ActivationKind,
    LimitOn,
)
from octomoe.core.device import Target
from octomoe.core.experts import GATE_UP, UP_GATE, ExpertWeights, RowOrder, interleaved
from octomoe.core.formats import (
    ALL,
    E4M3_240,
    E4M3FN,
    E5M2,
    FP8_BLOCK128,
    FP8_CHANNEL,
    FP8_COLUMN128,
    FP8_EXPERT,
    FP8_GROUP128,
    FP8_ROW,
    FP8_TENSOR,
    FP8_TOKEN,
    MXFP8,
    MXFP8_2D,
    MXFP8_E5M2,
    Element,
    Format,
    Rounding,
)
from octomoe.core.layouts import COMPACT, GEMM_READY, INTERLEAVED, ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import BlockRouting, Routing, append_shared_experts
from octomoe.ops.activation_bwd import activation_bwd, activation_bwd_both
from octomoe.ops.activation_quantize import activation_quantize, activation_quantize_both
from octomoe.ops.build_routing import build_routing
from octomoe.ops.dequantize import dequantize
from octomoe.ops.fused_moe import fused_moe
from octomoe.ops.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from octomoe.ops.moe_align_block_size import moe_align_block_size
from octomoe.ops.permute import permute
from octomoe.ops.quantize import quantize
from octomoe.ops.quantize_both import quantize_both
from octomoe.ops.quantize_experts import quantize_experts
from octomoe.ops.requantize import requantize
from octomoe.ops.unpermute import unpermute
from octomoe.ops.unpermute_bwd import unpermute_bwd
from octomoe.version import VERSION as __version__

_LAZY = {
    "convert_checkpoint": "octomoe.checkpoint.convert",
    "quantize_model": "octomoe.integrations.transformers",
    "verify_checkpoint": "octomoe.checkpoint.verify",
}


def __getattr__(name: str) -> object:
    """Names from rooms to the right, imported when they are first used."""
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'octomoe' has no attribute {name!r}")


__all__ = [
    "ALL",
    "COMPACT",
    "E4M3FN",
    "E4M3_240",
    "E5M2",
    "FP8_BLOCK128",
    "FP8_CHANNEL",
    "FP8_COLUMN128",
    "FP8_EXPERT",
    "FP8_GROUP128",
    "FP8_ROW",
    "FP8_TENSOR",
    "FP8_TOKEN",
    "GATE_UP",
    "GELU",
    "GELU_TANH",
    "GEMM_READY",
    "INTERLEAVED",
    "MXFP8",
    "MXFP8_2D",
    "MXFP8_E5M2",
    "RELU2",
    "SILU",
    "SWIGLU_OAI",
    "UP_GATE",
    "Activation",
    "ActivationKind",
    "BlockRouting",
    "Element",
    "ExpertWeights",
    "Format",
    "LimitOn",
    "QTensor",
    "Rounding",
    "Routing",
    "RowOrder",
    "ScaleLayout",
    "Target",
    "__version__",
    "activation_bwd",
    "activation_bwd_both",
    "activation_quantize",
    "activation_quantize_both",
    "append_shared_experts",
    "build_routing",
    "convert_checkpoint",
    "dequantize",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "interleaved",
    "moe_align_block_size",
    "permute",
    "quantize",
    "quantize_both",
    "quantize_experts",
    "quantize_model",
    "requantize",
    "unpermute",
    "unpermute_bwd",
    "verify_checkpoint",
]
