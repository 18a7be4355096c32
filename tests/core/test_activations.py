"""Claims: an activation's name says all of it and is read back; the constants are the documented
ones; options that an activation does not have are refused.
"""

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

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

# constant, name, gated, alpha, limit, up_offset
CASES = [
    (SILU, "silu", True, 1.0, None, 0.0),
    (GELU, "gelu", True, 1.0, None, 0.0),
    (GELU_TANH, "gelu_tanh", True, 1.0, None, 0.0),
    (RELU2, "relu2:ungated", False, 1.0, None, 0.0),
    (SWIGLU_OAI, "silu:alpha=1.702,limit=7.0,up_offset=1.0", True, 1.702, 7.0, 1.0),
]
SPELLINGS = {
    "silu:limit=7": Activation(limit=7.0),
    "silu:output_limit=10": Activation(limit=10.0, limit_on=LimitOn.OUTPUT),
    "silu:up_offset=1,alpha=1.702,limit=7": SWIGLU_OAI,
    "gelu:ungated": Activation(ActivationKind.GELU, gated=False),
}

# Any number, also those written with an exponent.
NUMBERS = st.one_of(
    st.sampled_from([0.0, 1.0, 1.702, 7.0, 1e-5, 1e30, 1 / 3]), st.floats(allow_nan=False)
)


@st.composite
def activations(draw: st.DrawFn) -> Activation:
    """Whatever the constructor takes."""
    try:
        return Activation(
            kind=draw(st.sampled_from(ActivationKind)),
            gated=draw(st.booleans()),
            alpha=draw(st.one_of(st.just(1.0), NUMBERS)),
            limit=draw(st.one_of(st.none(), NUMBERS)),
            limit_on=draw(st.sampled_from(LimitOn)),
            up_offset=draw(st.one_of(st.just(0.0), NUMBERS)),
        )
    except ValueError:
        assume(False)
        raise


@given(activation=activations())
def test_name_is_read_back(activation: Activation):
    assert Activation.parse(activation.name) == activation


@pytest.mark.parametrize(("activation", "name", "gated", "alpha", "limit", "up_offset"), CASES)
def test_constants(
    activation: Activation,
    name: str,
    gated: bool,
    alpha: float,
    limit: float | None,
    up_offset: float,
):
    assert activation.name == name
    assert activation.kind == name.split(":")[0]
    assert (activation.gated, activation.alpha) == (gated, alpha)
    assert (activation.limit, activation.up_offset) == (limit, up_offset)
    assert activation.limit_on == LimitOn.INPUT


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_other_spellings(spelling: str):
    assert Activation.parse(spelling) == SPELLINGS[spelling]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"kind": ActivationKind.GELU, "alpha": 1.702},
            r"Activation: alpha is 1.702, but needs kind silu",
        ),
        ({"gated": False, "limit": 7.0}, r"Activation: limit or up_offset .* needs gated=True"),
        ({"gated": False, "up_offset": 1.0}, r"Activation: limit or up_offset .* needs gated=True"),
        ({"limit": 0.0}, r"Activation: limit is 0.0, but needs a positive value"),
        ({"limit": -7.0}, r"Activation: limit is -7.0, but needs a positive value"),
        ({"limit": float("nan")}, r"Activation: limit is nan, but needs a positive value"),
        ({"alpha": float("nan")}, r"Activation: alpha is nan, but needs a finite value"),
        ({"up_offset": float("inf")}, r"Activation: up_offset is inf, but needs a finite value"),
        ({"kind": "relu3"}, r"Activation: kind is 'relu3', but needs one of: silu, gelu"),
        ({"limit_on": LimitOn.OUTPUT}, r"Activation: limit_on is output, but needs a limit to"),
    ],
)
def test_options_that_do_not_apply_are_refused(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        Activation(**arguments)


@pytest.mark.parametrize(
    "name", ["", "swish", "silu:beta=1", "silu:limit", "silu:limit=x", "silu:ungated=1", "silu:=1"]
)
def test_unknown_names_are_refused_with_the_known_ones(name: str):
    message = r"Activation.parse: name is .* KIND one of silu, gelu, gelu_tanh, relu2 and OPTION"
    with pytest.raises(ValueError, match=message):
        Activation.parse(name)


def test_parse_refuses_what_the_constructor_refuses():
    with pytest.raises(ValueError, match=r"Activation: alpha is 2, but needs kind silu"):
        Activation.parse("gelu:alpha=2")
