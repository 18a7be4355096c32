"""The counter for `quantize`."""

import torch
from torch import Tensor

from octomoe.core.formats import Format
from octomoe.core.layouts import COMPACT, ScaleLayout
from octomoe.core.qtensor import QTensor, packed_scale_shape
from octomoe.errors import refusal
from octomoe.ops.check import check_float, check_format, check_given, check_rank, check_same_device
from octomoe.ops.dispatch import implementation
from octomoe.ops.register import register


def quantize(
    x: Tensor,
    format: Format,
    *,
    layout: ScaleLayout = COMPACT,
    out: QTensor | None = None,
    amax: Tensor | None = None,
    scale: Tensor | None = None,
    seed: int | Tensor | None = None,
    backend: str = "auto",
) -> QTensor:
    """Quantise to 8 bits: ``scale = round(amax(block) / target_max)``, ``data = x * (1 / scale)``.

    Data is rounded to nearest, ties to even, and saturates. A block with a NaN or an Inf reads
    back as all NaN; an all-zero block gets the format's smallest scale.

    With a seed, data is rounded stochastically: up with the probability of its distance from the
    representable number below, so that gradients are right on average. The same seed gives the same
    bits, on any device; use another one for each tensor.

    Args:
        x: ``[rows, columns]`` or ``[experts, rows, columns]``, float32, bf16 or fp16. No size need
            be a multiple of the block.
        format: what to store; see `octomoe.core.formats`.
        layout: where to lay the scales.
        out: write into this value (of the same format and layout) instead of a new one.
        amax: float32 magnitudes to take the scales from, of the COMPACT scale's shape or of one
            element, instead of the data's own.
        scale: scales to use as they are, in the format's scale dtype; shapes as for `amax`.
        seed: of the random bits: an int of 64 bits, or an int64 tensor of one element on x's device
            (which CUDA graphs and torch.compile may change); None rounds to nearest.
        backend: ``"auto"``, ``"reference"``, ``"triton"`` or ``"sm90"``.

    Returns:
        A QTensor of x's shape.

    Raises:
        TypeError: x is not float32, bf16 or fp16, or an argument has another dtype than said.
        ValueError: a shape or device does not fit, both amax and scale are given, or the seed has
            more than 64 bits.
        NotImplementedError: the backend cannot run this.

    >>> import octomoe
    >>> q = octomoe.quantize(torch.tensor([[1.0, -2.0, 448.0]]), octomoe.FP8_ROW)
    >>> q.scale.item(), q.data.float().tolist()
    (1.0, [[1.0, -2.0, 448.0]])
    """
    check_float("quantize", "x", x)
    check_rank("quantize", "x", x, (2, 3), "[rows, columns] or [experts, rows, columns]")
    check_format("quantize", "format", format)
    check_same_device("quantize", x.device, amax=amax, scale=scale, out=out)
    if amax is not None and scale is not None:
        raise ValueError(refusal("quantize", "amax and scale", "are both given", "at most one"))
    shape = tuple(x.shape)
    amax = check_given("quantize", "amax", amax, torch.float32, format, shape)
    scale = check_given("quantize", "scale", scale, format.scale_dtype, format, shape)
    seed = seed_tensor("quantize", seed, x.device)
    if out is not None:
        _check_out(x, format, layout, out)
    data, scale_out = _quantize_op(x, format.name, layout, amax, scale, backend, seed)
    if out is None:
        return QTensor(data, scale_out, format, layout)
    out.data.copy_(data)
    out.scale.copy_(scale_out)
    return out


def _check_out(x: Tensor, format: Format, layout: ScaleLayout, out: QTensor) -> None:
    if (out.format, out.layout, out.shape) != (format, layout, x.shape):
        got = f"is {out.format.name} in {out.layout} of shape {tuple(out.shape)}"
        needs = f"{format.name} in {layout} of shape {tuple(x.shape)}"
        raise ValueError(refusal("quantize", "out", got, needs))


def seed_tensor(op: str, seed: int | Tensor | None, device: torch.device) -> Tensor | None:
    """A seed as a tensor; refuse what is none."""
    if seed is None:
        return None
    if isinstance(seed, Tensor):
        if seed.dtype != torch.int64:
            raise TypeError(refusal(op, "seed", f"has dtype {seed.dtype}", "torch.int64"))
        if seed.numel() != 1:
            raise ValueError(refusal(op, "seed", f"has shape {tuple(seed.shape)}", "one element"))
        check_same_device(op, device, seed=seed)
        return seed
    if not isinstance(seed, int):
        needs = "an int, or an int64 tensor of one element"
        raise TypeError(refusal(op, "seed", f"is a {type(seed).__name__}", needs))
    if not -(2**63) <= seed < 2**63:
        raise ValueError(refusal(op, "seed", f"is {seed}", "an int of 64 bits, signed"))
    # Not `torch.tensor`, which would wait for the device.
    return torch.full((), seed, dtype=torch.int64, device=device)


def empty_quantized(
    x: Tensor, shape: tuple[int, ...], format: str, layout: str
) -> tuple[Tensor, Tensor]:
    """Data and scale of what quantises to `shape`, for fakes; x has the device."""
    fmt = Format.parse(format)
    scale_shape = packed_scale_shape(fmt, ScaleLayout(layout), shape)
    return (
        x.new_empty(shape, dtype=fmt.element.dtype),
        x.new_empty(scale_shape, dtype=fmt.scale_dtype),
    )


@register("quantize")
def _quantize_op(
    x: Tensor,
    format: str,
    layout: str,
    amax: Tensor | None,
    scale: Tensor | None,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    run = implementation("quantize", backend, x.device)
    q: QTensor = run(
        x,
        Format.parse(format),
        layout=ScaleLayout(layout),
        amax=amax,
        scale=scale,
        seed=seed,
    )
    return q.data, q.scale


@_quantize_op.register_fake
def _(
    x: Tensor,
    format: str,
    layout: str,
    amax: Tensor | None,
    scale: Tensor | None,
    backend: str,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return empty_quantized(x, tuple(x.shape), format, layout)
