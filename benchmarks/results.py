"""make results APP=x [TASK=variant]: every number in an app's README, rerun: seeds, controls and rivals at equal seconds.

    runs       the offline command for each seed
    controls   shuffled advantages (must not learn), random rewards, and what the same seconds buy without reinforcement
               (benchmarks/equal_time.py)

Writes results/<app>[-<task>].json and .svg, and the tables of the app's README. Finished runs in runs/ are taken as they
are, so a stopped call goes on.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from core import app as apps
from core import config as configs
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.summary import git_revision
from core.run.train import Setup, run_training

sys.path.insert(0, str(Path(__file__).parent))  # started with -P

import equal_time
import readme


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--app", required=True)
    parse.add_argument("--task", help="a variant of the app")
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parse.add_argument("--shuffled-seeds", type=int, nargs="*", help="seeds of shuffled advantages (default: all)")
    parse.add_argument(
        "--rival-seeds", type=int, nargs="*", help="seeds of random rewards and rivals (default: the first)"
    )
    options = parse.parse_args()
    app = apps.find(options.app, options.task)
    if options.task and app.variant != options.task:
        parse.error(f"{options.app} has no variant {options.task!r}; there are: {', '.join(app.variants) or 'none'}")
    runs: list[dict] = []
    controls: dict[str, list[dict]] = {}

    def write() -> None:
        kept = Path("results") / f"{app.label}.json"
        studies = json.loads(kept.read_text()).get("studies", {}) if kept.exists() else {}  # other scripts' part
        results = {"runs": runs, "controls": controls, "studies": studies, "command": command(app)}
        RunFolder("results").write_json(f"{app.label}.json", {**results, "git": git_revision()})
        draw(app.label, results)
        tell(app, results)

    for seed in options.seeds:
        runs.append(train(app, seed))
        if options.shuffled_seeds is None or seed in options.shuffled_seeds:
            controls.setdefault("shuffled advantages", []).append(train(app, seed, "shuffled_advantages"))
        write()
    forecast = isinstance(app.acts, apps.Forecast)  # its rivals are its baselines, and benchmarks/air_quality_arms.py
    for seed in options.seeds[: 0 if forecast else 1] if options.rival_seeds is None else options.rival_seeds:
        controls.setdefault("random rewards", []).append(train(app, seed, "random_rewards"))
        for name, summary in rivals(app, seed, next(run for run in runs if run["seed"] == seed)).items():
            controls.setdefault(name, []).append(summary)
        write()


def command(app) -> str:
    return f"make results APP={app.name}" + (f" TASK={app.variant}" if app.variant else "")


def load(app, seed: int, **settings):
    name = f"{app.variant}-tiny.yaml" if app.variant else "tiny.yaml"
    return configs.load(app, apps.folder(app.name) / name, run__seed=seed, **settings)


def place(app, name: str, seed: int) -> Path:
    """Of a run, or of the rivals' figures."""
    return Path("runs") / app.name / f"results-{f'{app.variant}-' if app.variant else ''}{name}-s{seed}"


def train(app, seed: int, control: str | None = None) -> dict:
    config = load(app, seed, run__control=control)
    path = place(app, control or "grpo", seed)
    made = command(app).replace("results", "train") + f" SEED={seed}"
    with RunFolder.open(path, config.as_dict()) as folder, Progress(config.optim.steps, path.name) as progress:
        summary = run_training(Setup(app, config), folder, progress, made, app.variant or None)
    return {**summary, "name": control or "grpo"}


def rivals(app, seed: int, reference: dict) -> dict[str, dict]:
    """{name: summary} of what the same seconds, or the same samples, buy without reinforcement; kept in runs/."""
    cache = place(app, "rivals", seed).with_suffix(".json")
    if cache.exists():
        return json.loads(cache.read_text())
    found = equal_time.rivals(app, load(app, seed), reference["seconds"]["rl"], f"rivals, seed {seed}")
    RunFolder(cache.parent).write_json(cache.name, found)
    return found


def tell(app, results: dict) -> None:
    """The tables of the app's README, between the two marks of the app or its variant."""
    metric, lower = results["runs"][0]["metric"], results["runs"][0]["better"] == "lower"
    told = f"{metric}, less is better" if lower else metric
    digits = 3 if results["runs"][0]["before"] >= 0.1 else 4
    lines = [f"### Figures (`{results['command']}`, {results['runs'][0]['n']} held-out rows, {told})", ""]
    lines += ["| arm | seed | before | after | change, 95 % interval | sampled before, after | update size |"]
    lines += ["|---" * 7 + "|"]
    for arm, summaries in {"GRPO": results["runs"], **results["controls"]}.items():
        for s in summaries:
            table = {row["name"]: row for row in s.get("table", [])}
            sampled = table.get(
                f"{metric}, sampled", {"before": s.get("sampled_before"), "after": s.get("sampled_after")}
            )
            pair = "" if sampled["before"] is None else f"{sampled['before']:.{digits}f}, {sampled['after']:.{digits}f}"
            interval = f" [{s['ci95'][0]:+.{digits}f}, {s['ci95'][1]:+.{digits}f}]" if "ci95" in s else ""
            size = f"{s['update_size']:.3f}" if s.get("update_size") is not None else ""
            change = f"{s['after'] - s['before']:+.{digits}f}{interval}"
            ends = f"{s['before']:.{digits}f} | {s['after']:.{digits}f}"
            lines.append(f"| {arm} | {s['seed']} | {ends} | {change} | {pair} | {size} |")
    names = list(dict.fromkeys(row["name"].split(" (")[0] for run in results["runs"] for row in run["table"]))
    lines += ["", "Every line of the runs' own tables, before and after, for each seed:", ""]
    seeds = [f"seed {run['seed']}" for run in results["runs"]]
    lines += [f"| | {' | '.join(seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    for name in names:
        cells = []
        for run in results["runs"]:
            row = next((row for row in run["table"] if row["name"].split(" (")[0] == name), None)
            cells.append(f"{row['before']:.3f} → {row['after']:.3f}" if row else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for name in results["runs"][0]["baselines"]:
        values = [f"{run['baselines'][name]:.{digits}f}" for run in results["runs"]]
        lines.append(f"| free: {name} | {' | '.join(values)} |")
    rivals = [run.get("best_baseline") for run in results["runs"]]
    if all(rivals):
        cells = [
            f"{rival['name']}: {rival['before']:+.4f} → {rival['after']:+.4f} [{rival['ci95'][0]:+.4f}, {rival['ci95'][1]:+.4f}]"
            for rival in rivals
        ]
        lines.append(f"| less the best free one | {' | '.join(cells)} |")
    spent = [sum(v for k, v in run["seconds"].items() if k != "warmup_made") for run in results["runs"]]
    lines += ["", f"Seconds in all, of each seed: {', '.join(f'{v:.0f}' for v in spent)}."]
    readme.rewrite(app.name, f"results {app.variant}".rstrip(), "\n".join(lines))


def draw(name: str, results: dict) -> None:
    """results/<app>.svg: the change in the headline metric of every arm and seed, with its interval where there is one."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    arms = {"GRPO": results["runs"], **results["controls"]}
    figure = Figure(figsize=(8.5, 0.55 * len(arms) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for row, (_arm, summaries) in enumerate(arms.items()):
        for k, summary in enumerate(summaries):
            change, y = summary["after"] - summary["before"], row + 0.18 * (k - (len(summaries) - 1) / 2)
            colour = "#1c6ea4" if row == 0 else "#8a8a8a"
            if "ci95" in summary:
                axes.plot(summary["ci95"], [y, y], color=colour, linewidth=1.6, solid_capstyle="butt")
            axes.plot(change, y, "o", color=colour, markersize=4.5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(arms)), list(arms))
    axes.invert_yaxis()
    axes.set_xlabel(
        f"change in {results['runs'][0]['metric']} over the warm start, held out (95 % interval; one dot a seed)"
        + ("; less is better" if results["runs"][0]["better"] == "lower" else "")
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(Path("results") / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
