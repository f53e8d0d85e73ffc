"""What a launch asks of Triton and torch below their public interfaces.

Read in Triton 3.6 to 3.9 and torch 2.11 and 2.13; where Triton is another release, nothing is launched from here.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from marlin_w4a16.kernels.target import gluon_is_known

# A launch that is ready: takes the stream and addresses.
Launcher = Callable[[int, tuple[int, ...]], None]
Pick = Callable[[tuple[Any, ...]], tuple[Any, ...]]

current_device: Callable[[], int] = getattr(torch._C, "_cuda_getDevice", lambda: -2)  # none where torch has no CUDA
raw_stream: Callable[[int], int] = getattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 0)
_guards: Any = torch._C._dynamo.guards


def empty(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """``torch.empty_strided`` on the current CUDA device, for a third of the time."""
    if torch._C._get_deterministic_algorithms():  # it may be asked to fill what it returns
        return torch.empty_strided(shape, strides, dtype=dtype, device="cuda")
    made: Tensor = _guards._empty_strided_cuda(shape, strides, dtype)
    return made


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Any:
    """``function.apply`` where no transform of torch.func is entered, without a look whether one is."""
    return super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]


def is_known(compiled: Any) -> bool:
    """Whether `launcher` knows how to start a compiled kernel as this Triton does, which does nothing beside."""
    run: Any = getattr(compiled, "run", None)
    if not gluon_is_known() or type(run).__name__ != "CudaLauncher":
        return False
    return not (run.global_scratch_size or run.profile_scratch_size or getattr(run, "gsan_enabled", False))


def launcher(
    compiled: Any,
    grid: tuple[int, ...],
    pick: Pick,
    maps: Sequence[tuple[int, "Encoding"]],
    constants: tuple[Any, ...],
) -> Launcher:
    """What starts a compiled kernel without Triton's look at its arguments.

    Args:
        compiled: what ``kernel[grid](...)`` returned, so that it is loaded on this device.
        grid: its programs.
        pick: the arguments of the kernel, pointers as integers and descriptors expanded, from the addresses that the
            launcher is given, the descriptors and the constants behind them.
        maps: the addresses, by their places, and encodings of the descriptors.
        constants: what no call changes.
    """
    run = compiled.run
    x, y, z = (*grid, 1, 1)[:3]
    function, meta = compiled.function, compiled.packed_metadata
    how = function, run.launch_cooperative_grid, run.launch_pdl
    if hasattr(run, "arg_annotations"):  # since Triton 3.7 one function starts every kernel
        start, behind = _driver().utils.launch, (meta, *(None,) * 5, run.arg_annotations, run.kernel_signature)

        def launch(stream: int, given: tuple[int, ...]) -> None:
            made = [tensor_map(given[at], encoding) for at, encoding in maps]
            start(x, y, z, stream, *how, *behind, pick((*given, *made, *constants)))

    else:
        start, middle = _start_of(run), (*how, None, None, meta, None, None, None)

        def launch(stream: int, given: tuple[int, ...]) -> None:
            made = [tensor_map(given[at], encoding) for at, encoding in maps]
            start(x, y, z, stream, *middle, *pick((*given, *made, *constants)))

    return launch


def hooked() -> bool:
    """Whether something wants to know of every launch, such as Triton's profiler."""
    runtime = _runtime()
    try:
        return bool(runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls)
    except AttributeError:  # a function was put in the place of a chain of them
        return True


def descriptors_of(compiled: Any) -> list[dict[str, Any]]:
    """How each descriptor among a compiled kernel's arguments is encoded."""
    return list(getattr(compiled.metadata, "tensordesc_meta", None) or ())


class Encoding:
    """How the copy engine reads a tensor, but for its address; equal ones are one object, which is quick to look up."""

    __slots__ = ("arguments",)

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


@functools.lru_cache(maxsize=1 << 16)
def tensor_map(address: int, encoding: Encoding) -> Any:
    """A tensor as the copy engine takes it. Kept by address: it is nothing but this address and its encoding."""
    return _fill()(address, *encoding.arguments)


def encoding_of(meta: dict[str, Any], shape: tuple[int, ...], strides: tuple[int, ...]) -> Encoding:
    """That of a descriptor of a kernel, which is zero outside of its tensor."""
    from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

    kind = TMA_DTYPE_DEVICE_TO_HOST[meta["elem_type"]]
    return _encoding(meta["swizzle"], meta["elem_size"], kind, tuple(meta["block_size"]), shape, strides, 0)


_encoding = functools.cache(Encoding)


@functools.cache
def _runtime() -> Any:
    from triton import knobs

    return knobs.runtime


def _driver() -> Any:
    import triton

    return triton.runtime.driver.active


@functools.cache
def _fill() -> Callable[..., Any]:
    utils = _driver().utils
    old: Callable[..., Any] | None = getattr(utils, "fill_tma_descriptor", None)  # until Triton 3.6
    return old or cast(Callable[..., Any], utils.fill_tma_descriptor_tiled)


def _start_of(run: Any) -> Callable[..., None]:
    """The C function of a launcher of Triton 3.6, which stands behind one that makes descriptors."""
    inner = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(run.launch) else {}
    start: Callable[..., None] = inner.get("launcher", run.launch)
    return start
