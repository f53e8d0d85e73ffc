"""Checkpoints of gpt-oss (``quant_method: mxfp4``): experts in MXFP4, all other weights dense."""

from marlin_w4a16.checkpoints.fields import Fields
from marlin_w4a16.checkpoints.layouts import Layout
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.checkpoints.storage import FP4Storage, Part

EXPERTS = FP4Storage(
    "gpt-oss MXFP4",
    "e8m0",
    (32,),
    (
        Part("blocks", "codes", ("U8",), ("e", "n", "k/g", "g/2")),
        Part("scales", "scales", ("U8",), ("e", "n", "k/g")),
    ),
    joint="_",
    stacked=True,
    layout=Layout("blocks"),
)


def scheme(config: Fields) -> Scheme:
    """What such a config says: everything but experts is dense."""
    joined = tuple(part.leaf for part in EXPERTS.parts)
    return Scheme("OpenAI", "MXFP4", {"*.experts.*": EXPERTS}, joined=joined, where=config.where)
