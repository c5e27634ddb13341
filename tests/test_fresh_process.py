"""Trained models, quantized in memory: a process of its own loads the checkpoint and computes the same bits."""

import subprocess
import sys

import pytest
import torch
from command_line import ENVIRONMENT

from sfmp import QuantSpec, data, fisher_salience, hf, make_plan, quantize_model
from sfmp.stages import load_model

LOAD = """
import sys
import torch
import sfmp
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
with torch.no_grad():
    torch.save(model(torch.load(sys.argv[2])).logits, sys.argv[2])
"""


@pytest.mark.parametrize("name", ["embedded", "stories260K"])
def test_a_fresh_process_has_the_logits_of_the_model_in_memory(name, request, tmp_path):
    source = name if name == "embedded" else str(request.getfixturevalue("shared_data") / "models" / name)
    model, tokenizer = load_model(source)
    windows = data.calibration_windows(data.load_text("python:calibration"), tokenizer, 4, 128)
    spec = QuantSpec(bpw=3.5, group_size=32, block_rows=64, levels=(2, 3, 4), method="awq")
    with torch.no_grad():
        before = model(windows).logits
    quantize_model(model, make_plan(fisher_salience(model, windows), spec), windows)
    with torch.no_grad():
        expected = model(windows).logits  # by the compiled kernels, as a user has them
    assert not torch.equal(before, expected)
    hf.save_checkpoint(model, tmp_path / "out", tokenizer=tokenizer)
    torch.save(windows, tmp_path / "tensor.pt")
    arguments = [str(tmp_path / "out"), str(tmp_path / "tensor.pt"), str(torch.get_num_threads())]
    done = subprocess.run([sys.executable, "-c", LOAD, *arguments], capture_output=True, text=True, env=ENVIRONMENT,
                          timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert torch.equal(torch.load(tmp_path / "tensor.pt"), expected)
