"""The process that measures parts: it is told one part a line and answers in lines of JSON.

Before it tries anything that may break a device or never end it says so ({"trying": name}); when it dies, the process
that asked knows what to leave out. The last line for a part is its result.
"""

from __future__ import annotations

import gc
import json
import os
import sys


def run_part(part: dict, settings, tell) -> dict:
    """Measure one part.

    Parameters
    ----------
    part : dict
        part, shape, …, and "skip": {name: why} of candidates to leave out.
    settings : gpu_timing.Settings
    tell : function that is given the name of what is tried next

    Returns
    -------
    dict
        "rows" and "absent" {peer: why}; "failed" if one of our own candidates failed. Of ceilings: "device",
        "ceilings"; of host: "host"; of compile: "compiled".
    """
    from sfmp.bench import gpu_parts, gpu_prebuild, gpu_timing

    name = part["part"]
    if settings.device == "cuda":
        _free_memory()
    if name == "ceilings":
        return gpu_parts.ceilings(settings, tell)
    if name == "compile":
        return gpu_prebuild.build(part["parts"], settings, tell)
    if name == "host":
        return {"host": gpu_parts.host(part, settings, tell)}
    if name == "accuracy":
        return {"rows": gpu_parts.accuracy(part, settings, tell)}
    attempts = Attempts(part.get("skip", {}), settings, tell)
    gpu_parts.timed(part, settings, attempts)
    tell(f"{name}: timing")
    found = {"rows": gpu_timing.measure(attempts.prepared, settings.rounds), "absent": attempts.absent}
    return {**found, "failed": attempts.failed} if attempts.failed else found


def _free_memory():
    """Give the device back what the last part had: its graphs and weights are in reference cycles."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


class Attempts:
    """Candidates of a part that ran; why the others did not.

    Attributes
    ----------
    prepared : list of gpu_timing.Prepared
    absent : dict, peer → why
    failed : list of str, our own candidates that failed, and why
    """

    def __init__(self, skip: dict[str, str], settings, tell):
        self.skip, self.settings, self.tell = skip, settings, tell
        self.prepared, self.absent, self.failed = [], {}, []

    def __call__(self, name: str, make, peer: str | None = None) -> None:
        """Make a candidate, run it and prepare its samples.

        Parameters
        ----------
        name : str
        make : function that returns a timing.Candidate
        peer : str or None
            None for our own; for a peer why it cannot be tried, or "".
        """
        from sfmp.bench import gpu_timing

        why = self.skip.get(name) or self.skip.get(name.split()[0]) or peer
        if not why:
            self.tell(name)
            try:
                self.prepared.append(gpu_timing.prepare(make(), self.settings))
                return
            except Exception as error:  # what a peer or a compiler raises is not known; the result says what it was
                why = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:300]}"
            self._check_device()
        if peer is None:
            self.failed.append(f"{name}: {why}")
        else:
            self.absent[name] = why

    def _check_device(self):
        """Raise what the device says: after a bad access nothing runs in this process any more, so it must end."""
        if self.settings.device == "cuda":
            import torch

            torch.cuda.synchronize()


def main() -> None:
    """Answer on standard output, and send what anything else prints there to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    from sfmp.bench.gpu_timing import Settings

    settings = Settings(**json.loads(sys.argv[1]))

    def answer(what):
        print(json.dumps(what, allow_nan=False), file=answers, flush=True)

    for line in sys.stdin:
        answer({"result": run_part(json.loads(line), settings, lambda name: answer({"trying": name}))})


if __name__ == "__main__":
    main()
