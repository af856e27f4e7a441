"""Fixtures of every room."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data (``DETDISTILL_DATA``, else ``../shared/data`` beside the repository)."""
    default = Path(__file__).parents[2] / "shared" / "data"
    folder = Path(os.environ.get("DETDISTILL_DATA") or default)
    if not folder.is_dir():
        pytest.skip(f"real data is not at {folder}; set DETDISTILL_DATA to its folder")
    return folder
