"""Local copies read like the Hub: texts, tasks with the prompts of lm-eval, models; devices as the environment says."""

import json
import math
import shutil
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import save_file

from sfmp import data, places, stage_evaluation, stages, standard_tasks, workflow
from sfmp.checks import SfmpError
from sfmp.design import load_design

ROOT = Path(__file__).resolve().parents[1]
SIX = ("arc_challenge", "arc_easy", "boolq", "hellaswag", "piqa", "winogrande")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def roots(shared_data, monkeypatch, tmp_path):
    """Environment of a job on a machine without network."""
    monkeypatch.setenv(places.DATA_ROOT, str(shared_data))
    monkeypatch.setenv(places.MODELS_ROOT, str(shared_data / "models"))
    return shared_data


def test_texts_of_a_hub_model_are_the_local_copies(roots):
    calibration = stages.documents("owner/name@abc", "calibration")
    evaluation = stages.documents("owner/name@abc", "evaluation")
    assert len(calibration) == 118 and all(text.strip() for text in calibration)
    rows = [json.loads(line)["text"] for line in (roots / "wikitext2_raw/test.jsonl").read_text("utf-8").splitlines()]
    assert evaluation == rows and len(rows) == 4358
    assert "" in evaluation  # blank lines count: perplexity is that of all rows joined
    assert data.load_text("dataset:wikitext2") == [text for text in rows if text.strip()]


def test_copies_are_inputs_of_the_jobs_that_read_them(shared_data):
    """So a manifest holds their checksums, and a changed copy reruns what was made from it."""
    config = yaml.safe_load((ROOT / "config" / "config.yaml").read_text("utf-8"))
    design = load_design({**config, "tier": "small", "data": {"root": str(shared_data)}}, ROOT / "config")
    rules = workflow.Rules(design)
    texts = [str(shared_data / path) for path in ("c4_sample/docs.jsonl", "wikitext2_raw/test.jsonl")]
    assert rules.texts(SimpleNamespace(model="qwen3-0.6b")) == {"texts": texts}
    asked = {row["tasks"]: rules.questions(SimpleNamespace(run=run)) for run, row in design.runs.items()}
    assert asked == {"no": {}, "yes": {"questions": [str(shared_data / "tasks" / f"{name}.jsonl") for name in SIX]}}


def test_a_missing_copy_is_one_clear_error(tmp_path, monkeypatch):
    monkeypatch.setenv(places.DATA_ROOT, str(tmp_path))
    with pytest.raises(SfmpError, match=f"expected c4 as {tmp_path}/c4_sample/docs.jsonl.*sfmp fetch c4"):
        data.load_text("dataset:c4")
    with pytest.raises(SfmpError, match=f"expected mmlu as {tmp_path}/tasks/mmlu.jsonl.*sfmp fetch mmlu"):
        standard_tasks.write_definitions(tmp_path, "mmlu")
    with pytest.raises(SfmpError, match="data set 'c5': expected one of c4,"):
        data.load_text("dataset:c5")
    with pytest.raises(SfmpError, match="expected a text, found a task"):
        data.load_text("dataset:piqa")
    monkeypatch.setenv(places.MODELS_ROOT, str(tmp_path))
    with pytest.raises(SfmpError, match=f"models.root: expected config.json in {tmp_path}/a/b.*--revision {COMMIT}"):
        stages.load_model(f"a/b@{COMMIT}")


def test_without_roots_everything_is_the_hubs_at_its_revision(monkeypatch):
    import datasets

    for name in (places.DATA_ROOT, places.MODELS_ROOT):
        monkeypatch.delenv(name, raising=False)
    calls, rows = [], places.dataset
    monkeypatch.setattr(places, "dataset", lambda name: {**rows(name), "revision": COMMIT})
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: calls.append((a, k)) or {"text": ["some", ""]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert stages.documents("owner/name", "evaluation") == ["some", ""]
    assert stages.documents("owner/name", "calibration") == ["some"]
    assert calls == [
        (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "test", "revision": COMMIT}),
        (("allenai/c4", None), {"split": "train[:20000]", "revision": COMMIT,
                                "data_files": {"train": "en/c4-train.00000-of-01024.json.gz"}}),
    ]
    assert stages.located(f"owner/name@{COMMIT}") == ("owner/name", {"revision": COMMIT})


def counted(monkeypatch, **counts):
    """Let copies of these data sets be whole with so many rows."""
    rows = places.dataset
    monkeypatch.setattr(places, "dataset", lambda name: {**rows(name), "count": str(counts.get(name, "-"))})


def test_a_copy_that_is_not_whole_is_refused(shared_data, tmp_path, monkeypatch):
    """Half a text has a perplexity too, and half a task an accuracy."""
    monkeypatch.setenv(places.DATA_ROOT, str(tmp_path))
    for name, file in (("wikitext2", "wikitext2_raw/test.jsonl"), ("piqa", "tasks/piqa.jsonl")):
        lines = (shared_data / file).read_text("utf-8").split("\n")[:-1]
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        for content, found in ((lines[:-1], len(lines) - 1), (lines + lines[:1], len(lines) + 1)):
            (tmp_path / file).write_text("\n".join(content) + "\n", "utf-8")
            with pytest.raises(SfmpError, match=f"{file}: expected the {len(lines)} rows of {name} .*, found {found};"):
                data.load_text(f"dataset:{name}") if name == "wikitext2" else (
                    standard_tasks.write_definitions(tmp_path, name))
        (tmp_path / file).write_text("\n".join(lines)[:-9], "utf-8")  # a copy that was cut off
        with pytest.raises(SfmpError, match=f"{file}[:,] .*expected"):
            data.load_text(f"dataset:{name}") if name == "wikitext2" else (
                standard_tasks.write_definitions(tmp_path, name))


def test_only_the_first_documents_are_read_as_from_the_hub(tmp_path, monkeypatch):
    rows = places.dataset
    monkeypatch.setattr(places, "dataset", lambda name: {**rows(name), "rows": "3"})
    monkeypatch.setenv(places.DATA_ROOT, str(tmp_path))
    path = tmp_path / "c4_sample/docs.jsonl"
    path.parent.mkdir()
    path.write_text("".join(f'{{"text": "{n}"}}\n' for n in range(5)), "utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert data.load_text("dataset:c4") == ["0", "1", "2"]
    path.write_text('{"text": "0"}\n', "utf-8")
    with pytest.warns(UserWarning, match="1 rows, where 3 of c4 are read from the Hub"):
        data.load_text("dataset:c4")


def test_what_has_no_revision_is_warned_of(tmp_path, monkeypatch):
    import datasets

    monkeypatch.delenv(places.DATA_ROOT, raising=False)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: {"text": ["some"]})
    rows = places.dataset
    monkeypatch.setattr(places, "dataset", lambda name: {**rows(name), "revision": "-"})
    with pytest.warns(UserWarning, match="data set wikitext2: no revision in config/datasets.tsv"):
        data.load_text("dataset:wikitext2")
    with pytest.warns(UserWarning, match="data set piqa: no revision"):
        standard_tasks.write_definitions(tmp_path, "piqa")


def test_a_table_of_another_project_is_not_read(tmp_path, monkeypatch):
    (tmp_path / "config").mkdir()
    (tmp_path / "config" / "datasets.tsv").write_text("name\turl\nc4\thttps\n", "utf-8")
    monkeypatch.chdir(tmp_path)
    assert places.dataset("c4")["source"] == "allenai/c4"


@pytest.mark.parametrize("damage, says", [
    ("model.safetensors", "no weights"), ("tokenizer.json", "no tokenizer"), ("cut", "model.safetensors cut off"),
    ("garbage", "model.safetensors cut off"), ("shard", "no model-00002-of-00002.safetensors"),
    ("index", "no list of weights in model.safetensors.index.json")])
def test_a_copy_of_a_model_that_is_not_whole_is_refused(shared_data, tmp_path, monkeypatch, damage, says):
    folder = Path(shutil.copytree(shared_data / "models" / "stories260K", tmp_path / "owner" / "name",
                                  copy_function=shutil.copy))
    monkeypatch.setenv(places.MODELS_ROOT, str(tmp_path))
    weights, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    assert stages.located("owner/name") == (str(folder), {})
    for path in (folder, *folder.iterdir()):
        path.chmod(0o755)
    if damage in ("cut", "garbage"):
        weights.write_bytes(weights.read_bytes()[:-1] if damage == "cut" else b"version https://git-lfs.github.com")
    elif damage in ("shard", "index"):
        index.write_text(json.dumps({"weight_map": {"a": "model-00002-of-00002.safetensors"}}) if damage == "shard"
                         else "[]")
    else:
        (folder / damage).unlink()
    with pytest.raises(SfmpError, match=f"expected a whole copy of owner/name, found {says}.*hf download owner/name"):
        stages.located("owner/name")


def test_a_copy_of_another_revision_is_refused(tmp_path, monkeypatch):
    note = tmp_path / "name" / ".cache/huggingface/download/config.json.metadata"
    note.parent.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / "name" / name).write_text("{}")
    save_file({"a": torch.zeros(1)}, tmp_path / "name" / "model.safetensors")
    note.write_text(f"{COMMIT}\netag\n0.0\n")
    monkeypatch.setenv(places.MODELS_ROOT, str(tmp_path))
    assert stages.located(f"owner/name@{COMMIT}") == (str(tmp_path / "name"), {})
    with pytest.raises(SfmpError, match=f"expected revision {'1' * 40} of owner/name, found {COMMIT}"):
        stages.located(f"owner/name@{'1' * 40}")


def test_stages_load_where_the_environment_says(monkeypatch):
    asked = []

    def from_pretrained(source, dtype, **options):
        asked.append((source, dtype, options))
        return SimpleNamespace(parameters=lambda: iter([torch.empty(0, device="meta")])), None

    monkeypatch.setattr(stages, "load_model", from_pretrained)
    monkeypatch.setattr("sfmp.model_source.chosen_device", lambda name: asked.append(name))
    for device, placed in (("cuda", {"device_map": {"": "cuda:0"}}), ("spread", {"device_map": "auto"})):
        asked.clear()
        monkeypatch.setenv(places.DEVICE, device)
        monkeypatch.setenv(places.DTYPE, "bfloat16")
        with pytest.raises(SfmpError, match="found parts on meta; give the job more GPUs"):
            stages.load_placed("owner/name")
        assert asked == ["cuda", ("owner/name", "bfloat16", placed)]
    for name in (places.DEVICE, places.DTYPE):
        monkeypatch.delenv(name)
    stages.load_placed("owner/name")
    assert asked[-1] == ("owner/name", "float32", {})


def test_a_gpu_that_is_not_there_is_told(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("needs a machine without CUDA")
    monkeypatch.setenv(places.DEVICE, "cuda")
    with pytest.raises(SfmpError, match="device 'cuda': expected cpu, or cuda where there is one"):
        stages.load_model("embedded")


def test_a_placed_checkpoint_is_evaluated_with_dequantized_weights_throughout(tiny_llama, monkeypatch):
    """As `perplexity` computes: kernels of a GPU in bfloat16 would be another computation."""
    from sfmp import QuantSpec, make_plan, quantize_model
    from sfmp.linear import StoredLinear
    from sfmp.salience import SALIENCE_SOURCES

    windows = torch.arange(32).reshape(2, 16)
    plan = make_plan(SALIENCE_SOURCES["magnitude"](tiny_llama, windows, 0), QuantSpec(block_rows=32, method="rtn"))
    quantize_model(tiny_llama, plan, windows)
    layers = [module for module in tiny_llama.modules() if isinstance(module, StoredLinear)]
    run = SimpleNamespace(inputs={"checkpoint": "folder"})
    monkeypatch.setattr(stage_evaluation, "load_placed", lambda source: (tiny_llama, None))
    monkeypatch.setattr(stage_evaluation, "load_tokenizer", lambda source: None)
    stage_evaluation.load_for_evaluation(run, "owner/name")
    assert layers and not any("keep" in layer._cache for layer in layers)
    monkeypatch.setenv(places.DEVICE, "spread")
    model, _ = stage_evaluation.load_for_evaluation(run, "owner/name")
    assert all(layer._cache["keep"] for layer in layers)
    with torch.no_grad():
        logp = model(input_ids=windows[:1]).logits[0].log_softmax(-1)
    hand = math.exp(-sum(float(logp[at, windows[0, at + 1]]) for at in range(15)) / 15)
    assert hand == pytest.approx(stage_evaluation.perplexity(model, windows[:1], 16), rel=1e-6)


def test_inputs_follow_the_model():
    """The evaluation notebook hands tokens of the CPU to a model that may be elsewhere."""
    model = torch.nn.Linear(2, 2, device="meta")
    given = {"input_ids": torch.ones(1), "use_cache": True}
    args, kwargs = stage_evaluation._move_inputs(model, (torch.ones(1),), given)
    assert args[0].device.type == kwargs["input_ids"].device.type == "meta" and kwargs["use_cache"] is True
