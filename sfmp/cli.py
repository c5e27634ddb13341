"""The command line: ``sfmp COMMAND …`` or ``python -m sfmp COMMAND …``.

This module only parses; what a command does is in `sfmp.commands`, which is loaded once the arguments are known to be
right. ``sfmp --help`` therefore loads neither torch nor numpy.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings

EXAMPLES = """examples:
  sfmp quantize embedded out/embedded-3bpw --bpw 3 --block-rows 64
  sfmp quantize Qwen/Qwen3-0.6B@main out/qwen3 --bpw 3.5 --calibration dataset:c4 --device cuda
  sfmp inspect out/embedded-3bpw --picture bits.png
  sfmp eval out/embedded-3bpw --text python:evaluation --tasks next_line --json results.json
  sfmp generate out/embedded-3bpw "def main():" --tokens 40
  sfmp convert authors-checkpoint out/converted --base-model meta-llama/Llama-3.1-8B
  sfmp push out/embedded-3bpw me/embedded-3bpw --results results.json
  sfmp bench cpu --out cpu.json
  sfmp pin --tier small
  sfmp fetch c4 wikitext2 piqa --data-root /data

exit status: 0 done, 2 bad arguments or input (one line says what to do), 130 interrupted,
1 anything unexpected (with traceback)"""
MODEL = "a local folder, `embedded` (the small model of this package), or OWNER/NAME[@REVISION] on the Hugging Face Hub"
TEXT = ("python:calibration, python:evaluation, a .txt or .jsonl file, dataset:NAME of config/datasets.tsv, or "
        "hub:ID[:CONFIG]:SPLIT[@REVISION][#FILE]")


def main(arguments=None) -> int:
    """Run one command; return its exit status: 0 done, 2 bad input, 130 interrupted. Anything else is raised."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    own_parser = arguments[:1] == ["bench"]
    options = None if own_parser else parser().parse_args(arguments)
    command = "bench" if own_parser else options.command
    from sfmp.checks import SfmpError

    formatted, warnings.formatwarning = warnings.formatwarning, _line
    try:
        if own_parser:
            from sfmp.bench.__main__ import main as bench

            return bench(arguments[1:])
        from sfmp import commands

        getattr(commands, command)(options)
        sys.stdout.flush()
    except SfmpError as error:
        print(f"sfmp {command}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"sfmp {command}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    finally:
        warnings.formatwarning = formatted
    return 0


def _line(message, category, filename, lineno, line=None, whole=warnings.formatwarning):
    """What a warning says, as one line; where in the code it was raised only if it is meant for programmers."""
    if category is UserWarning:
        return f"sfmp: {' '.join(str(message).split())}\n"
    return whole(message, category, filename, lineno, line)


def parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    from sfmp import __version__

    root = argparse.ArgumentParser(
        prog="sfmp", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=EXAMPLES,
        description="Search-free fine-grained mixed-precision quantization of language models.")
    root.add_argument("--version", action="version", version=f"sfmp {__version__}")
    commands = root.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (_quantize, _eval, _generate, _inspect, _convert, _push, _pin, _fetch):
        add(commands)
    commands.add_parser("bench", add_help=False, help="measure kernels, decoding and memory (python -m sfmp.bench)")
    return root


def _command(commands, name, text, example):
    return commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".",
                               epilog=f"example:\n  {example}", formatter_class=argparse.RawDescriptionHelpFormatter)


def _quantize(commands):
    one = _command(commands, "quantize", "quantize a model to a budget of bits per weight",
                   "sfmp quantize embedded out/embedded-3bpw --bpw 3 --block-rows 64")
    one.add_argument("model", metavar="MODEL", help=MODEL)
    one.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
    one.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint")
    one.add_argument("--resume", action="store_true", help="go on where a killed run of the same command "
                     "was, or begin if there was none (not where --device spread holds the whole model, nor for the "
                     "models of which a warning says that they are quantized in memory as a whole)")
    spec = one.add_argument_group("what to make")
    spec.add_argument("--bpw", type=float, default=3.0, help="bits per weight, scales and offsets included (3.0)")
    spec.add_argument("--levels", type=_levels, default=(2, 3, 4), help="bit-widths of a block, or auto (2,3,4)")
    spec.add_argument("--group-size", type=int, default=128, help="input columns that share a scale (128)")
    spec.add_argument("--block-rows", type=int, default=512, help="output rows of a block (512)")
    spec.add_argument("--method", choices=("awq", "gptq", "rtn"), default="awq", help="how codes are found (awq)")
    spec.add_argument("--objective", choices=("paper", "measured"), default="paper", help="of the allocation (paper)")
    spec.add_argument("--scope", choices=("global", "layer", "matrix"), default="global", help="of the budget (global)")
    spec.add_argument("--reorder", choices=("both", "rows", "cols", "none"), default="both", help="what is sorted")
    spec.add_argument("--skip", nargs="+", default=("lm_head",), metavar="NAME",
                      help="matrices left alone, by full or last name; name lm_head too beside others (lm_head)")
    spec.add_argument("--seed", type=int, default=0)
    data = one.add_argument_group("what to measure on")
    data.add_argument("--calibration", metavar="TEXT", default="python:calibration",
                      help=f"{TEXT}; python:calibration by default, which is Python code: give text like yours")
    data.add_argument("--windows", type=int, default=64, help="number of calibration windows (64)")
    data.add_argument("--seqlen", type=int, help="tokens of a window (512, or the model's context if that is shorter)")
    data.add_argument("--salience", choices=("fisher", "activation", "magnitude", "random"), default="fisher",
                      help="what says which weights matter (fisher)")
    data.add_argument("--keep-salience", metavar="FOLDER",
                      help="block sums of salience: used if they are there, written otherwise; another budget, other "
                      "levels, scope or method on the same model and text then measure nothing again")
    _machine(one, "where the GPUs do not hold all of the model, one layer at a time on one device instead")
    one.add_argument("--base-model", metavar="ID[@REVISION]", help="what the model card names; MODEL by default")
    one.add_argument("--max-shard-size", default="5GB", help="largest file of OUT (5GB)")
    one.add_argument("--quiet", action="store_true", help="no progress bars")


def _eval(commands):
    one = _command(commands, "eval", "measure perplexity and zero-shot accuracy of a model, quantized or not",
                   "sfmp eval out/embedded-3bpw --text python:evaluation --tasks next_line --json results.json")
    one.add_argument("model", metavar="MODEL", help=MODEL)
    one.add_argument("--text", action="append", metavar="TEXT", help=f"{TEXT}; may be repeated (python:evaluation)")
    one.add_argument("--seqlen", type=int, help="tokens of a window (2048, or the model's context if that is shorter)")
    one.add_argument("--windows", type=int, help="evenly spaced windows of each text (all)")
    one.add_argument("--tasks", nargs="+", default=(), metavar="TASK", help="next_line, identifier, docstring, or of "
                     "lm-eval: arc_easy, arc_challenge, boolq, hellaswag, piqa, winogrande, mmlu, gsm8k")
    one.add_argument("--items", type=int, default=300, help="items of each of our tasks (300)")
    _machine(one)
    one.add_argument("--json", metavar="FILE", help="also write the results, as `sfmp push --results` takes them")
    one.add_argument("--quiet", action="store_true", help="no bars of ours (lm-eval, which runs tasks, has its own)")


def _generate(commands):
    one = _command(commands, "generate", "continue a text, token by token",
                   'sfmp generate out/embedded-3bpw "def main():" --tokens 40')
    one.add_argument("model", metavar="MODEL", help=MODEL)
    one.add_argument("prompt", metavar="PROMPT", nargs="?", help="text to continue; standard input if absent")
    one.add_argument("--tokens", type=int, default=100, help="largest number of new tokens (100)")
    one.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (0)")
    one.add_argument("--top-p", type=float, default=1.0, help="sample from the likeliest tokens of this total (1)")
    one.add_argument("--seed", type=int, default=0)
    _machine(one)


def _inspect(commands):
    one = _command(commands, "inspect", "show bits by layer and projection, exact bytes and plan hash of a checkpoint",
                   "sfmp inspect out/embedded-3bpw --picture bits.png")
    one.add_argument("out", metavar="OUT", help="folder of a quantized checkpoint")
    one.add_argument("--picture", metavar="FILE.png", help="draw the bits by layer and projection")
    one.add_argument("--json", action="store_true", help="print JSON")


def _convert(commands):
    one = _command(commands, "convert", "convert a checkpoint published by SFMP's authors (4-bit codes, safetensors)",
                   "sfmp convert authors-checkpoint out/converted --base-model meta-llama/Llama-3.1-8B")
    one.add_argument("source", metavar="IN", help="local folder with config.json and *.safetensors")
    one.add_argument("out", metavar="OUT", help="folder to write; it must not exist")
    one.add_argument("--overwrite", action="store_true", help="replace OUT if it is a checkpoint")
    one.add_argument("--base-model", metavar="ID[@REVISION]", help="what was quantized, for the model card")
    one.add_argument("--codes", metavar="NAME", default="qweight", help="last part of the codes' tensor name (qweight)")
    one.add_argument("--nibbles", choices=("low-first", "high-first"), default="low-first",
                     help="which half of a byte holds the code of lower index (low-first)")
    one.add_argument("--axes", choices=("[N, K/2]", "[N/2, K]", "[K, N/2]", "[K/2, N]"),
                     help="axes of the codes, if the shapes of all matrices fit several")
    one.add_argument("--quiet", action="store_true", help="no progress bars")


def _push(commands):
    one = _command(commands, "push", "upload a quantized checkpoint to the Hugging Face Hub, with its model card",
                   "sfmp push out/embedded-3bpw me/embedded-3bpw --private --results results.json")
    one.add_argument("out", metavar="OUT", help="folder of a quantized checkpoint")
    one.add_argument("repository", metavar="OWNER/NAME", help="repository on the Hub; made if it does not exist")
    one.add_argument("--results", nargs="+", default=(), metavar="FILE.json", help="what `sfmp eval --json` wrote")
    one.add_argument("--private", action="store_true", help="make a new repository private")
    one.add_argument("--revision", help="branch to upload to (main)")
    one.add_argument("--message", default="Upload a model quantized by sfmp", help="commit message")


def _pin(commands):
    one = _command(commands, "pin", "write the revisions of models and data sets that have none yet into config/",
                   "sfmp pin --tier small")
    one.add_argument("--tier", choices=("small", "paper"), help="models of this tier only")
    one.add_argument("--again", action="store_true", help="also replace the revisions that are there")
    one.add_argument("--config", default="config", metavar="FOLDER", help="with models.tsv and datasets.tsv (config)")


def _fetch(commands):
    one = _command(commands, "fetch", "copy data sets of config/datasets.tsv for machines without network",
                   "sfmp fetch c4 wikitext2 piqa --data-root /data")
    one.add_argument("names", nargs="+", metavar="NAME", help="row of config/datasets.tsv")
    one.add_argument("--data-root", required=True, metavar="FOLDER", help="what data.root is to be on that machine")


def _machine(one, spread="for models larger than one GPU"):
    one.add_argument("--device", default="auto",
                     help="cpu, cuda, cuda:1 …; auto: cuda if there is one; spread: over all GPUs, then the CPU; "
                     f"{spread} (auto)")
    one.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto",
                     help="of what is not quantized; auto: as stored, but float32 for float16 on a CPU (auto)")


def _levels(text):
    if text == "auto":
        return text
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected auto or bit-widths such as 2,3,4, found {text!r}") from None
