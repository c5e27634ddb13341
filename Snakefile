# Every rule of the replication; a rule runs one notebook. The design is config/runs.tsv, the size config/tiers/*.yaml.
#   snakemake --cores 8                      every result of the embedded tier (the default)
#   snakemake -n --config tier=small         what a bigger tier would do
#   snakemake --config knobs=full            the rivals with their published settings instead of reduced ones
#   targets: all tables figures claims costs html report summary publish train_embedded
import sys
import time
from pathlib import Path

from snakemake.utils import min_version

from sfmp.workflow import (FIGURES, RUN_NOTEBOOK, SOURCES, TABLES, Rules, available_cores, begin, check_ready, closing_words,
                           job_threads, leave_lock, load_design, shell_prefix, take_lock)

min_version("9.19")

configfile: "config/config.yaml"
report: "report/workflow.rst"

STARTED = time.time()
design = load_design(config)
shared = Rules(design)
R, L = design.results, f"{design.results}/logs"
MODEL, SHOWCASE = design.showcase_model, design.showcase
CORES, GPU = workflow.resource_settings.cores, 0 if design.config["device"] == "cpu" else 1
# Megabytes, and threads that keep jobs within the machine: of a notebook that holds a model, and of one that does not.
HEAVY, LIGHT = design.config["job_mem_mb"], 1000
HEAVY_THREADS, LIGHT_THREADS = job_threads(CORES, HEAVY), job_threads(CORES, LIGHT)

if workflow.is_main_process:
    begin(design, workflow.output_settings.dryrun)

shell.prefix(shell_prefix(design))

TABLE_FILES = expand(f"{R}/tables/{{name}}.csv", name=TABLES)
FIGURE_FILES = expand(f"{R}/figures/{{name}}.{{kind}}", name=FIGURES, kind=["svg", "png", "csv"])
RESULTS = [*TABLE_FILES, *FIGURE_FILES, f"{R}/claims.csv"]
EVALUATIONS = expand(f"{R}/eval/{{run}}.json", run=design.runs)
QUANTIZED = expand(f"{R}/quantized/{{run}}.json", run=design.quantized)
COSTS = expand(f"{R}/timing/{{name}}.csv", name=["e5_cost", "e5_ratio", "e5_scaling"])

def table(name):
    return report(f"{R}/tables/{name}.csv", caption="report/table.rst", category="Tables", labels={"table": name})

def figure(name, folder="figures"):
    svg = report(f"{R}/{folder}/{name}.svg", caption="report/figure.rst", category="Figures", labels={"figure": name})
    return [svg, f"{R}/{folder}/{name}.png", f"{R}/{folder}/{name}.csv"]

wildcard_constraints: model="|".join(design.models), source="|".join(SOURCES), run="[^/]+"

localrules: all, tables, figures, claims, costs, html, report, summary, publish

rule all:
    default_target: True
    input: RESULTS, COSTS, f"{R}/html/index.html", f"{R}/report.html", f"{R}/summary.txt"

rule tables:
    input: TABLE_FILES

rule figures:
    input: FIGURE_FILES

rule claims:
    input: f"{R}/claims.csv"

rule costs:
    input: COSTS

rule overview:
    input: notebook=shared.notebook("overview")
    output: overview=figure("overview")
    log: **shared.logs("overview")
    params: **shared.params("overview")
    threads: LIGHT_THREADS
    resources: mem_mb=LIGHT
    shell: RUN_NOTEBOOK

rule calibration:
    input: unpack(shared.texts), notebook=shared.notebook("calibration"), weights=shared.weights
    output:
        calibration=f"{R}/windows/{{model}}.calibration.safetensors",
        evaluation=f"{R}/windows/{{model}}.evaluation.safetensors",
    log: **shared.logs("calibration/{model}")
    params: **shared.params("calibration")
    threads: HEAVY_THREADS
    resources: mem_mb=shared.memory, gpu=shared.gpus
    shell: RUN_NOTEBOOK

use rule calibration as salience with:
    input: notebook=shared.notebook("salience"), windows=shared.windows("calibration"), weights=shared.weights
    output:
        salience=f"{R}/salience/{{model}}.{{source}}.safetensors",
        timing=f"{R}/timing/salience/{{model}}.{{source}}.json",
    log: **shared.logs("salience/{model}.{source}")
    params: **shared.params("salience")

use rule calibration as reordering with:
    input: notebook=shared.notebook("reordering"), salience=f"{R}/salience/{MODEL}.fisher.safetensors"
    output: salience_before_after=figure("salience_before_after"), concentration=table("concentration")
    log: **shared.logs("reordering")
    params: **shared.params("reordering")

use rule reordering as allocation with:
    input:
        notebook=shared.notebook("allocation"), windows=f"{R}/windows/{MODEL}.calibration.safetensors",
        salience=f"{R}/salience/{MODEL}.fisher.safetensors", guided=f"{R}/salience/{MODEL}.guided.safetensors",
    output:
        allocation=table("allocation"), allocation_oracle=table("allocation_oracle"),
        mlp_experiment=table("mlp_experiment"), bit_map=figure("bit_map"), bits_by_layer=figure("bits_by_layer"),
        mlp_curves=figure("mlp_curves"), guided_agreement=table("guided_agreement"),
        oracle_seconds=f"{R}/timing/allocation_oracle.csv",
    log: **shared.logs("allocation")
    params: **shared.params("allocation")

use rule calibration as quantization with:
    input:
        unpack(shared.salience), notebook=shared.notebook("quantization"),
        windows=shared.windows("calibration"), weights=shared.weights,
    output:
        plan=f"{R}/plan/{{run}}.safetensors", checkpoint=directory(f"{R}/models/{{run}}"),
        quantized=f"{R}/quantized/{{run}}.json", timing=f"{R}/timing/quantization/{{run}}.json",
    log: **shared.logs("quantization/{run}")
    params: **shared.params("quantization")
    wildcard_constraints: run=shared.one_of(design.planned)

if design.config.get("scatter") or design.tier != "embedded":  # layers shared by jobs; downloads ahead of them
    include: "rules/cluster.smk"

# AMQ's search serves every budget, so it is done once. What others wait for goes first: the search, then the rivals.
use rule calibration as search with:
    input: notebook=shared.notebook("search"), windows=shared.windows("calibration"), weights=shared.weights
    output: search=f"{R}/search/{{model}}.json", timing=f"{R}/timing/search/{{model}}.json"
    log: **shared.logs("search/{model}")
    params: **shared.params("search")
    priority: 2

use rule calibration as rival with:
    input:
        unpack(shared.salience), unpack(shared.search), notebook=shared.notebook("rival"),
        windows=shared.windows("calibration"), weights=shared.weights,
    output:
        checkpoint=directory(f"{R}/models/{{run}}"), quantized=f"{R}/quantized/{{run}}.json",
        timing=f"{R}/timing/rival/{{run}}.json",
    log: **shared.logs("rival/{run}")
    params: **shared.params("rival")
    priority: 1
    wildcard_constraints: run=shared.one_of(design.rivals)

use rule reordering as packing with:
    input: notebook=shared.notebook("packing"), checkpoint=f"{R}/models/{SHOWCASE}"
    output: packing=table("packing")
    log: **shared.logs("packing")
    params: **shared.params("packing")

use rule packing as lut_gemm with:
    input: notebook=shared.notebook("lut_gemm"), checkpoint=f"{R}/models/{SHOWCASE}"
    output:
        lut_gemm=table("lut_gemm"), lut_gemm_simulated=table("lut_gemm_simulated"),
        lut_gemm_traffic=table("lut_gemm_traffic"), memory_traffic=figure("memory_traffic"),
    log: **shared.logs("lut_gemm")
    params: **shared.params("lut_gemm")

use rule packing as model_integration with:
    input: notebook=shared.notebook("model_integration"), checkpoint=f"{R}/models/{SHOWCASE}"
    output: integration=table("integration")
    log: **shared.logs("model_integration")
    params: **shared.params("model_integration")

use rule calibration as evaluation with:
    input:
        unpack(shared.checkpoint), unpack(shared.questions), notebook=shared.notebook("evaluation"),
        windows=shared.windows("evaluation"), weights=shared.weights,
    output: eval=f"{R}/eval/{{run}}.json"
    log: **shared.logs("evaluation/{run}")
    params: **shared.params("evaluation")

use rule overview as e1 with:
    input:
        notebook=shared.notebook("e1"), evals=EVALUATIONS, quantized=QUANTIZED,
        runs=design.runs_table, paper="config/paper_values.tsv",
    output:
        e1_main=table("e1_main"), e1_main_md=f"{R}/tables/e1_main.md", e1_bytes=table("e1_bytes"),
        accuracy_vs_bpw=figure("accuracy_vs_bpw"), perplexity_vs_bpw=figure("perplexity_vs_bpw"),
        retention_vs_bpw=figure("retention_vs_bpw"),
    log: **shared.logs("e1")
    params: **shared.params("e1")

use rule e1 as e3 with:
    input: notebook=shared.notebook("e3"), evals=EVALUATIONS, quantized=QUANTIZED, runs=design.runs_table
    output:
        e3_reorder=table("e3_reorder"), e3_block=table("e3_block"), e3_group=table("e3_group"),
        e3_levels=table("e3_levels"), e3_salience=table("e3_salience"), e3_objective=table("e3_objective"),
        e3_scope=table("e3_scope"), e3_granularity=table("e3_granularity"), e3_guided=table("e3_guided"),
        e3_quantizer=table("e3_quantizer"),
        reorder=figure("reorder"), block_shape=figure("block_shape"), group_size=figure("group_size"),
        levels=figure("levels"), salience_source=figure("salience_source"), objective=figure("objective"),
        scope=figure("scope"), granularity=figure("granularity"), guided=figure("guided"),
        quantizer=figure("quantizer"),
    log: **shared.logs("e3")
    params: **shared.params("e3")

# Shows the timings of one quiet run: two jobs that run beside each other would measure each other.
use rule e1 as e4_cpu with:
    input: notebook=shared.notebook("e4_cpu"), cpu_bench=design.config["cpu_bench"]
    output:
        e4_cpu_products=table("e4_cpu_products"), e4_cpu_fits=table("e4_cpu_fits"),
        e4_cpu_reordering=table("e4_cpu_reordering"), e4_cpu_batches=table("e4_cpu_batches"),
        e4_cpu_crossovers=table("e4_cpu_crossovers"), e4_cpu_accuracy=table("e4_cpu_accuracy"),
        e4_cpu_widths=table("e4_cpu_widths"), e4_cpu_decoding=table("e4_cpu_decoding"),
        e4_cpu_targets=table("e4_cpu_targets"), e4_cpu_conditions=table("e4_cpu_conditions"),
        kernel_peers=figure("kernel_peers"), kernel_bits=figure("kernel_bits"), kernel_batch=figure("kernel_batch"),
        kernel_accuracy=figure("kernel_accuracy"), table_width=figure("table_width"), decode_speed=figure("decode_speed"),
    log: **shared.logs("e4_cpu")
    params: **shared.params("e4_cpu")

# Shows what was measured on a GPU, nothing where nothing was; on a machine with a GPU it also measures, for its log only.
use rule e1 as e4_gpu with:
    input: unpack(shared.gpu_evidence), notebook=shared.notebook("e4_gpu")
    output:
        e4_gpu_conditions=table("e4_gpu_conditions"), e4_gpu_products=table("e4_gpu_products"),
        e4_gpu_fits=table("e4_gpu_fits"), e4_gpu_layouts=table("e4_gpu_layouts"),
        e4_gpu_reordering=table("e4_gpu_reordering"), e4_gpu_batches=table("e4_gpu_batches"),
        e4_gpu_crossovers=table("e4_gpu_crossovers"), e4_gpu_widths=table("e4_gpu_widths"),
        e4_gpu_accuracy=table("e4_gpu_accuracy"), e4_gpu_host=table("e4_gpu_host"),
        e4_gpu_decoding=table("e4_gpu_decoding"), e4_gpu_predictions=table("e4_gpu_predictions"),
        e4_gpu_targets=table("e4_gpu_targets"), gpu_bits=figure("gpu_bits"), gpu_kernels=figure("gpu_kernels"),
    log: **shared.logs("e4_gpu")
    params: **shared.params("e4_gpu")
    resources: mem_mb=HEAVY, gpu=shared.gpus

# Shows the peaks of quiet processes: one large model, and three sizes.
use rule e1 as e5_memory with:
    input: notebook=shared.notebook("e5_memory"), memory_bench=design.config["memory_bench"]
    output:
        e5_memory_conditions=table("e5_memory_conditions"), e5_memory_sizes=table("e5_memory_sizes"),
        e5_memory_depth=table("e5_memory_depth"), e5_memory_steps=table("e5_memory_steps"),
        e5_memory_bytes=table("e5_memory_bytes"), memory=figure("memory"),
    log: **shared.logs("e5_memory")
    params: **shared.params("e5_memory")

# What reads clocks stays out of tables/ and figures/, which are the same to the byte in every run.
rule e5:
    input: notebook=shared.notebook("e5"), timing=shared.timings(), runs=design.runs_table
    output:
        e5_cost=f"{R}/timing/e5_cost.csv", e5_ratio=f"{R}/timing/e5_ratio.csv",
        e5_scaling=f"{R}/timing/e5_scaling.csv",
        cost=figure("cost", "timing"), cost_scaling=figure("cost_scaling", "timing"),
    log: **shared.logs("e5")
    params: **shared.params("e5")
    threads: HEAVY_THREADS
    resources: mem_mb=HEAVY
    shell: RUN_NOTEBOOK

use rule e1 as e9 with:
    input:
        notebook=shared.notebook("e9"), tables=[*TABLE_FILES, *COSTS],
        claims="config/claims.tsv", paper="config/paper_values.tsv", runs=design.runs_table,
    output: claims=report(f"{R}/claims.csv", caption="report/claims.rst", category="Claims")
    log: **shared.logs("e9")
    params: **shared.params("e9")

# All executed notebooks, rendered in one process; needs no network.
rule html:
    input: RESULTS, COSTS, notebooks=shared.executed()
    output: index=f"{R}/html/index.html"
    log: f"{L}/html.txt"
    shell: "python -m sfmp.report html --logs {L} --index {output.index:q} > {log:q} 2>&1"

# Tables, figures and claims in one self-contained page (Snakemake's own report).
rule report:
    input: RESULTS
    output: f"{R}/report.html"
    log: f"{L}/report.txt"
    shell: "snakemake tables figures claims --report {output:q} --nolock --cores 1 --config tier={design.tier} > {log:q} 2>&1"

# What ran, how long it took, where the results are and what a bigger tier needs.
rule summary:
    input: RESULTS, COSTS
    output: text=f"{R}/summary.txt"
    log: f"{L}/summary.txt"
    shell: "python -m sfmp.report summary --tier {design.tier} --text {output.text:q} > {log:q} 2>&1"

# Copies the small evidence to results/reference/<tier>, the part of results/ that git tracks. Not part of `all`.
rule publish:
    input: RESULTS
    shell: "python -m sfmp.report publish --tier {design.tier}"

include: "rules/training.smk"

onstart:
    check_ready(design)
    take_lock()

onsuccess:
    leave_lock()
    print(closing_words(design, time.time() - STARTED))

onerror:
    leave_lock()
    print(closing_words(design, time.time() - STARTED, failed=True), file=sys.stderr)
