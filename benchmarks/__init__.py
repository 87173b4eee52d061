"""Benchmarks; run with ``pytest benchmarks --benchmark-only``."""
