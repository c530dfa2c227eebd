"""The report of a run: a table for the terminal and one self-contained page, from its files alone.

Nothing here needs torch, a GPU, the model or the data: `read_run` reads the run folder.
"""
