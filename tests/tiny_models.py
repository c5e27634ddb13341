"""Random models of a few layers in folders, with the embedded model's tokenizer; some in processes that are killed."""

import json
import os
import signal
import sys

import torch

VOCABULARY = 4096


def write(folder, family="llama", dtype=torch.bfloat16, **options):
    """Save a tiny random model of a family and the tokenizer; return the folder."""
    import transformers

    from sfmp.stages import load_tokenizer

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
             "num_attention_heads": 4, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 0,
             "pad_token_id": 0}
    grouped = {"num_key_value_heads": 2}
    shared = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    name, config = {
        "llama": ("Llama", {**sizes, **grouped, "tie_word_embeddings": True}),
        "neox": ("GPTNeoX", sizes),
        "gpt2": ("GPT2", {**shared, "n_embd": 64, "n_layer": 3, "n_head": 4, "n_positions": 128}),
        "mixtral": ("Mixtral", {**sizes, **grouped, "num_local_experts": 4}),
    }[family]
    head = {"GPT2": "GPT2LMHeadModel"}.get(name, f"{name}ForCausalLM")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, head)(getattr(transformers, f"{name}Config")(**config)).to(dtype)
    model.save_pretrained(folder, **options)
    load_tokenizer("embedded").save_pretrained(folder)
    return folder


def token_windows(count=3, length=40):
    """Random tokens [count, length] of the tokenizer."""
    return torch.randint(0, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))


def text_file(folder):
    """Write a text for calibration; return its path."""
    path = folder / "text.txt"
    path.write_text("\n".join(f"def function_{n}(x):\n    return x + {n}" for n in range(400)), "utf-8")
    return path


def contents(folder):
    """Bytes of every file of a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def quantize_until_killed(arguments, kills):
    """In forked processes, run the command again and again, ended by SIGKILL at its n-th rename for each n of `kills`,
    until one ends well.

    Before or after the rename by turns. Prints the exit statuses as JSON: -9 for each kill, and of the last run,
    which nobody ends.
    """
    import sfmp.stream_quantize  # noqa: F401  loaded once, before the forks
    from sfmp import cli

    statuses = []
    for number, kill in enumerate([*kills, None]):
        child = os.fork()
        if child == 0:
            if kill is not None:
                _die_at(kill, after=number % 2 == 0)
            os._exit(cli.main([*arguments, *(["--resume"] if number else [])]))
        statuses.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        if statuses[-1] == 0:
            break
    print(json.dumps(statuses), flush=True)


def _die_at(count, after):
    rename, seen = os.replace, [0]

    def replace(*arguments):
        seen[0] += 1
        if seen[0] == count and not after:
            os.kill(os.getpid(), signal.SIGKILL)
        rename(*arguments)
        if seen[0] == count:
            os.kill(os.getpid(), signal.SIGKILL)

    os.replace = replace


if __name__ == "__main__":
    quantize_until_killed(sys.argv[2:], json.loads(sys.argv[1]))
