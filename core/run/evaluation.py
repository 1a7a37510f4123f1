"""make eval and make predict: a finished run's model, or any MODEL folder, without training."""

from __future__ import annotations

from pathlib import Path

from core.app import App, prepare
from core.config import Config, ConfigError
from core.run import evaluate as ev
from core.run.actor import Actor, actor_of
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.rivals import Rivals, best_baseline, compare, difference, verified
from core.run.splits import Split
from core.run.summary import evaluation_json, span, verification_table
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


def run_evaluation(
    app: App, config: Config, model_path: str | None, run: Path, split: str | None, own: Config | None = None
) -> int:
    """Score the policy on a split, print the table, write eval-<split>.json beside the model (or in runs/ for a foreign one).

    own: the config without MODEL=, if there is one: learned baselines come from its supervised starts.
    """
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
            rivals = Rivals(app, own or config, data, chosen, judge, progress, make=False)
            compared = compare(rivals, {"model": result.completions})
        where = RunFolder(run if not model_path else Path("runs") / app.name / f"eval-{source.name}")
        kept = actor.keep(where, f"eval-{split}", chosen, result.completions)
        report = evaluation_json(app, chosen, result, kept, headline)
        free = {name: ev.mean(g.scores[headline], g.weights[headline]) for name, g in compared.baselines.items()}
        rows = [
            (
                name + (" ↓" if app.better(name) == "lower" else ""),
                f"{m['mean']:.4f}",
                f"[{m['ci95'][0]:.3f}, {m['ci95'][1]:.3f}]",
            )
            for name, m in report["metrics"].items()
        ]
        rows += [(f"free baseline: {name}", f"{value:.4f}", "") for name, value in free.items()]
        report |= {"model": str(source), "split": split, "baselines": free}
        if best := best_baseline(app, compared.baselines):
            own, *ci95 = difference(app, chosen, result, compared.baselines[best[0]])
            report["best_baseline"] = {"name": best[0], "value": best[1], "model": own, "ci95": ci95}
            rows.append((f"{headline} minus that of {best[0]}", f"{own:+.4f}", span(*ci95)))
        report |= verified(app, chosen, compared.arms)
        where.path.mkdir(parents=True, exist_ok=True)
        written = where.write_json(f"eval-{split}.json", report)
        progress.table(f"{source} on {len(chosen)} rows of {split} ({actor.how})", ["", "mean", "95 % interval"], rows)
        for table in report["tables"]:
            verification_table(progress, table)
        progress.note(f"{result.unscored} rows could not be judged; every prediction is in {written}")
    return 0


def run_prediction(app: App, config: Config, model_path: str | None, run: Path, source: Path, target: Path) -> int:
    """Answer what INPUT= asks with the policy, into OUTPUT=: of texts a file, of pictures a folder, of forecasts either."""
    refuse_missing_gpu(config)
    kind = actor_of(app)
    requests, rows = kind.requests(app, source, target)
    rows = prepare(app, rows, config.task)
    kind.refuse_rows(app, config, rows)
    with quiet():
        actor, _ = policy(app, config, model_path, run)
    actor.refuse_requests()
    completions, _ = actor.complete(rows, range(len(rows)))
    actor.answer(requests, rows, completions, target)
    print(f"{len(completions)} answers written to {target}")
    return 0
