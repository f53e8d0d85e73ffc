"""Modules that own packed weights, and how they take the place of others."""
