"""Every op in plain torch, on any device: the meaning that kernels must match."""

from octomoe.reference.activation_bwd import activate_bwd, activation_bwd
from octomoe.reference.activation_quantize import activate, activation_quantize
from octomoe.reference.build_routing import build_routing
from octomoe.reference.dequantize import dequantize
from octomoe.reference.fused_moe import fused_moe
from octomoe.reference.grouped_gemm import grouped_gemm, grouped_gemm_dgrad, grouped_gemm_wgrad
from octomoe.reference.permute import permute
from octomoe.reference.quantize import block_amax, quantize
from octomoe.reference.requantize import requantize
from octomoe.reference.unpermute import unpermute

__all__ = [
    "activate",
    "activate_bwd",
    "activation_bwd",
    "activation_quantize",
    "block_amax",
    "build_routing",
    "dequantize",
    "fused_moe",
    "grouped_gemm",
    "grouped_gemm_dgrad",
    "grouped_gemm_wgrad",
    "permute",
    "quantize",
    "requantize",
    "unpermute",
]
