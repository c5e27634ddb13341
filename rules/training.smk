# Trains the embedded model again from the Python that is installed; resumable. The shipped weights stay as they are.
rule train_embedded:
    output: directory("results/embedded/train/model")
    log: "results/embedded/logs/train_embedded.txt"
    params: cores=min(CORES or 1, available_cores())
    threads: CORES or 1
    resources: mem_mb=4000
    shell: "OMP_NUM_THREADS={params.cores} python -m sfmp.train --out results/embedded/train 2>&1 | tee {log:q}"
