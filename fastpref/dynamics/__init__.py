"""Learning dynamics: what a run records about every pair and every behavior, and how it is read.

`schema` names the columns, `recorder` writes and reads them, `groups` turns pairs into behaviors.
Importing this package does not import torch: the records are read on any machine.
"""
