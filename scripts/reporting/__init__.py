"""The package behind report.py, experiment.py and digits/study.py: runs, tables, figures."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:  # scripts start with their own folder on the path, not with this one
    sys.path.insert(0, str(ROOT))
