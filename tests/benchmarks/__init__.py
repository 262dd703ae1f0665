"""Time, memory and quality, each compared with a baseline in the same run: `python -m tests.benchmarks [NAME...]`."""
