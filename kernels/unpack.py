"""One packed word and its two scale bytes to eight scaled 16-bit values, inside a Triton kernel.

Both forms return the same bits: PTX for the GPU, plain Triton for its interpreter, which has no inline assembly.

What a value carries: E4M3 ``code * scale * 2**-7``, E8M0 ``code * scale``; the kernel's epilogue multiplies by
`UNPACK_GAIN`. Every product is exact: at most 6 significant bits, and the offset keeps the scale in range, subnormals
included. A register holds a pair of codes as ``value * 2**-126`` in bfloat16 or ``value * 2**-14`` in float16 (see
layout.py); a scale byte becomes ``scale * 2**119`` or ``scale * 2**7`` for E4M3. E8M0 first undoes the codes' offset,
since ``2**126 * scale`` would overflow. bfloat16 products are written as fma with -0: SM80 has no bf16x2 multiply.
"""

import triton
import triton.language as tl

UNPACK_GAIN = {"e4m3": 2.0**7, "e8m0": 1.0}

_BF16_CODES = """
    and.b32 r0, $8, 0x81C081C0;
    shl.b32 t, $8, 3;   and.b32 r1, t, 0x81C081C0;
    shl.b32 t, $8, 6;   and.b32 r2, t, 0x81C081C0;
    shl.b32 t, $8, 1;   and.b32 r3, t, 0x80008000;
    shr.b32 t, $8, 3;   and.b32 t, t, 0x01800180;   or.b32 r3, r3, t;
    shr.b32 t, $8, 7;   and.b32 t, t, 0x00400040;   or.b32 r3, r3, t;
"""
# float16 wants the magnitude three bits higher than bfloat16
_FP16_CODES = """
    and.b32 r0, $8, 0x80008000;
    shl.b32 t, $8, 3;   and.b32 u, t, 0x0E000E00;   or.b32 r0, r0, u;   and.b32 r1, t, 0x80008000;
    shl.b32 t, $8, 6;   and.b32 u, t, 0x0E000E00;   or.b32 r1, r1, u;   and.b32 r2, t, 0x80008000;
    shl.b32 t, $8, 9;   and.b32 u, t, 0x0E000E00;   or.b32 r2, r2, u;
    shl.b32 t, $8, 1;   and.b32 r3, t, 0x80008000;
    and.b32 u, $8, 0x0C000C00;                      or.b32 r3, r3, u;
    shr.b32 t, $8, 4;   and.b32 u, t, 0x02000200;   or.b32 r3, r3, u;
"""
# both scale bytes at once, one in each half: sign to bit 15, the rest under the exponent, then a power of two
_SPREAD = "prmt.b32 s, $9, 0, 0x4140;\n"
_BF16_E4M3 = (
    _SPREAD
    + """
    and.b32 t, s, 0x00800080;   shl.b32 t, t, 8;
    and.b32 u, s, 0x007F007F;   shl.b32 u, u, 4;   or.b32 s, t, u;
    mov.b32 t, 0x7B007B00;      fma.rn.bf16x2 s, s, t, z;
    mov.b32 u, 0x7B807B80;      fma.rn.bf16x2 s, s, u, z;
    prmt.b32 s0, s, s, 0x1010;
    prmt.b32 s1, s, s, 0x3232;
"""
)
_FP16_E4M3 = (
    _SPREAD
    + """
    and.b32 t, s, 0x00800080;   shl.b32 t, t, 8;
    and.b32 u, s, 0x007F007F;   shl.b32 u, u, 7;   or.b32 s, t, u;
    mov.b32 t, 0x78007800;      mul.rn.f16x2 s, s, t;
    prmt.b32 s0, s, s, 0x1010;
    prmt.b32 s1, s, s, 0x3232;
"""
)
_BF16_E8M0 = (
    _SPREAD
    + """
    shl.b32 s, s, 7;
    mov.b32 t, 0x00400040;      max.bf16x2 s, s, t;
    prmt.b32 s0, s, s, 0x1010;
    prmt.b32 s1, s, s, 0x3232;
    mov.b32 u, 0x7E807E80;
    fma.rn.bf16x2 r0, r0, u, z;
    fma.rn.bf16x2 r1, r1, u, z;
    fma.rn.bf16x2 r2, r2, u, z;
    fma.rn.bf16x2 r3, r3, u, z;
"""
)
# float16 holds 2**-23 .. 2**13 times a code; anything else would be rounded or clipped and becomes NaN instead
_FP16_E8M0 = """
    and.b32 t, $9, 0xFF;            bfe.u32 u, $9, 8, 8;
    sub.u32 s0, t, 104;             sub.u32 s1, u, 104;
    setp.gt.u32 p, s0, 36;          setp.gt.u32 q, s1, 36;
    shl.b32 t, t, 23;               shl.b32 u, u, 23;
    selp.b32 t, 0x7FC00000, t, p;   selp.b32 u, 0x7FC00000, u, q;
    mov.b32 f, t;                   mov.b32 g, u;
    cvt.rn.f16x2.f32 s0, f, f;      cvt.rn.f16x2.f32 s1, g, g;
    mov.b32 u, 0x74007400;
    mul.rn.f16x2 r0, r0, u;
    mul.rn.f16x2 r1, r1, u;
    mul.rn.f16x2 r2, r2, u;
    mul.rn.f16x2 r3, r3, u;
"""
_BF16_SCALE = """
    fma.rn.bf16x2 r0, r0, s0, z;
    fma.rn.bf16x2 r1, r1, s1, z;
    fma.rn.bf16x2 r2, r2, s0, z;
    fma.rn.bf16x2 r3, r3, s1, z;
"""
_FP16_SCALE = """
    mul.rn.f16x2 r0, r0, s0;
    mul.rn.f16x2 r1, r1, s1;
    mul.rn.f16x2 r2, r2, s0;
    mul.rn.f16x2 r3, r3, s1;
"""


def _program(codes: str, scales: str, product: str) -> tl.constexpr:
    return tl.constexpr(
        "{\n    .reg .b32 r0, r1, r2, r3, s, s0, s1, t, u, z;\n    .reg .f32 f, g;\n    .reg .pred p, q;\n"
        "    mov.b32 z, 0x80008000;\n" + codes + scales + product + "    mov.b32 {$0, $1}, r0;\n"
        "    mov.b32 {$2, $3}, r1;\n    mov.b32 {$4, $5}, r2;\n    mov.b32 {$6, $7}, r3;\n}"
    )


_BF16_E4M3_PTX = _program(_BF16_CODES, _BF16_E4M3, _BF16_SCALE)
_BF16_E8M0_PTX = _program(_BF16_CODES, _BF16_E8M0, _BF16_SCALE)
_FP16_E4M3_PTX = _program(_FP16_CODES, _FP16_E4M3, _FP16_SCALE)
_FP16_E8M0_PTX = _program(_FP16_CODES, _FP16_E8M0, _FP16_SCALE)


_OUT = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")


@triton.jit
def _ptx_bf16(words, scales, PROGRAM: tl.constexpr):
    return tl.inline_asm_elementwise(PROGRAM, _OUT, [words, scales], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1)


@triton.jit
def _ptx_fp16(words, scales, PROGRAM: tl.constexpr):
    return tl.inline_asm_elementwise(PROGRAM, _OUT, [words, scales], dtype=(tl.float16,) * 8, is_pure=True, pack=1)


@triton.jit
def _halves(register, scale, kind: tl.constexpr, dtype: tl.constexpr):
    low = (register & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = ((register >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    if kind == "e8m0":
        low = low * (2.0**14 if dtype == tl.float16 else 2.0**126)
        high = high * (2.0**14 if dtype == tl.float16 else 2.0**126)
    return (low * scale).to(dtype), (high * scale).to(dtype)


@triton.jit
def _scale(byte, kind: tl.constexpr, dtype: tl.constexpr):
    if kind == "e4m3":
        bits = ((byte & 0x80) << 24) | ((byte & 0x7F) << 20)
        value = bits.to(tl.float32, bitcast=True) * 2.0**120 * (2.0**7 if dtype == tl.float16 else 2.0**119)
    else:
        value = tl.maximum(byte << 23, 1 << 22).to(tl.float32, bitcast=True)
        if dtype == tl.float16:
            value = tl.where((byte < 104) | (byte > 140), float("nan"), value)
    return value.to(dtype)


@triton.jit
def _plain(words, scales, kind: tl.constexpr, dtype: tl.constexpr):
    r0 = words & -0x7E3F7E40
    r1 = (words << 3) & -0x7E3F7E40
    r2 = (words << 6) & -0x7E3F7E40
    r3 = ((words << 1) & -0x7FFF8000) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
    if dtype == tl.float16:
        r0 = (r0 & -0x7FFF8000) | ((r0 << 3) & 0x0E000E00)
        r1 = (r1 & -0x7FFF8000) | ((r1 << 3) & 0x0E000E00)
        r2 = (r2 & -0x7FFF8000) | ((r2 << 3) & 0x0E000E00)
        r3 = (r3 & -0x7FFF8000) | ((r3 << 3) & 0x0E000E00)
    s0 = _scale(scales & 0xFF, kind, dtype)
    s1 = _scale((scales >> 8) & 0xFF, kind, dtype)
    a0, a1 = _halves(r0, s0, kind, dtype)
    a2, a3 = _halves(r1, s1, kind, dtype)
    a4, a5 = _halves(r2, s0, kind, dtype)
    a6, a7 = _halves(r3, s1, kind, dtype)
    return a0, a1, a2, a3, a4, a5, a6, a7


@triton.jit
def unpack_words(words, scales, kind: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr):
    """Eight scaled values a word, as ``words.shape + [2 p, 2 r, 2 h]`` (see layout.py).

    ``scales`` has the shape of ``words``: int32 with the bytes of rows r = 0 and 1 in its low half.
    """
    if not PTX:
        a0, a1, a2, a3, a4, a5, a6, a7 = _plain(words, scales, kind, dtype)
    elif dtype == tl.float16:
        if kind == "e4m3":
            a0, a1, a2, a3, a4, a5, a6, a7 = _ptx_fp16(words, scales, _FP16_E4M3_PTX)
        else:
            a0, a1, a2, a3, a4, a5, a6, a7 = _ptx_fp16(words, scales, _FP16_E8M0_PTX)
    else:
        if kind == "e4m3":
            a0, a1, a2, a3, a4, a5, a6, a7 = _ptx_bf16(words, scales, _BF16_E4M3_PTX)
        else:
            a0, a1, a2, a3, a4, a5, a6, a7 = _ptx_bf16(words, scales, _BF16_E8M0_PTX)
    low = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    high = tl.join(tl.join(a4, a5), tl.join(a6, a7))
    return tl.join(low, high)
