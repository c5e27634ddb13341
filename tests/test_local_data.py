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


def hub_rows(task, rows):
    """The exported rows in the columns of the Hub; written apart from the package."""
    for row in rows:
        if task.startswith("arc"):
            yield {"id": row["id"], "question": row["question"], "answerKey": "12345"[row["gold"]],
                   "choices": {"text": row["choices"], "label": list("12345")[: len(row["choices"])]}}
        elif task == "hellaswag":
            yield {"ind": 1, "activity_label": row["activity_label"], "ctx_a": row["ctx"], "ctx_b": "",
                   "endings": row["choices"], "label": str(row["gold"])}
        elif task == "piqa":
            yield {"goal": row["goal"], "sol1": row["choices"][0], "sol2": row["choices"][1], "label": row["gold"]}
        elif task == "boolq":
            yield {"passage": row["passage"], "question": row["question"], "idx": 0, "label": row["gold"]}
        else:
            yield {name: row[name] for name in ("sentence", "option1", "option2", "answer")}


def requests_of(task):
    """Everything a model is asked and how the answers are scored."""
    task.build_all_requests(rank=0, world_size=1)
    asked = [(instance.request_type, instance.doc_id, *instance.args) for instance in task.instances]
    targets = [task.doc_to_target(doc) for doc in task.eval_docs]
    config = task.config
    return {"requests": asked, "targets": targets, "metrics": config.metric_list, "type": config.output_type,
            "delimiter": config.target_delimiter, "shots": config.num_fewshot, "filters": config.filter_list,
            "higher": task.higher_is_better(), "aggregation": {k: v.__name__ for k, v in task.aggregation().items()}}


@pytest.mark.parametrize("name", SIX)
def test_rendered_requests_are_those_of_the_stock_task(name, shared_data, tmp_path, monkeypatch):
    """The stock task of lm-eval, given the same rows in the Hub's columns, asks and scores the very same."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    lines = (shared_data / "tasks" / f"{name}.jsonl").read_text("utf-8").split("\n")[:200]
    rows = [json.loads(line) for line in lines if line]
    for folder, content in (("exported", rows), ("hub", list(hub_rows(name, rows)))):
        path = tmp_path / folder / "tasks" / f"{name}.jsonl"
        path.parent.mkdir(parents=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in content), "utf-8")
    stock_folder = Path(lm_eval.__file__).parent / "tasks" / standard_tasks.STOCK[name]
    manager = TaskManager(include_path=str(stock_folder.parent), include_defaults=False)
    where = {split: str(tmp_path / "hub" / "tasks" / f"{name}.jsonl") for split in ("train", "validation", "test")}
    inline = {"group": "stock", "task": [{"task": name, "dataset_path": "json", "dataset_name": None,
                                          "dataset_kwargs": {"data_files": where, "cache_dir": str(tmp_path / "c")}}]}
    stock = requests_of(single(manager.load_task_or_group([inline])))
    assert len(stock["targets"]) == len(rows) and len(stock["requests"]) >= 2 * len(rows)
    counted(monkeypatch, **{name: len(rows)})
    for folder in ("exported", "hub"):  # the two layouts of a copy
        monkeypatch.setenv(places.DATA_ROOT, str(tmp_path / folder))
        written = tmp_path / f"{folder} definitions"
        written.mkdir()
        assert standard_tasks.write_definitions(written, name) == [name]
        ours = TaskManager(include_path=str(written), include_defaults=False).load_task_or_group([name])
        assert requests_of(single(ours)) == stock


SUBJECTS = ("abstract_algebra", "anatomy", "world_religions")


def worked_rows(name):
    """Split → rows in the Hub's columns, of which each says who it is."""
    if name == "gsm8k":
        return {split: [{"question": f" {split} {n}? ", "answer": f"So {n} + {n} = {n + n}.\n#### {n + n:,}"}
                        for n in range(count)] for split, count in (("test", 6), ("train", 40))}
    every = [path.stem.removeprefix("mmlu_") for path, _ in standard_tasks.stock_parts(name).values()]
    return {split: [{"question": f" {subject} {split} {n} ", "subject": subject, "choices": [f"{n}{c}" for c in "wxyz"],
                     "answer": n % 4} for subject in every for n in range(count)]
            for split, count in (("test", 6), ("dev", 7))}


@pytest.mark.parametrize("name", ["mmlu", "gsm8k"])
def test_rendered_requests_with_worked_examples_are_those_of_the_stock_task(name, tmp_path, monkeypatch):
    """MMLU and GSM8K are not among the offline data: rows that are made up, of which each says who it is."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = worked_rows(name)
    shots = next(split for split in rows if split != "test")
    for split, found in rows.items():
        path = tmp_path / "tasks" / (f"{name}.jsonl" if split == "test" else f"{name}.{split}.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in found), "utf-8")
    row = {**places.dataset(name), "count": str(len(rows["test"])), "shot_count": str(len(rows[shots]))}
    monkeypatch.setattr(places, "dataset", lambda _: row)
    monkeypatch.setenv(places.DATA_ROOT, str(tmp_path))
    written = tmp_path / "definitions"
    written.mkdir()
    parts = standard_tasks.write_definitions(written, name)
    assert len(parts) == (57 if name == "mmlu" else 1)
    stock_folder = Path(lm_eval.__file__).parent / "tasks" / standard_tasks.STOCK[name]
    stock_manager = TaskManager(include_path=str(stock_folder.parent), include_defaults=False)
    our_manager = TaskManager(include_path=str(written), include_defaults=False)
    for part in [f"mmlu_{subject}" for subject in SUBJECTS] if name == "mmlu" else parts:
        files = {}
        for split, found in rows.items():  # the rows of this subject, as its configuration of the Hub has them
            files[split] = str(tmp_path / f"{part}-{split}.jsonl")
            kept = [one for one in found if f"mmlu_{one.get('subject')}" in (part, "mmlu_None")]
            Path(files[split]).write_text("".join(json.dumps(one) + "\n" for one in kept), "utf-8")
        where = {"data_files": files, "cache_dir": str(tmp_path / "c")}
        inline = {"group": "stock", "task": [{"task": part, "dataset_path": "json", "dataset_name": None,
                                              "dataset_kwargs": where}]}
        found = [single(stock_manager.load_task_or_group([inline])), single(our_manager.load_task_or_group([part]))]
        for task in found:  # as lm_eval.simple_evaluate does
            task.set_config("num_fewshot", int(row["shots"]))
            task.set_fewshot_seed(1234)
        stock, ours = map(requests_of, found)
        assert ours == stock and len(stock["targets"]) == 6
        assert stock["requests"][0][2].count(f" {shots} " if name == "mmlu" else shots) == 5


def test_a_subject_without_rows_is_told(tmp_path, monkeypatch):
    for split, count in (("", 2), (".dev", 1)):
        path = tmp_path / "tasks" / f"mmlu{split}.jsonl"
        path.parent.mkdir(exist_ok=True)
        one = {"question": "q", "subject": "anatomy", "choices": list("wxyz"), "answer": 0}
        path.write_text((json.dumps(one) + "\n") * count, "utf-8")
    monkeypatch.setenv(places.DATA_ROOT, str(tmp_path))
    row = {**places.dataset("mmlu"), "count": "2", "shot_count": "1"}
    monkeypatch.setattr(places, "dataset", lambda _: row)
    with pytest.raises(SfmpError, match="task mmlu: expected rows of subject 'abstract_algebra' in the local copy"):
        standard_tasks.write_definitions(tmp_path, "mmlu")


def single(found):
    """The one task of what a task manager returns."""
    while isinstance(found, dict):
        [found] = found.values()
    return found


def test_a_damaged_copy_names_its_file(tmp_path, monkeypatch):
    path = tmp_path / "tasks" / "piqa.jsonl"
    path.parent.mkdir()
    monkeypatch.setenv(places.DATA_ROOT, str(tmp_path))
    counted(monkeypatch)
    for row, says in (('{"goal": "g", "gold": 0, "choices": ["one"]}', "IndexError"),
                      ('{"goal": "g", "gold": -1, "choices": ["one", "two"]}', r"expected gold in 0\.\.1, found -1"),
                      ('{"question": "of another task", "answer": "a"}', "expected a column 'goal', found 'question'"),
                      ('{"goal": "g", "sol1": "a", "sol2": "b"}', "expected a column 'label'"), ("[1]", "found")):
        path.write_text(f"{row}\n", "utf-8")
        with pytest.raises(SfmpError, match=f"{path}: expected rows of piqa as JSON objects, .*{says}"):
            standard_tasks.write_definitions(tmp_path, "piqa")


def test_definitions_of_the_hub_pin_its_revision(tmp_path, monkeypatch):
    monkeypatch.delenv(places.DATA_ROOT, raising=False)
    rows = places.dataset
    monkeypatch.setattr(places, "dataset", lambda name: {**rows(name), "revision": COMMIT})
    names = standard_tasks.write_definitions(tmp_path, "mmlu")
    assert len(names) == 57 and "mmlu_anatomy" in names
    for name in (*names, *standard_tasks.write_definitions(tmp_path, "gsm8k")):
        definition = json.loads((tmp_path / f"{name}.yaml").read_text("utf-8"))
        assert definition["dataset_kwargs"] == {"revision": COMMIT} and definition["task"] == name
        assert Path(definition["include"]).is_file() and set(definition) == {"task", "include", "dataset_kwargs"}


def test_a_task_that_the_hub_does_not_give_is_one_clear_error(tiny_llama, monkeypatch):
    import lm_eval

    def evaluate(**_):
        raise ConnectionError("Couldn't reach 'baber/piqa' on the Hub")

    monkeypatch.delenv(places.DATA_ROOT, raising=False)
    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate)
    _, tokenizer = stages.load_model("embedded")
    with pytest.warns(UserWarning, match="no revision"), pytest.raises(SfmpError, match="task piqa: expected its rows"):
        standard_tasks.accuracy(tiny_llama, tokenizer, ["piqa"])


def test_tasks_run_on_a_local_model(roots, monkeypatch):
    monkeypatch.setattr(standard_tasks, "stock_row", remember(standard_tasks.stock_row, kept := []))
    model, tokenizer = stages.load_model(f"karpathy/stories260K@{COMMIT}")
    assert (model.config._name_or_path, model.config._commit_hash) == ("karpathy/stories260K", COMMIT)
    scores = standard_tasks.accuracy(model, tokenizer, ["arc_easy", "winogrande"], limit=20)
    assert kept and set(scores) == {"arc_easy", "winogrande"}
    easy, grande = scores["arc_easy"], scores["winogrande"]
    assert easy["n"] == 20 and easy["chance"] == pytest.approx(0.25, abs=0.02) and grande["chance"] == 0.5
    assert grande["acc"] == grande["acc_norm"]  # lm-eval has no other metric for it
    # By hand: the likeliest of the two sentences, given what follows the gap.
    rows = [json.loads(line) for line in (roots / "tasks/winogrande.jsonl").read_text("utf-8").splitlines()[:20]]
    right = sum(by_hand(model, tokenizer, row) == int(row["answer"]) - 1 for row in rows)
    assert grande["acc"] == pytest.approx(right / 20)
    assert grande["acc_stderr"] == pytest.approx(math.sqrt(grande["acc"] * (1 - grande["acc"]) / 19))


def remember(function, kept):
    return lambda *arguments: kept.append(arguments) or function(*arguments)


def by_hand(model, tokenizer, row):
    """Index of the option after which the rest of the sentence is likelier."""
    before, _, after = row["sentence"].partition("_")
    totals = []
    for option in (row["option1"], row["option2"]):
        whole = tokenizer(before + option + " " + after.strip())["input_ids"]
        start = len(tokenizer(before + option)["input_ids"])
        with torch.no_grad():
            logp = model(input_ids=torch.tensor([whole])).logits[0].log_softmax(-1)
        totals.append(sum(float(logp[at - 1, whole[at]]) for at in range(start, len(whole))))
    return totals.index(max(totals))


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
