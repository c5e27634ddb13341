# Models and data sets of a tier, fetched where there is a network, for nodes that have none. Not part of `all`.
#   snakemake --cores 1 downloads --config tier=small 'data={root: /shared/data}' 'models={root: /shared/models}'
# Without a root, models go to the cache of the Hub (HF_HOME), and data are read from the Hub by the jobs.
from sfmp.workflow_downloads import data_command, model_command

localrules: downloads, download_model, download_data

rule downloads:
    input: expand(f"{R}/downloads/{{name}}.txt", name=[*design.models, "data"])

# The only jobs that are tried again: networks fail by chance.
rule download_model:
    output: f"{R}/downloads/{{model}}.txt"
    params: command=lambda wildcards: model_command(design, wildcards.model)
    retries: 3
    shell: "HF_HUB_OFFLINE=0 {params.command} > {output:q}"

rule download_data:
    output: f"{R}/downloads/data.txt"
    params: command=data_command(design)
    retries: 3
    shell: "HF_HUB_OFFLINE=0 {params.command} > {output:q}"
