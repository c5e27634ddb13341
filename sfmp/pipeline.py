"""From a model to a quantized checkpoint folder in one call: what `sfmp quantize` runs."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable
from pathlib import Path

from sfmp.checks import SfmpError, integer
from sfmp.model_source import check_new, check_unquantized, chosen_device, load, skeleton, source_record, window_length
from sfmp.permissions import share_weights
from sfmp.spec import Plan, QuantSpec


@dataclasses.dataclass(frozen=True)
class Calibration:
    """Where the windows come from and what is measured on them.

    Attributes
    ----------
    text : str, a source of `sfmp.data.load_text`
    windows : int, how many
    seqlen : int or None, tokens of each; None is 512 or the model's context if that is shorter
    salience : str, a key of `sfmp.salience.SALIENCE_SOURCES`
    """

    text: str = "python:calibration"
    windows: int = 64
    seqlen: int | None = None
    salience: str = "fisher"


def quantize_to_folder(source: str, folder, spec: QuantSpec, calibration: Calibration, *, dtype: str = "auto",
                       device: str = "auto", base_model: str | None = None, overwrite: bool = False,
                       max_shard_size: str = "5GB", resume: bool = False, kept_salience=None,
                       progress: bool = False):
    """Quantize a model and write the checkpoint with tokenizer and model card, complete or not at all.

    One layer is in memory at a time, and what is done is kept in a folder beside `folder` until all is, so that a
    killed run can go on. Models that do not allow that (a warning says why), and ``device="spread"``, are quantized in
    memory as a whole. The bytes are the same.

    Parameters
    ----------
    source, dtype, device : see `sfmp.model_source.load`
    folder : path that does not exist, unless `overwrite`
    spec : QuantSpec
    calibration : Calibration
    base_model : str, optional
        ``owner/name[@revision]`` for the model card, where `source` is a local copy.
    max_shard_size : str
        Largest file, such as ``5GB``.
    resume : bool
        Go on with what an earlier run, called with the same arguments, left.
    kept_salience : path, optional
        Folder with the reduced salience of an earlier run on the same model and calibration: used if it is there,
        written otherwise. Budget, levels, scope and method may differ.
    progress : bool
        Show bars on standard error.

    Returns
    -------
    Plan

    Raises
    ------
    SfmpError
        Any of it is unusable, or the earlier run was another one; `folder` is then as it was.
    """
    from sfmp import data
    from sfmp.resume import in_place, work_folder

    folder, origin = Path(folder), source_record(source, base_model or _of_a_copy(source))
    check_apart(source, folder)
    if resume and not overwrite and (folder / "config.json").is_file() and not work_folder(folder).exists():
        raise SfmpError(f"{folder}: expected unfinished work to resume, found a checkpoint and no such work; if it is "
                        "what you want nothing is left to do, else choose another folder or pass --overwrite")
    if not (resume and in_place(folder)):
        check_new(folder, overwrite)
    integer("windows", calibration.windows, 1)
    _check_size(max_shard_size)
    texts = data.load_text(calibration.text)

    def windows_for(model, tokenizer):
        _check_skip(model, spec.skip)
        seqlen = window_length(model, calibration.seqlen, 512)
        return data.calibration_windows(texts, tokenizer, calibration.windows, seqlen, spec.seed)

    job = _Request(source, folder, spec, calibration.salience, dtype, device, origin, overwrite, max_shard_size, resume,
                   progress, windows_for, kept_salience)
    plan = job.run()
    share_weights(folder)
    return plan


def check_apart(source, folder) -> None:
    """Raise SfmpError if writing `folder` would replace a local `source`, or a folder that `source` lies in."""
    model, folder = Path(source).resolve(), Path(folder).resolve()
    if model.is_dir() and (folder == model or folder in model.parents):
        raise SfmpError(f"{folder}: expected a folder apart from {source}, which is read, found one that holds it; "
                        "choose another")


def _check_skip(model, skip):
    """Raise SfmpError if a name of what is left alone fits no matrix; lm_head, the default, need not."""
    from sfmp.checks import is_skipped
    from sfmp.salience import linear_modules
    from sfmp.unfuse import linears_exposed

    with linears_exposed(model):
        names = list(linear_modules(model, ()))
    unused = [one for one in skip if one != "lm_head" and not any(is_skipped(name, (one,)) for name in names)]
    if unused:
        raise SfmpError(f"skip: expected the full or last name of a matrix, found {unused[0]!r}, which none has; the "
                        f"first are {', '.join(names[:3])}; correct it")


def _check_size(text):
    """Raise SfmpError unless transformers can read it as a size, hours before it does."""
    if not re.fullmatch(r"0*[1-9]\d*(KB|MB|GB|TB)", str(text).upper()):
        raise SfmpError(f"max_shard_size: expected a size such as 5GB or 500MB, found {text!r}; correct it")


@dataclasses.dataclass(frozen=True)
class _Request:
    """One call of `quantize_to_folder`, its arguments checked; ``windows_for(model, tokenizer)`` cuts the windows."""

    source: str
    folder: Path
    spec: QuantSpec
    kind: str
    dtype: str
    device: str
    origin: dict | None
    overwrite: bool
    max_shard_size: str
    resume: bool
    progress: bool
    windows_for: Callable
    kept: object = None

    def run(self):
        """Stream the model, or say why not and quantize it in memory."""
        from sfmp.stream import NotStreamable

        if self.device == "spread":
            return self.in_memory()
        try:
            return self.streamed()
        except NotStreamable as error:
            warnings.warn(f"{error}: the whole model is held in memory, and a killed run begins again", stacklevel=3)
            return self.in_memory()

    def in_memory(self):
        from sfmp.allocate import make_plan
        from sfmp.apply import quantize_model
        from sfmp.hf import attach, save_checkpoint
        from sfmp.salience import SALIENCE_SOURCES

        if self.kept is not None:
            raise SfmpError("kept_salience: expected a model that is quantized layer by layer, found one that is not (a"
                            " warning says why) or device spread; leave --keep-salience out")
        model, tokenizer = load(self.source, self.dtype, self.device)
        check_unquantized(self.source, model.config)
        if self.device == "spread" and any(parameter.is_meta for parameter in model.parameters()):
            warnings.warn("device spread: the GPUs do not hold all of the model, so one layer at a time is quantized, "
                          "on one device", stacklevel=4)
            del model
            return dataclasses.replace(self, device="auto").run()
        windows = self.windows_for(model, tokenizer)
        options = {"progress": self.progress} if self.kind in ("fisher", "activation") else {}
        if self.kind == "fisher" and self.device == "spread":  # twice the weights beside them
            options |= {"checkpointing": True, "accumulate": "cpu"}
        salience = SALIENCE_SOURCES[self.kind](model, windows, self.spec.seed, skip=self.spec.skip, **options)
        plan = make_plan(salience, self.spec, model)
        del salience
        attach(quantize_model(model, plan, windows, progress=self.progress), plan, self.origin)
        check_new(self.folder, self.overwrite)
        save_checkpoint(model, self.folder, tokenizer, max_shard_size=self.max_shard_size)
        return plan

    def streamed(self):
        from sfmp.resume import fingerprint, workplace
        from sfmp.stream import NotStreamable, open_stream
        from sfmp.stream_quantize import STREAMED, assemble, quantize_layers

        if self.kind not in STREAMED:
            raise NotStreamable(f"{self.kind} salience is not computed layer by layer")
        device = chosen_device(self.device)
        empty, tokenizer = skeleton(self.source)
        windows = self.windows_for(empty, tokenizer)
        identity = fingerprint(self.source, empty.config, self.spec, windows, salience=self.kind, dtype=self.dtype,
                               device=device.type, origin=self.origin, max_shard_size=self.max_shard_size)
        with workplace(self.folder, identity, resume=self.resume, overwrite=self.overwrite) as (work, finished):
            if finished:
                return Plan.load(work / "plan.safetensors")
            stream = open_stream(self.source, empty, self.dtype, device, self.spec.skip, work / "offloaded")
            stream.check(windows)
            plan = self.plan(stream, windows, work, identity)
            quantize_layers(stream, plan, windows, work, self.progress)
            assemble(stream, plan, work, tokenizer, origin=self.origin, max_shard_size=self.max_shard_size)
        return plan

    def plan(self, stream, windows, work, identity):
        """The plan, from the salience that is kept if there is one; keeps it otherwise."""
        from sfmp.compact_salience import load_problem, merged
        from sfmp.kept_salience import identity_of_salience, keep, kept_plan
        from sfmp.stream_quantize import streamed_plan

        if self.kept is None:
            return streamed_plan(stream, self.spec, windows, work, self.kind, self.progress)
        of_salience = identity_of_salience(identity, self.spec)
        plan = kept_plan(self.kept, self.spec, of_salience)
        if plan is not None:
            plan.save(work / "plan.safetensors")  # a run that is killed at its very end is asked for it
            return plan
        plan = streamed_plan(stream, self.spec, windows, work, self.kind, self.progress)
        parts = sorted(work.glob("salience-*.safetensors"))
        if len(parts) < len(stream):  # a resumed run, whose plan came from such a folder
            raise SfmpError(f"{self.kept}: expected the salience that this run's plan came from, found no such folder; "
                            "name the one that the plan came from, or leave --keep-salience out")
        keep(merged(map(load_problem, parts)), self.kept, of_salience)
        return plan


def _of_a_copy(source):
    """The name of a model whose copy is read below the machine's models root; the folder would not tell it."""
    from sfmp.stages import located

    if source == "embedded" or Path(source).is_dir():
        return None
    return source if Path(located(source)[0]).is_dir() else None
