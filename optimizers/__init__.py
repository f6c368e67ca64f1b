"""Optimizers: SO in one file of its own, which people copy into other projects."""

from optimizers.SparseOptimizer import SO

__all__ = ["SO"]
