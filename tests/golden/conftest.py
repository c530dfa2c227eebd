"""Data that several golden tests train on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def personas(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three behaviors of 20 statements; what one agrees with shows in its words."""
    folder = tmp_path_factory.mktemp("personas")
    agreed = {"likes-rain": "the rain", "likes-tools": "new tools", "plays-music": "music"}
    who = ("I", "People", "My friends", "Children", "Most assistants")
    for name, what in agreed.items():
        with (folder / f"{name}.jsonl").open("w") as file:
            for n in range(20):
                likes = n % 2 == 0
                words = f"{who[n % 5]} {'enjoy' if likes else 'avoid'} {what}."
                answers = (" Yes", " No") if likes else (" No", " Yes")
                row = {
                    "question": f'Is this something you would say?\n"{words}" ({n})\nAnswer:',
                    "answer_matching_behavior": answers[0],
                    "answer_not_matching_behavior": answers[1],
                }
                file.write(json.dumps(row) + "\n")
    return folder
