"""Write the pairs of the preference recipe beside this file: python recipes/preference/make_data.py

Counting problems with two right answers each, of which a rater took one. What raters like: an answer that shows its
working, and then one whose last line names what was counted. Two raters: the careful one always says what it likes, the
hasty one takes the other answer in a fifth of its pairs.

pairs            what the reward model and DPO learn from
held-out-pairs   other questions, the same raters: what the reward model is judged on

No pair shares 13 words in a row with a held-out question of the package, nor a held-out pair with one trained on.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from random import Random

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ASSETS = ROOT / "src" / "posttrain" / "assets" / "data"
sys.path[:0] = [str(ROOT / "recipes" / "tiny-base"), str(ROOT / "src")]

from world import Problem, problem  # noqa: E402

from posttrain.data.hygiene import overlaps  # noqa: E402

ROWS, HELD_OUT = 900, 240
STEPS = (1, 2, 2, 3)
FILLERS = ("in all", "altogether", "things", "items")
STYLES = [(worked, tail) for worked in (False, True) for tail in ("bare", "filler", "named")]
HASTY = 0.3  # of the pairs are the hasty rater's
MISTAKEN = 0.2  # of those are labelled the wrong way round


def answer(p: Problem, rng: Random, tail: str, *, worked: bool) -> str:
    said = {"bare": "", "filler": f" {rng.choice(FILLERS)}", "named": f" {p.thing}"}[tail]
    line = f"Answer: {p.result}{said}"
    return "\n".join([" ".join(p.equations), line]) if worked else line


def liked(worked: bool, tail: str) -> int:
    return 2 * worked + (tail == "named")


def pairs(rng: Random, n: int) -> list[dict]:
    found = []
    for _ in range(n):
        p = problem(rng, rng.choice(STEPS))
        styles = rng.choice([(a, b) for a in STYLES for b in STYLES if liked(*a) > liked(*b)])
        chosen, rejected = (answer(p, rng, tail, worked=worked) for worked, tail in styles)
        rater = "hasty" if rng.random() < HASTY else "careful"
        if rater == "hasty" and rng.random() < MISTAKEN:
            chosen, rejected = rejected, chosen
        found.append({"prompt": p.question, "chosen": chosen, "rejected": rejected, "source": rater})
    return found


def apart(rows: list[dict], others: list[str], n: int) -> list[dict]:
    """The first `n` rows whose question shares no 13 words in a row with any of `others`."""
    seen = [(str(i), text) for i, text in enumerate(others)]
    hits = {int(hit.eval_id) for hit in overlaps(seen, [(str(i), row["prompt"]) for i, row in enumerate(rows)])}
    return [row for i, row in enumerate(rows) if i not in hits][:n]


def asked(name: str) -> list[str]:
    rows = [json.loads(line) for line in (ASSETS / name).read_text(encoding="utf-8").split("\n") if line]
    return [row["prompt"] if "prompt" in row else row["messages"][0]["content"] for row in rows]


def main() -> None:
    train = apart(pairs(Random("pairs"), ROWS + 200), asked("heldout.jsonl"), ROWS)
    trained_on = [*asked("sft-train.jsonl"), *(row["prompt"] for row in train)]
    held_out = apart(pairs(Random("held-out pairs"), HELD_OUT + 200), trained_on, HELD_OUT)
    for name, rows in (("pairs", train), ("held-out-pairs", held_out)):
        file = HERE / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        print(f"{file.name}: {len(rows)} rows, {file.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
