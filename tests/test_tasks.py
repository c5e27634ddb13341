"""Items of the zero-shot tasks: well-formed, deterministic, from held-out modules."""

import pytest

from sfmp import tasks
from sfmp.corpus import Document, stdlib_documents
from sfmp.spec import SfmpError


@pytest.fixture(scope="module")
def documents():
    return stdlib_documents("evaluation")


@pytest.mark.parametrize("task", sorted(tasks.TASKS))
def test_items_are_well_formed(task, documents):
    items = tasks.build(task)
    assert len(items) == tasks.ITEMS >= 300
    texts = [doc.text for doc in documents]
    for item in items:
        assert len(set(item["choices"])) == 4
        right = item["choices"][item["answer"]]
        assert any(item["question"] in text and right in text for text in texts)
    positions = [item["answer"] for item in items]
    assert all(45 <= positions.count(i) <= 105 for i in range(4))  # 300 fair draws: 75 ± 4 standard deviations


@pytest.mark.parametrize("task", sorted(tasks.TASKS))
def test_items_depend_on_the_seed_only(task, documents):
    def build(seed):
        return tasks.build(task, 50, seed, documents[:6])

    assert build(1) == build(1) != build(2)


def test_the_question_and_right_choice_continue_the_file():
    text = "\n".join(f"        value_{i} = compute({i}, {i})" for i in range(12))
    for item in tasks.next_line_items(Document("m", text)):
        assert item["question"] + item["right"] in text


def test_the_right_name_stands_in_the_context_with_all_wrong_ones(documents):
    for item in tasks.build("identifier", 60):
        assert all(choice in item["question"] for choice in item["choices"])


def test_too_few_items_and_unknown_tasks_are_clear_errors():
    with pytest.raises(SfmpError, match="expected 300 items, found 0"):
        tasks.build("docstring", documents=[Document("m", "x = 1\n")])
    with pytest.raises(SfmpError, match="expected one of"):
        tasks.build("arithmetic")
