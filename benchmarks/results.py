"""make results APP=x: every number in an app's README, rerun: seeds, controls and rivals at equal seconds.

    runs       the offline command for each seed
    controls   shuffled advantages (must not learn), random rewards, and the rivals of reinforcement, which start from the
               same warm start and get the same wall seconds: more imitation of the same demonstrations, imitation of the
               policy's own samples that the reward accepts, imitation of gold on the prompts of RL (the upper rival), and
               sampling more without training (best of G by an oracle; the most common of G)

Writes results/<app>.json and results/<app>.svg. Finished runs in runs/ are taken as they are, so a stopped call goes on.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np

from core import app as apps
from core import config as configs
from core.policy import language
from core.run import evaluate as ev
from core.run.folder import RunFolder
from core.run.progress import Progress
from core.run.start import distance, start
from core.run.summary import git_revision
from core.run.train import Setup, Split, run_training
from core.train.warmup import imitate, quiet


def main() -> None:
    parse = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parse.add_argument("--app", required=True)
    parse.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parse.add_argument(
        "--rival-seeds", type=int, nargs="*", help="seeds of random rewards and rivals (default: the first)"
    )
    options = parse.parse_args()
    app = apps.find(options.app)
    runs: list[dict] = []
    controls: dict[str, list[dict]] = {}

    def write() -> None:
        results = {"runs": runs, "controls": controls, "studies": {}, "command": f"make results APP={app.name}"}
        RunFolder("results").write_json(f"{app.name}.json", {**results, "git": git_revision()})
        draw(app.name, results)
        tell(apps.folder(app.name) / "README.md", results)

    for seed in options.seeds:
        runs.append(train(app, seed))
        controls.setdefault("shuffled advantages", []).append(train(app, seed, "shuffled_advantages"))
        write()
    for seed in options.seeds[:1] if options.rival_seeds is None else options.rival_seeds:
        controls.setdefault("random rewards", []).append(train(app, seed, "random_rewards"))
        for name, summary in rivals(app, seed, next(run for run in runs if run["seed"] == seed)).items():
            controls.setdefault(name, []).append(summary)
        write()


def load(app, seed: int, **settings):
    return configs.load(app, apps.folder(app.name) / "tiny.yaml", run__seed=seed, **settings)


def train(app, seed: int, control: str | None = None) -> dict:
    config = load(app, seed, run__control=control)
    path = Path("runs") / app.name / f"results-{control or 'grpo'}-s{seed}"
    with RunFolder.open(path, config.as_dict()) as folder, Progress(config.optim.steps, path.name) as progress:
        summary = run_training(Setup(app, config), folder, progress, f"make train APP={app.name} SEED={seed}")
    return {**summary, "name": control or "grpo"}


def rivals(app, seed: int, reference: dict) -> dict[str, dict]:
    """{name: summary} of what the same seconds, or the same samples, buy without reinforcement."""
    config = load(app, seed)
    cache = Path("runs") / app.name / f"results-rivals-s{seed}.json"
    if cache.exists():
        return json.loads(cache.read_text())
    found: dict[str, dict] = {}
    seconds = reference["seconds"]["rl"]
    with Progress(0, f"rivals, seed {seed}") as progress, quiet():
        setup = Setup(app, config)
        data = Split(app, config, progress)
        headline = setup.headline
        with ev.Judge(app, config, setup.composite) as judge:

            def measured(name: str, model, before, extra=None) -> None:
                after = ev.evaluate(model, tokenizer, judge, data.test, config, samples=1)
                diff, lo, hi = ev.change(app, data.test, before.scores[headline], after.scores[headline])
                found[name] = {
                    "name": name, "seed": seed, "before": before.mean(headline), "after": after.mean(headline),
                    "change": diff, "ci95": [lo, hi], "n": len(data.test),
                    "sampled_before": float(np.nanmean(before.sampled[headline])),
                    "sampled_after": float(np.nanmean(after.sampled[headline])),
                    "update_size": moved(model), **(extra or {}),
                }  # fmt: skip
                progress.note(f"{name}: {found[name]['before']:.3f} -> {found[name]['after']:.3f}")

            model, tokenizer, warm = start(app, config, data, judge, progress)
            moved = distance(model)
            before = ev.evaluate(model, tokenizer, judge, data.test, config, samples=1)
            group = config.rollout.group_size
            more = ev.best_of(model, tokenizer, judge, data.test, config, group, headline)
            for how, value in more.items():
                found[f"best of {group}, {how}"] = {
                    "name": how,
                    "seed": seed,
                    "before": before.mean(headline),
                    "after": value,
                    "n": len(data.test),
                }
            prompts = [row["prompt"] for row in data.train]
            common = {
                "batch_size": config.warmup.batch_size,
                "lr": config.warmup.lr / 4,
                "seed": seed + 1,
                "steps": 10**6,
            }
            common |= {"output": Path("runs") / "warmup" / "sft", "prompt_loss": False}

            shown = data.train[: config.warmup.rows]
            labels = app.demonstrations(shown, seed)
            imitate(model, tokenizer, prompts[: len(shown)], labels, seconds=seconds, **common)
            measured("more imitation of the same demonstrations", model, before)

            model, _ = language.load(config.model, warm["path"])
            began = time.monotonic()
            limit = config.optim.steps * config.rollout.prompts_per_step  # the prompts that RL saw
            asked = data.train[:limit]
            kept = []
            for draw in ev.draws(model, tokenizer, asked, config, 2):
                scores = judge.rewards.score(draw, asked)
                right = scores.values[:, judge.rewards.names.index(app.outcome)] >= 1
                kept += [(row["prompt"], text) for row, text, ok in zip(asked, draw, right, strict=True) if ok]
            left = max(1.0, seconds - (time.monotonic() - began))
            imitate(model, tokenizer, [p for p, _ in kept], [c for _, c in kept], seconds=left, **common)
            measured("imitation of own samples that the reward accepts", model, before, {"kept": len(kept)})

            model, _ = language.load(config.model, warm["path"])
            imitate(
                model,
                tokenizer,
                [row["prompt"] for row in asked],
                [app.gold(row) for row in asked],
                seconds=seconds,
                **common,
            )
            measured("imitation of gold on the prompts of RL", model, before)
    RunFolder(cache.parent).write_json(cache.name, found)
    return found


MARKS = "<!-- results -->", "<!-- /results -->"


def tell(readme: Path, results: dict) -> None:
    """The tables of the app's README, between its two marks."""
    head, rest = readme.read_text().split(MARKS[0])
    tail = rest.split(MARKS[1])[1]
    metric = results["runs"][0]["metric"]
    lines = ["", f"### Figures (`{results['command']}`, {results['runs'][0]['n']} held-out rows, {metric}, greedy)", ""]
    lines += ["| arm | seed | before | after | change, 95 % interval | sampled before, after | update size |"]
    lines += ["|---" * 7 + "|"]
    for arm, summaries in {"GRPO": results["runs"], **results["controls"]}.items():
        for s in summaries:
            table = {row["name"]: row for row in s.get("table", [])}
            sampled = table.get(
                f"{metric}, sampled", {"before": s.get("sampled_before"), "after": s.get("sampled_after")}
            )
            pair = "" if sampled["before"] is None else f"{sampled['before']:.3f}, {sampled['after']:.3f}"
            interval = f" [{s['ci95'][0]:+.3f}, {s['ci95'][1]:+.3f}]" if "ci95" in s else ""
            size = f"{s['update_size']:.3f}" if s.get("update_size") is not None else ""
            change = f"{s['after'] - s['before']:+.3f}{interval}"
            lines.append(f"| {arm} | {s['seed']} | {s['before']:.3f} | {s['after']:.3f} | {change} | {pair} | {size} |")
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
        values = [f"{run['baselines'][name]:.3f}" for run in results["runs"]]
        lines.append(f"| free: {name} | {' | '.join(values)} |")
    spent = [sum(v for k, v in run["seconds"].items() if k != "warmup_made") for run in results["runs"]]
    lines += ["", f"Seconds in all, of each seed: {', '.join(f'{v:.0f}' for v in spent)}.", ""]
    RunFolder(readme.parent).write_text(readme.name, head + MARKS[0] + "\n".join(["", *lines]) + MARKS[1] + tail)


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
        f"change in {results['runs'][0]['metric']} over the warm start, held-out databases (95 % interval; one dot a seed)"
    )
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(Path("results") / f"{name}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
