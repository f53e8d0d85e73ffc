"""Packed words and scale words to scaled 16-bit values, inside a Triton kernel.

Every step has two forms that return the same bits: PTX for the GPU, plain Triton for its interpreter, which has no
inline assembly. The Gluon kernels (fragments.py) use the first.

What a value carries: E4M3 ``code * scale * 2**-7``, E8M0 ``code * scale``; the kernel's epilogue multiplies by
`UNPACK_GAIN`. Every product is exact: at most 6 significant bits, and the offset keeps the scale in range, subnormals
included. A register holds a pair of codes as ``value * 2**-126`` in bfloat16 or ``value * 2**-14`` in float16 (see
layout.py); a scale byte becomes ``scale * 2**119`` or ``scale * 2**7`` for E4M3. E8M0 first undoes the codes' offset,
since ``2**126 * scale`` would overflow. bfloat16 products are written as fma with -0: SM80 has no bf16x2 multiply.

For bfloat16 the shifts and masks of a word, and the fma in the place of a multiply, are those of `HopperMXValueLayout`
in triton_kernels (layout.py names it).

A scale word holds two groups of two rows (layout.py). It becomes two registers, each the pair of rows of one group;
the halves are spread over a register of their own with moves, which ptxas turns into operand selectors for free.
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
    shl.b32 t, $8, 3;   shl.b32 u, $8, 6;   shl.b32 v, $8, 9;
    and.b32 r0, $8, 0x80008000;   and.b32 r3, t, 0x0E000E00;   or.b32 r0, r0, r3;
    and.b32 r1, t, 0x80008000;    and.b32 r3, u, 0x0E000E00;   or.b32 r1, r1, r3;
    and.b32 r2, u, 0x80008000;    and.b32 r3, v, 0x0E000E00;   or.b32 r2, r2, r3;
    shl.b32 t, $8, 1;             and.b32 r3, t, 0x80008000;
    and.b32 u, $8, 0x0C000C00;    or.b32 r3, r3, u;
    shr.b32 t, $8, 4;             and.b32 u, t, 0x02000200;    or.b32 r3, r3, u;
"""
_SPREAD = """
    mov.b32 {low, high}, $9;   mov.b32 s0, {low, low};   mov.b32 s1, {high, high};
"""
_BF16_UNDO = """
    mov.b32 u, 0x7E807E80;
    fma.rn.bf16x2 r0, r0, u, z;   fma.rn.bf16x2 r1, r1, u, z;
    fma.rn.bf16x2 r2, r2, u, z;   fma.rn.bf16x2 r3, r3, u, z;
"""
_FP16_UNDO = """
    mov.b32 u, 0x74007400;
    mul.rn.f16x2 r0, r0, u;   mul.rn.f16x2 r1, r1, u;   mul.rn.f16x2 r2, r2, u;   mul.rn.f16x2 r3, r3, u;
"""
_BF16_SCALE = """
    fma.rn.bf16x2 r0, r0, s0, z;   fma.rn.bf16x2 r1, r1, s1, z;
    fma.rn.bf16x2 r2, r2, s0, z;   fma.rn.bf16x2 r3, r3, s1, z;
"""
_FP16_SCALE = """
    mul.rn.f16x2 r0, r0, s0;   mul.rn.f16x2 r1, r1, s1;   mul.rn.f16x2 r2, r2, s0;   mul.rn.f16x2 r3, r3, s1;
"""


def _codes(*steps: str) -> str:
    return (
        "{\n    .reg .b32 r0, r1, r2, r3, s0, s1, t, u, v, z;\n    .reg .b16 low, high;\n    mov.b32 z, 0x80008000;\n"
        + "".join(steps)
        + "    mov.b32 {$0, $1}, r0;\n    mov.b32 {$2, $3}, r1;\n"
        + "    mov.b32 {$4, $5}, r2;\n    mov.b32 {$6, $7}, r3;\n}"
    )


CODES_PTX = {
    ("e4m3", "bf16"): _codes(_BF16_CODES, _SPREAD, _BF16_SCALE),
    ("e8m0", "bf16"): _codes(_BF16_CODES, _SPREAD, _BF16_UNDO, _BF16_SCALE),
    ("e4m3", "fp16"): _codes(_FP16_CODES, _SPREAD, _FP16_SCALE),
    ("e8m0", "fp16"): _codes(_FP16_CODES, _SPREAD, _FP16_UNDO, _FP16_SCALE),
}
CODES_OUT = tl.constexpr("=h,=h,=h,=h,=h,=h,=h,=h,r,r")

# The even group lies in bits 6..0 of each half word, the odd one in bits 14..8: both are put under the exponent.
_BF16_E4M3 = """{
    .reg .b32 t, u, z;
    mov.b32 z, 0x80008000;   mov.b32 t, 0x7B007B00;   mov.b32 u, 0x7B807B80;
    shl.b32 $0, $2, 4;   and.b32 $0, $0, 0x07F007F0;   fma.rn.bf16x2 $0, $0, t, z;   fma.rn.bf16x2 $0, $0, u, z;
    shr.b32 $1, $2, 4;   and.b32 $1, $1, 0x07F007F0;   fma.rn.bf16x2 $1, $1, t, z;   fma.rn.bf16x2 $1, $1, u, z;
}"""
_FP16_E4M3 = """{
    .reg .b32 t;
    mov.b32 t, 0x78007800;
    shl.b32 $0, $2, 7;   and.b32 $0, $0, 0x3F803F80;   mul.rn.f16x2 $0, $0, t;
    shr.b32 $1, $2, 1;   and.b32 $1, $1, 0x3F803F80;   mul.rn.f16x2 $1, $1, t;
}"""
_BF16_E8M0 = """{
    .reg .b32 t;
    mov.b32 t, 0x00400040;
    shl.b32 $0, $2, 7;   and.b32 $0, $0, 0x7F807F80;   max.bf16x2 $0, $0, t;
    shr.b32 $1, $2, 1;   and.b32 $1, $1, 0x7F807F80;   max.bf16x2 $1, $1, t;
}"""
# float16 holds 2**-23 .. 2**13 times a code; anything else would be rounded or clipped and becomes NaN instead. Byte 0
# becomes 0: the copy engine fills scales past the end of a weight with it, and these meet zeros of x
_FP16_E8M0_BYTE = """
    bfe.u32 t, $2, {at}, 8;   sub.u32 u, t, 104;   setp.gt.u32 p, u, 36;   setp.ne.and.u32 p, t, 0, p;
    shl.b32 t, t, 23;         selp.b32 t, 0x7FC00000, t, p;   mov.b32 {to}, t;
"""
_FP16_E8M0 = (
    "{\n    .reg .b32 t, u;\n    .reg .pred p;\n    .reg .f32 f, g;\n"
    + _FP16_E8M0_BYTE.format(at=0, to="f")
    + _FP16_E8M0_BYTE.format(at=16, to="g")
    + "    cvt.rn.f16x2.f32 $0, g, f;\n"
    + _FP16_E8M0_BYTE.format(at=8, to="f")
    + _FP16_E8M0_BYTE.format(at=24, to="g")
    + "    cvt.rn.f16x2.f32 $1, g, f;\n}"
)
SCALES_PTX = {
    ("e4m3", "bf16"): _BF16_E4M3,
    ("e8m0", "bf16"): _BF16_E8M0,
    ("e4m3", "fp16"): _FP16_E4M3,
    ("e8m0", "fp16"): _FP16_E8M0,
}
SCALES_OUT = tl.constexpr("=&r,=&r,r")


@triton.constexpr_function
def codes_ptx(kind, dtype):
    """The program that turns a word and the pair of its row scales into eight values."""
    return CODES_PTX[kind, "fp16" if dtype == tl.float16 else "bf16"]


@triton.constexpr_function
def scales_ptx(kind, dtype):
    """The program that turns a scale word into the pairs of its even and its odd group."""
    return SCALES_PTX[kind, "fp16" if dtype == tl.float16 else "bf16"]


@triton.jit
def _halves(register, pair, kind: tl.constexpr, dtype: tl.constexpr, ROW: tl.constexpr):
    low = (register & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    high = ((register >> 16) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    scale = ((pair >> (16 * ROW)) & 0xFFFF).to(tl.int16).to(dtype, bitcast=True)
    if kind == "e8m0":
        low = low * (2.0**14 if dtype == tl.float16 else 2.0**126)
        high = high * (2.0**14 if dtype == tl.float16 else 2.0**126)
    return (low * scale).to(dtype), (high * scale).to(dtype)


@triton.jit
def _scale(byte, kind: tl.constexpr, dtype: tl.constexpr):
    if kind == "e4m3":
        value = ((byte & 0x7F) << 20).to(tl.float32, bitcast=True) * 2.0**120
        value = value * (2.0**7 if dtype == tl.float16 else 2.0**119)
    else:
        value = tl.maximum(byte << 23, 1 << 22).to(tl.float32, bitcast=True)
        if dtype == tl.float16:
            value = tl.where((byte != 0) & ((byte < 104) | (byte > 140)), float("nan"), value)
    return value.to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF


@triton.jit
def scale_pairs(words, kind: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr = True):
    """Scale words as ``words.shape + [2 groups]``: int32, the scales of rows r = 0 and 1 as 16-bit values."""
    if PTX:
        even, odd = tl.inline_asm_elementwise(
            scales_ptx(kind, dtype), SCALES_OUT, [words], dtype=(tl.int32, tl.int32), is_pure=True, pack=1
        )
    else:
        even = _scale(words & 0xFF, kind, dtype) | (_scale((words >> 16) & 0xFF, kind, dtype) << 16)
        odd = _scale((words >> 8) & 0xFF, kind, dtype) | (_scale((words >> 24) & 0xFF, kind, dtype) << 16)
    return tl.join(even, odd)


@triton.jit
def unpack_words(words, pairs, kind: tl.constexpr, dtype: tl.constexpr, PTX: tl.constexpr = True):
    """Eight scaled values a word, as ``words.shape + [2 p, 2 r, 2 h]`` (see layout.py).

    ``pairs`` has the shape of ``words``: what `scale_pairs` made of the scales of rows r = 0 and 1.
    """
    if PTX:
        program: tl.constexpr = codes_ptx(kind, dtype)
        if dtype == tl.float16:
            a0, a1, a2, a3, a4, a5, a6, a7 = tl.inline_asm_elementwise(
                program, CODES_OUT, [words, pairs], dtype=(tl.float16,) * 8, is_pure=True, pack=1
            )
        else:
            a0, a1, a2, a3, a4, a5, a6, a7 = tl.inline_asm_elementwise(
                program, CODES_OUT, [words, pairs], dtype=(tl.bfloat16,) * 8, is_pure=True, pack=1
            )
    else:
        r0 = words & -0x7E3F7E40
        r1 = (words << 3) & -0x7E3F7E40
        r2 = (words << 6) & -0x7E3F7E40
        r3 = ((words << 1) & -0x7FFF8000) | ((words >> 3) & 0x01800180) | ((words >> 7) & 0x00400040)
        if dtype == tl.float16:
            r0 = (r0 & -0x7FFF8000) | ((r0 << 3) & 0x0E000E00)
            r1 = (r1 & -0x7FFF8000) | ((r1 << 3) & 0x0E000E00)
            r2 = (r2 & -0x7FFF8000) | ((r2 << 3) & 0x0E000E00)
            r3 = (r3 & -0x7FFF8000) | ((r3 << 3) & 0x0E000E00)
        a0, a1 = _halves(r0, pairs, kind, dtype, 0)
        a2, a3 = _halves(r1, pairs, kind, dtype, 1)
        a4, a5 = _halves(r2, pairs, kind, dtype, 0)
        a6, a7 = _halves(r3, pairs, kind, dtype, 1)
    low = tl.join(tl.join(a0, a1), tl.join(a2, a3))
    high = tl.join(tl.join(a4, a5), tl.join(a6, a7))
    return tl.join(low, high)


@triton.jit
def lane_offsets(GROUP: tl.constexpr):
    """Where the words and the scale words of the lanes of 4 warps stand in a tile, ``[1, 128, those of a lane]``."""
    SCALES: tl.constexpr = 32 // GROUP
    lane = tl.arange(0, 128)[None, :, None]
    word_at = lane * 4 + tl.arange(0, 4)[None, None, :]
    return word_at, (lane // 4) * SCALES + tl.arange(0, SCALES)[None, None, :]


@triton.jit
def load_values(
    words, scales, at, word_at, scale_at, kind: tl.constexpr, dtype: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """Codes times block scales of the tiles ``at`` ``[R, 1, 1]``: ``[R, 4 w, 8 g, 4 t, 4 s, 2 p, 2 r, 2 h]``."""
    R: tl.constexpr = at.shape[0]
    w = tl.load(words + at * 512 + word_at)
    s = scale_pairs(tl.load(scales + at * (32 * 32 // GROUP) + scale_at), kind, dtype, PTX)
    if GROUP == 32:  # a group serves two k-steps
        s = tl.broadcast_to(s[:, :, :, :, None], (R, 128, 1, 2, 2))
    return unpack_words(w, s.reshape((R, 128, 4)), kind, dtype, PTX).reshape((R, 4, 8, 4, 4, 2, 2, 2))


@triton.jit
def hide_joins(operand):
    """The operand of a product as ``mma.sync`` wants it.

    Triton picks k width 4 for one that comes from `join`, and then shuffles it between lanes, or loads it word by word;
    an opaque move hides the joins: the fragment is taken as it lies (computeOrigBitWidth, Triton 3.6).
    """
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [operand], dtype=operand.dtype, is_pure=False, pack=2)


@triton.jit
def load_operand(
    words, scales, at, word_at, scale_at, kind: tl.constexpr, dtype: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr, WGMMA: tl.constexpr,
):  # fmt: skip
    """The left operand ``[64 R, 64]`` of the tiles ``at`` ``[R, 1, 1]``: codes times block scales."""
    R: tl.constexpr = at.shape[0]
    a = load_values(words, scales, at, word_at, scale_at, kind, dtype, GROUP, PTX)
    # R w g t s p r h -> (R w r g) (s h t p)
    a = a.permute((0, 1, 6, 2, 4, 7, 3, 5)).reshape((R * 64, 64))
    return hide_joins(a) if PTX and not WGMMA else a


@triton.jit
def load_rows(
    words, scales, at, word_at, scale_at, kind: tl.constexpr, dtype: tl.constexpr, GROUP: tl.constexpr,
    PTX: tl.constexpr,
):  # fmt: skip
    """The values ``[64, 64 C]`` of the tiles ``at`` ``[C, 1, 1]``, side by side: codes times block scales."""
    C: tl.constexpr = at.shape[0]
    a = load_values(words, scales, at, word_at, scale_at, kind, dtype, GROUP, PTX)
    # C w g t s p r h -> (w r g) (C s h t p)
    return a.permute((1, 6, 2, 0, 4, 7, 3, 5)).reshape((64, C * 64))
