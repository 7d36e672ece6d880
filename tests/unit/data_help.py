"""Small tokenizers made on the spot, and rows written to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

SHARED = Path(__file__).parents[2].parent / "shared"
SENTENCES = [
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May.",
    "How many clips did Natalia sell altogether? She sold 48 + 24 = 72 clips.",
    "user and assistant and system say hello, thank you and good-bye.",
    "\n\n\n\n\n\n",
]


def byte_tokenizer(*, chatml: bool = True, vocab_size: int = 400, eos: str | None = "<|end|>") -> Any:
    """Byte-level BPE. Its end of text is not ChatML's end of turn, as in many base models."""
    specials = (["<|end|>"] if eos else []) + (["<|im_start|>", "<|im_end|>"] if chatml else [])
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, pad_token=eos)


def stories_tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(shared("models/stories260k"))


def shared(path: str) -> Path:
    """A real file kept beside the repository; the test is skipped, with the reason, where it is absent."""
    if not (SHARED / path).exists():
        pytest.skip(f"real data {path} is not beside the repository")
    return SHARED / path


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path
