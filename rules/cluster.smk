# What a cluster needs beside the Snakefile: layers shared by jobs (--config scatter=N), and downloads ahead of the jobs.
if design.config.get("scatter"):
    include: "scatter.smk"

if design.tier != "embedded":
    include: "downloads.smk"
