"""The README says what the published evidence says."""

from pathlib import Path

import pytest

from sfmp.readme import BEGIN, END, results_block, update_readme
from sfmp.spec import SfmpError

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "results" / "reference" / "embedded"


def test_the_results_in_the_readme_are_the_published_ones():
    text = (ROOT / "README.md").read_text("utf-8")
    assert text.partition(BEGIN)[2].partition(END)[0].strip() == results_block(REFERENCE).strip()


def test_only_the_marked_part_is_replaced(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text(f"# title\n{BEGIN}\nSTALE\n{END}\nthe rest\n", "utf-8")
    update_readme(readme, REFERENCE)
    text = readme.read_text("utf-8")
    assert text.startswith("# title\n") and text.endswith(f"{END}\nthe rest\n") and "STALE" not in text
    readme.write_text("# no markers\n", "utf-8")
    with pytest.raises(SfmpError, match="found no pair"):
        update_readme(readme, REFERENCE)


def test_gpu_times_are_told_where_there_are_some_and_denied_where_there_are_none(tmp_path):
    import gpu_evidence_case

    from sfmp import gpu_evidence, gpu_targets, tables_gpu
    from sfmp.readme import _gpu_kernels

    assert "not measured" in _gpu_kernels(tmp_path)[0]
    for evidence in ({}, gpu_evidence.read_evidence(gpu_evidence_case.write_files(tmp_path))):
        conditions = gpu_evidence.conditions(evidence)
        products, errors = tables_gpu.products(evidence), tables_gpu.accuracy(evidence)
        decoded, host = tables_gpu.decoding(evidence), tables_gpu.host(evidence)
        conditions.to_csv(tmp_path / "e4_gpu_conditions.csv", index=False)
        found = gpu_targets.targets(products, errors, decoded, host, conditions)
        found.to_csv(tmp_path / "e4_gpu_targets.csv", index=False)
        lines = _gpu_kernels(tmp_path)
        assert ("not measured" in lines[0]) == (not evidence)
    assert "NVIDIA H200, 2000-01-01" in lines[0] and len(lines) == 4 + len(found)
    assert "| decode at 3 bits: times torch float16, both under CUDA graphs | Llama-3.1-8B | 2.5 | 3 | 1.20 |" in lines


def test_every_path_the_readme_links_to_exists():
    import re

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text("utf-8")):
        assert (ROOT / target).exists(), target
