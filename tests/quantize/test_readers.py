"""Code that reads a parameter of a module past its call, however it comes to it."""

import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear as product

from marlin_w4a16 import quantize
from swaps import done, refusals


class Base(nn.Module):
    """Several linears, and a way to them that a subclass has."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64)
        self.layers, self.by_name = nn.ModuleList([nn.Linear(64, 64)]), nn.ModuleDict({"x": nn.Linear(64, 64)})

    def forward(self, x: Tensor) -> Tensor:
        return self.project(x)


class Calls:
    """A mixin, of which calls reach `project`, and nothing reaches `fuse`."""

    def project(self, x: Tensor) -> Tensor:
        return product(self.b(x), self.a.weight)

    def fuse(self) -> Tensor:
        return torch.cat([self.b.weight, self.layers[0].weight])


class After(Base, Calls):
    pass


class Before(Calls, Base):
    pass


@pytest.mark.parametrize("cls", [After, Before])
def test_the_bases_of_a_class_count_whichever_way_they_stand(cls):
    model = cls()
    reason = "Calls.project reads its weight, which is empty in a PackedLinear"
    assert refusals(quantize(model, "nvfp4")) == {"a": reason}
    assert done(quantize(cls(), "nvfp4")) == ["b", "layers.0", "by_name.x"] and model(torch.randn(2, 64)).shape == (
        2,
        64,
    )


class Processor:
    def __call__(self, attention: nn.Module, x: Tensor) -> Tensor:
        return product(x, attention.a.weight)


def handed(module: nn.Module, x: Tensor) -> Tensor:
    return product(x, module.weight)


def wrapped(function):
    def call(self, x: Tensor) -> Tensor:
        return function(self, x)

    return call


class Reads(Base):
    """Each method reads the weight of another linear, or of one in another way."""

    def by_alias(self, x: Tensor) -> Tensor:
        chosen = self.a
        return product(x, chosen.weight)

    def by_loop(self, x: Tensor) -> Tensor:
        for number, layer in enumerate(self.layers):
            x = product(x, layer.weight) + number
        return x

    def by_index(self, x: Tensor) -> Tensor:
        return product(x, self.layers[0].weight)

    def by_key(self, x: Tensor) -> Tensor:
        return product(x, self.by_name["x"].weight)

    def by_string(self, x: Tensor) -> Tensor:
        return product(x, getattr(self.a, "weight"))  # noqa: B009

    def by_function(self, x: Tensor) -> Tensor:
        return handed(self.a, x)

    def by_method(self, x: Tensor) -> Tensor:
        return self.other(x, self.a)

    def other(self, x: Tensor, taken: nn.Module) -> Tensor:
        return product(x, taken.weight)

    def by_processor(self, x: Tensor) -> Tensor:
        return self.processor(self, x)

    def by_property(self, x: Tensor) -> Tensor:
        return product(x, self.held)

    @property
    def held(self) -> Tensor:
        return self.a.weight

    @functools.cached_property
    def kept(self) -> Tensor:
        return self.a.weight

    def by_cached_property(self, x: Tensor) -> Tensor:
        return product(x, self.kept)

    @wrapped
    def by_decorator(self, x: Tensor) -> Tensor:
        return product(x, self.a.weight)

    def by_name_of_method(self, x: Tensor) -> Tensor:
        return getattr(self, "by_" + "alias" if x is None else "by_alias")(x)

    def init_state(self, x: Tensor) -> Tensor:
        return product(x, self.a.weight)


WAYS = {name: "a" for name in vars(Reads) if name.startswith(("by_", "init_"))}
WAYS |= {"by_loop": "layers.0", "by_index": "layers.0", "by_key": "by_name.x"}


@pytest.mark.parametrize("way, path", WAYS.items(), ids=WAYS)
def test_a_read_is_seen_however_code_comes_to_the_module(way, path):
    model = type("Model", (Reads,), {"forward": vars(Reads)[way]})()
    if way == "by_processor":
        model.processor = Processor()
    swaps = quantize(model, "nvfp4")
    assert list(refusals(swaps)) == [path] and len(swaps.done) == 3
    assert model(torch.randn(2, 64)).shape == (2, 64)


def test_a_read_by_a_grandparent_is_seen_and_one_of_a_namesake_is_not():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.other = Base(), Base()

        def forward(self, x: Tensor) -> Tensor:
            return product(x, self.inner.a.weight) + self.other.a(x)

    assert list(refusals(quantize(Block(), "nvfp4"))) == ["inner.a"]


def test_code_that_was_made_at_run_time_is_taken_for_a_reader():
    space: dict = {}
    exec("def forward(self, x):\n    return x @ self.a.weight.T", space)
    model = type("Made", (Base,), {"forward": space["forward"]})()
    assert list(refusals(quantize(model, "nvfp4"))) == ["a"]


def test_what_asks_for_no_values_is_no_reader():
    class Asks(Base):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(self.a.weight, Tensor) and self.a.weight is not None:
                x = x.to(self.a.weight.dtype)
            return self.a(x.to(self.a.weight.device))

    assert len(quantize(Asks(), "nvfp4").done) == 4
