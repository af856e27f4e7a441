"""A few of the mutations of benchmarks/fuzz.py; `make fuzz` runs hundreds."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="the fuzzer forks")
def test_mutated_input_ends_in_one_line():
    command = [sys.executable, "benchmarks/fuzz.py", "--mutations", "40", "--seed", "5", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=580)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^40 mutations, seed 5: 0 tracebacks, 0 hangs, 0 silent", done.stdout, re.MULTILINE)
