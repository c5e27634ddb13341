# With `--config scatter=N`, N jobs share the decoder layers of each AWQ run; the checkpoint has the same bytes.
#   plan, and what enters the first layer of each piece (once a model) → N pieces → gathered by the quantization notebook
# Jobs between run plain commands: what they hand on is no result, says itself what it was made from, and is deleted.
from sfmp.workflow_scatter import Scatter

scatter = Scatter(design)

rule piece_plan:
    input: unpack(shared.salience), weights=shared.weights
    output: temp(f"{scatter.folder}/plan/{{run}}.safetensors")
    log: f"{L}/piece_plan/{{run}}.txt"
    params: model=scatter.source, settings=scatter.settings, code=scatter.code
    threads: HEAVY_THREADS
    resources: mem_mb=shared.memory
    shell:
        "python -m sfmp.scatter_job plan --model {params.model:q} --salience {input.salience:q} {params.settings} "
        "--out {output:q} > {log:q} 2>&1"

rule piece_inputs:
    input: windows=shared.windows("calibration"), weights=shared.weights
    output: temp(scatter.inputs())
    log: f"{L}/piece_inputs/{{model}}.txt"
    params: model=scatter.source, code=scatter.code
    threads: HEAVY_THREADS
    resources: mem_mb=HEAVY, gpu=scatter.gpus
    shell:
        "python -m sfmp.scatter_job inputs --model {params.model:q} --windows {input.windows:q} "
        "--out {output:q} > {log:q} 2>&1"

rule piece:
    input:
        plan=f"{scatter.folder}/plan/{{run}}.safetensors", inputs=scatter.inputs_of_piece,
        windows=shared.windows("calibration"), weights=shared.weights,
    output: temp(directory(f"{scatter.folder}/layers/{{run}}/{{piece}}"))
    log: f"{L}/piece/{{run}}.{{piece}}.txt"
    params: model=scatter.source, code=scatter.code
    threads: HEAVY_THREADS
    resources: mem_mb=HEAVY, gpu=scatter.gpus
    wildcard_constraints: run=shared.one_of(scatter.runs), piece=r"\d+"
    shell:
        "python -m sfmp.scatter_job layers --model {params.model:q} --windows {input.windows:q} "
        "--plan {input.plan:q} --inputs {input.inputs:q} --out {output:q} > {log:q} 2>&1"

use rule quantization as gathering with:
    input:
        unpack(shared.salience), notebook=shared.notebook("quantization"),
        windows=shared.windows("calibration"), weights=shared.weights, layers=scatter.layers(),
    wildcard_constraints: run=shared.one_of(scatter.runs)

ruleorder: gathering > quantization
