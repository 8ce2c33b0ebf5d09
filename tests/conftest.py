"""Tests share the machine's few cores; one thread each is faster than threads that wait for one another."""

import torch

torch.set_num_threads(1)
