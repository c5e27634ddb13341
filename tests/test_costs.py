"""Cost by stage, its ratios and growth: what is charged to whom, and that a fit finds the exponent put in."""

import json

import matplotlib
import numpy as np
import pandas as pd
import pytest

matplotlib.use("Agg")

from sfmp import cost_study, plots_cost, tables_cost  # noqa: E402
from sfmp.checks import SfmpError  # noqa: E402
from sfmp.cost import Stage  # noqa: E402

RUNS = [
    ("m.awq", "main", "awq", 3.5, "fisher"),
    ("m.amq.a", "main", "amq", 3.25, "-"),
    ("m.amq.b", "main", "amq", 3.5, "-"),
    ("m.sfmp", "main", "sfmp-awq", 3.5, "fisher"),
    ("m.other", "reorder", "sfmp-rtn", 3.5, "fisher"),
]


def stage(name, seconds, **more):
    record = {"stage": name, "wall_seconds": seconds, "cpu_seconds": seconds, "peak_bytes": 1, "evaluations": 0}
    record |= {"unit": "run", "units": 0, "full_units": 0, "unit_scale": 1.0, **more}
    return record | {"full_seconds": Stage(**{k: v for k, v in record.items() if k != "stage"}, name=name).full_seconds}


@pytest.fixture
def timings(tmp_path):
    stages = {
        "quantization/m.awq": [stage("quantization", 8)],
        "rival/m.amq.a": [stage("search", 30, units=10, full_units=1000, unit_scale=2.0), stage("quantization", 9)],
        "rival/m.amq.b": [stage("quantization", 7)],  # the search was done by the other run
        "quantization/m.sfmp": [stage("allocation", 1), stage("quantization", 8)],
        "quantization/m.other": [stage("allocation", 99)],
        "salience/m.fisher": [stage("salience", 4, units=50, full_units=100)],
    }
    for name, rows in stages.items():
        path = tmp_path / f"{name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"run": path.stem, "stages": rows}))
    return tables_cost.timing_files(tmp_path)


@pytest.fixture
def design():
    table = pd.DataFrame(RUNS, columns=["run", "experiments", "method", "bpw", "salience"])
    return table.assign(model="m", objective="paper")


def test_every_method_is_charged_once_for_what_it_needs(timings, design):
    table = tables_cost.cost_by_stage(timings, design)
    found = [tuple(row) for row in table[["method", "stage", "part", "wall_seconds"]].to_numpy()]
    assert found == [
        ("awq", "quantization", "quantization", 8),
        ("amq", "search", "allocation", 30),  # shared, from the run that did it
        ("amq", "quantization", "quantization", 7),  # of the run at the common budget
        ("sfmp-awq", "salience", "allocation", 4),
        ("sfmp-awq", "allocation", "allocation", 1),
        ("sfmp-awq", "quantization", "quantization", 8),
    ]
    assert table.run[1] == "m.amq.b"


def test_ratios_are_sums_over_parts_at_both_knobs(timings, design):
    ratios = tables_cost.cost_ratios(tables_cost.cost_by_stage(timings, design)).set_index(["method", "part", "knobs"])
    assert ratios.ratio["amq", "allocation", "reduced"] == 30 / 5
    assert ratios.ratio["amq", "allocation", "full"] == 30 / 10 * 1000 * 2 / (8 + 1)
    assert ratios.ratio["amq", "total", "reduced"] == 37 / 13
    assert ratios.ratio["awq", "total", "reduced"] == 8 / 13 and ("awq", "allocation", "full") not in ratios.index
    assert ("amq", "total", "full") not in ratios.index  # AWQ itself is not extrapolated


def test_counts_are_kept_apart_from_clocks(timings, design):
    units = tables_cost.needed_evaluations(tables_cost.cost_by_stage(timings, design).assign(unit="evaluation"))
    assert not [column for column in units if "seconds" in column]


def test_timings_without_stages_are_named(tmp_path, design):
    (tmp_path / "m.awq.json").write_text('{"run": "m.awq", "wall_seconds": 1}')
    with pytest.raises(SfmpError, match="with `stages`"):
        tables_cost.cost_by_stage(tmp_path, design)


def test_growth_finds_the_exponent_and_leaves_out_what_did_nothing():
    sizes = np.array([2, 4, 8, 16])
    table = pd.DataFrame({"axis": "layers", "size": sizes, "method": "x", "stage": "s", "seconds": 0.1 * sizes**1.5,
                          "full_units": [0, 8, 16, 32], "full_seconds": 3.0})
    row = cost_study.growth(table).iloc[0]
    assert (row.seconds, row.needed, row.full_seconds) == pytest.approx((1.5, 1.0, 0.0))
    assert np.isnan(cost_study.growth(table.iloc[:2]).needed[0])
    assert cost_study.with_growth(table).seconds_exponent.tolist() == pytest.approx([1.5] * 4)


def test_needed_work_grows_with_layers_as_the_publications_say():
    """Counts of tiny models against arithmetic: 7 matrices a layer, 15 levels to sort, 10,250 evaluations."""
    table = cost_study.cost_scaling(layers=(1, 2), groups=(64,), width=64)
    layers = table[table.axis == "layers"].set_index(["method", "stage", "size"])
    assert [layers.full_units["amq", "sensitivity", n] for n in (1, 2)] == [8, 15]
    assert [layers.full_units["amq", "search", n] for n in (1, 2)] == [10_250] * 2
    assert [layers.full_units["bitstack", "sorting", n] for n in (1, 2)] == [105, 210]
    assert [layers.full_units["sfmp", "salience", n] for n in (1, 2)] == [100, 100]
    assert [layers.linears["sfmp", "salience", n] for n in (1, 2)] == [7, 14]
    assert layers.blocks["sfmp", "allocation", 1] == 4 * 2 * 2 + 3 * 2 * 4
    assert (table.seconds > 0).all() and set(table[table.axis == "blocks"]["size"]) == {4}
    cost_study.growth(table)


def test_random_models_leave_the_global_generator_alone():
    import torch

    before = torch.random.get_rng_state()
    first, second = (cost_study.random_model(1, 64, 64, seed=3).state_dict() for _ in range(2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_figures_draw_every_stage(timings, design):
    table = tables_cost.cost_by_stage(timings, design)
    axes = plots_cost.cost(table).axes[0]
    assert [t.get_text() for t in axes.get_yticklabels()] == table.stage.tolist()
    widths = sorted(bar.get_x() + bar.get_width() for bar in axes.patches)
    assert widths == pytest.approx(sorted([*table.cpu_seconds, *table.full_seconds]))
    sizes = np.array([2, 4])
    rows = [pd.DataFrame({"axis": axis, "size": sizes, "method": "sfmp", "stage": "salience", "seconds": sizes / 10,
                          "full_units": 100, "full_seconds": 1.0}) for axis in ("layers", "blocks")]
    figure = plots_cost.cost_scaling(cost_study.with_growth(pd.concat(rows, ignore_index=True)))
    assert [ax.texts[0].get_text() for ax in figure.axes] == ["1.0", "0.0", "1.0"]
    matplotlib.pyplot.close("all")
