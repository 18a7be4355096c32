"""Kernels run on the GPU if there is one, else in Triton's interpreter on the CPU."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from octomoe.core.qtensor import QTensor


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True, scope="session")
def _true_casts() -> Iterator[None]:
    """Round as the hardware does.

    Triton's interpreter (3.6 to 3.9) loses the carry when rounding to an 8-bit float moves a number
    into the next binade (124.2 becomes 64, not 128), and cuts float32 to bf16 instead of rounding.
    `test_the_interpreter_still_needs_this` says when it no longer does.
    """
    if torch.cuda.is_available():
        yield
        return
    from triton.runtime import interpreter

    plain = interpreter._convert_float
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_convert_float", _rounding(plain))
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
