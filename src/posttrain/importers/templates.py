"""Chat templates by name: a packaged one, or the tokenizer's own."""

from __future__ import annotations

from posttrain.importers.job import Job, place
from posttrain.recipe.yaml_lines import KeyPath

CHATML = "builtin:templates/chatml.jinja"
# Names that stand for the template a family's own tokenizers carry.
FAMILIES = (
    "llama qwen gemma mistral phi deepseek cohere command jamba falcon olmo granite exaone glm chatglm yi internlm "
    "baichuan minicpm smollm gpt gpt_oss hunyuan kimi ministral pixtral nemotron aya ernie seed mimo bailing"
).split()


def named(job: Job, at: KeyPath, name: str) -> None:
    """A template's name in the other tool. Which one is used here is always said."""
    fallback = name.startswith("tokenizer_default_fallback_")
    if name == "chatml":
        job.move_top(at, "chat_template", CHATML)
        job.note("the chatml template needs <|im_end|> as a token of the model's tokenizer; `posttrain run` checks it.")
    elif name == "tokenizer_default" or fallback or any(name.startswith(family) for family in FAMILIES):
        job.ledger.not_needed(at, "the tokenizer's own template is used: see posttrain data preview")
        if fallback:
            job.note(f"where the tokenizer has no template, set chat_template (it was {name.split('fallback_')[1]}).")
    else:
        job.ledger.lost(
            at, f"there is no template {name}. The tokenizer's own is used; or set chat_template: FILE.jinja."
        )


def from_file(job: Job, at: KeyPath, value: str) -> None:
    path, _ = place(job, value)
    if "\n" in value or "{%" in value or "{{" in value:
        job.ledger.lost(at, "save the template as a .jinja file and set chat_template to it.")
    elif path.endswith(".jinja"):
        job.move_top(at, "chat_template", path)
    else:
        job.ledger.lost(at, f"save the template of {value} as a .jinja file and set chat_template to it.")
