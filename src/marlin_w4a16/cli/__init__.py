"""The commands of ``python -m marlin_w4a16``, a module each, and what they share."""
