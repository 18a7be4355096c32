"""Our ways to compute a layer: kernels under a configuration, ops in a row, the public op."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from octomoe import (
    QTensor,
    activation_quantize,
    build_routing,
    fused_moe,
    grouped_gemm,
    permute,
    unpermute,
)
from octomoe.bench.contender import Contender
from octomoe.bench.layers import SCALING, Problem, choices_of
from octomoe.core.device import target_of
from octomoe.core.experts import static_scale
from octomoe.kernels import decode_moe_sm90 as decode
from octomoe.kernels import fused_moe as portable
from octomoe.kernels import fused_moe_sm90 as sm90
from octomoe.kernels import fused_moe_wide_sm90 as wide
from octomoe.kernels.build_routing import build_blocks
from octomoe.kernels.fused_rows_wide_sm90 import rows_in_order
from octomoe.tune.configs import DecodeConfig, FusedMoeConfig
from octomoe.tune.kinds import Config


def kernel_contenders(problem: Problem) -> dict[str, Contender]:
    """From quantised rows and sorted choices on, except for the op.

    `octomoe` are the kernels that the public op takes on this device, `portable` those for any
    device where it takes others, `octomoe op` is the op from bf16 rows and ids on.
    """
    op = Contender(partial(run_op, problem))
    config = looked_up(problem)
    found = {"octomoe": _contender(problem, config)}
    if not isinstance(config, FusedMoeConfig | None):
        found["portable"] = _contender(problem, portable_config(problem))
    return found | {"octomoe op": op}


def _contender(problem: Problem, config: Config | None) -> Contender:
    if config is None:
        return Contender(by_ops(problem), "op by op")
    return Contender(run_config(problem, config), asdict(config))


def layer_contenders(problem: Problem) -> dict[str, Contender]:
    """From bf16 rows and the router's scores on."""

    def run(backend: str) -> Tensor:
        return run_op(problem, *choices_of(problem), backend=backend)

    found = {"octomoe": Contender(partial(run, _backend(problem)))}
    if not isinstance(looked_up(problem), FusedMoeConfig | None):
        found["portable"] = Contender(partial(run, "triton"))
    return found


def run_op(
    problem: Problem,
    topk_weights_TA: Tensor | None = None,
    topk_ids_TA: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """The public op, from ids on; those given in place of the problem's."""
    return fused_moe(
        problem.hidden_TD,
        problem.experts,
        problem.topk_weights_TA if topk_weights_TA is None else topk_weights_TA,
        problem.topk_ids_TA if topk_ids_TA is None else topk_ids_TA,
        activation_format=problem.recipe.activations,
        routed_scaling_factor=SCALING,
        backend=backend or _backend(problem),
    )


def run_config(problem: Problem, config: Config) -> Callable[[], Tensor]:
    """Our kernels under a configuration, from quantised rows and sorted choices on.

    Here alone a configuration's type says whose it is.
    """
    experts, format = problem.experts, problem.recipe.activations
    routed = build_blocks(problem.topk_ids_TA, experts.num_experts, align=config.rows)
    options: dict[str, Any] = {"routed_scaling_factor": SCALING, "config": config}
    if isinstance(config, DecodeConfig):
        # Where rows are quantised on their way, that is what is timed.
        return partial(
            decode.experts_forward,
            problem.x if decode.encodes_before(experts, format, config) else problem.hidden_TD,
            experts,
            problem.topk_weights_TA,
            problem.topk_ids_TA,
            routed if decode.sorts_before(problem.topk_ids_TA, config) else None,
            activation_format=format,
            **options,
        )
    options["out_dtype"] = problem.hidden_TD.dtype
    arguments: tuple[Any, ...] = (experts, problem.topk_weights_TA, *routed)
    if isinstance(config, FusedMoeConfig):
        options["activation_format"] = format
        return partial(portable.experts_forward, problem.x, *arguments, **options)
    if sm90.meets_in_8_bits(format):
        assert isinstance(problem.x, QTensor)
        return partial(sm90.experts_forward, problem.x, *arguments, **options)
    options["activation_format"] = format
    rows = rows_in_order(problem.hidden_TD, format, is_chained=False)
    return partial(wide.experts_forward, rows, *arguments, **options)


def by_ops(problem: Problem) -> Callable[[], Tensor]:
    """An op at a time, from quantised rows and sorted choices on, as the fused op goes too where
    no kernel fuses it."""
    experts, x, format = problem.experts, problem.x, problem.recipe.activations
    backend = _backend(problem)
    routing = build_routing(problem.topk_ids_TA, experts.num_experts, backend=backend)
    assert isinstance(x, QTensor)
    assert format is not None
    h_scale = static_scale(experts.w2_input_scale, format)
    gemm = partial(grouped_gemm, out_dtype=torch.float32, backend=backend)

    def run() -> Tensor:
        h_SN = gemm(permute(x, routing, backend=backend), experts.w13, routing)
        h_SF = activation_quantize(h_SN, experts.activation, format, scale=h_scale, backend=backend)
        y_SD = gemm(h_SF, experts.w2, routing)
        y_TD = unpermute(y_SD, routing, problem.topk_weights_TA, backend=backend)
        return (y_TD * SCALING).to(problem.hidden_TD.dtype)

    return run


def looked_up(problem: Problem) -> Config | None:
    """What the public op runs with; None where it goes op by op."""
    hidden_TD, experts, num_choices = problem.hidden_TD, problem.experts, problem.num_choices
    format = problem.recipe.activations
    is_hopper = target_of(hidden_TD.device).arch == 90
    if is_hopper and sm90.why_not(hidden_TD, experts, num_choices, format, False) is None:
        config = sm90.choose(hidden_TD, experts, num_choices, format)
        if config is not None:
            return config
    return portable_config(problem)


def portable_config(problem: Problem) -> FusedMoeConfig | None:
    """What the kernels for any device run with; None where they go op by op."""
    hidden_TD, experts, format = problem.hidden_TD, problem.experts, problem.recipe.activations
    if not portable.is_fused(hidden_TD, experts, format):
        return None
    return portable.config_of(hidden_TD, experts, problem.num_choices, format)


def _backend(problem: Problem) -> str:
    """On a CPU, where kernels are interpreted, none is taken unless it is named."""
    return "auto" if problem.hidden_TD.is_cuda else "triton"
