"""Benchmarks: `python -m bench NAME`. What is measured, and how, stands in `measure` and `train`."""
