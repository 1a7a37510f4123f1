"""python -m core.main train | eval | predict | report | check | new | apps | recipes: what the Makefile calls.

Variables of make arrive as options; everything else is a key of the config (SET="section.key=value ...").
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import sys
from pathlib import Path

import yaml

from core import app as apps
from core import config as configs
from core import ranks
from core.app import AppError
from core.config import Config, ConfigError

ROOMS = ("core", "rewards", "data", "apps")


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 1 if a check failed, or 2 after one sentence on what the user can mend."""
    options = parser().parse_args(arguments)
    options.arguments = sys.argv[1:] if arguments is None else arguments
    from core.pool import WorkerError
    from core.run.stopping import Stopped
    from core.scoring import RewardsFailing

    try:
        refuse_strangers()
        return COMMANDS[options.command](options)
    except Stopped as stopped:
        if ranks.is_main():
            print("stopped; the same command goes on", file=sys.stderr)
        number, alone = stopped.args[0], ranks.count() > 1 and not stopped.together
        return 0 if number == signal.SIGTERM and not alone else 128 + number
    except ranks.OtherRankFailed:
        return 2
    except BrokenPipeError:  # whoever reads the output has seen enough, as in `make recipes | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, WorkerError, RewardsFailing) as error:  # most are subclasses of ours of ValueError
        if os.environ.get("DEBUG"):
            raise
        if isinstance(error, ConfigError) and not ranks.is_main():
            return 2  # every rank meets the same one
        print(f"error: {error}", file=sys.stderr)
        if type(error) is ValueError or isinstance(error, OSError):  # perhaps not meant for the user
            print("(DEBUG=1 shows where this was noticed)", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if os.environ.get("DEBUG") or (error.name or "").split(".")[0] in ROOMS:
            raise
        found = f"the package {error.name!r} is not installed; make setup APP=<app> installs what an app needs"
        print(f"error: {found if error.name else error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m core.main", description=__doc__.splitlines()[0])
    commands = parse.add_subparsers(dest="command", required=True)
    for name, text in HELP.items():
        command = commands.add_parser(name, help=text, description=text)
        if name == "recipes":
            command.add_argument("--name", help="one recipe whole, or several as one: gdpo+gspo")
            command.add_argument("--write", type=Path, metavar="FILE", help="write the page on all of them")
        if name in ("apps", "recipes"):
            continue
        command.add_argument("--app", required=True, help="a folder of apps/")
        if name == "new":
            continue
        command.add_argument(
            "--config", default="tiny", help="a YAML file of the app, without its ending (default tiny)"
        )
        command.add_argument("--data", help="the data set's folder (default: the offline one, made here)")
        command.add_argument("--model", help="a folder or hub id (default: the config's); eval also takes forecasts")
        command.add_argument("--task", help="a named variant of the app")
        command.add_argument("--seed", type=int)
        command.add_argument("--run", help="the run's name or folder (default <config>[-<task>]-s<seed>)")
        command.add_argument("--set", default="", help='overrides, "section.key=value ..."')
        if name == "train":
            command.add_argument("--fresh", action="store_true", help="delete the run of that name first")
            command.add_argument("--gpus", type=int, default=1, help="processes, one a GPU (without GPUs: on the CPU)")
            command.add_argument(
                "--dry-run", action="store_true", help="print the resolved config and the batch, and stop"
            )
        if name == "eval":
            command.add_argument("--split", help="split to evaluate (default: the config's test split)")
        if name == "predict":
            command.add_argument(
                "--input",
                required=True,
                help="a JSON-lines file of questions, a folder of pictures, or an analysis to forecast from",
            )
            command.add_argument("--output", required=True, help="where to write the answers: a file, or a folder")
    return parse


HELP = {
    "train": "train an app, or go on with a run",
    "eval": "score a run's model, or any MODEL, on held-out rows, without training",
    "predict": "answer questions with a run's model",
    "report": "write a run's report.html again",
    "check": "score gold answers and attacks; loads no model",
    "new": "write the two files of a new app",
    "apps": "list the apps",
    "recipes": "list the recipes, or describe one of them",
}


def refuse_strangers() -> None:
    """The rooms have common names: refuse to run with somebody else's `data` or `apps`."""
    root = Path(__file__).resolve().parent.parent
    for room in ROOMS:
        found = importlib.util.find_spec(room)
        place = next(iter(found.submodule_search_locations or ()), None) if found else None
        if place is None or Path(place).resolve() != root / room:
            raise ConfigError(
                f"the package {room!r} comes from {place or 'nowhere'}, not from {root / room}; start with python -P from "
                f"{root}, and take the other one off PYTHONPATH"
            )


def resolved(options: argparse.Namespace, of_run: bool = False) -> tuple[apps.App, Config]:
    """The app, and the config of CONFIG= with all overrides.

    of_run: where a run is asked about (and no other MODEL), it is the config that the run was made with, so that lengths,
    prompts and rows are the run's own.
    """
    app = apps.find(options.app, options.task)

    def load(path: Path) -> Config:
        return configs.load(
            app,
            path,
            words(options.set),
            None if app.variant else options.task,
            data__folder=options.data,
            model__path=options.model,
            run__seed=options.seed,
        )

    config = load(apps.folder(app.name) / f"{app.variant + '-' if app.variant else ''}{options.config}.yaml")
    kept = run_path(options, app, config) / "config.yaml"
    return app, load(kept) if of_run and not options.model and kept.exists() else config


def words(overrides: str) -> list[str]:
    """The text of SET=, split as a shell does. Raises ConfigError for a quotation mark without its partner."""
    try:
        return shlex.split(overrides)
    except ValueError as error:
        raise ConfigError(f"SET={overrides!r} cannot be split into section.key=value: {error}") from error


def run_path(options: argparse.Namespace, app, config: Config) -> Path:
    """RUN= as a folder if it looks like one, else runs/<app>/<name>."""
    name = options.run or configs.run_name(options.config, options.task, config.run.seed)
    return Path(name) if os.sep in name else Path("runs") / app.name / name


def train(options: argparse.Namespace) -> int:
    app, config = resolved(options)
    from core.run.folder import RunFolder
    from core.run.progress import Progress
    from core.run.splits import refuse_missing_data
    from core.run.train import Setup, prepare, run_training

    started = "RANK" in os.environ  # by `launch` below, or by torchrun
    if options.gpus < 1:
        raise ConfigError(f"GPUS={options.gpus} is below its least value 1")
    setup = Setup(app, config, None if started else options.gpus, need_machine=not options.dry_run)
    if options.dry_run:
        print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
        print(f"# {setup.batch.line()}")
        return 0
    refuse_missing_data(config)
    path = run_path(options, app, config)
    with Progress(config.optim.steps, f"{app.name} {path.name}", quiet=not ranks.is_main()) as progress:
        if options.gpus > 1 and not started:
            if not RunFolder(path).finished or options.fresh:
                with RunFolder.open(path, config.as_dict(), fresh=options.fresh):  # refuses before any work
                    prepare(setup, progress)
            progress.close()
            return ranks.launch(options.gpus, options.arguments)
        with contextlib.ExitStack() as stack:  # only now: FRESH=1 deletes, and a config that cannot run must not
            folder = RunFolder(path)
            with ranks.main_first():
                if ranks.is_main():
                    folder = RunFolder.open(path, config.as_dict(), fresh=options.fresh)
            stack.enter_context(folder)  # on every rank: whichever cannot write says so in one sentence
            run_training(setup, folder, progress, command(options), options.task)
    return 0


def command(options: argparse.Namespace) -> str:
    """The make command that does the same again."""
    parts = [f"make {options.command} APP={options.app}"]
    if options.config != "tiny":
        parts.append(f"CONFIG={options.config}")
    for name in ("data", "model", "task", "seed", "run", "gpus"):
        value = getattr(options, name, None)
        if value is not None and (name, value) != ("gpus", 1):
            parts.append(f"{name.upper()}={shlex.quote(str(value))}")
    return " ".join(parts + ([f"SET={shlex.quote(options.set)}"] if options.set else []))


def evaluate(options: argparse.Namespace) -> int:
    from core.run.evaluation import run_evaluation

    app, config = resolved(options, of_run=True)
    _, own = resolved(argparse.Namespace(**vars(options) | {"model": None}), of_run=True)
    return run_evaluation(app, config, options.model, run_path(options, app, config), options.split, own)


def predict(options: argparse.Namespace) -> int:
    from core.run.evaluation import run_prediction

    app, config = resolved(options, of_run=True)
    return run_prediction(
        app, config, options.model, run_path(options, app, config), Path(options.input), Path(options.output)
    )


def report(options: argparse.Namespace) -> int:
    from core.run.report import write_report

    app, config = resolved(options)
    path = run_path(options, app, config)
    if not (path / "summary.json").exists() or not (path / "report.json").exists():
        raise ConfigError(f"{path} has no finished run; run make train APP={app.name} first, or name it with RUN=")
    extra = json.loads((path / "report.json").read_text())
    print(write_report(path, json.loads((path / "summary.json").read_text()), extra))
    return 0


def check(options: argparse.Namespace) -> int:
    from core.run.evaluate import Judge
    from core.run.progress import Progress
    from core.run.splits import read
    from core.run.train import Setup

    app, config = resolved(options)
    print(yaml.safe_dump(config.as_dict(), sort_keys=False), end="")
    with Progress(0, app.name) as progress:
        setup = Setup(app, config, need_machine=False)
        setup.say(progress)
        _, splits = read(app, config, progress)
        with Judge(app, config, setup.composite) as judge:
            findings = []
            for split, rows in splits.items():
                prepared = apps.prepare(app, rows, config.task)
                canaries = split == config.data.test
                found = apps.self_check(app, prepared, judge.rewards, judge.metrics, canary_rows=4 if canaries else 0)
                findings += [apps.Finding(f"{split}: {f.what}", f.ok, f.detail) for f in found]
        progress.table(
            "self-check", ["what", "", "evidence"], [(f.what, "ok" if f.ok else "FAILS", f.detail) for f in findings]
        )
        failed = sum(not f.ok for f in findings)
        progress.note(f"{len(findings) - failed} of {len(findings)} checks hold")
    return 1 if failed else 0


def new(options: argparse.Namespace) -> int:
    from core.run.scaffold import write_app

    print(write_app(options.app))
    return 0


def list_apps(options: argparse.Namespace) -> int:
    for name in apps.names():
        try:
            app = apps.find(name)
            tasks = f"; TASK={' or '.join([*app.tasks, *app.variants])}" if app.tasks or app.variants else ""
            print(f"{name:22} rewards: {', '.join(app.rewards)}; metric: {next(iter(app.metrics))}{tasks}")
        except AppError as error:
            print(f"{name:22} {error}")
    return 0


def list_recipes(options: argparse.Namespace) -> int:
    from core.objective import family
    from core.objective.recipes import build

    width = max(100, min(120, shutil.get_terminal_size((110, 0)).columns))
    if options.write:
        options.write.write_text(family.page())
        print(options.write)
    elif options.name:
        try:
            print(family.describe(build({"recipe": options.name.split("+")}), width))
        except ValueError as error:
            raise ConfigError(str(error)) from error
    else:
        print(family.table(width))
    return 0


COMMANDS = {
    "train": train, "eval": evaluate, "predict": predict, "report": report,
    "check": check, "new": new, "apps": list_apps, "recipes": list_recipes,
}  # fmt: skip

if __name__ == "__main__":
    sys.exit(main())
