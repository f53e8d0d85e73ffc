"""Changes of the tensors of a decode: of codes, values, scales and of the weight."""

from collections.abc import Callable

import torch
from torch import Tensor

from attacks.case import Mutation, mutations

Change = Callable[[Tensor], Tensor]


def cat(m, t: Tensor, change: Change) -> Tensor:
    """One element is changed, and all joined again."""
    flat, at = t.flatten(), m.spot % t.numel()
    return torch.cat((flat[:at], change(flat[at : at + 1]), flat[at + 1 :])).view(t.shape)


def chosen(m, t: Tensor, change: Change) -> Tensor:
    """One element is changed under a mask."""
    at = torch.arange(t.numel(), device=t.device).view(t.shape) == m.spot % t.numel()
    return torch.where(at, change(t), t)


def written(m, t: Tensor, change: Change) -> Tensor:
    """One element of a copy is written."""
    t = t.clone(memory_format=torch.contiguous_format)
    flat, at = t.view(-1), m.spot % t.numel()
    flat[at] = change(flat[at])
    return t


def through_a_view(m, t: Tensor, change: Change) -> Tensor:
    """One element is written in place, through a view of a view."""
    t = t.contiguous().clone()
    one = t.flatten()[m.spot % t.numel() :][:1]
    one.copy_(change(one))
    return t


def scattered(m, t: Tensor, change: Change) -> Tensor:
    """One element is scattered into a copy."""
    flat, at = t.flatten(), torch.tensor([m.spot % t.numel()])
    return flat.scatter(0, at, change(flat[at])).view(t.shape)


WAYS = {"joined": cat, "where": chosen, "written": written, "through a view": through_a_view, "scattered": scattered}


def one(name: str, change: Change) -> dict[str, Callable[..., Tensor]]:
    """A change of one element, in every way."""
    return {f"{name}, {how}": lambda m, t, way=way: way(m, t, change) for how, way in WAYS.items()}


def each(**changes: Change) -> dict[str, Callable[..., Tensor]]:
    """Changes that need no module."""
    return {name.replace("_", " "): lambda m, t, change=change: change(t) for name, change in changes.items()}


def flipped_pairs(t: Tensor) -> Tensor:
    return t.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)


def mixed(t: Tensor) -> Tensor:
    """Pairs of columns rotated by 45 degrees."""
    a, b = t[..., ::2], t[..., 1::2]
    return torch.stack((a + b, a - b), -1).flatten(-2) * 0.5**0.5


def blocks_swapped(t: Tensor) -> Tensor:
    left, right = t.chunk(2, -1)
    return torch.cat((right, left), -1)


def along(t: Tensor, axis: int) -> Tensor:
    """1, 2, ... along an axis."""
    shape = [1] * t.ndim
    shape[axis] = -1
    return torch.arange(1, t.shape[axis] + 1).view(shape)


def shuffled(size: int) -> Tensor:
    """Another order of 0, 1, ... below a multiple of a power of two."""
    return (torch.arange(size) * 5 + 3) % size


UNPACK = {
    **one("one code", lambda c: c ^ 1),
    **one("one sign", lambda c: c ^ 8),
    **each(
        codes_plus_one=lambda c: (c + 1) & 15,
        codes_inverted=lambda c: c ^ 15,
        nibbles_exchanged=flipped_pairs,
        sevens_are_sixes=lambda c: torch.where(c == 7, 6, c),
        codes_below_15=lambda c: c.clamp(max=14),
        codes_rolled=lambda c: c.roll(1, -1),
        codes_of_the_next_group=lambda c: c.roll(16, -1),
        signs_dropped=lambda c: c & 7,
        exponents_exchanged=lambda c: c & 9 | (c & 2) << 1 | (c & 4) >> 1,
        last_code_zero=lambda c: c * (along(c, -1) < c.shape[-1]),
        first_row_zero=lambda c: c * (along(c, 0) > 1),
    ),
}
VALUES = {
    **one("one value", lambda v: v + 0.25),
    **one("the sign of a value", torch.neg),
    **each(
        three_is_three_and_a_half=lambda v: torch.where(v == 3, 3.5, v),
        six_is_five=lambda v: torch.where(v == 6, 5.0, v),
        three_and_four_exchanged=lambda v: torch.where(v == 3, 4.0, torch.where(v == 4, 3.0, v)),
        halves_flushed=lambda v: torch.where(v.abs() < 1, 0.0, v),
        whole_values=torch.round,
        values_to_4=lambda v: v.clamp(-4, 4),
        positive_ones_larger=lambda v: torch.where(v > 0, v * 1.01, v),
        a_little_added=lambda v: v + 0.01,
        values_squared=lambda v: v * v.abs(),
        odd_values_down=lambda v: (v * 2).trunc() / 2 - (v == 1.5) * 0.5,
        values_by_column=lambda v: v * (1 + along(v, -1) / 64),
        minus_zero_is_small=lambda v: v - 0.1 * v.signbit() * (v == 0),
    ),
}
SCALE = {
    **one("one scale", lambda s: s * 1.125),
    **one("one scale is zero", torch.zeros_like),
    **one("one scale doubled", lambda s: s * 2),
    **each(
        scales_rolled_by_group=lambda s: s.roll(1, -1),
        scales_rolled_by_row=lambda s: s.roll(1, 0),
        scales_of_two_groups=lambda s: s[..., ::2].repeat_interleave(2, -1),
        scales_flipped=lambda s: s.flip(-1),
        a_factor_for_each_group=lambda s: s * along(s, -1),
        a_factor_for_each_row=lambda s: s * along(s, 0),
        odd_rows_doubled=lambda s: s * (1 + along(s, 0) % 2),
        scales_in_bfloat16=lambda s: s.bfloat16().to(s.dtype),
        scales_in_e5m2=lambda s: s.to(torch.float8_e5m2).to(s.dtype),
        scales_in_e4m3=lambda s: s.to(torch.float8_e4m3fn).to(s.dtype),
        scales_in_float16=lambda s: s.half().to(s.dtype),
        scales_in_powers_of_two=lambda s: s.abs().clamp(1e-30).log2().round().exp2(),
        scales_at_least=lambda s: s.clamp(min=0.05),
        scales_at_most=lambda s: s.clamp(max=0.2),
        scales_plus_a_little=lambda s: s + 1e-2 * s.abs().mean(),
        scales_squared=torch.square,
        scales_neg=torch.neg,
        scales_over_their_mean=lambda s: s / s.mean(),
        small_scales_zero=lambda s: s * (s.abs() > s.abs().mean() / 2),
        first_group_of_the_second=lambda s: torch.cat((s[..., 1:2], s[..., 1:]), -1),
        halves_of_scales_exchanged=blocks_swapped,
        scales_by_rank=lambda s: s.sort(-1).values,
        scales_smoothed=lambda s: (s + s.roll(1, -1)) / 2,
        the_largest_of_the_row=lambda s: s.amax(-1, True).expand_as(s).clone(),
    ),
}
WEIGHT = {
    **one("one element", lambda w: w + 0.5),
    **one("one element zero", torch.zeros_like),
    **each(
        rows_rolled=lambda w: w.roll(1, 0),
        columns_rolled=lambda w: w.roll(1, -1),
        columns_rolled_by_a_group=lambda w: w.roll(16, -1),
        a_column_doubled=lambda w: w * (1 + (along(w, -1) == 8)).to(w.dtype),
        a_row_tripled=lambda w: w * (1 + 2 * (along(w, 0) == 3)).to(w.dtype),
        a_factor_for_each_column=lambda w: w * (along(w, -1) / 8).to(w.dtype),
        a_constant=lambda w: w + 0.02,
        a_factor=lambda w: w * 1.01,
        minus=torch.neg,
        magnitudes=torch.abs,
        limited=lambda w: w.clamp(-1, 1),
        limited_above=lambda w: w.clamp(max=1.5),
        in_bfloat16=lambda w: w.bfloat16().to(w.dtype),
        in_float16=lambda w: w.half().to(w.dtype),
        in_e4m3=lambda w: w.to(torch.float8_e4m3fn).to(w.dtype),
        in_e5m2=lambda w: w.to(torch.float8_e5m2).to(w.dtype),
        in_int8=lambda w: (w * 32).round().clamp(-127, 127).to(torch.int8).to(w.dtype) / 32,
        transposed=lambda w: w.mT,
        upper_triangle=torch.triu,
        columns_flipped=lambda w: w.flip(-1),
        rows_flipped=lambda w: w.flip(0),
        every_fourth_zero=lambda w: w * (along(w, -1) % 4 > 0).to(w.dtype),
        small_ones_zero=lambda w: torch.where(w.abs() < 0.3, 0, w),
        rows_of_unit_length=lambda w: w / w.norm(dim=-1, keepdim=True).clamp(min=1e-6),
        rows_without_mean=lambda w: w - w.mean(-1, True),
        on_a_grid=lambda w: (w * 16).round() / 16,
        soft_limit=lambda w: 4 * torch.tanh(w / 4),
        a_cube_added=lambda w: w + 1e-2 * w**3,
        columns_mixed=mixed,
        halves_exchanged=blocks_swapped,
        pairs_exchanged=flipped_pairs,
        sorted_rows=lambda w: w.sort(-1).values,
        sums=lambda w: w.cumsum(-1) / 8,
        last_column_of_ones=lambda w: torch.cat((w[..., :-1], torch.ones_like(w[..., -1:])), -1),
        a_row_repeated=lambda w: torch.cat((w[1:2], w[1:])),
        a_column_repeated=lambda w: torch.cat((w[..., 1:2], w[..., 1:]), -1),
        leaky=lambda w: torch.nn.functional.leaky_relu(w, 0.9),
        read_with_other_strides=lambda w: w.contiguous().flatten().roll(5).view(w.shape),
        a_step_added=lambda w: torch.where(w > 1, w + 0.1, w),
    ),
    "columns in another order": lambda m, w: w[..., shuffled(w.shape[-1])],
    "rows in another order": lambda m, w: w[shuffled(w.shape[0])],
    "a low rank added": lambda m, w: w + (along(w, 0) @ along(w, -1)).to(w.dtype) * 1e-4 if w.ndim == 2 else w + 0.1,
}
HARMLESS = {
    "unpack": each(cloned=torch.clone, in_int16=lambda c: c.to(torch.int16)),
    "values": each(
        values_in_e5m2=lambda v: v.to(torch.float8_e5m2).to(v.dtype),
        values_in_bfloat16=lambda v: v.bfloat16().to(v.dtype),
    ),
    "scale": each(scales_cloned=torch.clone, scales_contiguous=Tensor.contiguous, scales_twice=lambda s: s * 2 / 2),
    "weight": each(
        cloned_weight=torch.clone,
        without_nan=torch.nan_to_num,
        in_float64=lambda w: w.double().to(w.dtype),
        minus_minus=lambda w: torch.neg(torch.neg(w)),
        detached=torch.detach,
        contiguous=Tensor.contiguous,
        by_an_index_of_all=lambda w: w[torch.arange(w.shape[0])],
        limited_far_out=lambda w: w.clamp(-1e6, 1e6),
        dropout_not_in_training=lambda w: torch.nn.functional.dropout(w, 0.5, False),
    ),
}

NEAR: list[Mutation] = [
    *mutations("unpack", UNPACK),
    *mutations("values", VALUES),
    *mutations("scale", SCALE),
    *mutations("decode", WEIGHT),
]
TRUE: list[Mutation] = [
    mutation
    for place, changes in HARMLESS.items()
    for mutation in mutations("decode" if place == "weight" else place, changes, harmless=True)
]
