"""What became of a candidate: decisions are values, and a refusal carries its reason."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Rejected:
    """Left as traced, and why.

    Attributes:
        why: what many weights may have in common.
        detail: what this one adds, such as the first element that differs; or None.
        rounds: the model rounds on the way to a type that holds less, which is to be kept where it is compiled.
    """

    why: str
    detail: str | None = None
    rounds: bool = False

    @property
    def reason(self) -> str:
        """The whole reason."""
        return self.why if self.detail is None else f"{self.why}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Excluded:
    """Left as traced because the options say so: no refusal."""

    reason: str


@dataclass(frozen=True, slots=True)
class Replaced:
    """Replaced by an op.

    Attributes:
        op: the op's name.
        kernel: what runs it on the weight's device.
        nbytes: bytes of the packed copy; in a dry run, those it would have.
        note: what a reader should know, such as that the model itself rounds this weight twice; or None.
        detail: what this weight adds to that; or None.
        error: with the option ``verify``, the worst relative L2 difference of a product from its traced form on
            random input; else None.
    """

    op: str
    kernel: str
    nbytes: int
    note: str | None = None
    error: float | None = None
    detail: str | None = None

    @property
    def told(self) -> str | None:
        """The note and its detail."""
        return self.note if self.detail is None else f"{self.note}: {self.detail}"


@dataclass(frozen=True, slots=True)
class Owned:
    """Packed already, by the module that owns it; runs as the op it was traced as.

    Attributes:
        op, kernel: as in `Replaced`.
        nbytes: bytes of the packed weight.
    """

    op: str
    kernel: str
    nbytes: int


@dataclass(frozen=True, slots=True)
class Mixture:
    """The mixture that a weight is a part of.

    Attributes:
        count: how many experts there are.
        chosen: how many of them each token has.
        activation: what stands between their products.
    """

    count: int
    chosen: int
    activation: str

    def __str__(self) -> str:
        return f"{self.chosen} of {self.count} experts, {self.activation}"


@dataclass(frozen=True, slots=True)
class Row:
    """One FP4 weight, or near miss, of a graph.

    Attributes:
        path: the module path of the weight's codes, or the expression they were read from.
        spelling: how the traced model multiplies by it.
        shape: rows and columns; before them, of a stack, the number of its matrices.
        format: such as ``"NVFP4 group 16"``, or None where nothing fits.
        outcome: what became of it.
        nbytes: bytes of the tensors it was made from; 0 where there are none beside the packed ones.
        uses: how many products of the graph share it.
        producer: who made those tensors, if `marlin_w4a16.prepare` knows their modules.
        experts: the mixture of experts that it belongs to, where the whole of it runs as one op.
    """

    path: str
    spelling: str
    shape: tuple[int, ...]
    format: str | None
    outcome: Replaced | Owned | Rejected | Excluded
    nbytes: int
    uses: int = 1
    producer: str | None = None
    experts: Mixture | None = None

    @property
    def stacked(self) -> bool:
        """Whether it is a stack of matrices."""
        return len(self.shape) > 2


def raised(error: Exception) -> Rejected:
    """What a model's own operations raise: the graph then runs as it was traced."""
    return Rejected(f"its traced operations raise {type(error).__name__}: {error}")
