"""The experiments of Im & Li (arXiv 2403.18742), each by one command: what the theory says before
training beside what training shows. docs/reproduce.md describes them.

A module per experiment has `run(settings) -> Outcome`; `names` lists them.
"""
