"""Speed of the public functions against what one writes without them; see docs/benchmarks.md."""

import sys
from pathlib import Path

# Where the sheets are: what is timed, and the baselines.
sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
