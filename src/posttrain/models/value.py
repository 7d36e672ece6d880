"""A decoder with a score in place of its output layer: reward models, read at the end of an answer or of each step.

It is saved as transformers' own …ForSequenceClassification with one label (`score.weight`), so any loader opens it.

Axes: N scored positions, D width, B answers.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import ModelError
from posttrain.models import hub
from posttrain.models.attention import IMPLEMENTATION, ForestUnsupported
from posttrain.models.forest import LossTable
from posttrain.models.load import PROBE_TOLERANCE, LoadOptions, is_scorer, read_model
from posttrain.models.merge import MERGE_BOUND, merged_state
from posttrain.models.policy import Policy, stock_attention
from posttrain.models.quantised import shell
from posttrain.records import Branch, Tree

ANSWER, STEPS = "answer", "steps"
READS = "posttrain_reads"  # in config.json: what a score is of
WHOLE_ANSWERS = "a reward model scores whole answers"


def with_score(policy: Policy, reads: str, *, seed: int) -> Policy:
    """The policy's decoder, with its adapter if it has one, under a new score that trains. Takes the policy over.

    The score starts as small random numbers (Stiennon et al. 2020), the same ones for the same seed.
    """
    made = put_score(policy, reads, seed=seed)
    _refuse_other_reading(made)
    return made


def put_score(policy: Policy, reads: str, *, seed: int) -> Policy:
    """`with_score` without asking the model anything, so that it also serves a model without weights."""
    model, head = _empty_scorer(policy.model)
    setattr(model, model.base_model_prefix, policy.decoder)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        drawn = torch.randn(1, head.in_features) / math.sqrt(head.in_features + 1)
    model.score = nn.Linear(head.in_features, 1, bias=False, device=policy.device)
    with torch.no_grad():
        model.score.weight.copy_(drawn)
    if policy.adapter is not None:
        _refuse_lost(policy, model)
    setattr(model.config, READS, reads)
    model.train(policy.model.training)
    return replace(policy, model=model)


def _refuse_lost(policy: Policy, scorer: nn.Module) -> None:
    """With an adapter, everything that was to train must still be there."""
    kept = {id(p) for p in scorer.parameters()}
    if lost := [name for name, p in policy.trainable().items() if id(p) not in kept]:
        raise ModelError(
            f"lora.modules_to_save: {lost[0].split('.modules_to_save.')[0]} is the output layer, which a reward model "
            "does not have.",
            remedy="Leave it out: the score that takes its place trains in full.",
        )


def _empty_scorer(language_model: Any) -> tuple[Any, nn.Linear]:
    """transformers' class for this decoder, without weights, on the decoder's own config; and the score it has."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

    config = language_model.config
    kind = type(config)
    found = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING.get(kind, None)
    if found is None:
        raise _no_scorer(config, "transformers has no class for it that scores")
    config.num_labels = 1
    with torch.device("meta"):
        model = found(config)
    head = getattr(model, "score", None)
    decoder = getattr(model, model.base_model_prefix, None)
    if not isinstance(head, nn.Linear) or head.bias is not None or head.out_features != 1:
        raise _no_scorer(config, f"{found.__name__} has no plain linear score")
    if type(decoder).__name__ != type(_decoder(language_model)).__name__:
        raise _no_scorer(config, f"{found.__name__} scores another decoder")
    model.config = config  # attention is switched through it, in the decoder too
    return model, head


def _decoder(language_model: Any) -> Any:
    base = language_model.base_model
    return base if base is not language_model else language_model.model


def _no_scorer(config: Any, why: str) -> ModelError:
    return ModelError(
        f"{config.model_type} cannot become a reward model: {why}.",
        remedy="Train it on another architecture: Llama, Qwen3, Mistral, Gemma, Phi-3 or GPT-2, for example.",
    )


def at_ends(tree: Tree) -> Tree:
    """The same tree with the last token of each answer marked, where a reward model is read."""
    branches = tuple(Branch(b.token_ids, (*(False,) * (len(b.token_ids) - 1), True)) for b in tree.branches)
    return Tree(tree.id, tree.trunk_ids, branches)


def read_scores(model: Policy, trees: Sequence[Tree]) -> tuple[Tensor, LossTable]:
    """(N,) scores at the marked tokens of the trees, in tree order, in float32 or wider."""
    batch = model.batch(trees)
    hidden_ND = model.hidden_at(batch, batch.table.own)
    weight_D = model.model.score.weight[0]
    wide = torch.promote_types(torch.promote_types(hidden_ND.dtype, weight_D.dtype), torch.float32)
    return hidden_ND.to(wide) @ weight_D.to(wide), batch.table


def load_scorer(source: str, options: LoadOptions) -> Policy:
    """A reward model from a directory or a Hub name: ours, or any …ForSequenceClassification with one label."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    if Path(source, "config.json").is_file() or not Path(source).exists():
        hub.reach(source)
        try:
            config = AutoConfig.from_pretrained(source)
        except (OSError, ValueError):
            config = None  # read_model says what is wrong
        if config is not None and not is_scorer(config):
            raise ModelError(
                f"{source} is a language model, not a reward model.",
                remedy="Train one with a reward_model stage, or name another.",
            )
    model = read_model(source, options, AutoModelForSequenceClassification)
    head = getattr(model.model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1 or head.bias is not None:
        raise ModelError(f"{source} gives several scores, or none.", remedy="A reward model has one label.")
    _choose_layout(model, options.forest)
    _refuse_other_reading(model)
    return model


def reads_steps(model: Policy) -> bool:
    return bool(getattr(model.model.config, READS, ANSWER) == STEPS)


@torch.no_grad()
def _choose_layout(model: Policy, forest: str) -> None:
    """Forest where its scores are those of padded rows."""
    stock = model.model.config._attn_implementation
    model.layout = "padded"
    if forest == "off":
        return
    padded = probe_scores(model)
    reason = ""
    try:
        model.model.set_attn_implementation(IMPLEMENTATION)
        model.layout = "forest"
        if _gap(probe_scores(model), padded) <= PROBE_TOLERANCE[_compute(model)]:
            return
        reason = "scores differ from padded rows"
    except (ForestUnsupported, ValueError, TypeError, AttributeError, RuntimeError, LookupError) as e:
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
    model.model.set_attn_implementation(stock)
    model.layout = "padded"
    if forest == "on":
        raise ModelError(f"forest: on, but {model.model.config.model_type} cannot: {reason}.", remedy="Use auto.")
    model.notes.append(f"forest off for {model.model.config.model_type} ({reason}); prompts are recomputed per answer")


@torch.no_grad()
def probe_scores(model: Policy) -> Tensor:
    """Scores of random tokens: the same ones for every model of the same vocabulary."""
    return read_scores(model, _probe_trees(model.model.config.get_text_config().vocab_size))[0]


def _probe_trees(vocabulary: int) -> list[Tree]:
    generator = torch.Generator().manual_seed(1)

    def ids(n: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocabulary, (n,), generator=generator).tolist())

    pair = tuple(Branch(ids(n), (False,) * n) for n in (6, 3))
    return [at_ends(Tree("probe-pair", ids(8), pair)), at_ends(Tree("probe-single", ids(4), pair[:1]))]


@torch.no_grad()
def _refuse_other_reading(model: Policy) -> None:
    """A class whose score is more than a product with the last token's hidden state would be trained otherwise than it
    is read by others. One row at a time: what counts as its last token depends on padding."""
    trees = _probe_trees(model.model.config.get_text_config().vocab_size)
    config = model.model.config.get_text_config()
    pad, config.pad_token_id = config.pad_token_id, None
    training = model.model.training
    model.model.eval()
    try:
        rows = [(*tree.trunk_ids, *branch.token_ids) for tree in trees for branch in tree.branches]
        with _one_type(model), stock_attention(model.model):
            stock = [model.model(torch.tensor([row], device=model.device)).logits[0, 0].float() for row in rows]
        gap = _gap(read_scores(model, trees)[0], torch.stack(stock))
    finally:
        config.pad_token_id = pad
        model.model.train(training)
    if gap > PROBE_TOLERANCE[_compute(model)]:
        raise _no_scorer(model.model.config, f"its own class scores otherwise, by {gap:.2g}")


def _one_type(model: Policy) -> Any:
    """The score trains in float32 also on a decoder that is kept in less, which the stock class would not multiply."""
    if model.autocast is None and model.model.score.weight.dtype != model.model.dtype:
        return torch.autocast(model.device.type, model.model.dtype)
    return model.compute()


def _gap(ours: Tensor, theirs: Tensor) -> float:
    """Largest difference, relative where scores are large."""
    return float(((ours - theirs).abs() / theirs.abs().clamp(min=1.0)).max())


def _compute(model: Policy) -> torch.dtype:
    dtype: torch.dtype = model.autocast or model.model.dtype
    return dtype


def save_scorer(model: Policy, directory: Path, *, stop_token_ids: tuple[int, ...]) -> None:
    """Weights, config, tokenizer and template, an adapter merged into a copy of the weights.

    Other loaders read the last token of a padded row that is not padding. Where padding and the end of an answer are
    one token they would read the token before; then another special token pads, or, without one, none: such a loader
    takes one row at a time and refuses several.
    """
    tokenizer = copy.deepcopy(model.tokenizer)
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in stop_token_ids:
        tokenizer.pad_token = _other_pad(tokenizer, stop_token_ids)
    config = model.model.config
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.use_cache = True
    shell(model.model).save_pretrained(directory, state_dict=merged_state(model))
    config.use_cache = False
    tokenizer.save_pretrained(directory)


def _other_pad(tokenizer: Any, stop_token_ids: tuple[int, ...]) -> str | None:
    special = {str(token): i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = {token: int(i) for token, i in special.items()}
    return next((token for token, i in ids.items() if i not in stop_token_ids), None)


def saved_scorer_differs(model: Policy, directory: Path, dtype: str = "auto") -> str | None:
    """None when the model in `directory` gives the trained one's scores on random tokens; else how far off."""
    saved = load_scorer(
        str(directory), LoadOptions(dtype, forest="off", frozen_base=model.model.dtype != torch.float32)
    )
    gap = _gap(probe_scores(saved), probe_scores(model))
    tolerance = MERGE_BOUND[_compute(model)]
    return None if gap <= tolerance else f"its scores differ by {gap:.2g}, more than {tolerance:g}"
