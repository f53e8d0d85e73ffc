"""Whether a GGUF file fits the model that its metadata name, told from its header: what `from_pretrained` refuses."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from marlin_w4a16.checkpoints.files import CheckpointError
from marlin_w4a16.checkpoints.gguf_header import Header
from marlin_w4a16.checkpoints.layers import Problem
from marlin_w4a16.checkpoints.scheme import Scheme
from marlin_w4a16.hf.fit import Fitted
from marlin_w4a16.hf.gguf_placing import placed
from marlin_w4a16.hf.placing import place


def fit(found: Header, scheme: Scheme) -> Fitted | Problem:
    """How a file fits its model, or why no model can be made."""
    name = found.file.name
    try:
        config = AutoConfig.from_pretrained(found.file.parent, gguf_file=name)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        held = placed(found, scheme, model).held
    except CheckpointError as error:
        told, _, expected = str(error).partition(": found ")[2].partition(", expected ")
        return Problem(name, "general.architecture", told or str(error), expected or "one that can be loaded")
    except Exception as error:  # whatever transformers and a model's own code raise
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        return Problem(name, "the metadata", f"some of which transformers can make no model: {text}", "valid ones")
    return next(iter(held.problems), None) or Fitted(place(held, model, scheme), frozenset())
