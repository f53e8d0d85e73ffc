"""FP4 models from dense ones."""
