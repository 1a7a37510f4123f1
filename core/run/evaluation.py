"""make eval and make predict: a finished run's model, or any MODEL folder, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from core.app import App, prepare, unknown
from core.config import Config, ConfigError
from core.policy import language
from core.policy.language import Sampling, complete
from core.run import evaluate as ev
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.splits import Split, data_folder
from core.run.summary import evaluation_json
from core.run.train import refuse_machine
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
    refuse_machine(config)
    with quiet(), Progress(0, app.name) as progress:
        model, tokenizer, source = policy(app, config, model_path, run)
        splits = app.load(data_folder(app, config, progress))
        split = split or config.data.test
        if split not in splits:
            raise ConfigError(unknown("SPLIT", split, splits))
        chosen = (
            Split(app, config, progress).test if split == config.data.test else prepare(app, splits[split], config.task)
        )
        composite = app.composite(config.rewards.preset, config.rewards.weights)
        headline = next(iter(app.metrics))
        with ev.Judge(app, config, composite) as judge:
            result = ev.evaluate(model, tokenizer, judge, chosen, config)
            free = {}
            for name, baseline in app.baselines.items():
                answers = baseline(prepare(app, splits[config.data.train], config.task), chosen)
                free[name] = ev.grade(judge, chosen, answers)[0][headline]
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
    """Answer every line of `source` (JSON lines) with the policy; writes JSON lines {..., "prediction"} to `target`."""
    refuse_machine(config)
    if app.predict is None:
        raise ConfigError(f"app {app.name} has no predict: it answers no free questions")
    if not source.exists():
        raise ConfigError(f"INPUT={source} does not exist; give a file with one JSON object a line")
    requests = []
    for number, line in enumerate(source.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            request = json.loads(line)
            requests.append({"id": f"line-{number}", **app.predict(request)})
        except json.JSONDecodeError as error:
            raise ConfigError(f"{source}, line {number} is not a JSON object: {error}") from error
        except KeyError as error:
            raise ConfigError(f"{source}, line {number} lacks the key {error.args[0]!r}") from error
        except (TypeError, ValueError, FileNotFoundError) as error:
            raise ConfigError(f"{source}, line {number}: {error}") from error
    rows = prepare(app, requests, config.task)
    with quiet():
        model, tokenizer, _ = policy(app, config, model_path, run)
    sampling = Sampling(config.rollout.max_completion_length, batch_size=config.evaluate.batch_size)
    completions, _ = complete(model, tokenizer, [row["prompt"] for row in rows], sampling)
    lines = [
        json.dumps(
            {"id": row["id"], "prediction": app.extract(text) if app.extract else text, "completion": text},
            ensure_ascii=False,
        )
        for row, text in zip(rows, completions, strict=True)
    ]
    RunFolder(target.parent).write_text(target.name, "\n".join(lines) + "\n")
    print(f"{len(lines)} answers written to {target}")
    return 0
