"""Memory on the CPU, counted."""

import gc
import weakref

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from marlin_w4a16 import quantize


class Live(TorchDispatchMode):
    """Counts the bytes of the storages that ops make, and of some that were there, while they live."""

    def __init__(self, *there: Tensor):
        super().__init__()
        self.now, self.peak, self.seen = 0, 0, set()
        for tensor in there:
            self.add(tensor)
        self.start = self.peak = self.now

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.add(tensor)
        return out

    def add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes()
        if key not in self.seen:
            self.seen.add(key)
            self.now += nbytes
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self.drop, key, nbytes)

    def drop(self, key: int, nbytes: int) -> None:
        self.seen.remove(key)
        self.now -= nbytes


def assert_one_module_at_a_time(model: nn.Module, format: str) -> None:
    """quantize() needs little more than the weights of the largest module, and leaves what is packed alone."""
    dense = sum(p.nbytes for p in model.parameters())
    with Live(*model.parameters()) as live:
        swaps = quantize(model, format)
        packed = sum(row.after for row in swaps.done)
        gc.collect()
        assert live.now == dense - sum(row.before for row in swaps.done) + packed == packed
    assert live.peak <= live.start + 36 * 2**20
