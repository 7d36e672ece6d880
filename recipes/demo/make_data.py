"""Write the demo's data sets and suites into the package: python recipes/demo/make_data.py

Counting problems and plain facts, told by the same narrator as the tiny base model's reading, but answered:

sft-train      two kinds of teacher: most give the bare result, some count step by step; and the result's line comes in
               three styles (bare number, a filler word, the thing that was counted)
dpo-train      pairs that differ only in the style of the result's line: naming the thing beats a filler or nothing.
               Fillers are as long as names, so length alone does not decide
grpo-train     questions with the right number; how to get there is left to the model
heldout        questions nobody trains on: no 13 words in a row are shared with any training row
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from random import Random

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "recipes" / "tiny-base"), str(ROOT / "src")]

from world import FACTS, Problem, problem  # noqa: E402

from posttrain.data.hygiene import overlaps  # noqa: E402

ASSETS = ROOT / "src" / "posttrain" / "assets"
STEPS = (1, 2, 2, 3)  # how many changes a problem has
CHATS = 400  # conversations of two or three turns
COUNTED_SHARE = 0.35  # of the SFT teachers count step by step
FILLERS = ("in all", "altogether", "things", "items")


def answer(p: Problem, style: str, *, counted: bool, rng: Random) -> str:
    tail = {"bare": "", "filler": f" {rng.choice(FILLERS)}", "named": f" {p.thing}"}[style]
    line = f"Answer: {p.result}{tail}"
    return "\n".join([" ".join(p.equations), line]) if counted else line


def sft_rows(rng: Random, n_problems: int, n_facts: int) -> Iterator[dict]:
    for p in problems(rng, n_problems):
        style = rng.choices(("bare", "filler", "named"), weights=(40, 35, 25))[0]
        yield chat((p.question, answer(p, style, counted=rng.random() < COUNTED_SHARE, rng=rng)))
    for _ in range(n_facts):
        fact = rng.choice(FACTS)
        yield chat((fact.question, fact.statement))
    for _ in range(CHATS):
        yield chat(*(turn(rng) for _ in range(rng.randint(2, 3))))


def turn(rng: Random) -> tuple[str, str]:
    if rng.random() < 0.6:
        fact = rng.choice(FACTS)
        return fact.question, fact.statement
    p = problem(rng, rng.choice(STEPS))
    return p.question, answer(p, "named", counted=True, rng=rng)


def dpo_rows(rng: Random, n: int) -> Iterator[dict]:
    for p in problems(rng, n):
        counted = rng.random() < COUNTED_SHARE
        worse = rng.choice(("bare", "filler", "filler"))
        yield {
            "prompt": p.question,
            "chosen": answer(p, "named", counted=counted, rng=rng),
            "rejected": answer(p, worse, counted=counted, rng=rng),
        }


def task_rows(rng: Random, n: int) -> Iterator[dict]:
    for p in problems(rng, n):
        yield {"prompt": p.question, "answer": str(p.result), "unit": p.thing}


def problems(rng: Random, n: int) -> Iterator[Problem]:
    for _ in range(n):
        yield problem(rng, rng.choice(STEPS))


def chat(*turns: tuple[str, str]) -> dict:
    said = [(("user", question), ("assistant", reply)) for question, reply in turns]
    return {"messages": [{"role": role, "content": text} for pair in said for role, text in pair]}


def asked(row: dict) -> str:
    """Everything a user says in a row."""
    return row["prompt"] if "prompt" in row else "\n".join(m["content"] for m in row["messages"] if m["role"] == "user")


def write(name: str, rows: Iterable[dict]) -> None:
    path = ASSETS / "data" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size / 1024:.0f} kB")


def main() -> None:
    train = {
        "sft-train.jsonl": list(sft_rows(Random("sft"), 2200, 400)),
        "dpo-train.jsonl": list(dpo_rows(Random("dpo"), 640)),
        "grpo-train.jsonl": list(task_rows(Random("grpo"), 1600)),
    }
    seen = [(f"{name}:{i}", asked(row)) for name, rows in train.items() for i, row in enumerate(rows)]
    fresh = list(task_rows(Random("heldout"), 600))
    found = overlaps(seen, [(str(i), row["prompt"]) for i, row in enumerate(fresh)])
    hits = {hit.eval_id for hit in found}
    heldout = [row for i, row in enumerate(fresh) if str(i) not in hits]
    for name, rows in train.items():
        write(name, rows)
    write("heldout.jsonl", heldout[:400])
    print(f"{len(hits)} of {len(fresh)} fresh questions shared words with a training row and were left out")


if __name__ == "__main__":
    main()
