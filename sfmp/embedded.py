"""The embedded model: a small LLaMA-architecture language model of Python that ships with the package.

It exists so that every step of the pipeline runs offline, in minutes, on any machine, on a model that was really
trained. The weights are ours (recipe: :mod:`sfmp.train`, text: :mod:`sfmp.corpus`); the folder is an ordinary Hugging
Face checkpoint.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from sfmp.spec import SfmpError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import Tokenizer
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

NAME = "embedded"
FOLDER = Path(__file__).parent / "embedded_model"
BOS = "<|bos|>"
VOCABULARY = 4096
CONTEXT = 512


def configuration():
    """Return the architecture (``transformers.LlamaConfig``): 6 layers, hidden 256, 4 heads on 2 key/value heads,
    SwiGLU 768, tied."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Train the byte-level BPE tokenizer (vocabulary 4096, token 0 = beginning of a document) on ``texts``.

    Words are cut by the byte-level rule (runs of white space stay together, so an indentation is one token) and a
    merge never crosses a word: no token can hold a sentence of the corpus.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[BOS],
        initial_alphabet=alphabet,
        max_token_length=20,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def wrap_tokenizer(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """Wrap a raw tokenizer for transformers and lm-eval; beginning, end and padding are the same token."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=BOS, pad_token=BOS, model_max_length=CONTEXT
    )


def load(folder: str | Path = FOLDER, dtype: str = "float32",
         **options) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the embedded model and its tokenizer.

    Parameters
    ----------
    folder : path, optional
        A checkpoint written by :mod:`sfmp.train`; the shipped one by default.
    dtype : str
        Torch type of the weights in memory; the shipped file is float16.
    options
        Passed to ``from_pretrained``, such as ``device_map``.

    Returns
    -------
    (LlamaForCausalLM, PreTrainedTokenizerFast)
        The model in evaluation mode, on the CPU.

    Raises
    ------
    SfmpError
        If the folder holds no checkpoint.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(folder)
    if not (folder / "model.safetensors").is_file():
        raise SfmpError(
            f"embedded model: expected model.safetensors in {folder}, found none; reinstall the package or run "
            "`snakemake train_embedded` and pass the folder it names"
        )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options)
    return model.eval(), AutoTokenizer.from_pretrained(folder)
