"""benchmarks/gpu_lora.py as far as a CPU goes: it runs, and its figures are those of the run."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_lora


def test_smoke_writes_what_it_measured(tmp_path):
    gpu_lora.main(["--smoke", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "gpu_lora.json").read_text())
    assert found["rollouts_a_step"] == 8
    assert found["completion_tokens_a_second"] == pytest.approx(8 * 8 / found["seconds_a_step"], rel=0.01)
    assert str(tmp_path) not in json.dumps(found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_so(capsys):
    with pytest.raises(SystemExit):
        gpu_lora.main([])
    assert "no GPU is visible" in capsys.readouterr().err
