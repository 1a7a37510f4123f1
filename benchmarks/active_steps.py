"""Noise in the steps that are worth it, against noise in all of them: equal reward in less time an iteration?

    python -P benchmarks/active_steps.py [--seeds 0 1] [--updates 60] [--output FOLDER]      writes results/active_steps.json

Talk2Move (arXiv 2601.02356) makes noise in the first K steps alone, goes to the end in two large ones, and reports half the
time for no worse results. Here both arms train the editing app from the same warm start for as many updates, in 10 steps:

    all      noise in steps 1 to 9, all trained, then the last
    active   noise in the first K steps, all trained, then 2 large ones; K is measured by the run itself (window=active)

`change` is the change of the held-out IoU with the true target over the warm start, `difference` the paired difference of
active to all with a 95 % interval over scenes; `seconds` the median of a training step, arms one after the other.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from core import app as apps
from core import config as configs
from core.run import evaluate as ev
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.summary import git_revision
from core.run.train import Setup, Split, run_training

COMMON = (
    "rollout.steps=10",
    "rollout.eval_steps=10",
    "rollout.window_size=0",
    "evaluate.every=0",
    "evaluate.samples=0",
)
ARMS = {
    "all": ("rollout.window=all", "rollout.shortcut=0"),
    "active": ("rollout.window=active", "rollout.shortcut=2"),
}


def arm(name: str, seed: int, updates: int) -> dict[str, Any]:
    """A run's figures, and the held-out scores of each row after it."""
    app = apps.find("image_editing")
    overrides = [*COMMON, *ARMS[name], f"optim.steps={updates}", f"run.seed={seed}"]
    config = configs.load(app, apps.folder(app.name) / "tiny.yaml", overrides)
    path = Path("runs") / app.name / f"active-{name}-s{seed}"
    with RunFolder.open(path, config.as_dict()) as folder, Progress(updates, path.name) as progress:
        summary = run_training(Setup(app, config), folder, progress, "benchmarks/active_steps.py")
        steps = [line for line in folder.read_metrics() if "step_s" in line]
    metric = summary["metric"]
    items = json.loads((path / "eval.json").read_text())["items"]
    # The first step measures the window.
    return {
        "before": summary["before"],
        "after": summary["after"],
        "ci95": summary["ci95"],
        "seconds": median(line["step_s"] for line in steps[1:]),
        "study_seconds": steps[0]["step_s"],
        "study": {name: value for name, value in steps[0].items() if name.startswith("active/")},
        "scores": [np.nan if item[metric] is None else item[metric] for item in items],
    }


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parse.add_argument("--updates", type=int, default=60)
    parse.add_argument("--output", type=Path, default=Path("results"))
    options = parse.parse_args()
    torch.set_num_threads(1)
    app, cases = apps.find("image_editing"), []
    for seed in options.seeds:
        arms = {name: arm(name, seed, options.updates) for name in ARMS}
        config = configs.load(app, apps.folder(app.name) / "tiny.yaml", [f"run.seed={seed}"])
        with Progress(0, "rows") as progress:
            rows = Split(app, config, progress).test
        scores = {name: np.array(made.pop("scores")) for name, made in arms.items()}
        difference = ev.change(app, rows, scores["all"], scores["active"])
        cases.append(
            {
                "case": f"seed {seed}",
                "arms": {name: made | {"change": made["after"] - made["before"]} for name, made in arms.items()},
                "difference": difference[0],
                "difference_ci95": list(difference[1:]),
                "ratio": arms["active"]["seconds"] / arms["all"]["seconds"],
                "unit": "s/step, active over all",
            }
        )
        command = f"python -P benchmarks/active_steps.py --updates {options.updates}"
        results = {"cases": cases, "command": command, "git": git_revision()}
        RunFolder(options.output).write_json("active_steps.json", results)
        print(json.dumps(cases[-1], indent=1))


if __name__ == "__main__":
    main()
