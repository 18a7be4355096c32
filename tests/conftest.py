"""What every test stands on: seeds, poisoned memory, tolerances, and naive ways to compute.

Nothing here calls an op of the library. The naive quantiser and the naive routing are written
from the format's definition alone, so that agreement with them says something.
"""

import hashlib
import math
import os
import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product

import hypothesis
import numpy
import pytest
import torch
from torch import Tensor

from octomoe.core.activations import Activation
from octomoe.core.formats import ALL, Element, Format
from octomoe.core.qtensor import QTensor

if not torch.cuda.is_available():
    # Kernels run in Triton's interpreter. It is asked for when a kernel's file is imported.
    os.environ["TRITON_INTERPRET"] = "1"

ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="run the wide case lists too")


def pytest_configure(config: pytest.Config) -> None:
    for line in (
        "full: a case that runs with --full only",
        "plain_memory: fresh memory is left as the allocator gives it",
    ):
        config.addinivalue_line("markers", line)
    # Tensors are small here, and tests may run side by side: a second thread costs more than it
    # gives (the ops' tests took 101 s with two threads on two busy cores, 45 s with one).
    torch.set_num_threads(1)
    # torch notes which functions a device context changes when it first meets one; that must not
    # be the patched ones of `_poisoned_memory`.
    with torch.device("meta"):
        torch.empty(0)
    # derandomize: like every other seed here, hypothesis' comes from the test's name.
    hypothesis.settings.register_profile(
        "octomoe",
        deadline=None,
        derandomize=True,
        max_examples=500 if config.getoption("--full") else 40,
    )
    hypothesis.settings.load_profile("octomoe")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--full"):
        narrow = [item for item in items if item.get_closest_marker("full") is None]
        if len(narrow) < len(items):
            config.hook.pytest_deselected(items=[i for i in items if i.get_closest_marker("full")])
        items[:] = narrow
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu") is not None:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _seed_from_name(request: pytest.FixtureRequest) -> None:
    seed = int.from_bytes(hashlib.sha256(request.node.nodeid.encode()).digest()[:4], "little")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@pytest.fixture(autouse=True)
def _poisoned_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """An output element that nobody wrote shows as NaN, or as a huge odd integer."""
    with pytest.MonkeyPatch.context() as patch:
        if request.node.get_closest_marker("plain_memory") is None:
            for owner, name in ALLOCATORS:
                patch.setattr(owner, name, _poisoning(getattr(owner, name)))
        yield


@pytest.fixture(
    scope="session",
    params=["cpu", *([pytest.param("cuda", marks=pytest.mark.gpu)] * torch.cuda.is_available())],
)
def device(request: pytest.FixtureRequest) -> torch.device:
    """Every device of this machine that the library runs on."""
    return torch.device(request.param)


@pytest.fixture(scope="session")
def sqnr_db() -> Callable[[Tensor, Tensor], float]:
    """Signal to quantisation noise over a whole tensor, in dB, computed in float64."""

    def measure(reference: Tensor, actual: Tensor) -> float:
        signal, result = reference.double(), actual.double().to(reference.device)
        noise_power = (result - signal).square().sum().item()
        signal_power = signal.square().sum().item()
        if noise_power == 0.0:
            return math.inf
        return 10 * math.log10(signal_power / noise_power) if signal_power else -math.inf

    return measure


@pytest.fixture(scope="session")
def assert_gemm_close() -> Callable[[Tensor, Tensor, int], None]:
    """Compare a GEMM over a depth of K with its float64 result.

    Each of K partial sums is rounded to float32, an error of 2^-24 of its size at most. Roundings
    are independent, so they add up like a random walk: to sqrt(K) * 2^-24 of a typical output, and
    not to K times it. The largest of a million such errors is about five times the typical one; 8
    leaves room for the order of the sum. One more rounding brings the sum to the output's dtype.
    """

    def check(actual: Tensor, expected: Tensor, depth: int) -> None:
        assert expected.dtype == torch.float64
        assert actual.shape == expected.shape
        if expected.numel() == 0:
            return
        typical = expected.square().mean().sqrt().item()
        torch.testing.assert_close(
            actual.double().to(expected.device),
            expected,
            rtol=torch.finfo(actual.dtype).eps,
            atol=8 * math.sqrt(max(depth, 1)) * 2.0**-24 * typical,
        )

    return check


@pytest.fixture(scope="session")
def assert_same_bits() -> Callable[[Tensor | QTensor, Tensor | QTensor], None]:
    """Compare bytes, shape and strides; NaN equals NaN, and 0 is not -0."""

    def check(actual: Tensor | QTensor, expected: Tensor | QTensor) -> None:
        if isinstance(expected, QTensor):
            assert isinstance(actual, QTensor)
            assert (actual.format, actual.layout) == (expected.format, expected.layout)
            check(actual.data, expected.data)
            check(actual.scale, expected.scale)
            return
        assert isinstance(actual, Tensor)
        assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
        if expected.numel():
            assert _steps(actual) == _steps(expected)
            assert torch.equal(_bytes(actual), _bytes(expected))

    return check


@pytest.fixture(scope="session")
def draw_ids() -> Callable[[int, int, int, str, int], Tensor]:
    """``topk_ids [T, A]`` int64 of a pattern.

    Patterns: ``any`` distinct per token; ``one`` all tokens to the last expert; ``hole`` expert 0
    is empty; ``dropped`` a third is -1; ``none`` all are; ``twice`` a token may repeat an expert.
    """

    def draw(
        tokens: int, experts: int, choices: int, pattern: str = "any", seed: int = 0
    ) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        match pattern:
            case "one":
                return torch.full((tokens, choices), experts - 1)
            case "none":
                return torch.full((tokens, choices), -1)
            case "twice":
                return torch.randint(experts, (tokens, choices), generator=generator)
        scores_TE = torch.rand(tokens, experts, generator=generator)
        if pattern == "hole":
            scores_TE[:, 0] = -1.0
        ids_TA = scores_TE.argsort(dim=1, descending=True)[:, :choices]
        if pattern == "dropped":
            ids_TA[torch.rand(tokens, choices, generator=generator) < 1 / 3] = -1
        return ids_TA

    return draw


@pytest.fixture(scope="session")
def naive_quantize() -> Callable[..., QTensor]:
    """Quantise finite numbers block by block, by the definition of the format. Runs on the CPU."""

    def quantize(x: Tensor, format: Format, scale: float | None = None) -> QTensor:
        x = x.cpu().float()
        code = torch.zeros(x.shape, dtype=torch.uint8)
        scale_shape, block = format.scale_shape(tuple(x.shape)), format.block[-x.dim() :]
        scales = torch.zeros(scale_shape)
        for index in product(*map(range, scale_shape)):
            where = tuple(
                slice(None) if b == ALL else slice(i * b, (i + 1) * b)
                for i, b in zip(index, block, strict=True)
            )
            amax = x[where].abs().max().item() if x[where].numel() else 0.0
            scales[index] = _naive_scale(amax, format) if scale is None else scale
            code[where] = _naive_encode(x[where] * (1.0 / scales[index]), format)
        if format.scale_dtype == torch.float8_e8m0fnu:
            exponents = scales.double().log2().round() + 127
            scales = exponents.to(torch.uint8).view(torch.float8_e8m0fnu)
        return QTensor(code.view(format.element.dtype), scales, format)

    return quantize


@pytest.fixture(scope="session")
def naive_values() -> Callable[[Tensor | QTensor], Tensor]:
    """The numbers of a tensor or COMPACT QTensor in float64, from bits; on the CPU."""

    def values(q: Tensor | QTensor) -> Tensor:
        if isinstance(q, Tensor):
            return q.double().cpu()
        decoded = torch.tensor([_decode(code, q.format.element.dtype) for code in range(256)])
        result = decoded.double()[_bytes(q.data).cpu().long()]
        scale = q.scale.cpu()
        if scale.dtype == torch.float8_e8m0fnu:
            scale = torch.exp2(_bytes(scale).double() - 127)
        block = q.format.block[-q.data.dim() :]
        for index in product(*map(range, scale.shape)):
            where = tuple(
                slice(None) if b == ALL else slice(i * b, (i + 1) * b)
                for i, b in zip(index, block, strict=True)
            )
            result[where] *= scale[index].double()
        return result

    return values


@pytest.fixture(scope="session")
def naive_activation() -> Callable[[Tensor, Activation], Tensor]:
    """Textbook formulas of the activations, in float64."""

    def nonlinear(x: Tensor, activation: Activation) -> Tensor:
        match str(activation.kind):
            case "silu":
                return x / (1 + torch.exp(-activation.alpha * x))
            case "gelu":
                return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))
            case "gelu_tanh":
                return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
            case "relu2":
                return torch.where(x > 0, x * x, 0.0)
        raise AssertionError(activation.kind)

    def apply(h: Tensor, activation: Activation) -> Tensor:
        h = h.double()
        if not activation.gated:
            return nonlinear(h, activation)
        width, limit = h.shape[-1] // 2, activation.limit or math.inf
        gate, up = h[..., :width], h[..., width:].clamp(-limit, limit)
        if activation.limit_on == "input":
            return nonlinear(gate.clamp(max=limit), activation) * (up + activation.up_offset)
        return nonlinear(gate, activation).clamp(max=limit) * (up + activation.up_offset)

    return apply


def _naive_scale(amax: float, format: Format) -> float:
    """Smallest scale of the format's kind that brings `amax` to at most the target."""
    if format.rounding == "exact":
        quotient = torch.tensor(amax / format.target_max, dtype=torch.float64).float().item()
        return max(quotient, 2.0**-126)
    mantissa, exponent = math.frexp(amax)
    target_mantissa, target_exponent = math.frexp(format.target_max)
    power = exponent - target_exponent + (mantissa > target_mantissa) if amax else -999
    return 2.0 ** max(power, -127 if format.scale_dtype == torch.float8_e8m0fnu else -126)


def _decode(code: int, dtype: torch.dtype) -> float:
    mantissa_bits, bias = (2, 15) if dtype == torch.float8_e5m2 else (3, 7)
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> mantissa_bits, code & ((1 << mantissa_bits) - 1)
    if dtype == torch.float8_e5m2 and exponent == 31:
        return sign * math.inf if mantissa == 0 else math.nan
    if dtype == torch.float8_e4m3fn and code & 0x7F == 0x7F:
        return math.nan
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa / (1 << mantissa_bits)) * 2.0 ** (exponent - bias)


@cache
def _magnitudes(element: Element) -> Tensor:
    """What the bytes from 0 up to that of the largest storable number mean, ascending."""
    decoded = [_decode(code, element.dtype) for code in range(128)]
    return torch.tensor([d for d in decoded if d <= element.max], dtype=torch.float64)


def _naive_encode(x: Tensor, format: Format) -> Tensor:
    """Bytes of the nearest representable numbers; of two equally near, the even byte."""
    grid = _magnitudes(format.element)
    size = x.double().abs().clamp(max=format.element.max)
    above = torch.searchsorted(grid, size).clamp(1, len(grid) - 1)
    to_below, to_above = size - grid[above - 1], grid[above] - size
    goes_down = (to_below < to_above) | ((to_below == to_above) & (above % 2 == 1))
    return (above - goes_down.long() + 0x80 * torch.signbit(x)).to(torch.uint8)


def _steps(x: Tensor) -> list[int]:
    """Strides of the axes along which there is a step to take."""
    return [stride for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]


def _bytes(x: Tensor) -> Tensor:
    if x.is_floating_point() and x.itemsize > 1:
        # A NaN may have any payload: a CPU and a GPU make different ones.
        x = torch.where(x.isnan(), torch.nan, x)
    # A copy, since an axis of one element may have any stride and still be contiguous.
    return torch.zeros_like(x, memory_format=torch.contiguous_format).copy_(x).view(torch.uint8)


def _poisoning(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    def fresh(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        is_plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.layout == torch.strided
        # Traced, fake and meta memory holds nothing.
        if not is_plain or tensor.is_meta or torch.compiler.is_compiling():
            return tensor
        with torch.no_grad():
            if tensor.dtype == torch.bool or tensor.is_quantized:
                return tensor
            if tensor.is_floating_point() and tensor.itemsize == 1:
                # NaN in every 8-bit float.
                tensor.view(torch.uint8).fill_(0xFF)
            elif tensor.is_floating_point() or tensor.is_complex():
                tensor.fill_(math.nan)
            else:
                tensor.fill_(torch.iinfo(tensor.dtype).max - 2)
        return tensor

    return fresh
