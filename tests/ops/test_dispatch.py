"""`dispatch`: `auto` picks the first usable backend, an explicit one never falls back.

Claimed: every op takes a backend; a refusal names the op and gives each backend's reason.
"""

from types import SimpleNamespace

import pytest
import torch

from octomoe import (
    FP8_ROW,
    MXFP8,
    SILU,
    ExpertWeights,
    Target,
    activation_bwd,
    activation_quantize,
    build_routing,
    dequantize,
    fused_moe,
    grouped_gemm,
    grouped_gemm_dgrad,
    grouped_gemm_wgrad,
    moe_align_block_size,
    permute,
    quantize,
    quantize_experts,
    requantize,
    unpermute,
    unpermute_bwd,
)
from octomoe.ops import dispatch

X_TD, IDS_TA = torch.linspace(-1, 1, 128).view(4, 32), torch.tensor([[0], [1], [0], [0]])
W_ENK = torch.linspace(-2, 1, 2048).view(2, 32, 32)
ROUTING = build_routing(IDS_TA, 2)
EXPERTS = ExpertWeights(w13=torch.cat([W_ENK, -W_ENK], dim=1), w2=W_ENK)
ROUTER_WEIGHTS_TA = torch.full((4, 1), 0.5)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")

CASES = {
    "quantize": lambda backend: quantize(X_TD, MXFP8, backend=backend),
    "dequantize": lambda backend: dequantize(quantize(X_TD, MXFP8), backend=backend),
    "requantize": lambda backend: requantize(quantize(X_TD, MXFP8), FP8_ROW, backend=backend),
    "build_routing": lambda backend: build_routing(IDS_TA, 2, backend=backend).choice_of_slot_S,
    "permute": lambda backend: permute(X_TD, ROUTING, backend=backend),
    "moe_align_block_size": lambda backend: (
        moe_align_block_size(IDS_TA, 16, 2, backend=backend).sorted_token_ids
    ),
    "unpermute": lambda backend: unpermute(X_TD, ROUTING, backend=backend),
    "unpermute_bwd": lambda backend: unpermute_bwd(
        X_TD, X_TD, ROUTING, ROUTER_WEIGHTS_TA, backend=backend
    )[0],
    "grouped_gemm": lambda backend: grouped_gemm(X_TD, W_ENK, ROUTING, backend=backend),
    "grouped_gemm_dgrad": lambda backend: grouped_gemm_dgrad(X_TD, W_ENK, ROUTING, backend=backend),
    "grouped_gemm_wgrad": lambda backend: grouped_gemm_wgrad(X_TD, X_TD, ROUTING, backend=backend),
    "activation_quantize": lambda backend: activation_quantize(X_TD, SILU, MXFP8, backend=backend),
    "activation_bwd": lambda backend: activation_bwd(X_TD[:, :16], X_TD, SILU, backend=backend),
    "fused_moe": lambda backend: fused_moe(
        X_TD, EXPERTS, ROUTER_WEIGHTS_TA, IDS_TA, backend=backend
    ),
}


@pytest.fixture(autouse=True)
def _without_an_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.fixture(autouse=True)
def _forgets_what_modules_there_are():
    dispatch._has_module.cache_clear()
    yield
    dispatch._has_module.cache_clear()


@pytest.fixture
def hopper(monkeypatch):
    """A machine that says it is an H200."""
    target = Target("NVIDIA H200", arch=90, sms=132, smem=232448)
    monkeypatch.setattr(Target, "of", classmethod(lambda cls, device: target))


def pretend(monkeypatch, **reasons):
    """Let backends be usable, or not for a reason."""
    monkeypatch.setattr(dispatch, "why_not", lambda op, backend, device: reasons.get(backend))


@pytest.mark.parametrize("op", CASES)
def test_every_op_runs_on_the_reference(op, assert_same_bits):
    assert_same_bits(CASES[op]("reference"), CASES[op]("auto"))


@pytest.mark.parametrize("op", CASES)
def test_every_op_refuses_an_unknown_backend(op):
    with pytest.raises(ValueError, match=f"^{op}: backend is 'cuda', but needs one of: auto, sm90"):
        CASES[op]("cuda")


@pytest.mark.parametrize("backend", ["triton", "sm90"])
@pytest.mark.parametrize("op", CASES)
def test_every_op_refuses_a_backend_that_cannot_run(op, backend):
    match = (
        rf"^{op}: backend is '{backend}' on cpu, but needs one that can run: "
        r"sm90 \(.+\); triton \(.+\); reference \(usable\)$"
    )
    with pytest.raises(NotImplementedError, match=match):
        CASES[op](backend)


def test_quantize_experts_passes_its_backend_on(assert_same_bits):
    quantized = quantize_experts(EXPERTS, MXFP8, backend="reference")
    assert_same_bits(quantized.w13, quantize(EXPERTS.w13, MXFP8))
    with pytest.raises(NotImplementedError, match="backend is 'triton' on cpu"):
        quantize_experts(EXPERTS, MXFP8, backend="triton")


def test_auto_takes_the_first_that_is_usable(monkeypatch):
    pretend(monkeypatch)
    assert dispatch.choose("quantize", "auto", CUDA) == "sm90"
    # A CPU has no other, though Triton's interpreter may run kernels there when asked to.
    assert dispatch.choose("quantize", "auto", CPU) == "reference"
    pretend(monkeypatch, sm90="no")
    assert dispatch.choose("quantize", "auto", CUDA) == "triton"
    pretend(monkeypatch, sm90="no", triton="no")
    assert dispatch.choose("quantize", "auto", CUDA) == "reference"


def test_the_interpreter_runs_kernels_when_asked_to(monkeypatch):
    assert "needs a GPU (or TRITON_INTERPRET=1)" in dispatch.why_not("quantize", "triton", CPU)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert dispatch.why_not("quantize", "triton", CPU) is None
    assert dispatch.choose("quantize", "auto", CPU) == "reference"


def test_an_explicit_backend_is_taken_though_a_faster_one_could(monkeypatch):
    pretend(monkeypatch)
    for backend in dispatch.BACKENDS:
        assert dispatch.choose("quantize", backend, CPU) == backend


def test_an_explicit_backend_never_falls_back(monkeypatch):
    pretend(monkeypatch, sm90="too old", triton=None)
    match = r"needs one that can run: sm90 \(too old\); triton \(usable\); reference \(usable\)"
    with pytest.raises(NotImplementedError, match=match):
        dispatch.choose("quantize", "sm90", CPU)


def test_reasons_of_a_cpu():
    assert dispatch.why_not("quantize", "reference", CPU) is None
    for backend in ("triton", "sm90"):
        reason = dispatch.why_not("quantize", backend, CPU)
        assert reason is not None
        assert "triton is not installed" in reason or "cpu" in reason


def test_reason_without_triton(monkeypatch, hopper):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: None)
    for backend in ("triton", "sm90"):
        reason = dispatch.why_not("quantize", backend, CUDA)
        assert reason == "the package triton is not installed"


def test_reason_of_another_gpu(monkeypatch):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: object())
    for target, said in (
        (Target("NVIDIA A100", arch=80), "NVIDIA A100 is 8.0"),
        (Target("NVIDIA B200", arch=100), "NVIDIA B200 is 10.0"),
        (Target("gfx942", is_hip=True), "gfx942 is no CUDA device"),
    ):
        monkeypatch.setattr(Target, "of", classmethod(lambda cls, device, target=target: target))
        reason = dispatch.why_not("quantize", "sm90", CUDA)
        assert reason == f"needs compute capability 9.0, {said}"
        # Triton is portable.
        assert dispatch.why_not("quantize", "triton", CUDA) is None


def test_reason_where_no_kernel_was_written(monkeypatch, hopper):
    monkeypatch.setattr(dispatch, "find_spec", lambda name: name == "triton" or None)
    for backend in ("triton", "sm90"):
        reason = dispatch.why_not("quantize", backend, CUDA)
        assert reason == f"this version has no {backend} kernel for it"


def test_every_op_has_a_reference():
    for op in dispatch.OPS:
        assert callable(dispatch.implementation(op, "reference", CPU))


@pytest.fixture
def refusing(monkeypatch):
    """A backend sm90 whose kernel takes even numbers only, in front of one that takes all."""
    modules = {
        "octomoe.kernels.quantize_sm90": SimpleNamespace(
            quantize=lambda: "sm90", why_not=lambda number: "it is odd" if number % 2 else None
        ),
        "octomoe.kernels.quantize": SimpleNamespace(quantize=lambda: "triton"),
    }
    pretend(monkeypatch)
    monkeypatch.setattr(dispatch, "import_module", modules.__getitem__)


@pytest.mark.parametrize(("number", "backend"), [(2, "sm90"), (3, "triton")])
def test_auto_goes_on_where_a_kernel_refuses_a_problem(number, backend, refusing):
    assert dispatch.implementation("quantize", "auto", CUDA, problem=(number,))() == backend


def test_an_explicit_backend_refuses_what_its_kernel_cannot_do(refusing):
    assert dispatch.implementation("quantize", "sm90", CUDA, problem=(2,))() == "sm90"
    match = "^quantize: backend is 'sm90', but needs one that can do this: sm90 cannot, it is odd"
    with pytest.raises(NotImplementedError, match=match):
        dispatch.implementation("quantize", "sm90", CUDA, problem=(3,))
