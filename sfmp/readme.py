"""The results in README.md: written from the published tables, never by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from sfmp.checks import SfmpError, write_atomically
from sfmp.tables_comparison import permutation_bits

BEGIN = "<!-- results: written by `snakemake publish`, tested against results/reference/embedded -->"
NEAR = 0.005  # bits per weight over a budget in bytes that still count as meeting it: a bit map of column groups
END = "<!-- end of results -->"


def results_block(reference: Path) -> str:
    """Return the README's results: perplexity and accuracy by method and budget, and the verdict on every claim.

    Parameters
    ----------
    reference : Path
        A published tier, with ``tables/e1_main.csv`` and ``claims.csv``.

    Returns
    -------
    str
        Markdown, rounded; the full precision is in the CSV files it names.
    """
    main = pd.read_csv(reference / "tables" / "e1_main.csv")
    equal = pd.read_csv(reference / "tables" / "e1_bytes.csv")
    claims = pd.read_csv(reference / "claims.csv", dtype=str, keep_default_na=False)
    control = main[main.method == "fp16"].iloc[0]
    runs = main[main.method != "fp16"]
    ours = main[(main.method == "sfmp-awq") & main.bpw_bytes.notna()]
    overhead = (ours.bpw_bytes - ours.bpw_achieved).max()
    equal = equal[(equal.method != "fp16") & (equal.bpw_bytes <= equal.bpw + NEAR)]
    shown = claims[(claims.paper_version != "ours") | claims.verdict.str.match("not-replicated|direction-only")]
    counts = claims.verdict.str.split(" ").str[0].value_counts()
    return "\n".join(
        [
            "Held-out perplexity of the embedded model by bits per weight (`bpw`); without quantization "
            f"{control.perplexity:.2f}:",
            "",
            _grid(runs, "perplexity", "{:.2f}"),
            "",
            "![share of the accuracy and perplexity kept, against bits per weight, one panel a family of methods]"
            "(results/reference/embedded/figures/retention_vs_bpw.png)",
            "",
            "The same with every stored byte counted (permutations, bit maps, factors), runs at most "
            f"{NEAR:g} bits over the budget; "
            f"permutations and bit map of SFMP take {overhead:.2f} bits per weight on matrices as small as these, "
            f"the permutations {permutation_bits():.3f} on those of an 8B model:",
            "",
            _grid(equal, "perplexity", "{:.2f}"),
            "",
            f"Zero-shot accuracy in per cent, mean of three tasks, ± {100 * control.acc_stderr:.1f} standard error; "
            f"without quantization {100 * control.acc:.1f}:",
            "",
            _grid(runs.assign(acc=100 * runs.acc), "acc", "{:.1f}"),
            "",
            *_kernels(reference / "tables"),
            "",
            *_gpu_kernels(reference / "tables"),
            "",
            _memory(reference / "tables"),
            "",
            "Claims (" + ", ".join(f"{n} {verdict}" for verdict, n in counts.items()) + "); "
            "rules: [config/claims.tsv](config/claims.tsv), all verdicts: "
            "[claims.csv](results/reference/embedded/claims.csv). Below: every claim of the "
            "paper, and those of ours that did not come out as expected.",
            "",
            "| claim | what the paper (or, where marked ours, this replication) says | measured | verdict |",
            "|---|---|---|---|",
            *map(_claim, shown.itertuples()),
        ]
    )


def _kernels(tables: Path) -> list[str]:
    """Speed of the CPU kernels beside their peers, and of decoding."""
    products, decoding = (pd.read_csv(tables / f"e4_cpu_{name}.csv") for name in ("products", "decoding"))
    told = pd.read_csv(tables / "e4_cpu_conditions.csv", index_col="what").value
    shown = products[products.family.ne("roof") & ~products.natural & ~products.mixed & products.bits.isin([2, 3, 4])]
    names = {"sfmp": "{0.mode}", "onnxruntime": "onnxruntime ({0.mode})", "openvino": "OpenVINO",
             "torch": "torch {0.mode}"}
    shown = shown.assign(candidate=[names[row.family].format(row) for row in shown.itertuples()])
    shapes = list(dict.fromkeys(shown["shape"]))
    columns = [(shape, bits) for shape in shapes for bits in (2, 3, 4)]
    grid = shown.pivot_table(index="candidate", columns=["shape", "bits"], values="times_bfloat16", sort=False)
    lines = [f"| {name} | " + " | ".join("–" if pd.isna(v) else f"{v:.1f}" for v in grid.loc[name].reindex(columns))
             + " |" for name in grid.index]
    large = decoding[decoding.random].set_index("weights")
    bpw = 3.0
    packed = large[large.bpw == bpw].loc["sfmp lut16"]
    return [
        f"Speed on one CPU ({told['processor']}, {told['threads']} threads, {told['date']}): one token, weights from "
        "memory, tables and reordering included, `torch` with bfloat16 weights = 1, medians of ratios within a run "
        "([e4_cpu](notebooks/e4_cpu.ipynb)):",
        "",
        "| kernel | " + " | ".join(f"{shape}, {bits} bits" for shape, bits in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
        *lines,
        "",
        f"`generate` on {packed.model} random Llama weights: {packed.tokens_per_second:.1f} tokens a second at "
        f"{bpw:g} bpw (lut16), {large.tokens_per_second['torch bf16']:.1f} with torch in bfloat16, "
        f"{large.tokens_per_second['torch fp32']:.1f} in float32.",
        "",
        "![time of one token against bits: straight lines just above the time of reading the same bytes]"
        "(results/reference/embedded/figures/kernel_bits.png)",
    ]


def _gpu_kernels(tables: Path) -> list[str]:
    """What was measured on a GPU beside what was asked for; that nothing was, where nothing was."""
    path = tables / "e4_gpu_targets.csv"
    found = pd.read_csv(path).dropna(subset=["measured"]) if path.is_file() else pd.DataFrame()
    if found.empty:
        return ["GPU kernels: **not measured**, on no device. What they should reach, and a prediction, are in "
                "[e4_gpu](notebooks/e4_gpu.ipynb)."]
    told = pd.read_csv(tables / "e4_gpu_conditions.csv").set_index(["file", "what"]).value
    where = "; ".join(f"{file}: {told[file, 'device']}, {told[file, 'date']}, torch {told[file, 'torch']}"
                      for file in dict.fromkeys(told.index.get_level_values("file")))
    return [
        f"GPU kernels ({where}; [e4_gpu](notebooks/e4_gpu.ipynb)), medians, beside what the targets for an H200 were:",
        "",
        "| target | of | required | measured | margin |",
        "|---|---|---|---|---|",
        *(f"| {row.target} | {row.of} | {row.required:g} | {row.measured:.3g} | {row.margin:.2f} |"
          for row in found.itertuples()),
    ]


def _memory(tables: Path) -> str:
    """Peak of quantizing by model, and the largest model step by step."""
    sizes, steps = (pd.read_csv(tables / f"e5_memory_{name}.csv") for name in ("sizes", "steps"))
    told = pd.read_csv(tables / "e5_memory_conditions.csv", index_col="what").value
    exact, = pd.read_csv(tables / "e5_memory_bytes.csv").itertuples()
    small = "; ".join(f"{row.model / 1e6:.0f} MB of weights, {row.above_imports / 1e6:.0f} MB above the libraries' "
                      f"{row.imports / 1e6:.0f} MB" for row in sizes.itertuples())
    large = ", ".join(f"{row.step} {row.peak / 1e9:.2f} GB" for row in steps.itertuples() if row.step != "create")
    return (
        f"Memory of `sfmp quantize` ({told['method']}, {told['calibration']}, {told['date']}; "
        f"[e5_memory](notebooks/e5_memory.ipynb)): {small}. A random Llama of {steps.model.iloc[0] / 1e9:.2f} GB "
        f"({told['whole run method']}, {told['whole run calibration']}, {told['whole run date']}), by process: "
        f"{large}. Its checkpoint has {exact.payload:,} bytes of tensors; expected were {exact.expected:,}."
    )


def _claim(row) -> str:
    text = f"(ours) {row.text}" if row.paper_version == "ours" else row.text
    return f"| {row.claim} | {text} | {row.ours or '–'} | {row.verdict} |"


def _grid(runs: pd.DataFrame, column: str, form: str) -> str:
    """Markdown table: one row a method, one column a budget."""
    grid = runs.pivot_table(index="method", columns="bpw", values=column, sort=False).sort_index(axis=1)
    head = "| method | " + " | ".join(f"{bpw:g}" for bpw in grid.columns) + " |"
    rows = (
        f"| {method} | " + " | ".join("–" if pd.isna(v) else form.format(v) for v in values) + " |"
        for method, values in zip(grid.index, grid.to_numpy(), strict=True)
    )
    return "\n".join([head, "|---" * (len(grid.columns) + 1) + "|", *rows])


def update_readme(readme: Path, reference: Path) -> None:
    """Replace the results between the two markers of the README.

    Raises
    ------
    SfmpError
        If a marker is missing.
    """
    text = readme.read_text("utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SfmpError(f"{readme}: expected the lines {BEGIN!r} and {END!r}, found no pair; put them back")
    new = f"{before}{BEGIN}\n\n{results_block(reference)}\n\n{END}{after}"
    write_atomically(readme, lambda temporary: temporary.write_text(new, encoding="utf-8"))
