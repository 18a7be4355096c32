"""The counter for `fused_moe`."""

from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import ALL, Format
from octomoe.errors import refusal
from octomoe.ops.check import (
    check_expert_map,
    check_float,
    check_format,
    check_ids,
    check_int,
    check_pair,
    check_rank,
    check_same_device,
    check_shape,
    check_slots,
)
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register
from octomoe.ops.schema import format_of, put_together, take_apart


def fused_moe(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation_format: Format | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
    expert_map: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """A whole MoE layer behind the router.

        y[t] = routed_scaling_factor * sum over a of topk_weights[t, a] * expert[topk_ids[t, a]](x)
        expert(x) = act(x @ w13.T + b13) @ w2.T + b2

    Accumulation is float32; the sum over choices is in their order.

    Args:
        hidden_states: ``[T, D]`` bf16, fp16 or float32.
        experts: the layer's weights, quantised or not.
        topk_weights: ``[T, A]`` float.
        topk_ids: ``[T, A]`` int32 or int64; -1 drops a choice.
        activation_format: what hidden states and intermediate are quantised to; None leaves them
            as they are (weight-only). Its scales change along K where the weights' do:
            `FP8_TENSOR` or `FP8_TOKEN` with per-tensor, per-expert and per-channel weights,
            `FP8_GROUP128` with `FP8_BLOCK128`, `MXFP8` with `MXFP8`. `FP8_TENSOR` is static where
            `experts` holds input scales.
        routed_scaling_factor: multiplies the sum.
        apply_router_weight_on_input: multiply rows by their router weight before the experts
            instead of after.
        expert_map: ``[E]`` int, local id of every global expert or -1; `topk_ids` are then global.
        out: ``[T, D]`` to write into, dtype of hidden_states.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        ``[T, D]`` in the dtype of hidden_states (`out` if given).

    Raises:
        TypeError: an argument has another type or dtype than said.
        ValueError: a shape, device, id or format pair does not fit.
        NotImplementedError: the backend cannot run this.

    >>> import torch, octomoe
    >>> experts = octomoe.ExpertWeights(w13=torch.randn(4, 64, 32), w2=torch.randn(4, 32, 32))
    >>> experts = octomoe.quantize_experts(experts, octomoe.MXFP8)
    >>> weights, ids = torch.rand(5, 2), torch.randint(4, (5, 2))
    >>> octomoe.fused_moe(
    ...     torch.randn(5, 32), experts, weights, ids, activation_format=octomoe.MXFP8).shape
    torch.Size([5, 32])
    """
    _check(hidden_states, experts, topk_weights, topk_ids, activation_format, expert_map, out)
    y: Tensor = _fused_moe_op(
        hidden_states,
        *take_apart(experts.w13),
        *take_apart(experts.w2),
        experts.w13_bias,
        experts.w2_bias,
        experts.w13_input_scale,
        experts.w2_input_scale,
        experts.activation.name,
        topk_weights,
        topk_ids,
        "" if activation_format is None else activation_format.name,
        routed_scaling_factor,
        apply_router_weight_on_input,
        expert_map,
        backend,
    )
    return y if out is None else out.copy_(y)


def _check(
    hidden_states: Tensor,
    experts: ExpertWeights,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation_format: Format | None,
    expert_map: Tensor | None,
    out: Tensor | None,
) -> None:
    op = "fused_moe"
    if not isinstance(experts, ExpertWeights):
        got = f"is a {type(experts).__name__}"
        raise TypeError(refusal(op, "experts", got, "an ExpertWeights"))
    check_float(op, "hidden_states", hidden_states)
    check_rank(op, "hidden_states", hidden_states, (2,), "[T, D]")
    num_tokens = hidden_states.shape[0]
    check_shape(op, "hidden_states", tuple(hidden_states.shape), (num_tokens, experts.hidden_size))
    check_rank(op, "topk_ids", topk_ids, (2,), "[T, A]")
    check_int(op, "topk_ids", topk_ids)
    check_shape(op, "topk_ids", tuple(topk_ids.shape), (num_tokens, topk_ids.shape[1]))
    check_float(op, "topk_weights", topk_weights)
    check_shape(op, "topk_weights", tuple(topk_weights.shape), tuple(topk_ids.shape))
    check_slots(op, topk_ids.numel())
    if expert_map is not None:
        check_expert_map(op, expert_map)
    if activation_format is not None:
        check_format(op, "activation_format", activation_format)
        if activation_format.block[1] not in (1, ALL):
            got = f"is {activation_format.name}"
            needs = "scales that no two tokens share, or one for all"
            raise ValueError(refusal(op, "activation_format", got, needs))
    for weight in (experts.w13, experts.w2):
        check_pair(op, format_of(weight), activation_format)
    check_same_device(
        op,
        hidden_states.device,
        experts=experts.w13,
        topk_weights=topk_weights,
        topk_ids=topk_ids,
        expert_map=expert_map,
        out=out,
    )
    if out is not None:
        check_shape(op, "out", tuple(out.shape), tuple(hidden_states.shape))
        if out.dtype != hidden_states.dtype:
            got = f"has dtype {out.dtype}"
            raise TypeError(refusal(op, "out", got, f"hidden_states' {hidden_states.dtype}"))


@register("fused_moe")
def _fused_moe_op(
    hidden_states: Tensor,
    w13: Tensor,
    w13_scale: Tensor | None,
    w13_format: str,
    w13_layout: str,
    w2: Tensor,
    w2_scale: Tensor | None,
    w2_format: str,
    w2_layout: str,
    w13_bias: Tensor | None,
    w2_bias: Tensor | None,
    w13_input_scale: Tensor | None,
    w2_input_scale: Tensor | None,
    activation: str,
    topk_weights: Tensor,
    topk_ids: Tensor,
    activation_format: str,
    routed_scaling_factor: float,
    apply_router_weight_on_input: bool,
    expert_map: Tensor | None,
    backend: str,
) -> Tensor:
    num_experts = w13.shape[0] if expert_map is None else expert_map.shape[0]
    check_ids("fused_moe", "topk_ids", topk_ids, num_experts)
    if expert_map is not None:
        check_ids("fused_moe", "expert_map", expert_map, w13.shape[0])
    experts = ExpertWeights(
        put_together(w13, w13_scale, w13_format, w13_layout),
        put_together(w2, w2_scale, w2_format, w2_layout),
        Activation.parse(activation),
        w13_bias,
        w2_bias,
        w13_input_scale,
        w2_input_scale,
    )
    format = Format.parse(activation_format) if activation_format else None
    problem = (hidden_states, experts, topk_ids.shape[1], format, apply_router_weight_on_input)
    run = implementation("fused_moe", backend, hidden_states.device, problem=problem)
    y: Tensor = run(
        hidden_states,
        experts,
        topk_weights,
        topk_ids,
        activation_format=format,
        routed_scaling_factor=routed_scaling_factor,
        apply_router_weight_on_input=apply_router_weight_on_input,
        expert_map=expert_map,
    )
    return y


@_fused_moe_op.register_fake
def _(hidden_states: Tensor, *_rest: object) -> Tensor:
    return hidden_states.new_empty(hidden_states.shape)
