"""Rows that tensor cores take in pieces, for few rows: bf16 in halves, MXFP8 in blocks.

Weight rows fill the tensor core's tile; the other side has room to spare. What a row needs more
than 8 bits, or more than one scale, for becomes rows of its own there:

- bf16: its 8 significant bits are two numbers of E4M3, which has 4, under a power of two of each
  128. Of what is less than 2^-13 of the largest, bits below 2^-20 of it are lost.
- MXFP8: each 32 of a step lie alone in a row of zeros, so that a product is that of one block.
"""

from octomoe.kernels.expert_tiles import STEP
from octomoe.kernels.gluon_shim import gl, gluon
from octomoe.kernels.scaling import _encode_own, _magnitude_bits, _scale_of_amax

WIDTH = gl.constexpr(STEP)
BLOCK = gl.constexpr(32)
BLOCKS = gl.constexpr(STEP // 32)
# Of the trailing half.
TRAILING = gl.constexpr(2.0**-4)


@gluon.jit
def _encode_halves(value):
    """Leading and trailing halves of bf16 ``[rows, 128]``, one above the other, and scales.

    Of a row that is not finite the scale is NaN.
    """
    amax = gl.max(_magnitude_bits(value), axis=1)
    # The largest becomes less than 2^8. 2^-126 at least: its inverse is a number.
    exponent = gl.maximum((amax >> 23) - 7, 1)
    inverse = ((254 - exponent) << 23).to(gl.float32, bitcast=True)
    bits = gl.where(amax >= 0x7F800000, 0x7FC00000, exponent << 23)
    scaled = value.to(gl.float32) * inverse[:, None]
    scaled = gl.where((amax >= 0x7F800000)[:, None], 0.0, scaled)
    leading = scaled.to(gl.float8e4nv)
    trailing = ((scaled - leading.to(gl.float32)) * 16.0).to(gl.float8e4nv)
    ROWS: gl.constexpr = value.shape[0]
    both = gl.join(leading, trailing).permute((2, 0, 1)).reshape([2 * ROWS, WIDTH])
    return both, bits.to(gl.float32, bitcast=True)


@gluon.jit
def _whole(product, ROWS: gl.constexpr):
    """``[weight rows, ROWS]``, of the products with halves."""
    both = product.reshape([product.shape[0], 2, ROWS]).permute((0, 2, 1))
    leading, trailing = both.split()
    return leading + trailing * TRAILING


@gluon.jit
def _encode_blocks(value, ENCODING: gl.constexpr):
    """``[4 * rows, 128]``, in whose row ``b * rows + r`` are block b of row r and zeros; scales."""
    ROWS: gl.constexpr = value.shape[0]
    cut = value.reshape([ROWS, BLOCKS, BLOCK])
    scale = _scale_of_amax(gl.max(_magnitude_bits(cut), axis=2), ENCODING)
    encoded = _encode_own(cut, gl.expand_dims(scale, 2), ENCODING)
    bits = encoded.to(gl.uint8, bitcast=True).reshape([ROWS, WIDTH])
    layout: gl.constexpr = gl.BlockedLayout([1, 1, 8], [1, 2, 16], [1, 4, 1], [2, 1, 0])
    bits = gl.convert_layout(bits, gl.SliceLayout(0, layout))
    block = gl.arange(0, BLOCKS, layout=gl.SliceLayout(1, gl.SliceLayout(2, layout)))
    column = gl.arange(0, WIDTH, layout=gl.SliceLayout(0, gl.SliceLayout(1, layout)))
    is_own = gl.expand_dims(gl.expand_dims(block, 1), 2) == gl.expand_dims(
        gl.expand_dims(column // BLOCK, 0), 1
    )
    spread = gl.where(is_own, gl.expand_dims(bits, 0), gl.full((1, 1, 1), 0, gl.uint8, layout))
    spread = spread.reshape([BLOCKS * ROWS, WIDTH]).to(encoded.dtype, bitcast=True)
    return spread, scale.permute((1, 0)).reshape([BLOCKS * ROWS])


@gluon.jit
def _sum_of_blocks(product, ROWS: gl.constexpr):
    """``[weight rows, ROWS]``, of the products with blocks."""
    return gl.sum(product.reshape([product.shape[0], BLOCKS, ROWS]), axis=1)


@gluon.jit
def _scaled_sum(product, scale, words, ROWS: gl.constexpr):
    """The same, each product times both scales.

    A weight scale of 2^-127, that of zeros, counts as zero.

    Args:
        product: ``[weight rows, 4 * ROWS]``.
        scale: of its columns.
        words: for each weight row, the bytes of its blocks' scales.
    """
    column = gl.arange(0, BLOCKS * ROWS, layout=gl.SliceLayout(0, product.type.layout))
    block = (column // ROWS)[None, :]
    # The byte of the block, where the exponent of a float32 is.
    words = words[:, None]
    bits = gl.where(block < 3, words << gl.maximum(23 - 8 * block, 0), words >> 1) & 0x7F800000
    product = product * (bits.to(gl.float32, bitcast=True) * scale[None, :])
    total = _sum_of_blocks(product, ROWS)
    # Bytes of 255 are NaN.
    is_nan = ((words & 0x7F7F7F7F) + 0x01010101) & words & -0x7F7F7F80 != 0
    nan = gl.where(is_nan, float("nan"), 0.0).to(gl.float32)
    return total + gl.convert_layout(nan, total.type.layout)
