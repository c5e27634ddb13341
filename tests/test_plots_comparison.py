"""Figures of the full comparison: every method drawn once in its panel, nothing outside left unsaid."""

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from sfmp import plots_comparison as plots  # noqa: E402
from sfmp.checks import SfmpError  # noqa: E402
from sfmp.records import METHODS  # noqa: E402


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture
def main():
    rows = [("fp16", np.nan, 10.0, 1.0, 0.6, 0.01)]
    for place, method in enumerate(m for family in plots.FAMILIES.values() for m in family):
        rows += [(method, bpw, 11.0 + place - bpw, 0.9 + place / 100, 0.5, 0.01) for bpw in (2.5, 3.5)]
    rows += [("sfmp-awq", bpw, 13 - bpw, 0.95, 0.5, 0.01) for bpw in (2.5, 3.5)]
    columns = ["method", "bpw_achieved", "perplexity", "retention", "acc", "acc_stderr"]
    return pd.DataFrame(rows, columns=columns).assign(objective="paper")


def curves(ax):
    return {line.get_label(): line for line in ax.get_lines() if not line.get_label().startswith("_")}


def test_every_family_has_its_panels_with_sfmp_in_all(main):
    axes = plots.retention_vs_bpw(main).axes
    assert len(axes) == 6
    for column, members in enumerate(plots.FAMILIES.values()):
        expected = {plots.LOOKS[m][0] for m in members} | {"SFMP on AWQ", "fp16 (no quantization)"}
        for ax in (axes[column], axes[3 + column]):
            assert set(curves(ax)) == expected and len(expected) <= 6
    assert curves(axes[0])["RTN"].get_ydata().tolist() == pytest.approx([90, 90])
    assert curves(axes[3])["RTN"].get_ydata().tolist() == [8.5, 7.5]


def test_what_lies_outside_is_marked_with_its_value(main):
    main.loc[(main.method == "rtn") & (main.bpw_achieved == 2.5), ["perplexity", "retention"]] = [103.2, 0.41]
    axes = plots.retention_vs_bpw(main).axes
    assert [t.get_text() for t in axes[0].texts] == ["41"] and [t.get_text() for t in axes[3].texts] == ["103"]
    assert axes[3].get_ylim()[1] < 60 and axes[0].get_ylim()[0] > 80


def test_methods_that_were_not_run_leave_no_trace(main):
    kept = main[main.method.isin(["fp16", "rtn", "sfmp-awq"])]
    axes = plots.retention_vs_bpw(kept).axes
    assert len(axes) == 2 and set(curves(axes[0])) == {"RTN", "SFMP on AWQ", "fp16 (no quantization)"}
    with pytest.raises(SfmpError, match="retention"):
        plots.retention_vs_bpw(main.drop(columns="retention"))


def test_looks_differ_inside_a_panel_and_every_method_has_one():
    for members in plots.FAMILIES.values():
        looks = [plots.LOOKS[m][1:3] for m in (*members, "sfmp-awq")]
        assert len({marker for _, marker in looks}) == len({colour for colour, _ in looks}) == len(looks)
    assert set(METHODS) - {"fp16", "layer_wise", "element"} <= set(plots.LOOKS)


def test_quantizer_has_one_panel_each():
    rows = [(q, a, b, 10 + b) for q in ("awq", "gptq") for a in ("uniform", "mixed") for b in (2.25, 3.0)]
    table = pd.DataFrame(rows, columns=["quantizer", "allocation", "bpw", "perplexity"]).assign(fp_perplexity=8.0)
    axes = plots.quantizer(table).axes
    assert [ax.get_title() for ax in axes] == ["AWQ", "GPTQ"]
    assert set(curves(axes[0])) == {"fp16", "uniform", "mixed"}


def test_granularity_keeps_the_control_in_sight():
    rows = [("element", 1, "-", 10), ("64×128", 2, "both", 11), ("64×128", 2, "none", 12), ("matrix", 3, "-", 13)]
    rows += [("model", 4, "none", 90)]
    table = pd.DataFrame(rows, columns=["unit", "place", "reorder", "perplexity"]).assign(bpw=3.0, fp_perplexity=9.0)
    ax = plots.granularity(table).axes[0]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["element", "64\n×128", "matrix", "model"]
    assert curves(ax)["blocks, natural order"].get_ydata().tolist() == [12]
    assert ax.get_ylim()[1] < 20 and sorted(t.get_text() for t in ax.texts) == ["10.0", "11.0", "12.0", "13.0", "90"]
