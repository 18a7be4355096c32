"""What a fused layer begins with: choices sorted by expert, and rows quantised, side by side."""

from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT
from octomoe.core.qtensor import QTensor
from octomoe.core.routing import Routing
from octomoe.kernels.build_routing import build_blocks
from octomoe.kernels.encoding import empty_quantized
from octomoe.kernels.quantize import quantize


def route_and_quantize(
    hidden_states: Tensor,
    format: Format,
    scale: Tensor | None,
    topk_ids: Tensor,
    num_experts: int,
    *,
    align: int,
    expert_map: Tensor | None,
    is_chained: bool,
) -> tuple[QTensor, tuple[Routing, Tensor]]:
    """Rows ``[T, D]`` in `format`, and a routing and the experts of its blocks of `align` slots.

    Args:
        scale: of the rows, where it is known before.
        is_chained: quantising may start before choices are sorted.
    """
    # Memory that routing gives back may be what is allocated next, while its kernels still run.
    q = empty_quantized(tuple(hidden_states.shape), format, COMPACT, hidden_states.device)
    routed = build_blocks(topk_ids, num_experts, align=align, expert_map=expert_map)
    quantize(hidden_states, format, scale=scale, out=q, is_chained=is_chained)
    return q, routed
