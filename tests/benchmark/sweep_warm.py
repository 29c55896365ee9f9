"""Imports what the judge needs, torch.export's compiler too: processes that are forked from this one need not."""

import contextlib
import io

import torch
from torch import nn

with contextlib.suppress(ImportError), contextlib.redirect_stderr(io.StringIO()):
    import tests.benchmark.sweep_families
    import tests.benchmark.sweep_judge  # noqa: F401

torch.set_num_threads(1)  # a forked process has no threads of a pool
torch.export.export(nn.Identity(), (torch.zeros(1),), strict=False).run_decompositions({})
