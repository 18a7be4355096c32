"""Kernels run on the GPU if there is one, else in Triton's interpreter on the CPU."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from torch import Tensor

from octomoe.core.activations import SILU, Activation
from octomoe.core.experts import ExpertWeights
from octomoe.core.formats import Format
from octomoe.core.qtensor import QTensor
from octomoe.ops.quantize_experts import quantize_experts

# Programs, of which one imports the other as Python finds it beside itself.
collect_ignore_glob = ["offline*.py"]
FOLDER = Path(__file__).parent


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _silent_arithmetic() -> Iterator[None]:
    """Say nothing of 1 / 0 and 0 * Inf, as the hardware does; the interpreter's NumPy warns.

    Kernels compute them in the lanes of a tile that lie past the end, and store nothing there.
    """
    with numpy.errstate(all="ignore"):
        yield


@pytest.fixture(scope="session")
def interpreter_cast() -> Callable[..., object]:
    """How Triton's interpreter itself converts floats."""
    from triton.runtime import interpreter

    return interpreter._convert_float


@pytest.fixture(autouse=True, scope="session")
def _true_casts(interpreter_cast: Callable[..., object]) -> Iterator[None]:
    """Round as the hardware does.

    Triton's interpreter (3.6 to 3.9) loses the carry when rounding to an 8-bit float moves a number
    into the next binade (124.2 becomes 64, not 128), and cuts float32 to bf16 instead of rounding.
    `test_the_interpreter_still_needs_this` says when it no longer does.
    """
    if torch.cuda.is_available():
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        corrected = _rounding(interpreter_cast)
        patch.setattr("triton.runtime.interpreter._convert_float", corrected)
        yield


@pytest.fixture(scope="session")
def interpreter_dot() -> Callable[..., object]:
    """How Triton's interpreter itself multiplies matrices."""
    from triton.runtime import interpreter

    return interpreter.InterpreterBuilder.create_dot


@pytest.fixture(autouse=True, scope="session")
def _true_products(interpreter_dot: Callable[..., object]) -> Iterator[None]:
    """Multiply bf16 matrices as numbers: Triton's interpreter (3.6 to 3.9) takes their bits.

    `test_the_interpreter_still_needs_this` says when it no longer does.
    """
    if torch.cuda.is_available():
        yield
        return
    import triton.language as tl
    from triton.runtime import interpreter

    def widened(operand):
        if operand.dtype != tl.bfloat16:
            return operand
        bits = operand.data.astype(numpy.uint32) << 16
        return interpreter.TensorHandle(bits.view(numpy.float32), tl.float32)

    def dot(builder, a, b, *rest):
        return interpreter_dot(builder, widened(a), widened(b), *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter.InterpreterBuilder, "create_dot", dot)
        yield


@pytest.fixture(autouse=True, scope="session")
def _loop_bounds() -> Iterator[None]:
    """Let a loop run up to an argument: Triton 3.6 makes an int of an array of one element.

    NumPy 2.4 no longer does. Triton 3.9 asks for the element.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    plain = interpreter._patch_lang_tensor

    def patch_tensor(tensor, scope):
        plain(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patch_tensor)
        yield


@pytest.fixture(autouse=True, scope="session")
def _no_unread_sums() -> Iterator[None]:
    """Add integers once, not a second time in 64 bits to see whether they overflow.

    Triton's interpreter (3.6 to 3.9) does so, and looks at the result in debug mode only: a third
    of the time of these tests.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime.interpreter import interpreter_builder

    plain = interpreter_builder.options
    assert not plain.debug
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter_builder, "options", replace(plain, sanitize_overflow=False))
        yield


@pytest.fixture(autouse=True, scope="session")
def _dtypes_by_name() -> Iterator[None]:
    """Remember NumPy's dtype of each of Triton's, whose interpreter (3.6 to 3.9) makes a table of
    all of them at every operation: a fifth of the time of these tests.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    plain = interpreter._get_np_dtype
    known = {}

    def numpy_dtype(dtype):
        name = dtype.scalar.name
        if name not in known:
            known[name] = plain(dtype.scalar)
        return known[name]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_get_np_dtype", numpy_dtype)
        yield


@pytest.fixture(autouse=True)
def _patched_once_per_launch() -> Iterator[None]:
    """Prepare a module's view of the language once per launch, not at every call of its functions.

    Triton's interpreter (3.6 to 3.9) goes through all of `triton.language` each time a device
    function is called, and finds its own patches: a quarter of the time of these tests. A launch
    that fails does not end: what it leaves is forgotten with its test.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    plain = interpreter._patch_lang
    patched = set()

    def patch_lang(function):
        if function.__module__ in patched:
            return None
        scope = plain(function)
        if not patched:
            # The kernel's own: its end is the launch's.
            restore = scope.restore
            scope.restore = lambda: (patched.clear(), restore())
        patched.add(function.__module__)
        return scope

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang", patch_lang)
        yield


def _rounding(plain: Callable[..., object]) -> Callable[..., object]:
    import triton.language as tl

    dtypes = {
        tl.float32: torch.float32,
        tl.float16: torch.float16,
        tl.bfloat16: torch.bfloat16,
        tl.float8e4nv: torch.float8_e4m3fn,
        tl.float8e5: torch.float8_e5m2,
    }
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

    def convert(value, source, target, rounding_mode):
        if source not in dtypes or target not in dtypes:
            return plain(value, source, target, rounding_mode)
        bits = torch.frombuffer(bytearray(value.tobytes()), dtype=integers[value.itemsize])
        result = bits.view(dtypes[source]).to(dtypes[target])
        # The hardware has one NaN.
        result = torch.where(result.float().isnan(), torch.nan, result.float()).to(result.dtype)
        raw = result.view(integers[result.itemsize]).numpy()
        return raw.view(f"uint{8 * raw.itemsize}").reshape(value.shape)

    return convert


@pytest.fixture(scope="session")
def compile_offline() -> Callable[..., dict[tuple[str, str], list[dict[str, object]]]]:
    """Run one of the programs that compile kernels; its records by two of their keys.

    Another process does it: one that interprets kernels cannot compile them.
    """

    def run(program, *arguments, by):
        environment = {name: os.environ[name] for name in os.environ if name != "TRITON_INTERPRET"}
        command = [sys.executable, FOLDER / program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        records = defaultdict(list)
        for record in map(json.loads, done.stdout.splitlines()):
            records[tuple(record[key] for key in by)].append(record)
        return records

    return run


@pytest.fixture(scope="session")
def make_experts(kernel_device) -> Callable[..., ExpertWeights]:
    """Experts of a case ``(tokens, experts, choices, .., hidden size, width)``; None: unquantised.

    `is_static`: activations get one scale each that is given.
    """

    def make(
        case: tuple,
        format: Format | None,
        activation: Activation = SILU,
        *,
        has_bias: bool = False,
        is_static: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str = kernel_device,
    ) -> ExpertWeights:
        _, num_experts, *_, hidden_size, width = case
        generator = torch.Generator().manual_seed(1)
        rows = width * (2 if activation.gated else 1)

        def draw(*shape: int, deviation: float) -> Tensor:
            return (deviation * torch.randn(shape, generator=generator)).to(device, dtype)

        experts = ExpertWeights(
            # Every intermediate value is of order one, as in a trained layer.
            draw(num_experts, rows, hidden_size, deviation=hidden_size**-0.5),
            draw(num_experts, hidden_size, width, deviation=width**-0.5),
            activation,
            draw(num_experts, rows, deviation=0.2) if has_bias else None,
            draw(num_experts, hidden_size, deviation=0.2) if has_bias else None,
        )
        if format is not None:
            experts = quantize_experts(experts, format)
        if is_static:
            scale, scale_mid = torch.tensor([[0.012], [0.03]], device=device)
            experts = replace(experts, w13_input_scale=scale, w2_input_scale=scale_mid)
        return experts

    return make


@pytest.fixture(scope="session")
def make_layer_inputs(kernel_device, draw_ids) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Hidden states, weights and ids of a case, of `num_global` experts if it has some of them."""

    def make(
        case: tuple,
        pattern: str = "any",
        *,
        num_global: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_experts, num_choices, *_, hidden_size, _ = case
        generator = torch.Generator().manual_seed(2)
        x_TD = torch.randn(num_tokens, hidden_size, generator=generator).to(kernel_device, dtype)
        weights_TA = torch.rand(num_tokens, num_choices, generator=generator)
        ids_TA = draw_ids(num_tokens, num_global or num_experts, num_choices, pattern, 3)
        # The weight of a dropped choice is never looked at.
        weights_TA[ids_TA < 0] = torch.nan
        return x_TD, weights_TA.to(kernel_device), ids_TA.to(kernel_device)

    return make


@pytest.fixture(scope="session")
def assert_agrees(sqnr_db) -> Callable[[Tensor, Tensor, float], None]:
    """Compare a layer's output with the reference's: finite, its noise so many dB below."""

    def check(actual: Tensor, expected: Tensor, least_db: float) -> None:
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        assert actual.isfinite().all()
        if expected.any():
            assert sqnr_db(expected, actual) > least_db
        else:
            assert not actual.any()

    return check


@pytest.fixture(scope="session")
def assert_equals_reference(assert_same_bits) -> Callable[..., None]:
    """Run an op in Triton and in the reference, on the same device, and compare all bits."""

    def check(op: Callable[..., object], *args: object, **options: object) -> None:
        actual = op(*args, **options, backend="triton")
        expected = op(*args, **options, backend="reference")
        actual = actual if isinstance(actual, tuple) else (actual,)
        expected = expected if isinstance(expected, tuple) else (expected,)
        for a, e in zip(actual, expected, strict=True):
            assert isinstance(a, Tensor | QTensor)
            assert_same_bits(a, e)

    return check


@pytest.fixture(scope="session")
def assert_equal_but_for_exp() -> Callable[[Tensor | QTensor, Tensor | QTensor], None]:
    """Compare what an exp or an erf went into: Triton and torch each round these in their own way.

    For |x| up to 12 they agree to 1e-6, most of it from rounding ``x * log2(e)``, and so do exact
    scales. Power-of-two scales are the same: no magnitude in these tests is so close to a boundary.
    A byte is another one, next to it, only where a value lies as close to a tie: two in 100000 do,
    since ties lie an eighth apart, and some more where the terms of a gradient cancel. 0.1 %, and
    one in a small tensor, leaves room. Gradients not quantised are compared with the tensor's
    largest, since they may cancel.
    """

    def check(actual: Tensor | QTensor, expected: Tensor | QTensor) -> None:
        if isinstance(expected, Tensor):
            assert isinstance(actual, Tensor)
            assert (actual.dtype, actual.stride()) == (expected.dtype, expected.stride())
            largest = expected.float().abs().amax().item() if expected.numel() else 0.0
            step = torch.finfo(expected.dtype).eps if expected.dtype != torch.float32 else 0.0
            torch.testing.assert_close(actual, expected, rtol=step, atol=1e-6 * largest)
            return
        assert isinstance(actual, QTensor)
        assert (actual.format, actual.layout) == (expected.format, expected.layout)
        scale, expected_scale = actual.scale.float(), expected.scale.float()
        is_exact = expected.format.rounding == "exact"
        tolerance = 1e-6 if is_exact else 0.0
        torch.testing.assert_close(scale, expected_scale, rtol=tolerance, atol=0, equal_nan=True)
        is_nan = expected.data.float().isnan()
        assert torch.equal(actual.data.float().isnan(), is_nan)
        steps = (_order(actual.data) - _order(expected.data)).abs()[~is_nan]
        assert steps.numel() == 0 or steps.max() <= 1
        assert steps.count_nonzero() <= 1 + 1e-3 * steps.numel()

    return check


def _order(data: Tensor) -> Tensor:
    """Bytes of 8-bit floats as integers that are ordered like the numbers; both zeros are 0."""
    code = data.view(torch.uint8).int()
    return torch.where(code < 0x80, code, 0x80 - code)
