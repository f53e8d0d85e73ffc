"""What only looks like FP4 is left alone, with a reason, and runs as eager does."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from marlin_w4a16 import E2M1_VALUES, explain, quantize_mxfp4, quantize_nvfp4

N, K = 48, 64
NF4 = torch.tensor(
    [-1.0, -0.6962, -0.5251, -0.3949, -0.2844, -0.1848, -0.0911, 0.0, 0.0796, 0.1609, 0.2461, 0.3379, 0.4407, 0.5626,
     0.7230, 1.0]
)  # fmt: skip
NOT_NVFP4 = "it is not NVFP4 group 16, low nibble first: row "


class Alike(nn.Module):
    """NVFP4 but for what a subclass changes."""

    table = torch.tensor(E2M1_VALUES)

    def __init__(self):
        super().__init__()
        weight = quantize_nvfp4(torch.randn(N, K))
        self.register_buffer("codes", weight.codes)
        self.register_buffer("scales", weight.scales.view(torch.float8_e4m3fn))
        self.factor = nn.Parameter(weight.multiplier[:1], requires_grad=False)

    def values(self) -> Tensor:
        return self.table[torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).int()]

    def weight(self) -> Tensor:
        return (self.values().unflatten(-1, (-1, 16)) * (self.scales.float() * self.factor).unsqueeze(-1)).flatten(-2)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight())


class AnotherTable(Alike):
    table = NF4


class Integers(Alike):
    def values(self) -> Tensor:
        return torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).float() - 8


class Offset(Alike):
    def weight(self) -> Tensor:
        return super().weight() + 0.01


class OffsetOfOneValue(Alike):
    def weight(self) -> Tensor:
        return torch.index_put(super().weight(), (torch.tensor([N - 1]), torch.tensor([K - 1])), torch.ones(()))


class NaNScale(Alike):
    def __init__(self):
        super().__init__()
        self.scales.view(torch.uint8)[N - 1, 2] = 0x7F


class NaNScaleInBytes(Alike):
    def __init__(self):
        super().__init__()
        weight = quantize_mxfp4(torch.randn(N, K))
        weight.scales[0, 1] = 0xFF
        self.codes, self.scales = weight.codes, weight.scales

    def weight(self) -> Tensor:
        scales = self.scales.view(torch.float8_e8m0fnu).float()
        return (self.values().unflatten(-1, (-1, 32)) * scales.unsqueeze(-1)).flatten(-2)


class OverflowsFloat16(Alike):
    def __init__(self):
        super().__init__()
        self.factor.fill_(100.0)
        self.codes[0, 0], self.scales[0, 0] = 0x77, 448

    def weight(self) -> Tensor:
        return super().weight().half().float()


class Trained(Alike):
    def __init__(self):
        super().__init__()
        self.factor.requires_grad_()


class Float64(Alike):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x.double(), self.weight().double())


class WithOut(Alike):
    def forward(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.weight().T, out=torch.empty(*x.shape[:-1], N))


REFUSED = {
    AnotherTable: NOT_NVFP4, Integers: NOT_NVFP4, Offset: NOT_NVFP4,
    OffsetOfOneValue: f"{NOT_NVFP4}47, column 63: expected -0.6835822, found 1",
    NaNScale: "scales: found NaN (byte 0x7f) at [47, 2], expected finite e4m3 codes",
    NaNScaleInBytes: "scales: found NaN (byte 0xff) at [0, 1], expected finite e8m0 codes",
    Trained: "F.linear with a weight that requires grad",
    Float64: "F.linear of float64: expected one of float16, bfloat16, float32", WithOut: "matmul with out=",
}  # fmt: skip


def assert_runs_as_eager(module: nn.Module, caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(2, 3, K)
    found = torch.compile(module, backend="marlin_w4a16")(x)
    torch.testing.assert_close(found, module(x), rtol=1e-4, atol=1e-4, equal_nan=True)
    assert [r.levelname for r in caplog.records if r.name == "marlin_w4a16"] == ["WARNING"]


@pytest.mark.parametrize("module, reason", REFUSED.items(), ids=[m.__name__ for m in REFUSED])
def test_it_is_refused_with_a_reason_and_runs_right(module, reason, caplog):
    model = module()
    (row,) = explain(model, torch.randn(2, 3, K)).rejected
    assert row.outcome.reason.startswith(reason) and row.path == "codes"
    assert_runs_as_eager(model, caplog)


def test_a_weight_that_overflows_where_its_decode_does_not_is_refused():
    (row,) = explain(OverflowsFloat16(), torch.randn(3, K)).rejected
    assert row.outcome.reason == "the traced weight holds NaN or Inf in float32"


class OfTheInput(Alike):
    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight() * x.mean())


class CodesOfTheInput(Alike):
    def forward(self, x: Tensor) -> Tensor:
        codes = self.codes ^ (x.sum() > 1e9)
        values = self.table[torch.stack((codes & 15, codes >> 4), -1).flatten(-2).int()]
        return linear(x, (values.unflatten(-1, (-1, 16)) * self.scales.float().unsqueeze(-1)).flatten(-2))


class Dense(Alike):
    def __init__(self):
        super().__init__()
        self.dense = nn.Parameter(super().weight())

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.dense)


@pytest.mark.parametrize("module", [OfTheInput, CodesOfTheInput, Dense])
def test_it_is_no_candidate_and_runs_right(module, caplog):
    model = module()
    assert not explain(model, torch.randn(2, 3, K)).rows
    assert_runs_as_eager(model, caplog)


def test_what_is_trained_gets_its_gradient():
    model, x = Trained(), torch.randn(3, K)
    model(x).sum().backward()
    expected, model.factor.grad = model.factor.grad, None
    torch.compile(model, backend="marlin_w4a16")(x).sum().backward()
    torch.testing.assert_close(model.factor.grad, expected, rtol=1e-4, atol=0)


def test_what_could_be_trained_is_replaced_where_no_gradient_is_wanted():
    with torch.no_grad():
        assert explain(Trained(), torch.randn(3, K)).replaced
