"""SIGTERM and SIGINT: what a run leaves, and that the same command goes on to the same bits.

On the app in faulty_apps/ (28 prompts, four a step, so an epoch has seven steps).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from faulty_run import RUN, Command, Event, command

from core.run.stopping import Stopped, StopRequest

LOSS = "core.train.language:LanguageTrainer._compute_loss"
GRACE_S = 10  # a step of a third of a second, a save, and the end of the interpreter, on a busy machine


def signal_self(number, *_, **__):
    os.kill(os.getpid(), number)


def model(home):
    return (home / RUN / "model" / "model.safetensors").read_bytes()


def saved(home):
    return sorted(int(path.name[11:]) for path in (home / RUN / "checkpoints").glob("checkpoint-*"))


SETTINGS = {
    "an epoch and more": "optim.steps=10 run.save_every=100",
    "two passes over each batch": "optim.steps=18 run.save_every=100 rollout.iterations=2 optim.micro_batch=8",
}


@pytest.fixture(scope="module", params=list(SETTINGS))
def whole(request, tmp_path_factory):
    """The home and the settings of a run that nobody stopped."""
    home = tmp_path_factory.mktemp("whole")
    ended = command(home, "--set", SETTINGS[request.param])
    assert ended.code == 0, ended.error
    return home, SETTINGS[request.param]


@pytest.fixture
def home(whole, tmp_path):
    for name in ("data", "warmup"):
        shutil.copytree(whole[0] / "runs" / name, tmp_path / "runs" / name)
    return tmp_path


def test_terminated_within_steps_of_both_epochs_it_ends_with_0_and_goes_on_to_the_same_bits(whole, home):
    reference, settings = whole
    micro = 2 if "micro_batch" in settings else 1  # calls of the loss in a step
    last = 17 if micro == 2 else 9  # in the second epoch, and with two passes between them
    for done, call in ((3, 2 * micro + 1), (last, (last - 1 - 3) * micro + 1)):  # the first micro-batch of a step
        stop = Event(LOSS, [call], partial(signal_self, signal.SIGTERM))
        began = time.monotonic()
        ended = command(home, "--set", settings, events=(stop,))
        assert ended.code == 0, ended.error
        assert "SIGTERM: finishing this step, then saving" in ended.error
        assert ended.error.endswith("stopped; the same command goes on\n")
        assert saved(home)[-1] == done
        assert not (home / RUN / "summary.json").exists()
        assert time.monotonic() - began < 60
    ended = command(home, "--set", settings)
    assert ended.code == 0, ended.error
    assert f"resuming after step {last}\n" in ended.out
    assert model(home) == model(reference)
    lines = [json.loads(line) for line in (home / RUN / "metrics.jsonl").open()]
    steps = [line["step"] for line in lines if "loss" in line]
    assert steps == list(range(1, len(steps) + 1))


def test_it_ends_within_one_step_and_one_save(home):
    run = Command(home, "--set", "optim.steps=1000 run.save_every=1000")
    while not (home / RUN / "metrics.jsonl").exists() or '"step": 3' not in (home / RUN / "metrics.jsonl").read_text():
        time.sleep(0.02)
        assert run.process.is_alive()
    began = time.monotonic()
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.end().code == 0
    assert time.monotonic() - began < GRACE_S
    assert saved(home)


@pytest.mark.parametrize(
    ("where", "number", "code"),
    [
        ("core.run.train:full_evaluation", signal.SIGTERM, 0),  # nothing to finish: it ends on the spot
        ("core.run.train:full_evaluation", signal.SIGINT, 130),
        ("core.run.train:full_evaluation", signal.SIGHUP, 129),
        ("trl:SFTTrainer.training_step", signal.SIGTERM, 0),
    ],
)
def test_elsewhere_it_ends_at_once_and_begins_that_part_again(whole, home, where, number, code):
    reference, settings = whole
    if "SFT" in where:
        shutil.rmtree(home / "runs" / "warmup")
    ended = command(home, "--set", settings, events=(Event(where, [1], partial(signal_self, number)),))
    assert ended.code == code, ended.error
    assert ended.error.endswith("stopped; the same command goes on\n")
    assert saved(home) == []
    assert command(home, "--set", settings).code == 0
    assert model(home) == model(reference)


def test_the_second_signal_ends_a_step_at_once(home):
    ended = command(home, events=(Event(LOSS, [3], signal_twice),))
    assert ended.code == 130, ended.error
    assert saved(home) == [2]


def signal_twice(*_, **__):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)


def test_handlers_are_as_they_were_and_a_waiting_signal_is_not_lost():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped) as stopped, StopRequest() as stop, stop.between_steps():
        signal_self(signal.SIGTERM)
    assert stop.asked == signal.SIGTERM
    assert stopped.value.args == (signal.SIGTERM,)
    assert signal.getsignal(signal.SIGTERM) is before


# -- two ranks ---------------------------------------------------------------------------------------------------------

SMALL = (
    "model.width=32 model.layers=1 model.vocabulary=400 warmup.steps=20 data.train_rows=40 data.test_rows=8 "
    "evaluate.validation_rows=4 evaluate.every=0 optim.steps=24 optim.lr=0.01 run.save_every=5 rollout.prompts_per_step=4 "
    "rollout.group_size=4 optim.micro_batch=8 rollout.max_completion_length=12 rewards.workers=2 run.control=random_rewards"
)


def start(home, run, inject="", more=""):
    """A run of two ranks. inject: Python that each rank runs before anything else."""
    (home / run).mkdir(exist_ok=True)
    (home / run / "sitecustomize.py").write_text(inject)
    arguments = ["train", "--app", "text_to_sql", "--run", run, "--gpus", "2", "--set", f"{SMALL} {more}"]
    root = str(Path(__file__).resolve().parents[3])
    said = (home / f"{run}.txt").open("a")
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "core.main", *arguments],
        cwd=home, env={**os.environ, "PYTHONPATH": os.pathsep.join([str(home / run), root])}, stdout=said, stderr=said,
    )  # fmt: skip


def weights(home, run):
    return (home / "runs/text_to_sql" / run / "model" / "model.safetensors").read_bytes()


def wait_for_step(home, run, step, process):
    metrics = home / "runs/text_to_sql" / run / "metrics.jsonl"
    while not metrics.exists() or f'"step": {step},' not in metrics.read_text():
        time.sleep(0.05)
        assert process.poll() is None, (home / f"{run}.txt").read_text()


@pytest.mark.slow
def test_two_ranks_stop_together_whoever_is_asked_and_go_on_to_the_same_bits(tmp_path):
    whole = start(tmp_path, "whole")
    assert whole.wait(300) == 0, (tmp_path / "whole.txt").read_text()
    for run, number, victim in (("launcher", "TERM", 0), ("one", "TERM", 2), ("killed", "KILL", 2)):
        process = start(tmp_path, run)
        wait_for_step(tmp_path, run, 7, process)  # an epoch has ten
        ranks = sorted(psutil.Process(process.pid).children(), key=lambda child: child.pid)
        [process, *ranks][victim].send_signal(getattr(signal, f"SIG{number}"))
        assert (process.wait(60) == 0) == (number == "TERM"), (tmp_path / f"{run}.txt").read_text()
        kept = sorted((tmp_path / "runs/text_to_sql" / run / "checkpoints").glob("checkpoint-*"))
        assert all((folder / f"generation_{rank}.pt").exists() for folder in kept for rank in (0, 1))
        again = start(tmp_path, run)
        if run == "launcher":
            wait_for_step(tmp_path, run, 13, again)
            again.terminate()
            assert again.wait(60) == 0
            again = start(tmp_path, run)
        assert again.wait(300) == 0, (tmp_path / f"{run}.txt").read_text()
        assert weights(tmp_path, run) == weights(tmp_path, "whole")


DIES_SAVING = """
import os, signal
if os.environ.get("RANK") == "1":
    import torch
    save = torch.save
    def dying(value, path, *more, **options):
        if str(path).endswith("checkpoint-10/generation_1.pt"):
            os.kill(os.getpid(), signal.SIGKILL)
        save(value, path, *more, **options)
    torch.save = dying
"""
FAILS_IN_EVALUATION = """
import os
if os.environ.get("RANK") == "1":
    import core.run.evaluate as evaluate
    from core.scoring import RewardsFailing
    def grade(*_):
        raise RewardsFailing("7 of the last 16 rows could not be scored")
    evaluate.grade = grade
"""


@pytest.mark.slow
def test_a_rank_that_dies_while_saving_leaves_no_checkpoint_that_lacks_its_part(tmp_path):
    whole, cut = start(tmp_path, "whole"), start(tmp_path, "cut", DIES_SAVING)
    assert cut.wait(300) == 128 + signal.SIGKILL
    assert "error: SIGKILL ended rank 1" in (tmp_path / "cut.txt").read_text()
    again = start(tmp_path, "cut")
    assert again.wait(300) == 0
    assert "resuming after step 5" in (tmp_path / "cut.txt").read_text()
    assert whole.wait(300) == 0
    assert weights(tmp_path, "cut") == weights(tmp_path, "whole")


@pytest.mark.slow
def test_what_one_rank_alone_meets_ends_all_in_its_one_sentence(tmp_path):
    process = start(tmp_path, "run", FAILS_IN_EVALUATION)
    assert process.wait(120) == 2
    said = (tmp_path / "run.txt").read_text()
    assert said.splitlines()[-1] == "error: 7 of the last 16 rows could not be scored"
    assert "Traceback" not in said


# accelerate takes FSDP only where there are GPUs; told to all the same, it and torch run it over gloo.
FSDP_ON_CPUS = """
import os, sys
if "core.main" not in sys.orig_argv:  # a reward's worker, which has no memory to spare for torch
    pass
elif "RANK" in os.environ:
    import accelerate.state as state
    from accelerate.utils import DistributedType
    import core.run.train as train
    train.refuse_ranks = lambda *_: None
    init = state.AcceleratorState.__init__
    def with_fsdp(self, *given, fsdp_plugin=None, **options):
        init(self, *given, fsdp_plugin=fsdp_plugin, **options)
        if fsdp_plugin is not None:
            kind = DistributedType.FSDP
            self._shared_state |= {"fsdp_plugin": fsdp_plugin, "distributed_type": kind, "device_mesh": None}
            state.PartialState._shared_state["distributed_type"] = kind
    state.AcceleratorState.__init__ = with_fsdp
    from torch.distributed.fsdp import FSDPModule
    import core.train.language as language
    loss = language.LanguageTrainer._compute_loss
    def checked(self, model, inputs):
        assert isinstance(model, FSDPModule), type(model)
        return loss(self, model, inputs)
    language.LanguageTrainer._compute_loss = checked
else:
    import core.run.train as train
    train.refuse_ranks = lambda *_: None
"""


@pytest.mark.slow
def test_weights_spread_over_two_ranks_train_stop_and_go_on_as_whole_ones_do(tmp_path):
    from safetensors.torch import load_file

    ddp = start(tmp_path, "ddp")
    assert ddp.wait(300) == 0
    fsdp = start(tmp_path, "fsdp", FSDP_ON_CPUS, "launch.strategy=fsdp")
    wait_for_step(tmp_path, "fsdp", 7, fsdp)
    fsdp.terminate()
    assert fsdp.wait(60) == 0
    again = start(tmp_path, "fsdp", FSDP_ON_CPUS, "launch.strategy=fsdp")
    assert again.wait(300) == 0, (tmp_path / "fsdp.txt").read_text()
    assert "resuming after step" in (tmp_path / "fsdp.txt").read_text()
    models = [load_file(tmp_path / "runs/text_to_sql" / run / "model" / "model.safetensors") for run in ("ddp", "fsdp")]
    for name, weight in models[0].items():
        assert (models[1][name] - weight).abs().max() < 1e-5
