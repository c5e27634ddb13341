"""The held-out modules are the same everywhere and never occur in training text."""

import hashlib
import sys

import pytest

from sfmp import corpus


@pytest.fixture(scope="module")
def held_out():
    return corpus.stdlib_documents("calibration") + corpus.stdlib_documents("evaluation")


@pytest.fixture(scope="module")
def training(held_out):
    return corpus.without_copies(corpus.stdlib_documents("train") + corpus.package_documents(), held_out)


def test_splits_partition_the_modules_by_name_alone():
    names = {split: {d.name.split(".")[0] for d in corpus.stdlib_documents(split)} for split in corpus.SPLITS}
    assert not names["train"] & names["calibration"]
    assert not names["train"] & names["evaluation"]
    assert not names["calibration"] & names["evaluation"]
    for split, members in names.items():
        for name in members - {"help"}:  # the interpreter's help topics are training text by decision
            bucket = hashlib.sha256(name.encode()).digest()[0] % 16
            assert split == ("calibration" if bucket == 0 else "evaluation" if bucket in (1, 5, 6) else "train")


def test_split_names_do_not_depend_on_the_python_version():
    assert [corpus.split_of(name) for name in ("http", "difflib", "json")] == ["calibration", "evaluation", "train"]


def test_no_held_out_module_occurs_in_training(held_out, training):
    trained_names = {doc.name for doc in training}
    assert not trained_names & {doc.name for doc in held_out}
    trained_texts = {hashlib.sha256(doc.text.encode()).hexdigest() for doc in training}
    assert not trained_texts & {hashlib.sha256(doc.text.encode()).hexdigest() for doc in held_out}


def test_no_training_file_repeats_a_held_out_one_line_by_line(held_out, training):
    seen = {line.strip() for doc in held_out for line in doc.text.splitlines() if len(line.strip()) >= 32}
    for doc in training:
        lines = [line.strip() for line in doc.text.splitlines() if len(line.strip()) >= 32]
        repeated = [line for line in lines if line in seen]
        assert len(repeated) < 4 or len(repeated) <= 0.05 * len(lines), f"{doc.name} repeats {repeated[:3]}"


def test_a_renamed_copy_of_a_held_out_module_is_left_out(held_out):
    original = max(held_out, key=lambda doc: len(doc.text))
    copy = corpus.Document("backport.of.something", "import os\n" * 20 + original.text)
    other = corpus.Document("unrelated", "value = some_function(argument_one, argument_two)\n" * 20)
    assert corpus.without_copies([copy, other], held_out) == [other]


def test_held_out_text_is_large_enough_and_of_this_python(held_out):
    assert sum(len(doc.text) for doc in held_out) > 800_000
    assert all(doc.name.split(".")[0] in sys.stdlib_module_names for doc in held_out)


def test_an_absent_package_is_passed_over():
    assert corpus.package_documents(["no_such_package_anywhere"]) == []
