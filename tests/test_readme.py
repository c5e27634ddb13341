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


def test_every_path_the_readme_links_to_exists():
    import re

    for target in re.findall(r"\]\((?!http)([^)#]+)\)", (ROOT / "README.md").read_text("utf-8")):
        assert (ROOT / target).exists(), target
