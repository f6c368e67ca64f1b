"""Some of the fuzzer's inputs, and whether it finds faults."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent


def test_inputs_succeed_or_are_refused():
    command = [sys.executable, FOLDER / "fuzz.py", "--inputs", "100", "--seed", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


FAULTS = """
import sys
sys.path.insert(0, {folder!r})
import fuzz

def hang():
    while True: pass

faults = dict(
    trace=lambda: 1 / 0, hang=hang, status=lambda: 1,
    chatter=lambda: print("a\\nb", file=sys.stderr) or 2,
)
fuzz.TARGETS = {{name: (lambda rng, read=read: read) for name, read in faults.items()}}
fuzz.TARGETS["fine"] = lambda rng: lambda: None
fuzz.LIMIT = 1
sys.exit(fuzz.fuzz(["--inputs", "5"]))
"""


def test_faults_are_found():
    code = FAULTS.format(folder=str(FOLDER))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    found = [line.split()[4] for line in done.stdout.splitlines() if "FINDING" in line]
    assert done.returncode == 1, done.stderr
    assert found == ["trace", "hang", "status", "chatter"], done.stdout
    assert "fine: {'success': 1}" in done.stdout
