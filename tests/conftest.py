"""Tests share the machine's few cores; one thread each is faster than threads that wait for one another."""

import torch
from hypothesis import settings

torch.set_num_threads(1)
settings.register_profile("repeatable", derandomize=True)  # a change passes or fails for what it changes
settings.load_profile("repeatable")
