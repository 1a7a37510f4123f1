"""Every language app's gpu.yaml as far as a CPU goes: a small random Qwen2, LoRA, three steps; the adapter is used after.

Only what a CPU cannot do is overridden: the sampler (vLLM), the GPU itself, and sizes.
"""

import json

import pytest
import torch
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file
from transformers import Qwen2Config, Qwen2ForCausalLM

from core import app as apps
from core.main import main
from core.policy.tiny import build_tokenizer

SMALL = (
    "run.force_cpu=true launch.sampler=hf run.control=random_rewards data.train_rows=12 data.test_rows=6 "
    "rollout.prompts_per_step=2 rollout.group_size=4 rollout.max_completion_length=8 optim.steps=3 optim.micro_batch=4 "
    "optim.lr=0.01 optim.warmup_steps=0 evaluate.every=2 evaluate.validation_rows=4 evaluate.batch_size=6 run.save_every=1 "
    "rewards.workers=1"
)


def with_gpu_config():
    return [name for name in apps.names() if isinstance(apps.find(name).acts, apps.Language)]


@pytest.fixture(scope="module", params=with_gpu_config())
def place(request, tmp_path_factory):
    """A folder with the app's data set in its real format, and a model."""
    home = tmp_path_factory.mktemp(request.param)
    app = apps.find(request.param)
    app.write_offline(home / "data", 0)
    tokenizer = build_tokenizer(["SELECT name FROM singer WHERE age > 20"] * 50, 600)
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=4096, eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        )
    )  # fmt: skip
    model.to(torch.bfloat16).save_pretrained(home / "qwen")
    tokenizer.save_pretrained(home / "qwen")
    return app, home


@pytest.fixture
def command(place, monkeypatch):
    app, home = place
    monkeypatch.chdir(home)

    def run(name, *more):
        return main([name, "--app", app.name, "--config", "gpu", "--data", "data", "--set", SMALL, *more])

    return run


def test_three_lora_steps_in_bfloat16_leave_an_adapter_that_loads_and_answers(place, command, tmp_path, capsys):
    app, home = place
    assert command("train", "--model", "qwen", "--run", "whole") == 0
    run = home / "runs" / app.name / "whole"
    assert [line["step"] for line in map(json.loads, (run / "metrics.jsonl").open()) if "loss" in line] == [1, 2, 3]
    adapter = load_file(run / "model" / "adapter_model.safetensors")
    assert adapter
    assert any(value.abs().max() > 0 for name, value in adapter.items() if "lora_B" in name)  # B starts at 0
    loaded = AutoPeftModelForCausalLM.from_pretrained(run / "model")
    assert loaded.base_model.model.config.model_type == "qwen2"
    capsys.readouterr()
    assert command("eval", "--run", "whole") == 0
    assert "6 " in capsys.readouterr().out


def test_lora_goes_on_from_its_checkpoint_to_the_same_adapter(place, command, capsys):
    app, home = place
    runs = home / "runs" / app.name
    if not (runs / "whole" / "model").exists():
        assert command("train", "--model", "qwen", "--run", "whole") == 0
    assert command("train", "--model", "qwen", "--run", "cut") == 0
    for name in ("summary.json", "after.json"):
        (runs / "cut" / name).unlink(missing_ok=True)
    last = runs / "cut" / "checkpoints" / "checkpoint-3"
    (last / "trainer_state.json").unlink()  # as a kill during its save leaves it
    capsys.readouterr()
    assert command("train", "--model", "qwen", "--run", "cut") == 0
    assert "resuming after step 2" in capsys.readouterr().out
    whole, cut = (load_file(runs / name / "model" / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert whole.keys() == cut.keys()
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_without_a_gpu_it_is_refused_with_an_estimate_of_the_memory(place, command, capsys):
    app, _ = place
    assert main(["train", "--app", app.name, "--config", "gpu", "--data", "data", "--set", "launch.sampler=hf"]) == 2
    error = capsys.readouterr().err
    assert "GB of GPU memory" in error
    assert "run.force_cpu=true" in error
