"""The numbers of an audit once more, straight from the files: plain loops, no code of posttrain."""

from __future__ import annotations

import gzip
import json
import math
import sys
from pathlib import Path
from typing import Any


def read(path: Path) -> list[dict[str, Any]]:
    raw = path.read_bytes()
    text = (gzip.decompress(raw) if path.name.endswith(".gz") else raw).decode("utf-8")
    return [json.loads(line) for line in text.split("\n") if line != ""]


def nearest_rank(values: list[int], percent: int) -> int:
    """The smallest value that at least this percentage of all values does not exceed."""
    for candidate in sorted(set(values)):
        below = 0
        for value in values:
            if value <= candidate:
                below += 1
        if below * 100 >= percent * len(values):
            return candidate
    raise AssertionError


def describe(texts: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for unit, values in (("characters", [len(t) for t in texts]), ("words", [len(t.split()) for t in texts])):
        found[unit] = {
            "n": len(values),
            "mean": round(sum(values) / len(values), 4),
            "shortest": min(values),
            "longest": max(values),
            "percentiles": {str(p): nearest_rank(values, p) for p in (5, 25, 50, 75, 95, 99)},
        }
    return found


def wilson(k: int, n: int) -> list[float]:
    """Both roots of (p − k/n)² = z² p (1 − p) / n, by bisection."""
    z = 1.959963984540054

    def excess(p: float) -> float:
        return (p - k / n) ** 2 - z * z * p * (1 - p) / n

    ends = []
    for outer in (0.0, 1.0):
        inside, outside = k / n, outer
        for _ in range(200):
            middle = (inside + outside) / 2
            if excess(middle) <= 0:
                inside = middle
            else:
                outside = middle
        ends.append(round(inside, 4))
    return ends


def turns(transcript: str) -> list[tuple[str, str]]:
    """A transcript of Human and Assistant, read line by line; what one speaker says in two parts is one turn."""
    found: list[list[str]] = []
    for paragraph in ("\n\n" + transcript if not transcript.startswith("\n\n") else transcript).split("\n\n"):
        for speaker in ("Human:", "Assistant:"):
            if paragraph.startswith(speaker):
                if found and found[-1][0] == speaker:
                    found[-1][1] += "\n\n" + paragraph[len(speaker) :].strip()
                else:
                    found.append([speaker, paragraph[len(speaker) :]])
                break
        else:
            if found:
                found[-1][1] += "\n\n" + paragraph
    return [(speaker, said.strip()) for speaker, said in found]


def pairs(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Questions, chosen and rejected; pairs with an empty or the same answer on both sides are left out."""
    found = []
    for row in rows:
        if "prompt" in row:
            asked, chosen, rejected = [row["prompt"]], row["chosen"], row["rejected"]
        else:
            a, b = turns(row["chosen"]), turns(row["rejected"])
            same = 0
            while same < min(len(a), len(b)) and a[same] == b[same]:
                same += 1
            while same and not (same < len(a) and same < len(b) and a[same][0] == b[same][0] == "Assistant:"):
                same -= 1
            asked = [said for speaker, said in a if speaker == "Human:"]
            chosen, rejected = (
                "".join(said for speaker, said in side[same:] if speaker == "Assistant:") for side in (a, b)
            )
        if chosen.strip() and rejected.strip() and chosen != rejected:
            found.append({"asked": asked, "chosen": chosen, "rejected": rejected})
    return found


def bias(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Length bias in characters; the interval of the correlation by the delta method, not by drawing."""
    longer = shorter = 0
    d = []
    for pair in found:
        a, b = len(pair["chosen"]), len(pair["rejected"])
        longer += a > b
        shorter += a < b
        d.append(math.log(a) - math.log(b))
    n = len(d)
    mean, square = sum(d) / n, sum(x * x for x in d) / n
    r = mean / math.sqrt(square)
    # r = m / √s: its influence at one pair is (d − m)/√s − m (d² − s) / (2 s^1.5)
    spread = 0.0
    for x in d:
        influence = (x - mean) / math.sqrt(square) - mean * (x * x - square) / (2 * square**1.5)
        spread += influence * influence
    reach = 1.959963984540054 * math.sqrt(spread / n / n)
    return {
        "longer": longer,
        "unequal": longer + shorter,
        "interval": wilson(longer, longer + shorter),
        "correlation": round(r, 4),
        "correlation_interval": [r - reach, r + reach],
    }


def copies(contents: list[tuple[str, ...]]) -> int:
    """Rows whose content, white space at its ends aside, some other row has too, but for one of each kind."""
    ordered = sorted([part.strip() for part in content] for content in contents)
    found = 0
    for i in range(1, len(ordered)):
        if ordered[i] == ordered[i - 1]:
            found += 1
    return found


if __name__ == "__main__":
    rows = read(Path(sys.argv[1]))
    if "chosen" in rows[0]:
        print(json.dumps(bias(pairs(rows)), indent=1))
    else:
        print(json.dumps({name: describe([str(row[name]) for row in rows]) for name in rows[0]}, indent=1))
