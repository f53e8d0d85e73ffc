"""Parts of programs that run in a process of their own, without the folder of the tests."""

# An FP4 linear that its model decodes; torch is imported.
LAYER = """
from torch import nn

class Layer(nn.Module):
    def __init__(self):
        super().__init__()
        table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
        self.register_buffer("table", torch.tensor(table + [-v for v in table]))
        self.register_buffer("codes", torch.randint(0, 256, (48, 32), dtype=torch.uint8))
        self.register_buffer("scales", torch.randint(120, 130, (48, 2), dtype=torch.uint8))

    def forward(self, x):
        codes = torch.stack((self.codes & 15, self.codes >> 4), -1).flatten(-2).int()
        scales = torch.exp2(self.scales.float() - 127).unsqueeze(-1)
        return nn.functional.linear(x, (self.table[codes].unflatten(-1, (-1, 32)) * scales).flatten(-2))
"""
