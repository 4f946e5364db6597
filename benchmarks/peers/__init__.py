"""The same workload on other job queues, and on ours. `python -m benchmarks.peers` runs it."""
