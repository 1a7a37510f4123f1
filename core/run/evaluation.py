"""make eval and make predict: a finished run's model, or any MODEL folder, without training."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from core.app import App, prepare
from core.config import Config, ConfigError
from core.run import evaluate as ev
from core.run.actor import Actor, actor_of
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.splits import Split
from core.run.summary import evaluation_json
from core.run.train import refuse_missing_gpu
from core.train.warmup import quiet


def policy(app: App, config: Config, model: str | None, run: Path) -> tuple[Actor, Path]:
    """The model of MODEL= if given, else the one the run left, and its folder."""
    folder = Path(model) if model else run / "model"
    if not model and not folder.is_dir():
        raise ConfigError(
            f"{run} holds no trained model; run make train APP={app.name} first, name a run with RUN=, or give MODEL="
        )
    return actor_of(app).load(app, config, folder), folder


def run_evaluation(app: App, config: Config, model_path: str | None, run: Path, split: str | None) -> int:
    """Score the policy on a split, print the table, write eval-<split>.json beside the model (or in runs/ for a foreign one)."""
    refuse_missing_gpu(config)
    with quiet(), Progress(0, app.name) as progress:
        actor, source = policy(app, config, model_path, run)
        data = Split(app, config, progress)
        split = split or config.data.test
        chosen = data.test if split == config.data.test else data.whole(split)
        composite = app.composite(config.rewards.preset, config.rewards.weights)
        headline = next(iter(app.metrics))
        with ev.Judge(app, config, composite) as judge:
            result = ev.evaluate(actor, judge, chosen)
            free = {}
            for name, baseline in app.baselines.items():
                free[name] = ev.grade(judge, chosen, baseline(data.train, chosen))[0][headline]
        where = RunFolder(run if not model_path else Path("runs") / app.name / f"eval-{source.name}")
        kept = actor.keep(where, f"eval-{split}", result.completions)
        report = evaluation_json(app, chosen, result, kept, headline)
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
        where.path.mkdir(parents=True, exist_ok=True)
        written = where.write_json(f"eval-{split}.json", report)
        progress.table(f"{source} on {len(chosen)} rows of {split} ({actor.how})", ["", "mean", "95 % interval"], rows)
        progress.note(f"{result.unscored} rows could not be judged; every prediction is in {written}")
    return 0


def run_prediction(app: App, config: Config, model_path: str | None, run: Path, source: Path, target: Path) -> int:
    """Answer what INPUT= asks with the policy, into OUTPUT=: files for language models, folders of pictures for flows."""
    refuse_missing_gpu(config)
    if app.predict is None:
        raise ConfigError(f"app {app.name} has no predict: it answers no free questions")
    requests, rows = actor_of(app).requests(app, source, target)
    rows = prepare(app, rows, config.task)
    with quiet():
        actor, _ = policy(app, config, model_path, run)
    completions, _ = actor.complete(rows, range(len(rows)))
    actor.answer(requests, completions, target)
    print(f"{len(completions)} answers written to {target}")
    return 0
