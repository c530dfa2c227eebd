"""Benchmarks: `python -m bench NAME`. How things are measured stands in `measure` and `train`."""
