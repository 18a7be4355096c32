"""Claims: ExpertWeights refuses parts that do not fit; `arrange` brings every other arrangement to
gate-then-up without changing a value, quantised or not, or refuses; `append` is running both groups
of experts; `pad_width` does not change the layer's output.
"""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from octomoe.core.activations import GELU, RELU2, Activation
from octomoe.core.experts import GATE_UP, UP_GATE, ExpertWeights, RowOrder, Weight, interleaved
from octomoe.core.formats import (
    ALL,
    FP8_BLOCK128,
    FP8_EXPERT,
    FP8_ROW,
    FP8_TENSOR,
    MXFP8,
    MXFP8_2D,
    Format,
)
from octomoe.core.layouts import ScaleLayout
from octomoe.core.qtensor import QTensor
from octomoe.reference import fused_moe, quantize

# Power-of-two scales, under which the weights of `make_inputs` are stored without rounding.
TENSOR, EXPERT, ROW, BLOCK128 = (
    format.derive(rounding="pow2") for format in (FP8_TENSOR, FP8_EXPERT, FP8_ROW, FP8_BLOCK128)
)
ORDERS = [GATE_UP, UP_GATE, interleaved(1), interleaved(8), RowOrder(gate_first=False, chunk=8)]
# format (None is bf16), row order, F, D
CASES = [
    *((format, order, 24, 40) for format in (None, TENSOR, EXPERT, ROW, MXFP8) for order in ORDERS),
    *((BLOCK128, order, 256, 130) for order in (GATE_UP, UP_GATE, interleaved(128))),
]
ACTIVATIONS = [
    *("silu", "gelu", "gelu_tanh", "relu2", "silu:ungated", "gelu:ungated", "relu2:ungated"),
    *("silu:alpha=1.702,limit=7,up_offset=1", "silu:output_limit=1.5", "gelu:limit=1.5"),
]


def name_of(format: Format | None) -> str:
    return "bf16" if format is None else format.name


def make_inputs(
    num_experts: int = 3, width: int = 24, hidden_size: int = 40
) -> tuple[Tensor, Tensor, Tensor]:
    """gate_EFD, up_EFD, w2_EDF: whole numbers of four bits times powers of two that differ between
    experts, gate and up, rows, and blocks of columns; a scale in another's place shows.
    """

    def values(rows: int, columns: int, power: int) -> Tensor:
        digits = torch.randint(1, 16, (num_experts, rows, columns))
        digits *= torch.randint(0, 2, digits.shape) * 2 - 1
        expert, row, column = torch.meshgrid(
            torch.arange(num_experts), torch.arange(rows), torch.arange(columns), indexing="ij"
        )
        power_ENK = power + expert % 2 + row % 3 + (row // 128 + column // 32) % 2
        return (digits * 2**power_ENK).to(torch.bfloat16)

    gate_EFD, up_EFD = values(width, hidden_size, 0), values(width, hidden_size, 2)
    return gate_EFD, up_EFD, values(hidden_size, width, 0)


def spell(gate: Tensor, up: Tensor, order: RowOrder) -> Tensor:
    """Gate and up rows fused in `order`, chunk after chunk."""
    chunk = order.chunk or gate.shape[1]
    parts = []
    for start in range(0, gate.shape[1], chunk):
        pair = [gate[:, start : start + chunk], up[:, start : start + chunk]]
        parts += pair if order.gate_first else reversed(pair)
    return torch.cat(parts, dim=1)


def make_fused(num_experts: int = 3) -> tuple[Tensor, Tensor]:
    """w13_END, w2_EDF."""
    gate_EFD, up_EFD, w2_EDF = make_inputs(num_experts)
    return spell(gate_EFD, up_EFD, GATE_UP), w2_EDF


def store(weight: Tensor, format: Format | None, is_transposed: bool = False) -> Weight:
    """The weight as a checkpoint holds it; a transposed one has its format's block transposed."""
    if is_transposed:
        weight = weight.transpose(1, 2).contiguous()
    if format is None:
        return weight
    if is_transposed:
        experts, rows, columns = format.block
        format = replace(format, block=(experts, columns, rows))
    return quantize(weight, format)


def values_of(weight: Weight) -> Tensor:
    return weight.dequantize() if isinstance(weight, QTensor) else weight.float()


@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize(("format", "order", "width", "hidden_size"), CASES)
def test_arrange_gives_gate_then_up(
    format: Format | None, order: RowOrder, width: int, hidden_size: int, is_transposed: bool
):
    gate_EFD, up_EFD, w2_EDF = make_inputs(3, width, hidden_size)
    arranged = ExpertWeights.arrange(
        store(spell(gate_EFD, up_EFD, order), format, is_transposed),
        store(w2_EDF, format, is_transposed),
        row_order=order,
        is_transposed=is_transposed,
    )
    assert torch.equal(values_of(arranged.w13), torch.cat([gate_EFD, up_EFD], dim=1).float())
    assert torch.equal(values_of(arranged.w2), w2_EDF.float())
    if format is not None:
        assert (arranged.w13.format, arranged.w2.format) == (format, format)


@pytest.mark.parametrize("layout", ScaleLayout)
@pytest.mark.parametrize("format", [ROW, MXFP8], ids=name_of)
def test_arrange_takes_scales_in_any_layout(format: Format, layout: ScaleLayout):
    gate_EFD, up_EFD, w2_EDF = make_inputs()
    w13 = quantize(spell(gate_EFD, up_EFD, UP_GATE), format).relayout(layout)
    arranged = ExpertWeights.arrange(w13, w2_EDF, row_order=UP_GATE)
    assert torch.equal(values_of(arranged.w13), torch.cat([gate_EFD, up_EFD], dim=1).float())


@pytest.mark.parametrize("order", ORDERS)
def test_arrange_moves_the_bias_with_its_rows(order: RowOrder):
    gate_EFD, up_EFD, w2_EDF = make_inputs()
    w2_bias_ED = torch.randn(3, 40)
    arranged = ExpertWeights.arrange(
        spell(gate_EFD, up_EFD, order),
        w2_EDF,
        row_order=order,
        # The first column of each row serves as its bias.
        w13_bias=spell(gate_EFD[:, :, :1], up_EFD[:, :, :1], order).squeeze(2),
        w2_bias=w2_bias_ED,
    )
    assert torch.equal(arranged.w13_bias, arranged.w13[:, :, 0])
    assert torch.equal(arranged.w2_bias, w2_bias_ED)


def test_arrange_leaves_rows_alone_without_a_gate():
    gate_EFD, _, w2_EDF = make_inputs()
    arranged = ExpertWeights.arrange(gate_EFD, w2_EDF, row_order=UP_GATE, activation=RELU2)
    assert torch.equal(arranged.w13, gate_EFD)
    assert arranged.activation == RELU2


@pytest.mark.parametrize(
    ("format", "width", "order", "chunk"),
    [
        (BLOCK128, 96, UP_GATE, 96),
        (BLOCK128, 256, interleaved(8), 8),
        (MXFP8_2D, 64, interleaved(1), 1),
        (Format((1, 16, ALL)), 24, interleaved(8), 8),
    ],
)
def test_arrange_refuses_blocks_that_hold_gate_and_up(
    format: Format, width: int, order: RowOrder, chunk: int
):
    gate_EFD, up_EFD, w2_EDF = make_inputs(1, width, 32)
    w13 = quantize(spell(gate_EFD, up_EFD, order), format)
    message = (
        rf"ExpertWeights.arrange: w13 has scale blocks of {format.block[1]} rows across chunks of "
        rf"{chunk} .* needs blocks that hold gate rows or up rows only; dequantize it"
    )
    with pytest.raises(ValueError, match=message):
        ExpertWeights.arrange(w13, w2_EDF, row_order=order)


@pytest.mark.parametrize("order", [interleaved(7), interleaved(48), RowOrder(False, 5)])
def test_arrange_refuses_chunks_that_do_not_divide_the_rows(order: RowOrder):
    w13_END, w2_EDF = make_fused()
    message = rf"arrange: w13 has 48 rows, but needs a multiple of {2 * order.chunk} for chunks of"
    with pytest.raises(ValueError, match=message):
        ExpertWeights.arrange(w13_END, w2_EDF, row_order=order)


@pytest.mark.parametrize("shape", [(3, 47), (3, 50), (48,)])
@pytest.mark.parametrize("order", [GATE_UP, UP_GATE, interleaved(1)])
def test_arrange_refuses_a_bias_of_another_shape(order: RowOrder, shape: tuple[int, ...]):
    w13_END, w2_EDF = make_fused()
    message = r"ExpertWeights.*: w13_bias has shape .*, but needs \(3, 48\)"
    with pytest.raises(ValueError, match=message):
        ExpertWeights.arrange(w13_END, w2_EDF, row_order=order, w13_bias=torch.zeros(shape))


@pytest.mark.parametrize("is_transposed", [False, True])
def test_arrange_refuses_two_axes(is_transposed: bool):
    with pytest.raises(ValueError, match=r"ExpertWeights.*: w13 and w2 have shapes \(4"):
        ExpertWeights.arrange(torch.zeros(48, 40), torch.zeros(40, 24), is_transposed=is_transposed)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("format", [None, EXPERT, ROW, MXFP8], ids=name_of)
def test_append_runs_both_groups(format: Format | None, has_bias: bool):
    groups = []
    for num_experts in (3, 2):
        w13_END, w2_EDF = make_fused(num_experts)
        experts = ExpertWeights(
            store(w13_END, format),
            store(w2_EDF, format),
            w13_bias=torch.randn(num_experts, 48) if has_bias else None,
            w2_bias=torch.randn(num_experts, 40) if has_bias else None,
        )
        groups.append(experts)
    routed, shared = groups
    both = routed.append(shared)
    assert both.num_experts == 5
    x_TD, weights_TA = torch.randn(6, 40), torch.rand(6, 2)
    ids_TA = torch.stack([torch.arange(6) % 3, torch.arange(6) % 2], dim=1)
    # First choices go to routed experts, second ones to shared experts. Each sum has two terms.
    routed_TD = fused_moe(x_TD, routed, weights_TA[:, :1], ids_TA[:, :1])
    shared_TD = fused_moe(x_TD, shared, weights_TA[:, 1:], ids_TA[:, 1:])
    both_TD = fused_moe(x_TD, both, weights_TA, ids_TA + torch.tensor([0, 3]))
    assert torch.equal(both_TD, routed_TD + shared_TD)


def test_append_refuses_what_differs():
    w13_END, w2_EDF = make_fused()
    ours = ExpertWeights(w13_END, w2_EDF)
    message = r"ExpertWeights.append: shared is w13 .*, but needs w13 \[E, 48, 40\] torch.bfloat16"
    for theirs in (
        ExpertWeights(w13_END, w2_EDF, activation=GELU),
        ExpertWeights(w13_END, w2_EDF, w2_bias=torch.zeros(3, 40)),
        ExpertWeights(w13_END.float(), w2_EDF),
        ExpertWeights(w13_END, quantize(w2_EDF, ROW)),
        ExpertWeights(w13_END[:, :46], w2_EDF[:, :, :23]),
    ):
        with pytest.raises(ValueError, match=message):
            ours.append(theirs)

    one_scale = ExpertWeights(quantize(w13_END, TENSOR), quantize(w2_EDF, TENSOR))
    message = r"append: w13 is fp8_tensor-pow2, one scale over all experts, .*; append before quant"
    with pytest.raises(ValueError, match=message):
        one_scale.append(one_scale)


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_pad_width_keeps_the_output(name: str, has_bias: bool):
    activation = Activation.parse(name)
    num_rows = 40 if activation.gated else 20
    experts = ExpertWeights(
        torch.randn(3, num_rows, 12),
        torch.randn(3, 12, 20),
        activation,
        w13_bias=torch.randn(3, num_rows) if has_bias else None,
        w2_bias=torch.randn(3, 12) if has_bias else None,
    )
    padded = experts.pad_width(32)
    assert (padded.intermediate_size, padded.hidden_size) == (32, 12)

    x_TD, weights_TA, ids_TA = torch.randn(7, 12), torch.rand(7, 2), torch.randint(3, (7, 2))
    expected_TD = fused_moe(x_TD, experts, weights_TA, ids_TA)
    # The added products are zeros, but a longer sum may be grouped otherwise.
    torch.testing.assert_close(fused_moe(x_TD, padded, weights_TA, ids_TA), expected_TD)


def test_pad_width_leaves_multiples_alone():
    w13_END, w2_EDF = make_fused()
    experts = ExpertWeights(quantize(w13_END, ROW), quantize(w2_EDF, ROW))
    assert experts.pad_width(8) is experts
    message = r"ExpertWeights.pad_width: w13 or w2 is quantised, but needs unquantised weights"
    with pytest.raises(TypeError, match=message):
        experts.pad_width(32)


def test_numbers_of_a_layer():
    w13_END, w2_EDF = make_fused()
    experts = ExpertWeights(quantize(w13_END, MXFP8), w2_EDF)
    assert (experts.num_experts, experts.hidden_size, experts.intermediate_size) == (3, 40, 24)
    assert experts.device.type == "cpu"
    # A byte per element and two scales per row; two bytes per element.
    assert experts.num_bytes == 3 * 48 * (40 + 2) + 3 * 40 * 24 * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"w13": torch.zeros(48, 40)}, r"w13 and w2 have shapes \(48, 40\) and \(3, 40, 24\)"),
        ({"w2": torch.zeros(2, 40, 24)}, r"w2 has shape \(2, 40, 24\), but needs .* = \[3, 40, "),
        ({"w2": torch.zeros(3, 24, 40)}, r"w2 has shape \(3, 24, 40\).* go through .*arrange"),
        ({"w2": torch.zeros(3, 40, 48)}, r"w2 has shape .* \[3, 40, half of 48\] for w13"),
        ({"activation": RELU2}, r"w2 has shape .* \[3, 40, 48\] for w13 .* relu2:ungated"),
        ({"w13_bias": torch.zeros(3, 24)}, r"w13_bias has shape \(3, 24\), but needs \(3, 48\)"),
        ({"w2_bias": torch.zeros(3, 24)}, r"w2_bias has shape \(3, 24\), but needs \(3, 40\)"),
        ({"w13_input_scale": torch.ones(3)}, r"w13_input_scale is torch.float32 of shape \(3,\)"),
        ({"w2_input_scale": torch.ones(1).half()}, r"w2_input_scale .* use the largest"),
        ({"w2": torch.zeros(3, 40, 24, device="meta")}, r"w2 is on meta, but needs w13's device"),
        ({"w2_bias": torch.zeros(3, 40, device="meta")}, r"w2_bias is on meta, but needs w13's"),
    ],
)
def test_parts_that_do_not_fit_are_refused(changes: dict, message: str):
    w13_END, w2_EDF = make_fused()
    with pytest.raises(ValueError, match=f"ExpertWeights: {message}"):
        ExpertWeights(**{"w13": w13_END, "w2": w2_EDF, **changes})


def test_integer_weights_are_refused():
    w13_END, w2_EDF = make_fused()
    with pytest.raises(TypeError, match=r"ExpertWeights: w2 has dtype torch.int32, but needs a QT"):
        ExpertWeights(w13_END, w2_EDF.int())


def test_sizes_that_are_none_are_refused():
    w13_END, w2_EDF = make_fused()
    with pytest.raises(ValueError, match=r"pad_width: multiple is 0, but needs a positive size"):
        ExpertWeights(w13_END, w2_EDF).pad_width(0)
    with pytest.raises(ValueError, match=r"arrange: w13 has 48 rows, but needs a multiple of -2"):
        ExpertWeights.arrange(w13_END, w2_EDF, row_order=RowOrder(chunk=-1))


def test_append_keeps_the_larger_input_scale():
    w13_END, w2_EDF = make_fused()
    routed, shared = (
        ExpertWeights(
            w13_END, w2_EDF, w13_input_scale=torch.tensor(a), w2_input_scale=torch.tensor(b)
        )
        for a, b in ((0.5, 0.1), (0.25, 0.3))
    )
    both = routed.append(shared)
    assert both.w13_input_scale.item() == 0.5
    assert both.w2_input_scale.item() == pytest.approx(0.3)
    with pytest.raises(
        ValueError, match=r"append: shared is .* with no bias, but needs .* w13_inp"
    ):
        routed.append(ExpertWeights(w13_END, w2_EDF))
