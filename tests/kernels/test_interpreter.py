"""What the other tests ask of Triton's interpreter: casts as torch and the hardware do them."""

import pytest
import torch
import triton
import triton.language as tl

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU")

# A carry into the next binade; a number that lies above the middle of two bf16.
NEEDS = {torch.float8_e4m3fn: 124.2, torch.float8_e5m2: 31.0, torch.bfloat16: 1.0059}


@triton.jit
def _cast_kernel(x_ptr, y_ptr, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(y_ptr + index, tl.load(x_ptr + index).to(y_ptr.dtype.element_ty))


def cast(x, dtype):
    y = torch.empty(x.shape, dtype=dtype)
    _cast_kernel[(1,)](x, y, SIZE=x.numel())
    return y


@pytest.mark.parametrize("dtype", NEEDS, ids=str)
def test_casts_as_torch_does(dtype, assert_same_bits):
    x = torch.randn(4096) * torch.exp2(torch.randint(-20, 16, (4096,)).float())
    x = x.clamp(-448.0, 448.0)
    assert_same_bits(cast(x, dtype), x.to(dtype))


@pytest.mark.parametrize(("dtype", "value"), NEEDS.items(), ids=map(str, NEEDS))
def test_the_interpreter_still_needs_this(dtype, value, monkeypatch, interpreter_cast):
    # Failing is good news: then `_true_casts` need no longer correct this cast.
    monkeypatch.setattr("triton.runtime.interpreter._convert_float", interpreter_cast)
    x = torch.tensor([value])
    assert cast(x, dtype).float() != x.to(dtype).float()


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, SIZE: tl.constexpr):
    row, column = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    offset = row * SIZE + column
    tl.store(c_ptr + offset, tl.dot(tl.load(a_ptr + offset), tl.load(b_ptr + offset)))


def product(a, b):
    c = torch.empty(a.shape)
    _dot_kernel[(1,)](a, b, c, SIZE=a.shape[0])
    return c


@pytest.mark.parametrize("dtype", [*NEEDS, torch.float16, torch.float32], ids=str)
def test_multiplies_as_torch_does(dtype):
    a, b = torch.randn(2, 16, 16).to(dtype)
    torch.testing.assert_close(product(a, b), a.float() @ b.float())


def test_the_interpreter_still_needs_its_products_corrected(monkeypatch, interpreter_dot):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_dot", interpreter_dot)
    one = torch.eye(16, dtype=torch.bfloat16)
    assert not torch.equal(product(one, one), torch.eye(16))
