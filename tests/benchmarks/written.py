"""What the JSON of any benchmark must look like."""

import json
import math
import socket
from pathlib import Path

ROOT = Path(__file__).parents[2]
KEYS = {"case", "ours", "baseline", "ratio", "ci95", "unit", "pairs"}


def check(path):
    """Raises AssertionError unless the file is well formed; returns its cases."""
    text = path.read_text()
    result = json.loads(text)
    assert set(result) == {"cases", "machine", "command", "git"}
    assert set(result["machine"]) == {"cores", "python", "torch", "sqlite"}
    assert str(ROOT) not in text
    assert str(path.parent) not in text
    assert socket.gethostname() not in text
    assert result["command"].endswith(".py --quick")
    assert len({case["case"] for case in result["cases"]}) == len(result["cases"])
    for case in result["cases"]:
        assert set(case) >= KEYS
        low, high = case["ci95"]
        assert 0 < low <= case["ratio"] <= high < math.inf, case
        assert case["ours"] > 0 < case["baseline"]
        assert case["pairs"] >= 2
    return result["cases"]
