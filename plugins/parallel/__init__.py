"""Attention across processes, a scheme a file; see `attnbench.parallel`."""
