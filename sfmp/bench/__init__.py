"""Timing of kernels and decoding beside their peers, in one run: ``python -m sfmp.bench``.

Files by command:

* ``cpu``: `cpu` runs `cpu_kernels`, `cpu_peers`, `table_width`, `roof` (what memory allows) and `decode`, by `timing`.
* ``kernels``: `kernels` asks a process, `gpu_worker`, for the parts of `gpu_parts`. What they measure: `gpu_wanted`
  (ours, as data), `gpu_candidates` and `gpu_products` (ours, as functions), `gpu_peers` and `gpu_triton`,
  `gpu_ceilings`. How: `gpu_prebuild` (kernels compiled before), `gpu_timing` (graphs, events), `gpu_model`
  (predictions).
* ``decode``: `gpu_decode` asks a process a model, `decode_worker`, for the candidates of `decode_models`, each in the
  loop of `static_decode`. Random weights are `random_model`'s.
"""
