"""make eval and make predict: a finished run's model, or any MODEL folder, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from core.app import App, Row, prepare
from core.config import Config, ConfigError
from core.policy import language
from core.policy.language import Sampling, complete
from core.run import evaluate as ev
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.splits import Split
from core.run.summary import evaluation_json
from core.run.train import refuse_missing_gpu
from core.train.warmup import quiet


def policy(app: App, config: Config, model: str | None, run: Path) -> tuple[Any, Any, Path]:
    """The model of MODEL= if given, else the one the run left, its tokenizer, and its folder."""
    folder = Path(model) if model else run / "model"
    if not model and not folder.is_dir():
        raise ConfigError(
            f"{run} holds no trained model; run make train APP={app.name} first, name a run with RUN=, or give MODEL="
        )
    return *language.load(config.model, folder), folder


def run_evaluation(app: App, config: Config, model_path: str | None, run: Path, split: str | None) -> int:
    """Score the policy on a split, print the table, write eval-<split>.json beside the model (or in runs/ for a foreign one)."""
    refuse_missing_gpu(config)
    with quiet(), Progress(0, app.name) as progress:
        model, tokenizer, source = policy(app, config, model_path, run)
        data = Split(app, config, progress)
        split = split or config.data.test
        chosen = data.test if split == config.data.test else data.whole(split)
        composite = app.composite(config.rewards.preset, config.rewards.weights)
        headline = next(iter(app.metrics))
        with ev.Judge(app, config, composite) as judge:
            result = ev.evaluate(model, tokenizer, judge, chosen, config)
            free = {}
            for name, baseline in app.baselines.items():
                free[name] = ev.grade(judge, chosen, baseline(data.train, chosen))[0][headline]
        report = evaluation_json(app, chosen, result, headline)
        rows = [
            (name, f"{m['mean']:.4f}", f"[{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]")
            for name, m in report["metrics"].items()
        ]
        rows += [(f"free baseline: {name}", f"{np.nanmean(values):.4f}", "") for name, values in free.items()]
        report |= {
            "model": str(source),
            "split": split,
            "baselines": {name: float(np.nanmean(v)) for name, v in free.items()},
        }
        where = RunFolder(run if not model_path else Path("runs") / app.name / f"eval-{source.name}")
        where.path.mkdir(parents=True, exist_ok=True)
        written = where.write_json(f"eval-{split}.json", report)
        progress.table(f"{source} on {len(chosen)} rows of {split} (greedy)", ["", "mean", "95 % interval"], rows)
        progress.note(f"{result.unscored} rows could not be judged; every prediction is in {written}")
    return 0


def run_prediction(app: App, config: Config, model_path: str | None, run: Path, source: Path, target: Path) -> int:
    """Answer every line of `source` (JSON lines) with the policy; writes each to `target` with "prediction" and "completion".

    A line without an "id" gets "line-<number>". "prediction" is null where no answer could be read from the completion.
    """
    refuse_missing_gpu(config)
    if app.predict is None:
        raise ConfigError(f"app {app.name} has no predict: it answers no free questions")
    if not source.is_file():
        raise ConfigError(f"INPUT={source} is no file; give one with one JSON object a line")
    if target.is_dir():
        raise ConfigError(f"OUTPUT={target} is a folder; give the name of a file to write")
    requests, rows = read_requests(app, source)
    rows = prepare(app, rows, config.task)
    with quiet():
        model, tokenizer, _ = policy(app, config, model_path, run)
    sampling = Sampling(config.rollout.max_completion_length, batch_size=config.evaluate.batch_size)
    completions, _ = complete(model, tokenizer, [row["prompt"] for row in rows], sampling)
    lines = [
        json.dumps(
            request | {"prediction": app.extract(text) if app.extract else text, "completion": text},
            ensure_ascii=False,
        )
        for request, text in zip(requests, completions, strict=True)
    ]
    RunFolder(target.parent).write_text(target.name, "\n".join(lines) + "\n")
    print(f"{len(lines)} answers written to {target}")
    return 0


def read_requests(app: App, source: Path) -> tuple[list[dict[str, Any]], list[Row]]:
    """The objects of a JSON-lines file, and the rows that the app makes of them. Raises ConfigError naming file and line."""
    requests, rows = [], []
    for number, line in enumerate(source.read_text("utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{source}, line {number} is not a JSON object: {error}") from error
        if not isinstance(request, dict):
            raise ConfigError(f"{source}, line {number} is not a JSON object: {line[:60]}")
        request = {"id": f"line-{number}", **request}
        try:
            rows.append({"id": request["id"], **app.predict(request)})
        except KeyError as error:
            raise ConfigError(f"{source}, line {number} lacks the key {error.args[0]!r}") from error
        except (ValueError, OSError) as error:
            raise ConfigError(f"{source}, line {number}: {error}") from error
        requests.append(request)
    if not rows:
        raise ConfigError(f"INPUT={source} is empty; give a file with one JSON object a line")
    return requests, rows
