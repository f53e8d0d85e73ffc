"""Calls of eager mode that need no dispatcher: it would hand them to the same kernels, through Python, twice.

A call is *plain* if nothing but the kernel would see it: plain tensors, no compiler, no autocast, no transform, no
mode, no profiler. What is not plain goes through ``torch.ops.marlin_w4a16``.
"""

import functools
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from marlin_w4a16.fake_impls.library import DTYPES
from marlin_w4a16.kernels.layout import LAYOUTS, PackedFP4, packed_shapes
from marlin_w4a16.kernels.private import current_device, empty, hooked
from marlin_w4a16.kernels.replay import ALIGNED
from marlin_w4a16.kernels.target import supports

_Launch = Callable[[tuple[int, int]], None]  # from the addresses of an input and an output
_c = torch._C
_KERNEL_DTYPES = (torch.bfloat16, torch.float16)
_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_MOST = 128  # calls of a weight that are kept: numbers of tokens, biases, and gradients


def is_plain(x: Tensor) -> bool:
    """Whether a call with this input is plain, on the current GPU, which the kernels serve."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and x.is_cuda
        and x.get_device() == current_device()
        and x.dtype in _KERNEL_DTYPES
        and not (x.is_neg() or x._is_zerotensor())  # whose memory does not hold their values
        and nothing_entered()
        and _served(x.get_device())
    )


def nothing_entered() -> bool:
    """Whether nothing in this thread would see a call of an op: no mode, transform, tracer, autocast or profiler."""
    return not (
        _c._dispatch_tls_local_include_set().raw_repr() not in _plain_states()
        or _c._is_any_autocast_enabled()
        or _c._len_torch_function_stack()
        or _c._autograd._profiler_enabled()
        or forward_ad._current_level >= 0
    )


class Proof:
    """That the tensors of a packed weight are what its numbers say: shapes, dtypes, one device, adjacent elements.

    Holds as long as they stand where they stood and are as large.
    """

    __slots__ = ("calls", "device", "seen")

    def __init__(self, device: int, seen: tuple[int | bool, ...]) -> None:
        self.device, self.seen = device, seen
        self.calls: dict[tuple[Any, ...], Call] = {}

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()  # of this place alone: no copy and no file has it


def proof_of(packed: PackedFP4) -> Proof | None:
    """That the tensors of a packed weight are right, on a CUDA device; None if not: the op says what is wrong."""
    words, scales, multiplier = packed.words, packed.scales, packed.multiplier
    seen = (
        words.data_ptr(), words.nbytes, words.is_contiguous(),
        scales.data_ptr(), scales.nbytes, scales.is_contiguous(),
        multiplier.data_ptr(), multiplier.nbytes, multiplier.is_contiguous(),
    )  # fmt: skip
    for proof in packed.proofs:
        if proof is not None and proof.seen == seen:
            return proof  # type: ignore[no-any-return]
    if not _is_right(packed):
        return None
    packed.proofs[:] = [proof := Proof(words.get_device(), seen)]
    return proof


class Call(NamedTuple):
    """A product with a weight: what launches it for other addresses of its input and output, and the latter."""

    launch: _Launch
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def __call__(self, x: Tensor) -> Tensor:
        out = empty(self.shape, self.strides, x.dtype)
        self.launch((x.data_ptr(), out.data_ptr()))
        return out


def known(of: str, x: Tensor, packed: PackedFP4, bias: Tensor | None = None) -> Call | None:
    """Such a call if one was made before and this one is plain. Not to be compiled.

    Few functions, and few of torch's: between the other operators of a model each of them costs five times what it
    costs where nothing else runs, since the processor has forgotten it.

    Args:
        of: what is called.
        x: its input.
        packed: the weight.
        bias: what is added, or None.
    """
    if not packed.proofs or type(x) is not Tensor or not nothing_entered():
        return None
    proof = proof_of(packed)
    call = None if proof is None else proof.calls.get(_call_key(of, x, bias))
    if proof is None or call is None:
        return None
    device, address = proof.device, x.data_ptr()
    if (
        x.get_device() != device or current_device() != device or not address or address % ALIGNED
        or not x.is_contiguous() or x.is_neg() or hooked()
    ):  # fmt: skip
        return None
    return call


def keep(
    of: str, x: Tensor, packed: PackedFP4, bias: Tensor | None, out: Tensor, bind: Callable[[], _Launch | None]
) -> None:
    """Keeps a call that was made, if what launches it can be bound to the weight."""
    calls, key = packed.proofs[0].calls, _call_key(of, x, bias)
    launch = None if key in calls else bind()
    if launch is not None:
        if len(calls) >= _MOST:
            calls.clear()
        calls[key] = Call(launch, tuple(out.shape), out.stride())


def _call_key(of: str, x: Tensor, bias: Tensor | None) -> tuple[Any, ...]:
    if bias is None:
        return of, x.shape, x.dtype
    return of, x.shape, x.dtype, bias.data_ptr(), bias.nbytes, bias.dtype, bias.is_contiguous()


def fits(row: Tensor | None, shape: tuple[int, ...], device: int) -> bool:
    """Whether a bias, if there is one, is right for a call on a device."""
    return row is None or (
        row.shape == shape and row.dtype in DTYPES and row.get_device() == device and row.is_contiguous()
        and type(row) in _PLAIN_TYPES
    )  # fmt: skip


def needs_gradient(x: Tensor, *others: Tensor | None) -> bool:
    """Whether a gradient of one of the inputs will be asked for."""
    if not torch.is_grad_enabled():
        return False
    return x.requires_grad or any([t is not None and t.requires_grad for t in others])


def new_output(x: Tensor, width: int) -> Tensor:
    """An empty result for an input ``[..., k]`` on the current device: ``[..., width]``."""
    shape = x.shape
    if len(shape) == 3:
        return empty((shape[0], shape[1], width), (shape[1] * width, width, 1), x.dtype)
    if len(shape) == 2:
        return empty((shape[0], width), (width, 1), x.dtype)
    return x.new_empty((*shape[:-1], width))


def _is_right(packed: PackedFP4) -> bool:
    if packed.layout not in LAYOUTS:
        return False
    tensors = packed.tensors
    shapes, lead = packed_shapes(packed.n, packed.k, packed.group), packed.words.shape[:-3]
    return all(
        t.shape == (*lead, *shape) and t.dtype == dtype and t.is_cuda and t.device == tensors[0].device
        and t.is_contiguous() and type(t) in _PLAIN_TYPES
        for t, shape, dtype in zip(tensors, shapes, (torch.int32, torch.uint8, torch.float32), strict=True)
    )  # fmt: skip


@functools.cache
def _plain_states() -> tuple[int, int]:
    """What a thread adds to the keys by which it looks for a kernel, where nothing is entered, and in inference mode.

    Modes, transforms and tracers of torch show there.
    """
    found = []

    def look() -> None:
        found.append(_c._dispatch_tls_local_include_set().raw_repr())
        with torch.inference_mode():
            found.append(_c._dispatch_tls_local_include_set().raw_repr())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    return found[0], found[1]


@functools.cache
def _served(device: int) -> bool:
    return supports(torch.device("cuda", device))
