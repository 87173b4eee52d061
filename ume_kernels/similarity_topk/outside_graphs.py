"""Where a compiled graph breaks: lists of rows and corpora outside PyTorch are read by Python.

A module of its own, imported while a graph is traced: ``torch.compiler.disable`` loads the
compiler, which importing the package must not.
"""

from __future__ import annotations

import torch

from ume_kernels.similarity_topk.search import search as _search

search = torch.compiler.disable(_search)
