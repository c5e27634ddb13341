"""Figures: the right marks from the right rows, the same bytes twice, and clear errors. Data functions
against naive ones.
"""

import io

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot as plt  # noqa: E402

from sfmp import plots, plots_overview, plots_pipeline  # noqa: E402
from sfmp.allocate import make_plan  # noqa: E402
from sfmp.checks import SfmpError  # noqa: E402
from sfmp.spec import QuantSpec  # noqa: E402


@pytest.fixture(autouse=True)
def no_open_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def main():
    rows = [("fp16", np.nan, np.nan, 8.0, 0.7)]
    for method, loss in (("rtn", 9), ("awq", 5), ("sfmp-awq", 2)):
        rows += [
            (method, bpw, bpw - 0.001, 8 + loss * (4 - bpw), 0.7 - loss / 100) for bpw in (2.5, 3.0, 3.5)
        ]
    frame = pd.DataFrame(rows, columns=["method", "bpw", "bpw_achieved", "perplexity", "acc"])
    return frame.assign(acc_stderr=0.02, objective="paper")


@pytest.fixture(scope="module")
def salience():
    rng = np.random.default_rng(0)
    shapes = {"layers.0.a_proj": (48, 64), "layers.0.b_proj": (16, 96), "layers.1.a_proj": (40, 64)}
    loud = {n: rng.lognormal(0, 1, (s[0], 1)) * rng.lognormal(0, 1, (1, s[1])) for n, s in shapes.items()}
    return {n: (matrix * rng.exponential(size=matrix.shape)).astype(np.float32) for n, matrix in loud.items()}


@pytest.fixture(scope="module")
def plan(salience):
    return make_plan(salience, QuantSpec(bpw=4.0, group_size=32, block_rows=16, method="rtn"))


def lines(figure):
    return {
        line.get_label(): line for line in figure.axes[0].get_lines() if not line.get_label().startswith("_")
    }


def test_curves_hold_every_method_and_the_control_line(main):
    drawn = lines(plots.perplexity_vs_bpw(main))
    assert set(drawn) == {"fp16 (no quantization)", "RTN", "AWQ", "SFMP on AWQ"}
    assert drawn["RTN"].get_ydata().tolist() == main[main.method == "rtn"].perplexity.tolist()
    assert drawn["RTN"].get_xdata().tolist() == pytest.approx([2.499, 2.999, 3.499])
    assert set(drawn["fp16 (no quantization)"].get_ydata()) == {8.0}


def test_measured_objective_is_a_series_of_its_own(main):
    ours = main[main.method == "sfmp-awq"].assign(objective="measured", perplexity=1.0)
    drawn = lines(plots.perplexity_vs_bpw(pd.concat([main, ours])))
    assert set(drawn["SFMP on AWQ, measured objective"].get_ydata()) == {1.0}
    assert 1.0 not in drawn["SFMP on AWQ"].get_ydata()


def test_accuracy_is_in_percent(main):
    drawn = lines(plots.accuracy_vs_bpw(main))
    assert drawn["AWQ"].get_ydata() == pytest.approx([65.0, 65.0, 65.0])


def test_every_series_differs_by_more_than_colour():
    looks = [(marker, line) for _, _, marker, line in plots.SERIES.values()]
    assert len(set(looks)) == len(looks)


def test_ablation_keeps_the_asked_order_and_one_series_per_budget():
    rows = [
        ("sfmp-rtn", b, r, 10 + i + b) for b in (2.5, 3.0) for i, r in enumerate(("both", "cols", "none"))
    ]
    table = pd.DataFrame(rows, columns=["method", "bpw", "reorder", "perplexity"]).assign(fp_perplexity=8.0)
    figure = plots.ablation(table, "reorder", ("none", "rows", "cols", "both"))
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["none", "cols", "both"]
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert labels == ["fp16", "2.5 bpw", "3 bpw"]


def test_ablation_draws_no_line_across_a_value_that_was_not_measured():
    rows = [("sfmp-rtn", 2.5, "none", 9), ("sfmp-rtn", 2.5, "rows", 8), ("sfmp-rtn", 2.5, "both", 7)]
    rows += [("sfmp-awq", 2.5, "none", 6), ("sfmp-awq", 2.5, "both", 5)]
    table = pd.DataFrame(rows, columns=["method", "bpw", "reorder", "perplexity"])
    series = plots.ablation(table, "reorder", ("none", "rows", "both")).axes[0].containers
    drawn = {box.get_label(): box[0].get_ydata() for box in series}
    assert drawn["2.5 bpw, RTN"].tolist() == [9, 8, 7]
    assert drawn["2.5 bpw, AWQ"][[0, 2]].tolist() == [6, 5] and np.isnan(drawn["2.5 bpw, AWQ"][1])


def test_pyplot_stays_interactive_once_it_is():
    """A notebook shows only figures that are made while pyplot is interactive, which its first figure makes it."""
    seen = []
    with matplotlib.rc_context({"interactive": False}):
        plots.styled(lambda: seen.append(matplotlib.is_interactive()))()
        plots.styled(lambda: matplotlib.interactive(True))()  # what loading the backend of a notebook does
        plots.styled(lambda: seen.append(matplotlib.is_interactive()))()
    assert seen == [False, True]


def test_ablation_sorts_numbers_by_size():
    table = pd.DataFrame(
        {"method": "sfmp-rtn", "bpw": 3.0, "group_size": [128, 32, 64], "perplexity": [3.0, 1.0, 2.0]}
    )
    figure = plots.ablation(table, "group_size")
    assert [t.get_text() for t in figure.axes[0].get_xticklabels()] == ["32", "64", "128"]
    assert [t.get_text() for t in figure.axes[0].texts] == ["1", "2", "3"]


@pytest.mark.parametrize(
    "frame", [pd.DataFrame(), pd.DataFrame({"method": [], "bpw_achieved": [], "perplexity": []})]
)
def test_missing_data_is_named(frame):
    with pytest.raises(SfmpError, match="perplexity"):
        plots.perplexity_vs_bpw(frame)


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_same_figure_has_the_same_bytes(main, kind):
    def render():
        buffer = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if kind == "svg" else {"Software": None}
        with matplotlib.rc_context({"svg.hashsalt": "sfmp"}):
            plots.perplexity_vs_bpw(main).savefig(buffer, format=kind, metadata=metadata)
        return buffer.getvalue()

    assert render() == render()


def test_figures_do_not_depend_on_the_callers_style(main):
    with matplotlib.rc_context({"font.size": 30, "lines.linewidth": 9}):
        figure = plots.perplexity_vs_bpw(main)
    assert figure.axes[0].xaxis.label.get_size() == 8 and figure.get_figwidth() == plots.COLUMN


def test_salience_maps_are_means_of_cells(salience, plan):
    name = "layers.0.a_proj"
    frame = plots_pipeline.salience_maps_data(salience[name], plan[name], cells=5)
    before = frame[frame.order == "before"].pivot(index="row", columns="col", values="salience")
    edges = [[0, 9, 19, 28, 38, 48], [0, 12, 25, 38, 51, 64]]
    assert before.index.tolist() == edges[0][:-1] and before.columns.tolist() == edges[1][:-1]
    cell = salience[name][9:19, 38:51].astype(float).mean()
    assert before.loc[9, 38] == pytest.approx(cell)
    after = frame[frame.order == "after"].pivot(index="row", columns="col", values="salience").to_numpy()
    assert after[0, 0] > 5 * after[-1, -1]
    figure = plots_pipeline.salience_maps(frame, name)
    assert all(ax.get_ylim()[0] > ax.get_ylim()[1] for ax in figure.axes[:2])  # row 0 on top


def test_concentration_grows_and_stays_under_the_ceiling(salience, plan):
    table = plots_pipeline.concentration(salience, plan, top=0.25).set_index("name")
    assert (table.top_share_after > table.top_share_before).all() and (
        table.top_share_after < table.ceiling
    ).all()
    blocks = sorted((salience["layers.0.b_proj"][:, k : k + 32].sum() for k in (0, 32, 64)), reverse=True)
    assert table.top_share_before["layers.0.b_proj"] == pytest.approx(blocks[0] / sum(blocks))


def test_no_choice_of_blocks_beats_the_ceiling_even_where_one_block_is_more_than_the_share():
    spec = QuantSpec(bpw=4.0, group_size=32, block_rows=16, method="rtn")
    rng = np.random.default_rng(1)
    flat = {"a_proj": rng.uniform(size=(32, 64)).astype(np.float32), "b_proj": rng.uniform(size=(20, 40))}
    table = plots_pipeline.concentration(flat, make_plan(flat, spec), top=0.1)
    assert (table.top_share_after <= table.ceiling).all() and (table.ceiling < 1).all()


def test_gini_of_known_lists():
    assert plots_pipeline._gini(np.ones(5)) == pytest.approx(0)
    assert plots_pipeline._gini(np.array([0, 0, 0, 1.0])) == pytest.approx(0.75)


def test_bit_maps_hold_every_block(plan):
    frame = plots_pipeline.bit_map_data(plan)
    assert len(frame) == sum(matrix.bits.size for matrix in plan.values())
    part = frame[(frame.name == "layers.1.a_proj") & (frame.row_block == 2) & (frame.group == 1)]
    assert part.bits.tolist() == [plan["layers.1.a_proj"].bits[2, 1]]
    figure = plots_pipeline.bit_map(frame)
    assert figure.axes[0].get_title() == "layer 0 · a_proj"
    with pytest.raises(SfmpError, match="not in the plan"):
        plots_pipeline.bit_map_data(plan, ["nowhere"])


def test_bits_by_layer_weighs_ragged_blocks(plan):
    frame = plots_pipeline.bits_by_layer_data(plan).set_index("name")
    assert np.average(frame.bits, weights=frame.weights) == pytest.approx(plan.wbits)
    bits = plan["layers.1.a_proj"].bits.astype(float)  # 40 rows: the last block has 8
    assert frame.bits["layers.1.a_proj"] == pytest.approx(
        np.average(bits, axis=0, weights=[16, 16, 8]).mean()
    )
    plots_pipeline.bits_by_layer(frame.reset_index())


def test_overview_is_what_the_pipeline_computes():
    weight, salience = plots_overview.example_matrix(32, 64, seed=3)
    spec = QuantSpec(bpw=4.0, group_size=32, block_rows=8, method="rtn")
    frame = plots_overview.overview_data(weight, salience, spec)
    grid = {
        p: g.pivot(index="row", columns="col", values="value").to_numpy() for p, g in frame.groupby("panel")
    }
    assert set(grid) == set(plots_overview.PANELS)
    assert np.sort(grid["reordered"].ravel()) == pytest.approx(np.sort(salience.astype(np.float32).ravel()))
    assert (grid["codes"] < 2 ** grid["bits"]).all() and grid["bits"].mean() <= 3
    assert np.array_equal(grid["plane"], grid["codes"] >= 2 ** (grid["bits"] - 1))
    coarse = np.ptp(weight, axis=1).max() / (2**2 - 1)  # no error above one step of the widest two-bit group
    assert 0 < grid["error"].max() < coarse
    assert len(plots_overview.overview(frame, spec).axes) == 12
