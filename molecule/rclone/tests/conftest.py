"""Where the scenario's own programs and the project's are found."""

import sys
from pathlib import Path

SCENARIO = Path(__file__).parents[1]
sys.path[:0] = [str(SCENARIO), str(SCENARIO.parents[1] / "tests")]
