"""Benchmarks of which a small version shows, at every change, what the large one measures now and then."""

import json
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def test_a_labeling_with_faults_and_a_kill_ends_with_every_feature_labeled_or_recorded():
    command = [sys.executable, str(BENCHMARKS / "labeling.py"), "--features", "60", "--kills", "1", "--only", "load"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert sum(told["status"].values()) == sum(told["status"].get(s, 0) for s in ("written", "failed")) == 60
    assert told["status"]["written"] >= 54
    assert told["bought_twice"] == 0
    assert told["lost_to_kills"] <= told["concurrency"]
    assert sum(told["server"].get(fault, 0) for fault in ("429", "500", "prose", "cut", "hang")) > 0
