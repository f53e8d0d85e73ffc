"""Experts of mixtures in transformers: gathered from a checkpoint's layers, loaded, run."""
