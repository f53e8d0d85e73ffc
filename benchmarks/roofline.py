"""What an H200 can do: roofs that were measured, bars that ours should reach, and the picture of speed below the roofs.

Rows are those that dense.py writes.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Any

FIXED_US, READ_BYTES_PER_US = 1.8, 4.68e6
TENSOR_TFLOPS = 778  # bfloat16 in bursts; 630 to 651 sustained
DECODE = 256  # tokens up to which reading the weight is the floor

# The most microseconds that NVFP4 may take on an H200, at M up to each of:
BAR_TOKENS = (8, 16, 32, 64, 128, 256)
BARS = {
    (4096, 4096): (7.2, 7.5, 8, 9, 11, 17),
    (6144, 4096): (9.2, 9.5, 10, 11.5, 14, 20),
    (8192, 8192): (16.3, 17, 18, 20.5, 27, 48),
    (4096, 14336): (14.8, 15.5, 16.5, 18.5, 24, 46),
    (28672, 4096): (25, 26, 28, 32, 43, 85),
    (8192, 28672): (44, 47, 50, 57, 80, 163),
    (57344, 8192): (82, 88, 95, 112, 150, 322),
}
OTHER = (
    (1024, 4096), (512, 4096), (2880, 2880), (4096, 2880), (7168, 2048), (2048, 7168), (151936, 4096), (1000, 1040),
    (200, 1120),
)  # fmt: skip
# The least ratios: to Humming at M <= 256 where BARS has no time, to cuBLAS at M <= 256, and beyond, each and together.
TO_HUMMING, TO_CUBLAS, TO_CUBLAS_LARGE, GEOMEAN_LARGE = 1.15, 1.0, 0.97, 1.0

PICTURED = ((4096, 4096), (28672, 4096), (8192, 28672))
NAMES = {
    "ours": "this project",
    "cublas": "cuBLAS bf16",
    "portable": "portable kernel, SM80 code",
    "humming": "Humming",
    "marlin": "Marlin",
    "compiled": "compiled dequantisation",
}
COLOURS = {
    "ours": "#d1495b",
    "cublas": "#2e86ab",
    "portable": "#e58f9b",
    "humming": "#e0a030",
    "marlin": "#6a994e",
    "compiled": "#9d6bb5",
}
INK = "#808080"  # legible on white and on black

Row = Mapping[str, Any]


def floor_us(nbytes: int) -> float:
    """The time to read a weight of so many bytes once."""
    return FIXED_US + nbytes / READ_BYTES_PER_US


def tflops(m: int, n: int, k: int, us: float) -> float:
    """Multiplications and additions of a linear, in 10**12 a second."""
    return 2 * m * n * k / us / 1e6


def read_roof(m: int, n: int, k: int, nbytes: int) -> float:
    """TFLOP/s of a linear that only reads its weight, below those of the tensor cores."""
    return min(tflops(m, n, k, floor_us(nbytes)), TENSOR_TFLOPS)


@dataclass(frozen=True)
class Case:
    """One format, shape and M: microseconds of each peer that was right, and bytes of our packed weight."""

    format: str
    n: int
    k: int
    m: int
    us: dict[str, float]
    nbytes: int

    @property
    def shape(self) -> str:
        return f"{self.n}x{self.k}"

    def ratio(self, peer: str) -> float | None:
        """The peer's time over ours."""
        return self.us[peer] / self.us["ours"] if peer in self.us else None

    @property
    def fraction(self) -> float:
        """Of the read floor at small M, of the tensor cores' speed at large M."""
        if self.m <= DECODE:
            return floor_us(self.nbytes) / self.us["ours"]
        return tflops(self.m, self.n, self.k, self.us["ours"]) / TENSOR_TFLOPS

    @property
    def bar(self) -> float | None:
        """The most microseconds that it may take."""
        if self.format != "nvfp4" or (self.n, self.k) not in BARS or self.m > DECODE:
            return None
        return next(us for most, us in zip(BAR_TOKENS, BARS[self.n, self.k], strict=True) if self.m <= most)

    def misses(self) -> list[str]:
        """What it should reach and does not."""
        large, found = self.m > DECODE, []
        if self.bar is not None and self.us["ours"] > self.bar:
            found.append(f"{self.us['ours']:.1f} us, bar {self.bar} us")
        least = {"cublas": TO_CUBLAS_LARGE if large else TO_CUBLAS}
        if not large and self.bar is None:
            least["humming"] = TO_HUMMING
        for peer, bar in least.items():
            ratio = self.ratio(peer)
            if ratio is not None and ratio < bar:
                found.append(f"{ratio:.3f} of {peer}, bar {bar}")
        return [f"{self.format} {self.shape} M={self.m}: {miss}" for miss in found]


def cases(rows: Iterable[Row]) -> list[Case]:
    """Rows of the same format, shape and M together, where ours was timed."""
    together: dict[tuple[str, int, int, int], dict[str, Row]] = {}
    for row in rows:
        if row["status"] == "ok":
            together.setdefault((row["format"], row["n"], row["k"], row["m"]), {})[row["peer"]] = row
    return [
        Case(*key, {peer: row["us"] for peer, row in found.items()}, found["ours"]["nbytes"])
        for key, found in together.items()
        if "ours" in found
    ]


def geomean(ratios: Sequence[float]) -> float:
    return exp(sum(map(log, ratios)) / len(ratios))


def large_ratios(some: Iterable[Case]) -> dict[str, list[float]]:
    """Ratios to cuBLAS beyond M = 256, by shape."""
    found: dict[str, list[float]] = {}
    for case in some:
        ratio = case.ratio("cublas")
        if case.m > DECODE and ratio is not None:
            found.setdefault(case.shape, []).append(ratio)
    return found


def all_misses(some: Sequence[Case]) -> list[str]:
    """The misses of every case and of every format's geomean."""
    found = [miss for case in some for miss in case.misses()]
    for name in dict.fromkeys(case.format for case in some):
        ratios = [r for of in large_ratios(c for c in some if c.format == name).values() for r in of]
        if ratios and geomean(ratios) < GEOMEAN_LARGE:
            found.append(f"{name} all shapes M>{DECODE}: geomean {geomean(ratios):.3f} of cublas, bar {GEOMEAN_LARGE}")
    return found


def plot(rows: Sequence[Row], title: str, path: str) -> None:
    """Draws TFLOP/s against M, a panel for each of three shapes, from rows of one format whose status is "ok"."""
    import matplotlib as mpl

    mpl.use("Agg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "roofline", "font.family": "sans-serif"})
    import matplotlib.pyplot as plt

    shapes = pictured(rows)
    figure, panels = plt.subplots(
        1, len(shapes), figsize=(3.6 * len(shapes), 3.9), sharey=True, squeeze=False, layout="constrained"
    )
    for panel, shape in zip(panels[0], shapes, strict=True):
        draw(panel, [row for row in rows if (row["n"], row["k"]) == shape], shape)
    panels[0][0].set_ylabel("TFLOP/s", color=INK)
    handles, labels = panels[0][0].get_legend_handles_labels()
    figure.suptitle(title, color=INK, fontsize=10)
    figure.legend(
        handles,
        labels,
        loc="outside lower center",
        ncols=4,
        frameon=False,
        labelcolor=INK,
        fontsize=8,
        handlelength=2.5,
    )
    figure.savefig(path, transparent=True, metadata={"Date": None} if path.endswith(".svg") else None)
    plt.close(figure)


def pictured(rows: Sequence[Row]) -> list[tuple[int, int]]:
    """The shapes to draw: those of the README that were measured, else the first three."""
    measured = list(dict.fromkeys((row["n"], row["k"]) for row in rows))
    return [shape for shape in PICTURED if shape in measured] or measured[:3]


def draw(panel: Any, rows: Sequence[Row], shape: tuple[int, int]) -> None:
    """One shape: a line for each peer, dashed and dotted lines for the roofs."""
    n, k = shape
    tokens = sorted({row["m"] for row in rows})
    packed = next((row["nbytes"] for row in rows if row["peer"] == "ours"), n * k * 9 // 16)
    roof = [read_roof(m, n, k, packed) for m in tokens]
    panel.plot(tokens, roof, "--", color=INK, lw=1.2, label="FP4 read and tensor-core roof")
    panel.plot(tokens, [read_roof(m, n, k, 2 * n * k) for m in tokens], ":", color=INK, lw=1.2, label="bf16 read roof")
    for peer, name in NAMES.items():
        points = sorted((row["m"], tflops(row["m"], n, k, row["us"])) for row in rows if row["peer"] == peer)
        if points:
            width, order = (2.0, 3) if peer == "ours" else (1.2, 2)
            panel.plot(*zip(*points, strict=True), ".-", color=COLOURS[peer], lw=width, ms=4, zorder=order, label=name)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks([m for m in (1, 8, 64, 512, 4096) if tokens[0] <= m <= tokens[-1]] or tokens)
    panel.xaxis.set_major_formatter("{x:.0f}")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_title(f"{n} x {k}", color=INK, fontsize=9)
    panel.set_xlabel("M (tokens)", color=INK)
    panel.grid(color=INK, alpha=0.25, lw=0.5)
    panel.tick_params(which="both", colors=INK, labelsize=8)
    for spine in panel.spines.values():
        spine.set_color(INK)
