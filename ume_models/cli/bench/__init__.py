"""Results of the benchmarks: read from the files they wrote, as tables, plots, a page, and kept.

``figures`` is the common form; ``reading`` makes it of the files of pytest-benchmark, of a GPU
session and of the script comparison.
"""
