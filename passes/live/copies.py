"""The packed copies of the weights that are replaced together."""

from marlin_w4a16.kernels.expert_order import Order
from marlin_w4a16.kernels.layout import PackedFP4
from marlin_w4a16.passes.find.products import compute_dtype
from marlin_w4a16.passes.judge.verdict import Found
from marlin_w4a16.passes.judge.weights import Weight
from marlin_w4a16.passes.live.binding import Binding
from marlin_w4a16.passes.settings import Rules


class Copies:
    """Bindings of weights that were found to be FP4, each with its packed copy, made when first asked for."""

    def __init__(self, rules: Rules) -> None:
        self._rules = rules
        self._held: dict[tuple[Weight, Order | None], tuple[Binding, PackedFP4]] = {}

    def bound(self, weight: Weight, found: Found, order: Order | None) -> tuple[Binding, PackedFP4]:
        """The binding of a weight and its packed copy, the rows of experts in pairs if there is an order."""
        if (weight, order) not in self._held:
            dtype = compute_dtype(weight.products)
            binding = Binding(weight.decode, found, self._rules, dtype, weight.path, order)
            copy = binding.adopt(weight.values, found.weight)
            assert isinstance(copy, PackedFP4)  # what was found has been fitted to the dtype
            self._held[weight, order] = binding, copy
        return self._held[weight, order]

    def packed(self, weight: Weight, found: Found, order: Order | None) -> PackedFP4:
        """The packed copy alone."""
        return self.bound(weight, found, order)[1]
