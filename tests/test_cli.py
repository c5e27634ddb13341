"""The command line: what it prints, writes and returns, on the smallest models."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command_line import ENVIRONMENT, ROOT, command
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from sfmp import cli, spec

BARS = ["--block-rows", "64", "--windows", "2", "--seqlen", "64", "--device", "cpu"]
QUICK = [*BARS, "--quiet"]


@pytest.fixture(scope="module")
def stories(shared_data):
    return shared_data / "models" / "stories260K"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The embedded model, quantized by the command line: (folder, finished process)."""
    folder = tmp_path_factory.mktemp("made") / "deep" / "model"
    return folder, command("quantize", "embedded", folder, "--bpw", "3", "--method", "rtn", *BARS)


# ---- starting


@pytest.mark.parametrize("arguments", [["--help"], ["quantize", "--help"], ["--version"]])
def test_help_loads_nothing_heavy(arguments):
    code = ("import sys, sfmp.cli\ntry: sfmp.cli.main(sys.argv[1:])\nexcept SystemExit as done: assert done.code == 0\n"
            "heavy = {'torch', 'numpy', 'transformers', 'numba', 'pandas', 'matplotlib', 'tqdm'} & set(sys.modules)\n"
            "assert not heavy, heavy\nassert len(sys.modules) < 200, len(sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60,
                          env=ENVIRONMENT)
    assert done.returncode == 0, done.stderr
    assert "sfmp" in done.stdout


def test_every_command_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit) as done:
        cli.main(["--help"])
    text = capsys.readouterr().out
    assert done.value.code == 0 and "examples:" in text and "exit status:" in text
    for name in ("quantize", "eval", "generate", "inspect", "convert", "push"):
        assert re.search(rf"^    {name} ", text, re.M)
        with pytest.raises(SystemExit):
            cli.main([name, "--help"])
        assert f"example:\n  sfmp {name} " in capsys.readouterr().out
    assert re.search(r"^    bench ", text, re.M)


def test_examples_of_the_help_are_accepted():
    import shlex

    lines = [shlex.split(line)[1:] for line in cli.EXAMPLES.splitlines() if line.startswith("  sfmp ")]
    assert len(lines) >= 7
    for line in lines:
        if line[0] != "bench":
            assert cli.parser().parse_args(line).command == line[0]


def test_defaults_and_choices_are_those_of_the_specification():
    options = vars(cli.parser().parse_args(["quantize", "embedded", "out"]))
    default = spec.QuantSpec()
    for name in ("bpw", "levels", "group_size", "block_rows", *spec.CHOICES, "skip", "seed"):
        if name == "shared_columns":  # not offered: an ablation
            continue
        assert options[name] == getattr(default, name), name
    for name in ("method", "objective", "scope", "reorder"):
        for choice in spec.CHOICES[name]:
            assert vars(cli.parser().parse_args(["quantize", "m", "o", f"--{name}", choice]))[name] == choice
        with pytest.raises(SystemExit) as done:
            cli.parser().parse_args(["quantize", "m", "o", f"--{name}", "other"])
        assert done.value.code == 2


def test_the_entry_point_is_declared():
    import tomllib

    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    assert scripts == {"sfmp": "sfmp.cli:main"}


def test_bench_is_handed_over(monkeypatch):
    import sfmp.bench.__main__ as bench

    monkeypatch.setattr(bench, "main", lambda arguments: ("bench", arguments))
    assert cli.main(["bench", "cpu", "--out", "x.json"]) == ("bench", ["cpu", "--out", "x.json"])


# ---- quantize and what follows


def test_quantize_says_what_it_made_and_shows_bars(made):
    folder, done = made
    assert done.returncode == 0, done.stderr
    assert re.search(r"bpw 3\.0\d* .*bpw_stored \d", done.stdout) and "(confirmed)" in done.stdout
    assert str(folder) in done.stdout
    assert "salience" in done.stderr and "quantize" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    assert {"config.json", "model.safetensors", "README.md", "tokenizer.json"} <= {p.name for p in folder.iterdir()}


def test_the_same_command_gives_the_same_bytes(made, tmp_path):
    assert cli.main(["quantize", "embedded", str(tmp_path / "b"), "--bpw", "3", "--method", "rtn", *BARS]) == 0
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (tmp_path / "b" / name).read_bytes() == (made[0] / name).read_bytes(), name


def test_weights_are_as_readable_as_the_rest(made):
    folder, _ = made
    modes = {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()}
    assert "model.safetensors" in modes and len(set(modes.values())) == 1, modes


def test_quantize_equals_the_library(stories, tmp_path):
    from sfmp import data
    from sfmp.allocate import make_plan
    from sfmp.apply import quantize_model
    from sfmp.salience import fisher_salience
    from sfmp.stages import load_model

    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small cat. " * 200, "utf-8")
    arguments = ["--calibration", str(text), "--bpw", "3.5", "--group-size", "32", "--levels", "auto", *QUICK]
    assert cli.main(["quantize", str(stories), str(tmp_path / "out"), *arguments]) == 0
    model, tokenizer = load_model(str(stories))
    windows = data.calibration_windows(data.load_text(str(text)), tokenizer, 2, 64)
    chosen = spec.QuantSpec(bpw=3.5, group_size=32, block_rows=64, levels="auto")
    plan = make_plan(fisher_salience(model, windows), chosen, model)
    quantize_model(model, plan, windows)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    assert loaded.config.quantization_config.plan_hash == plan.hash


def test_a_copy_below_the_models_root_is_named_as_the_model_it_is(stories, tmp_path, monkeypatch):
    import shutil

    from sfmp.places import MODELS_ROOT

    shutil.copytree(stories, tmp_path / "root" / "someone" / "stories")
    monkeypatch.setenv(MODELS_ROOT, str(tmp_path / "root"))
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time there was a small cat. " * 200, "utf-8")
    arguments = ["quantize", "someone/stories", str(tmp_path / "out"), "--method", "rtn", "--salience", "magnitude",
                 "--calibration", str(text), "--group-size", "32", *QUICK]
    assert cli.main(arguments) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert config["source"] == {"model": "someone/stories", "revision": None}
    assert "\nbase_model: someone/stories\n" in (tmp_path / "out" / "README.md").read_text()


def test_inspect(made, capsys, tmp_path):
    folder, _ = made
    picture = tmp_path / "bits.png"
    assert cli.main(["inspect", str(folder), "--picture", str(picture)]) == 0
    text = capsys.readouterr().out
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    counted = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    inside = sum(tensor.numel() * tensor.element_size() for name, tensor in tensors.items()
                 if name.rpartition(".")[0] in config["modules"])
    printed = {part.strip(): int(number.replace(",", "")) for part, number in
               re.findall(r"^ *([a-z ]+?)  +([\d,]+) bytes$", text, re.M)}
    assert printed["all tensors"] == counted and printed["quantized matrices"] == inside
    assert printed["other tensors"] == counted - inside
    assert printed["planes"] + printed["scales"] + printed["overhead"] == inside
    assert config["plan_hash"] in text and "(confirmed)" in text
    # A cell of the table, computed from the planes: words of a block of b bits are b·(g/32)·rows.
    name = "model.layers.2.mlp.down_proj"
    planes, shape = tensors[f"{name}.planes"], config["modules"][name]["shape"]
    mean = planes.numel() * 32 / (shape[0] * shape[1])
    header = text.splitlines()[1].split()
    row = next(line.split() for line in text.splitlines() if line.startswith("2 "))
    assert float(row[1 + header.index("down")]) == pytest.approx(mean, abs=5e-4)
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["bytes"]["all tensors"] == counted and found["plan_hash_confirmed"] is True
    assert found["bpw"] == pytest.approx(3.0, abs=0.05) and len(found["bits"]) == 42
    assert found["bpw_stored"] == pytest.approx(8 * inside / found["weights"])


def test_inspect_notices_another_plan(made, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(made[0], folder)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["plan_hash"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))
    assert cli.main(["inspect", str(folder)]) == 0
    assert "NOT that of the tensors" in capsys.readouterr().out


@pytest.mark.slow
def test_eval_prints_and_writes_what_the_library_measures(made, capsys, tmp_path, monkeypatch):
    from sfmp import data
    from sfmp.corpus import Document
    from sfmp.evaluate import perplexity
    from sfmp.linear import keep_dequantized
    from sfmp.model_source import load

    documents = [Document("json", Path(json.decoder.__file__).read_text("utf-8"))]
    target = tmp_path / "results.json"
    text = str(tmp_path / "text.txt")
    Path(text).write_text(Path(json.__file__).read_text("utf-8"), "utf-8")
    arguments = ["--text", text, "--seqlen", "128", "--windows", "4", "--json", str(target)]
    asked = ["--tasks", "next_line", "--items", "4"]
    monkeypatch.setattr("sfmp.tasks.stdlib_documents", lambda split: documents)
    assert cli.main(["eval", str(made[0]), *arguments, *asked, "--device", "cpu"]) == 0
    results = json.loads(target.read_text())
    assert [(row["dataset"], row["metric"]) for row in results] == [
        (text, "perplexity"), ("next_line", "acc"), ("next_line", "acc_norm")]
    model, tokenizer = load(str(made[0]), device="cpu")
    windows, _ = data.evaluation_windows(data.load_text(text), tokenizer, 128)
    with keep_dequantized(model):
        expected = perplexity(model, windows[:: len(windows) // 4][:4], 128)
    assert results[0]["value"] == pytest.approx(expected, rel=1e-6) and results[0]["windows"] == 4
    printed = capsys.readouterr()
    assert f"perplexity  {expected:.4f}" in printed.out and "perplexity of" in printed.err
    assert 0 <= results[1]["value"] <= 1 and results[1]["items"] == 4
