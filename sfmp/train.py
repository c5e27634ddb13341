"""Train the embedded model from nothing but the installed Python: ``python -m sfmp.train --out DIR``.

One process, CPU or GPU, resumable: a batch depends on (seed, step) only and the state is saved every ``--save-every``
steps by write-and-rename, so a killed run continues where it stopped. Muon trains the matrices, AdamW the embedding
and the norms; the learning rate warms up, stays, and falls linearly to zero over the last ``DECAY`` of the steps.
Windows are half as long until then (attention is the dearest part on a CPU) and of full length while the rate falls.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import os
import time
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from sfmp import corpus, embedded

STEP_TOKENS = 8192
PART_TOKENS = 2048  # the gradient of a step is accumulated over parts whose logits fit the cache
LOG_WINDOWS = 32  # held-out windows of each split that the log follows
STDLIB_SHARE = 0.3  # of the windows of a batch; the rest comes from the packages
MUON_LR, ADAMW_LR, WARMUP, DECAY = 0.02, 2e-3, 50, 0.4
LOG_FIELDS = ("step", "tokens", "seconds", "train_loss", "bits_per_byte_calibration", "bits_per_byte_evaluation")


def prepare(out: Path) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Train the tokenizer and turn every split into token ids, once; cached in ``out``.

    Returns
    -------
    tokens : dict of str to uint16 array
        ``stdlib`` and ``packages`` (training), ``calibration``, ``evaluation``.
    bytes_per_token : dict of str to float
        For the held-out splits: UTF-8 bytes of text per token, to turn a loss into bits per byte.
    """
    held = {split: corpus.stdlib_documents(split) for split in ("calibration", "evaluation")}
    held_out = held["calibration"] + held["evaluation"]
    path = out / "tokens.npz"
    if not path.is_file():
        texts = {
            "stdlib": corpus.without_copies(corpus.stdlib_documents("train"), held_out),
            "packages": corpus.without_copies(corpus.package_documents(), held_out),
            **held,
        }
        if not (out / "tokenizer.json").is_file():
            sample = texts["stdlib"] + texts["packages"][::20]
            embedded.train_tokenizer(doc.text for doc in sample).save(str(out / "tokenizer.json"))
        tokenizer = _raw_tokenizer(out)
        arrays = {name: _tokenize(tokenizer, documents) for name, documents in texts.items()}
        with open(out / "tokens.tmp", "wb") as file:
            np.savez(file, **arrays)
        os.replace(out / "tokens.tmp", path)
    with np.load(path) as file:
        tokens = {name: file[name] for name in file.files}
    size = {split: sum(len(doc.text.encode()) for doc in documents) for split, documents in held.items()}
    return tokens, {split: size[split] / len(tokens[split]) for split in held}


def _raw_tokenizer(folder: Path):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _tokenize(tokenizer, documents: list[corpus.Document]) -> np.ndarray:
    bos = tokenizer.token_to_id(embedded.BOS)
    parts = [[bos, *encoding.ids] for encoding in tokenizer.encode_batch([doc.text for doc in documents])]
    return np.concatenate([np.asarray(part, dtype=np.uint16) for part in parts])


def batch_at(step: int, steps: int, tokens: dict[str, np.ndarray], seed: int) -> torch.Tensor:
    """Draw the batch of a step: int64 [windows, length] at random offsets, a function of (seed, step) only."""
    length = embedded.CONTEXT if steps - step <= DECAY * steps else embedded.CONTEXT // 2
    windows = STEP_TOKENS // length
    rng = np.random.default_rng((seed, step))
    count = round(windows * STDLIB_SHARE)
    sources = [tokens["stdlib"]] * count + [tokens["packages"]] * (windows - count)
    rng.shuffle(sources)
    starts = [rng.integers(0, len(source) - length) for source in sources]
    return torch.from_numpy(
        np.stack([s[i : i + length] for s, i in zip(sources, starts, strict=True)]).astype(np.int64)
    )


def learning_rate(step: int, steps: int) -> float:
    """Return the factor on both base rates at ``step`` of ``steps``: linear warm-up, constant, linear fall to zero."""
    return min(1.0, (step + 1) / WARMUP, (steps - step) / (DECAY * steps))


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Return [Muon on the 2-D weights of the decoder layers, AdamW on everything else]."""
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed" not in name and "lm_head" not in name]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=MUON_LR, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=ADAMW_LR, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def _loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast(ids.device.type, dtype=torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


def _backward(model: torch.nn.Module, ids: torch.Tensor) -> float:
    """Accumulate the gradient of the mean loss of ``ids`` part by part; return that loss."""
    parts = ids.split(max(1, PART_TOKENS // ids.shape[1]))
    total = 0.0
    for part in parts:
        loss = _loss(model, part) * (len(part) / len(ids))
        loss.backward()
        total += loss.item()
    return total


@torch.no_grad()
def bits_per_byte(
    model: torch.nn.Module, tokens: np.ndarray, bytes_per_token: float, device: str, windows: int
) -> float:
    """Return the mean loss over the first non-overlapping windows of the full context, in bits per byte of text."""
    length = embedded.CONTEXT
    count = min(len(tokens) // length, windows)
    ids = torch.from_numpy(tokens[: count * length].astype(np.int64)).view(count, length).to(device)
    losses = [_loss(model, part).item() * len(part) for part in ids.split(PART_TOKENS // length)]
    return sum(losses) / count / math.log(2) / bytes_per_token


def train(
    out: Path, steps: int, device: str = "cpu", seed: int = 0, log_every: int = 100, save_every: int = 200
) -> Path:
    """Train the embedded model, or continue training it, and export it to ``out/model``.

    Parameters
    ----------
    out : Path
        Working folder: tokenizer, token cache, state, ``training_log.csv`` (held-out loss on the same 32 windows of
        each split all along), and at the end ``held_out.json`` (on the whole splits) and the checkpoint ``model/``.
    steps : int
        Optimizer steps of 8,192 tokens. May be changed between resumed runs before the learning rate starts to fall.
    device : str
    seed : int
    log_every, save_every : int
        Steps between lines of the log and between saved states.

    Returns
    -------
    Path
        The exported Hugging Face folder (float16 safetensors, config, tokenizer).

    Notes
    -----
    1.2 s a step (windows of 256) to 1.45 s (512) on one 3.2 GHz core with AMX: 70 minutes for the default 3,000 steps.
    """
    from transformers import LlamaForCausalLM

    out.mkdir(parents=True, exist_ok=True)
    tokens, bytes_per_token = prepare(out)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(embedded.configuration()).to(device).train()
    if device == "cpu":
        model.set_attn_implementation("eager")  # 1.25 times as fast here as the fused CPU kernel
    optims, step, seconds, rows = optimizers(model), 0, 0.0, []
    state = out / "state.pt"
    if state.is_file():
        saved = torch.load(state, map_location=device, weights_only=True)
        model.load_state_dict(saved["model"])
        for optim, values in zip(optims, saved["optimizers"], strict=True):
            optim.load_state_dict(values)
        step, seconds, rows = saved["step"], saved["seconds"], saved["rows"]
    start = time.perf_counter() - seconds
    with tqdm(total=steps, initial=step, desc="train", unit="step", mininterval=10) as bar:
        while step < steps:
            for optim, base in zip(optims, (MUON_LR, ADAMW_LR), strict=True):
                optim.param_groups[0]["lr"] = base * learning_rate(step, steps)
            loss = _backward(model, batch_at(step, steps, tokens, seed).to(device))
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optim in optims:
                optim.step()
                optim.zero_grad(set_to_none=True)
            step += 1
            bar.update()
            last = step == steps
            if step % log_every == 0 or last:
                held = [
                    bits_per_byte(model, tokens[split], bytes_per_token[split], device, LOG_WINDOWS)
                    for split in bytes_per_token
                ]
                seconds = time.perf_counter() - start
                rows.append([step, step * STEP_TOKENS, round(seconds, 1), loss, *held])
                _write_log(out / "training_log.csv", rows)
                bar.set_postfix(loss=f"{loss:.3f}", calibration=f"{held[0]:.3f}", evaluation=f"{held[1]:.3f}")
            if step % save_every == 0 or last:
                _save_state(state, model, optims, step, seconds, rows)
    whole = {
        split: bits_per_byte(model, tokens[split], bytes_per_token[split], device, len(tokens[split]))
        for split in bytes_per_token
    }
    (out / "held_out.json").write_text(json.dumps({"bits_per_byte": whole, "steps": steps}, indent=2) + "\n", "utf-8")
    return export(model, out)


def _save_state(path: Path, model, optims, step: int, seconds: float, rows: list) -> None:
    state = {
        "model": model.state_dict(),
        "optimizers": [o.state_dict() for o in optims],
        "step": step,
        "seconds": seconds,
        "rows": rows,
    }
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def _write_log(path: Path, rows: list[list]) -> None:
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([LOG_FIELDS, *rows])
    os.replace(path.with_suffix(".tmp"), path)


def export(model: torch.nn.Module, out: Path) -> Path:
    """Write the checkpoint (float16) and its tokenizer to ``out/model`` and draw ``out/loss_curve.png``.

    The model passed in is converted to float16 in place.
    """
    from sfmp.plots_training import write_loss_curve

    folder = out / "model"
    model.half().save_pretrained(folder)
    write_loss_curve(out / "training_log.csv")
    embedded.wrap_tokenizer(_raw_tokenizer(out)).save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded model (resumable).")
    parser.add_argument("--out", type=Path, required=True, help="working folder; the checkpoint appears in OUT/model")
    parser.add_argument("--steps", type=int, default=3000, help="steps of 8,192 tokens (default: %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    print(f"checkpoint: {train(args.out, args.steps, args.device, args.seed)}")


if __name__ == "__main__":
    main()
