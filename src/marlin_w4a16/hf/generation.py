"""generate(): decode is compiled by this backend, as soon as the cache is static."""

from transformers import CompileConfig, PreTrainedModel


def compile_decode(model: PreTrainedModel) -> None:
    """Sets how generate() compiles, where the model can generate and nobody has set it.

    transformers compiles decode where the cache is static (``cache_implementation="static"``), and prefill where it
    comes in chunks (``prefill_chunk_size=...``). ``model.generation_config.compile_config`` can be set to another
    config, or to None for transformers' own; it is not saved with the model.
    """
    config = getattr(model, "generation_config", None)
    if config is not None and model.can_generate() and config.compile_config is None:
        config.compile_config = CompileConfig(backend="marlin_w4a16")
