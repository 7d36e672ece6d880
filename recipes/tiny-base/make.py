"""Make the tiny base model again: python recipes/tiny-base/make.py [--steps N]

Writes what the model reads (from `world.py`), trains a tokenizer on a part of it, initialises a small Qwen3 and
pre-trains it with this project's own loop: plain text is one of SFT's formats. The same seed gives the same weights
on the same kind of machine with the same number of threads; the weights' hash is printed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
from pathlib import Path
from random import Random

os.environ.setdefault("OMP_NUM_THREADS", "2")  # another number of threads adds in another order

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from world import page

from posttrain.paths import ASSETS
from posttrain.pipeline import file_hash, run
from posttrain.recipe import load_recipe
from posttrain.reporting import Reporter

HERE = Path(__file__).resolve().parent
BUILD = HERE / "build"
N_PAGES = 120_000
SEED = 1
# Words keep their leading space, and so do numbers of up to two digits: " 17" is one token wherever it stands.
PIECES = r"'s| ?\p{N}{1,2}| ?\p{L}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
KEPT = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


def write_corpus(path: Path, n_pages: int) -> list[str]:
    rng = Random(SEED)
    pages = [page(rng) for _ in range(n_pages)]
    path.write_text("".join(json.dumps({"text": p}) + "\n" for p in pages))
    return pages


def make_tokenizer(pages: list[str]) -> PreTrainedTokenizerFast:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1280, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    bpe.train_from_iterator(pages, trainer)
    end, *chat = SPECIAL
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=end, pad_token=end, additional_special_tokens=chat
    )
    tokenizer.chat_template = (ASSETS / "templates" / "chatml.jinja").read_text()
    return tokenizer


def make_model(vocab_size: int) -> Qwen3ForCausalLM:
    config = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        tie_word_embeddings=True,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(SEED)
    return Qwen3ForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, help="fewer steps, to try the machinery; default: the recipe's")
    parser.add_argument("--pages", type=int, default=N_PAGES, help="fewer pages to read, likewise")
    parser.add_argument("--into", type=Path, default=ASSETS / "tiny-base")
    parser.add_argument("--build", type=Path, default=BUILD, help="where corpus, start and runs are kept")
    chosen = parser.parse_args()
    start = chosen.build / "start"
    start.mkdir(parents=True, exist_ok=True)
    pages = write_corpus(chosen.build / "corpus.jsonl", chosen.pages)
    tokenizer = make_tokenizer(pages[:10_000])
    make_model(len(tokenizer)).save_pretrained(start)
    tokenizer.save_pretrained(start)
    shutil.copy(HERE / "recipe.yaml", chosen.build / "recipe.yaml")
    overrides = [f"sft.max_steps={chosen.steps}"] if chosen.steps else []
    report = run(load_recipe(chosen.build / "recipe.yaml", overrides), chosen.build / "home", Reporter())
    made = Path(report.outcomes[-1].artefact.path)
    chosen.into.mkdir(parents=True, exist_ok=True)
    for name in (*KEPT, "chat_template.jinja"):
        shutil.copy(made / name, chosen.into / name)
    (chosen.into / "model.safetensors").chmod(0o644)
    print(f"{chosen.into}: {file_hash(chosen.into / 'model.safetensors')}")


if __name__ == "__main__":
    main()
