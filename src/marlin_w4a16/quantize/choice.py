"""Which modules the user chose by their paths, and what is left dense by default."""

from collections.abc import Sequence

from marlin_w4a16.options import globs
from marlin_w4a16.passes.settings import excluded_by, not_included

# What ModelOpt's recipes leave dense (default_disabled_quantizers, 0.47); those of llm-compressor leave out heads and
# routers too: few bytes beside the rest, and they suffer most from rounding.
_HEADS = ("*lm_head*", "*output_layer*", "*proj_out", "output")
_ROUTERS = ("*router*", "*mlp.gate", "*block_sparse_moe.gate", "*mlp.shared_expert_gate")
_VISION = ("*vision_tower*", "*vision_model*", "*visual*", "*embed_vision*", "*multi_modal_projector*")
USUALLY_DENSE = (*_HEADS, *_ROUTERS, *_VISION, "*linear_attn.in_proj_a", "*linear_attn.in_proj_b", "mtp.*")


class Choice:
    """What the user chose by paths; a module has one or several, and at each its weights have theirs."""

    def __init__(self, include: str | Sequence[str] | None, exclude: str | Sequence[str] | None) -> None:
        self._usual = exclude is None
        self._include = globs("include", include)
        self._exclude = USUALLY_DENSE if exclude is None else globs("exclude", exclude) or ()

    def names(self, paths: list[str], weights: Sequence[str]) -> bool:
        """Whether one of these paths is given as it is, not as a glob."""
        named = {*paths, *(f"{path}.{name}" for path in paths for name in weights)}
        return not named.isdisjoint(self._include or ())

    def leaves(self, paths: list[str], weights: Sequence[str]) -> str | None:
        """Why a module with these paths and weights is not to be looked at, or None."""
        missed = [[not_included(f"{path}.{name}", self._include) for name in weights] for path in paths]
        if all(any(of) for of in missed):
            name, reason = next((name, miss.reason) for name, miss in zip(weights, missed[0], strict=True) if miss)
            return reason if all(missed[0]) else f"{name}: {reason}"
        hits = (excluded_by(f"{path}.{name}", self._exclude) for path in paths for name in weights)
        hit = next(filter(None, hits), None)
        if hit is None or (self._usual and self.names(paths, weights)):
            return None
        return f"usually dense: {hit.reason} by default" if self._usual else hit.reason
