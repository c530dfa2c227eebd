"""`python -m fastpref` does what the `fastpref` command does."""

from __future__ import annotations

import sys

from fastpref.cli import main

sys.exit(main())
