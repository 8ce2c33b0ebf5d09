"""How a workload is measured."""
