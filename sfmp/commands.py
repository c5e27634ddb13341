"""What each command of `sfmp.cli` does with its parsed arguments: calls the library and prints."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from sfmp.checks import SfmpError


def quantize(options) -> None:
    """Quantize a model into a folder; the last lines say what was made."""
    from sfmp.inspection import read_checkpoint, summary
    from sfmp.pipeline import Calibration, quantize_to_folder
    from sfmp.spec import QuantSpec

    spec = QuantSpec(bpw=options.bpw, group_size=options.group_size, block_rows=options.block_rows,
                     levels=options.levels, reorder=options.reorder, method=options.method, scope=options.scope,
                     objective=options.objective, skip=tuple(options.skip), seed=options.seed)
    calibration = Calibration(options.calibration, options.windows, options.seqlen, options.salience)
    quantize_to_folder(options.model, options.out, spec, calibration, dtype=options.dtype, device=options.device,
                       base_model=options.base_model, overwrite=options.overwrite,
                       max_shard_size=options.max_shard_size, resume=options.resume,
                       kept_salience=options.keep_salience, progress=not options.quiet)
    _print_made(summary(read_checkpoint(options.out)))


def eval(options) -> None:
    """Print one line per score; write them all if a file is named."""
    from sfmp.scores import evaluate_model, save_results

    if options.json:
        check_writable(options.json)
    results = evaluate_model(options.model, options.text or ["python:evaluation"], seqlen=options.seqlen,
                             windows=options.windows, tasks=options.tasks, items=options.items, dtype=options.dtype,
                             device=options.device, progress=not options.quiet)
    for row in results:
        error = f" ± {row['stderr']:.4f}" if "stderr" in row else ""
        print(f"{row['dataset']}  {row['metric']}  {row['value']:.4f}{error}")
    if options.json:
        save_results(results, options.json)


def generate(options) -> None:
    """Print the prompt, then each new token as it comes."""
    from sfmp.generate import generate as continue_text
    from sfmp.model_source import load

    prompt = sys.stdin.read() if options.prompt is None else options.prompt
    model, tokenizer = load(options.model, options.dtype, options.device)

    unshown = [prompt]  # until the first piece: what is refused leaves standard output empty

    def write(piece):
        print(*unshown, piece, sep="", end="", flush=True)
        unshown.clear()

    continue_text(model, tokenizer, prompt, tokens=options.tokens, temperature=options.temperature,
                  top_p=options.top_p, seed=options.seed, write=write)
    write("\n")


def inspect(options) -> None:
    """Print the tables of one checkpoint, or JSON; draw the picture if a file is named."""
    from sfmp.inspection import read_checkpoint, summary
    from sfmp.layer_bits import bits_by_layer_table, bits_frame, save_picture

    checkpoint = read_checkpoint(options.out)
    found = summary(checkpoint)
    if options.picture:
        check_writable(options.picture)
        save_picture(checkpoint.matrices, options.picture)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        print("mean code bits by layer and projection")
        table = bits_by_layer_table(bits_frame(checkpoint.matrices))
        print(table.to_string(float_format="{:.3f}".format, na_rep="", index_names=False), end="\n\n")
        for part, count in found["bytes"].items():
            print(f"{part:>18}  {count:>15,} bytes")
        print()
        _print_made(found)


def convert(options) -> None:
    """Convert an authors' checkpoint; the last lines say what was made."""
    from sfmp.convert import convert_checkpoint
    from sfmp.inspection import read_checkpoint, summary
    from sfmp.model_source import source_record

    convert_checkpoint(options.source, options.out, codes=options.codes, nibbles=options.nibbles,
                       axes=options.axes,
                       base=source_record("", options.base_model), overwrite=options.overwrite,
                       progress=not options.quiet)
    _print_made(summary(read_checkpoint(options.out)))


def push(options) -> None:
    """Upload a checkpoint; print where it is."""
    from sfmp.push import push_checkpoint
    from sfmp.scores import load_results

    print(push_checkpoint(options.out, options.repository, results=load_results(options.results),
                          private=options.private or None, revision=options.revision, message=options.message))


def pin(options) -> None:
    """Write revisions; print one line for each."""
    from sfmp.pin import pin as write_revisions

    _check_tables(Path(options.config))
    found = write_revisions(options.config, options.tier, options.again)
    for repository, commit in found:
        print(f"{repository}  {commit}")
    print(f"{len(found)} revisions written to {options.config}/models.tsv and {options.config}/datasets.tsv")


def fetch(options) -> None:
    """Copy data sets; print the files."""
    from sfmp.pin import fetch as copy

    for path in copy(options.names, options.data_root):
        print(path)


def check_writable(path) -> None:
    """Raise SfmpError if a result could not be written there, before it is computed."""
    from sfmp.disk import writing_to

    path = Path(path)
    if path.is_dir():
        raise SfmpError(f"{path}: expected a file to write, found a folder; name a file in it")
    with writing_to(path, "choose a place where you may write"):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise SfmpError(f"{path}: expected a folder {path.parent}, found a file; choose another place") from error
        with tempfile.TemporaryFile(dir=path.parent):
            pass


def _check_tables(folder):
    """Raise SfmpError where the tables are not; an installed package does not carry them."""
    for name in ("models.tsv", "datasets.tsv"):
        if not (folder / name).is_file():
            raise SfmpError(f"{folder / name}: expected this table, found none; run this in a checkout of the "
                            "repository, or name the folder that holds it with --config")


def _print_made(found):
    spec, confirmed = found["spec"] or {}, {True: "confirmed", False: "NOT that of the tensors", None: "as recorded"}
    print(f"{found['folder']}: {found['matrices']} matrices, {found['weights']:,} weights, method {spec.get('method')}")
    print(f"bpw {found['bpw']:.4f}  code bits {found['wbits']:.4f}  bpw_stored {found['bpw_stored']:.4f}  "
          f"tensors {found['bytes']['all tensors']:,} bytes")
    print(f"plan {found['plan_hash']} ({confirmed[found['plan_hash_confirmed']]})")
