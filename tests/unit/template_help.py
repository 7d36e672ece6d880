"""Chat templates of well-known model families (`tests/templates`), each on the packaged tokenizer with its tokens."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from transformers import AutoTokenizer

from posttrain.data.render import Renderer
from posttrain.paths import ASSETS
from posttrain.records import Branch, Message, ToolCall, Tree

TEMPLATES = Path(__file__).parents[1] / "templates"
THINK = ("<think>", "</think>")
CHATML = ("<|im_start|>", "<|im_end|>")


@dataclass(frozen=True)
class Family:
    """A template, the tokens it needs, and what it can write. `tokens` are whole but not special."""

    special: tuple[str, ...]
    bos: str | None = None
    eos: str = "<|endoftext|>"
    tokens: tuple[str, ...] = ()
    system: bool = True
    tools: bool = False
    thinking: bool = False
    trims: bool = False
    file: Path | None = None


DEEPSEEK_TOOLS = tuple(
    f"<｜tool▁{name}｜>"
    for name in ("calls▁begin", "calls▁end", "call▁begin", "call▁end", "sep", "outputs▁begin", "outputs▁end",
                 "output▁begin", "output▁end")
)  # fmt: skip
BUILTIN = ASSETS / "templates"
FAMILIES = {
    "chatml": Family(CHATML, file=BUILTIN / "chatml.jinja"),
    "chatml-tools": Family(CHATML, tokens=THINK, tools=True, thinking=True, file=BUILTIN / "chatml-tools.jinja"),
    "plain": Family((), file=BUILTIN / "plain.jinja"),
    "llama3": Family(
        ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|begin_of_text|>", eos="<|end_of_text|>", tools=True, trims=True,
    ),
    "qwen25": Family(CHATML, eos="<|im_end|>", tokens=("<tool_call>", "</tool_call>"), tools=True),
    "qwen3": Family(
        CHATML, eos="<|im_end|>", tokens=(*THINK, "<tool_call>", "</tool_call>"), tools=True, thinking=True
    ),
    "mistral_v1": Family(("<s>", "</s>"), bos="<s>", eos="</s>", system=False),
    "mistral_v3": Family(
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]",
         "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        bos="<s>", eos="</s>", tools=True,
    ),
    "gemma": Family(
        ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), bos="<bos>", eos="<eos>", system=False, trims=True
    ),
    "phi3": Family(("<|system|>", "<|user|>", "<|assistant|>", "<|end|>")),
    "phi4": Family((*CHATML, "<|im_sep|>"), eos="<|im_end|>"),
    "deepseek_r1": Family(
        ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", *DEEPSEEK_TOOLS),
        bos="<｜begin▁of▁sentence｜>", eos="<｜end▁of▁sentence｜>", tokens=THINK, tools=True, thinking=True,
    ),
    "marked": Family(CHATML, tokens=THINK),
}  # fmt: skip

WEATHER = json.dumps(
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
)
ASKED = Message("user", "Is it warm in Oslo?")
CALLS = Message("assistant", "", tool_calls=(ToolCall("weather", '{"city": "Oslo"}', id="call00001"),))
RESULT = Message("tool", "12", name="weather", tool_call_id="call00001")
ANSWERS = Message("assistant", "No, 12 degrees.")
WITH_TOOLS = (ASKED, CALLS, RESULT, ANSWERS)


def tokenizer_of(name: str) -> Any:
    family = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny-base")
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in family.special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in family.tokens])
    tokenizer.bos_token, tokenizer.eos_token = family.bos, family.eos
    return tokenizer


@cache
def renderer_of(name: str) -> Renderer:
    file = FAMILIES[name].file or TEMPLATES / f"{name}.jinja"
    return Renderer(tokenizer_of(name), file.read_text(encoding="utf-8"))


def runs(branch: Branch) -> list[tuple[bool, list[int]]]:
    """Neighbouring tokens with the same mark."""
    found: list[tuple[bool, list[int]]] = []
    for token, scored in zip(branch.token_ids, branch.scored, strict=True):
        if not found or found[-1][0] != scored:
            found.append((scored, []))
        found[-1][1].append(token)
    return found


def scored_texts(renderer: Renderer, tree: Tree) -> list[str]:
    """The scored runs of all branches, decoded."""
    return [renderer.decode(ids) for branch in tree.branches for scored, ids in runs(branch) if scored]


def texts(renderer: Renderer, tree: Tree) -> list[str]:
    """Each branch after its trunk, what is scored in [[ ]]."""
    trunk = renderer.decode(tree.trunk_ids)
    written = []
    for branch in tree.branches:
        parts = [(scored, renderer.decode(ids)) for scored, ids in runs(branch)]
        written.append(trunk + "".join(f"[[{text}]]" if scored else text for scored, text in parts))
    return written
