"""The standard tasks of lm-eval from local copies: the requests of the stock tasks, or a refusal."""

import json
import math
from pathlib import Path

import pytest
import torch
from test_local_data import COMMIT, SIX, counted
from test_local_data import roots as roots  # a fixture

from sfmp import places, stages, standard_tasks
from sfmp.checks import SfmpError


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
