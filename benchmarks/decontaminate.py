"""Decontamination at scale: synthetic training rows with planted runs of 13 words of evaluation items.

    python benchmarks/decontaminate.py --rows 1000000 --items 10000 --processes 2

Prints one JSON line. recall: planted rows that were found. false_hits: found rows that were not planted. Rows come from
a generator, so reading files is not part of it; making the rows is, and is also measured alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from posttrain.data.hygiene.contamination import Index, overlapping
from posttrain.data.hygiene.passages import Document, Passage

WORDS = [a + b + c for a in "ba ke li mo nu ra se ti vo zu".split() for b in "da fe gi ho ju la me ni po ru".split()
         for c in ["", *"n s t r l m x ck nd".split()]]  # fmt: skip
PLANTED_SHARE = 0.001


def sentence(rng: Random, n_words: int) -> str:
    # Zipf-like: the first few hundred words make most of the text, as in a language.
    return " ".join(WORDS[int(len(WORDS) * rng.random() ** 3)] for _ in range(n_words))


def items(n: int) -> list[Document]:
    rng = Random("items")
    made = []
    for i in range(n):
        question = Passage("question", sentence(rng, rng.randint(8, 120)) + "?", asked=True)
        made.append(Document(f"item:{i}", (question, Passage("answer", sentence(rng, rng.randint(1, 100))))))
    return made


def planted(i: int) -> bool:
    return Random(i).random() < PLANTED_SHARE


def rows(n: int, known: list[Document]) -> Iterator[Document]:
    """Rows of 60 to 240 words; every thousandth or so holds exactly 13 words in a row of an item's question."""
    long = [d.passages[0].text.rstrip("?").split() for d in known if len(d.passages[0].text.split()) >= 13]
    background = Random("rows")
    pool = [sentence(background, 40) for _ in range(20_000)]
    for i in range(n):
        rng = Random(i)
        hit = rng.random() < PLANTED_SHARE
        parts = [pool[int(rng.random() * len(pool))] for _ in range(rng.randint(2, 5))]
        if hit:
            said = rng.choice(long)
            at = rng.randrange(len(said) - 12)
            parts.insert(rng.randrange(len(parts) + 1), "Quux: " + " ".join(said[at : at + 13]).upper() + ", quux.")
        yield Document(f"row:{i}", (Passage("prompt", parts[0], asked=True), Passage("answer", " ".join(parts[1:]))))


def peak_mb(processes: int) -> float:
    """Of this process, and of the largest worker times their number."""
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024 if processes > 1 else 0.0
    return own + workers * (processes if processes > 1 else 0)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--items", type=int, default=10_000)
    parser.add_argument("--processes", type=int, default=2)
    asked = parser.parse_args()
    known = items(asked.items)
    began = time.perf_counter()
    for _ in rows(asked.rows, known):
        pass
    making = time.perf_counter() - began
    began = time.perf_counter()
    index = Index.of(known)
    indexed = time.perf_counter() - began
    stream = overlapping(rows(asked.rows, known), index, asked.processes)
    found = {i for i, hits in enumerate(stream) if hits}
    seconds = time.perf_counter() - began
    expected = {i for i in range(asked.rows) if planted(i)}
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False,
                            cwd=Path(__file__).parent)  # fmt: skip
    figures = {
        "benchmark": "decontaminate",
        "commit": commit.stdout.strip(),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "rows": asked.rows,
        "items": asked.items,
        "processes": asked.processes,
        "seconds": round(seconds, 2),
        "of_which_index": round(indexed, 2),
        "making_rows_alone": round(making, 2),
        "rows_per_second": round(asked.rows / seconds),
        "planted": len(expected),
        "recall": len(found & expected) / len(expected) if expected else None,
        "false_hits": len(found - expected),
        "peak_rss_mb": round(peak_mb(asked.processes)),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
