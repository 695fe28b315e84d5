"""relu(x * scale + shift) of a convolution's first operand, as it is loaded, in fp16: two elements an instruction.

    relu((x - pivot) * scale + bias),    pivot = -shift / scale,  bias = shift + pivot * scale

In fp16, x * scale + shift would lose as many digits as |mean| is larger than sigma. The pivot is where the line crosses
zero: near it the difference is exact (Sterbenz), away from it everything has one rounding of fp16, and the bias, in
fp32 the little that the rounded pivot leaves, is small. The pivot is limited, for scales near zero; then the bias is of
the size of the shift, as it should be.

On compute capability 9.0 and later only: the instructions are older, but the pointer loads of older GPUs need a mask,
and their results are to stay as they are.
"""

from kernels.jit import INTERPRETED, tl, triton

_INTERPRETED = tl.constexpr(INTERPRETED)


@triton.jit
def halves(scale, shift):
    """(pivot, scale, bias) in fp16 of fp32 [C] scale and shift; |scale| must be below 65504. NaNs are passed on."""
    pivot = tl.minimum(tl.maximum(-shift / scale, -16384.0), 16384.0).to(tl.float16)  # of 0 / 0 too: max drops a NaN
    return pivot, scale.to(tl.float16), (shift + pivot.to(tl.float32) * scale).to(tl.float16)


@triton.jit
def relu_affine(x, pivot, scale, bias, NAN_IS_ZERO: tl.constexpr):
    """relu((x - pivot) * scale + bias), all fp16 [BLOCK, BLOCK]; a NaN becomes 0 if NAN_IS_ZERO, else it stays."""
    if _INTERPRETED:  # which knows no PTX: the same roundings
        z = (x - pivot).to(tl.float32) * scale.to(tl.float32) + bias.to(tl.float32)
        if NAN_IS_ZERO:
            return tl.where(z > 0.0, z, 0.0).to(tl.float16)
        return tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float16)
    if NAN_IS_ZERO:  # of max's operands the number, which fma's own relu would not choose
        PTX: tl.constexpr = """{
            .reg .b32 z, zero;
            mov.b32 zero, 0;
            sub.rn.f16x2 z, $1, $2;
            fma.rn.f16x2 z, z, $3, $4;
            max.f16x2 $0, z, zero;
        }"""
    else:
        PTX: tl.constexpr = """{
            .reg .b32 z;
            sub.rn.f16x2 z, $1, $2;
            fma.rn.relu.f16x2 $0, z, $3, $4;
        }"""
    return tl.inline_asm_elementwise(PTX, "=r,r,r,r,r", [x, pivot, scale, bias], dtype=tl.float16, is_pure=True, pack=2)
