"""Timing of kernels and decoding beside their peers, in one run: ``python -m sfmp.bench``."""
