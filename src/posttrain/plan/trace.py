"""One forward and backward pass of the training code itself, on tensors without contents.

A model of many equal layers is traced with three: the first, one in the middle, the last. What the middle one adds is
repeated. So a 70-billion model takes a second, and the result is that of tracing all its layers
(tests/unit/test_plan_trace.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.models.adapters import linear_layers, put_on
from posttrain.models.attention import ForestUnsupported
from posttrain.models.decode import Decoder, kind_of
from posttrain.models.forest import build_forest
from posttrain.models.load import checkpoint_activations
from posttrain.models.merge import merged_state
from posttrain.models.padded import build_padded
from posttrain.models.policy import Policy, disable_dropout
from posttrain.models.straight import Layer, Straight
from posttrain.models.value import ANSWER, put_score, read_scores
from posttrain.plan.kernels import kernels_of
from posttrain.plan.ledger import Ledger, Span, count_grouped_products
from posttrain.plan.shape import Shape, give_device, layers_of, tiles_of, use_forest
from posttrain.records import Tree
from posttrain.settings import LoraSettings


@dataclass(frozen=True, slots=True)
class Setup:
    """How a model is held for training."""

    kept: torch.dtype  # of the weights
    compute: torch.dtype
    device: str  # cpu | cuda
    adapter: str = "none"  # none | lora | dora | qlora
    lora: LoraSettings = field(default_factory=LoraSettings)
    checkpointing: bool = False
    dropout: bool = True  # preference methods and RL switch it off
    layout: str = "forest"  # forest | padded
    scores: bool = False  # a reward model: a score in place of the output layer

    @property
    def autocast(self) -> torch.dtype | None:
        return self.compute if self.compute != self.kept else None


@dataclass(frozen=True, slots=True)
class Traced:
    """Bytes above the weights and whatever else is held; operations of the whole pass."""

    peak: int
    kept: int  # alive when the forward pass is over: what the backward pass needs
    flops: int
    layout: str  # forest | padded
    n_tokens: int
    held: int = 0  # what a heap that never shrinks has beside the peak: small blocks that were freed before


@dataclass(frozen=True, slots=True)
class Counts:
    n_params: int
    n_trainable: int
    weight_bytes: int  # adapters included
    trainable_bytes: int  # and so many of gradients
    merged_bytes: int  # what saving an adapter's merged model takes beside the weights
    linear_params: int  # of linear layers other than the output head: what a 4-bit base packs
    largest_linear: int
    stacked_params: int  # of tensors of three axes: a mixture's experts


def count(shape: Shape, setup: Setup) -> Counts:
    """Exact counts of the whole model with its adapter: those of three layers, and what each further one adds."""
    if not shape.uniform:
        return _count(shape, setup, shape.n_layers)
    fewer, more = (_count(shape, setup, n) for n in (shape.n_traced - 1, shape.n_traced))
    extra = shape.n_layers - shape.n_traced
    grown = {f.name: getattr(more, f.name) for f in dataclasses.fields(Counts)}
    for name in grown.keys() - {"largest_linear"}:
        grown[name] += extra * (grown[name] - getattr(fewer, name))
    return Counts(**grown)


def _count(shape: Shape, setup: Setup, n_layers: int) -> Counts:
    plain = shape.build(setup.kept, n_layers)
    linear = [plain.get_submodule(name).weight.numel() for name in linear_layers(plain)]
    policy = _policy(shape, setup, n_layers)
    parameters = list(policy.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    merged = 0
    if setup.adapter != "none":
        with Ledger(parameters) as ledger:
            merged_state(policy)
        merged = ledger.peak
    return Counts(
        n_params=sum(p.numel() for p in parameters),
        n_trainable=sum(p.numel() for p in trained),
        weight_bytes=sum(map(_size, parameters)),
        trainable_bytes=sum(map(_size, trained)),
        merged_bytes=merged,
        linear_params=sum(linear),
        largest_linear=max(linear, default=0),
        stacked_params=sum(p.numel() for p in plain.parameters() if p.ndim >= 3),
    )


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def trace_training(
    shape: Shape, setup: Setup, trees: Sequence[Tree], *, accumulating: bool, reference_too: bool = False
) -> Traced:
    """Forward, loss and backward of one micro-batch. `accumulating`: gradients of an earlier one are there already
    (and counted by the caller); else they are born here. `reference_too`: the reference scores the same trees between
    forward and backward, as a KL term needs."""

    def run(policy: Policy, marks: _Marks) -> None:
        policy.model.train()
        result = _result(policy, trees)
        if reference_too:
            with torch.no_grad(), policy.adapter_off() if policy.adapter is not None else nullcontext():
                policy.score(trees)
        marks.forward_done()
        result.sum().backward()

    what = "training, reference too" if reference_too else "training"
    return _trace(shape, setup, trees, run, accumulating=accumulating, what=what)


def trace_scoring(shape: Shape, setup: Setup, trees: Sequence[Tree]) -> Traced:
    """Log-probabilities without gradients: evaluation, and asking a reference."""

    @torch.no_grad()
    def run(policy: Policy, marks: _Marks) -> None:
        policy.model.eval()
        _result(policy, trees)
        marks.forward_done()

    plain = dataclasses.replace(setup, checkpointing=False)
    return _trace(shape, plain, trees, run, accumulating=False, what="scoring")


def sampler_copies(shape: Shape, setup: Setup, n_positions: int) -> int:
    """Bytes of what the sampler makes of the weights before it draws (`models.decode`)."""
    if setup.adapter != "none" or setup.autocast or setup.layout != "forest" or setup.compute != torch.float32:
        return 0  # as `Policy.straight` decides; the model below is in float32
    policy = Policy(shape.whole.eval(), None)
    use_forest(policy.model)
    with torch.no_grad(), Ledger([*policy.model.parameters(), *policy.model.buffers()]) as ledger:
        way = policy.for_sampling(n_positions)
    made = ledger.live
    if setup.device == "cpu" and isinstance(decoder := getattr(way, "__self__", None), Decoder):
        whole = [weight for layer in decoder.straight.layers for weight in (layer.o.weight, layer.down.weight)]
        made += sum(_size(weight) for weight in whole if kind_of(weight) != "torch")  # laid out anew, not joined
    return made


def _result(policy: Policy, trees: Sequence[Tree]) -> Tensor:
    """What the loss is computed from."""
    if hasattr(policy.model, "score"):
        return read_scores(policy, trees)[0]
    return policy.score(trees)[0].logp_N


_Run = Callable[[Policy, "_Marks"], None]


def _trace(shape: Shape, setup: Setup, trees: Sequence[Tree], run: _Run, *, accumulating: bool, what: str) -> Traced:
    lengths = tuple((len(t.trunk_ids), tuple((len(b.token_ids), sum(b.scored)) for b in t.branches)) for t in trees)
    key = (what, accumulating, _what_counts(setup), lengths)
    if key not in shape.remembered:
        shape.remembered[key] = _trace_once(shape, setup, trees, run, accumulating)
    return shape.remembered[key]


def _what_counts(setup: Setup) -> str:
    """A 4-bit base is traced as the 16-bit one it stands for."""
    adapter = "lora" if setup.adapter == "qlora" else setup.adapter
    return repr(dataclasses.replace(setup, adapter=adapter))


def _trace_once(shape: Shape, setup: Setup, trees: Sequence[Tree], run: _Run, accumulating: bool) -> Traced:
    if setup.layout == "forest":
        try:
            return _trace_as(shape, setup, trees, run, "forest", accumulating)
        except (ForestUnsupported, ValueError, TypeError, AttributeError, LookupError):
            pass  # as the probe at load would find; the plan says which layout it is for
    return _trace_as(shape, setup, trees, run, "padded", accumulating)


def _trace_as(shape: Shape, setup: Setup, trees: Sequence[Tree], run: _Run, layout: str, accumulating: bool) -> Traced:
    count_grouped_products()
    n, more = shape.n_traced, None
    found = _watch(shape, setup, trees, run, layout, accumulating, n)
    if shape.uniform and setup.autocast:  # every layer's cast weights are kept until the forward pass ends
        more = _watch(shape, setup, trees, run, layout, accumulating, n + 1)

    def spans(account: str) -> list[Span]:
        own: list[Span] = getattr(found, account).spans
        if not shape.uniform:
            return own
        return repeat_middle(own, n, shape.n_layers, getattr(more, account).spans if more else None)

    peak, kept = _highest(spans("all"))
    held = max(0, _highest(spans("heap"))[0] + _highest(spans("mapped"))[0] - peak)
    flops = sum(span.flops for span in spans("all"))
    return Traced(peak, kept, flops, layout, sum(tree.n_tokens for tree in trees), held)


def _watch(
    shape: Shape, setup: Setup, trees: Sequence[Tree], run: _Run, layout: str, accumulating: bool, n_layers: int
) -> Ledger:
    policy = _policy(shape, setup, n_layers)
    if layout == "forest":
        use_forest(policy.model)
    batch = _laid_out(trees, layout)
    # Meta tensors are the quicker ones, but autocast passes them by (it looks at where tensors are), and stock masks
    # want to be read.
    fake = setup.autocast is not None or layout == "padded"
    mode: Any = FakeTensorMode(allow_non_fake_inputs=True) if fake else nullcontext()
    with mode:
        if fake:
            give_device(policy.model)
            batch = _mapped(batch, mode.from_tensor)
        else:
            batch = _mapped(batch, lambda tensor: tensor.to("meta"))
        held = [*policy.model.parameters(), *policy.model.buffers(), *_tensors(batch)]
        if accumulating:
            for p in policy.trainable().values():
                p.grad = torch.empty_like(p)
                held.append(p.grad)
    policy = _Prepared(**{f.name: getattr(policy, f.name) for f in dataclasses.fields(policy)})
    policy.layout, policy.prepared = layout, batch
    ledger = Ledger(held)
    marks = _Marks(ledger)
    with tiles_of(setup.device), mode, kernels_of(setup.device), marks.on(policy, n_layers), ledger:
        run(policy, marks)
        ledger.mark("end")
    return ledger


def _laid_out(trees: Sequence[Tree], layout: str) -> Any:
    return build_forest(trees) if layout == "forest" else build_padded(trees)


@dataclass
class _Prepared(Policy):
    """A policy whose batch was laid out before, because index arithmetic needs contents."""

    prepared: Any = None

    def batch(self, trees: Sequence[Tree]) -> Any:
        del trees
        return self.prepared


def _policy(shape: Shape, setup: Setup, n_layers: int | None) -> Policy:
    policy = Policy(shape.build(setup.kept, n_layers), None, autocast=setup.autocast)
    if not setup.dropout:
        disable_dropout(policy.model)
    if setup.adapter != "none":
        plain = setup.lora.model_copy(update={"init": "default"})  # others start from weights, which are not here
        with torch.device("meta"):
            put_on(policy, plain, seed=0, kind=setup.adapter)
    if setup.scores:
        with torch.device("meta"):
            policy = put_score(policy, ANSWER, seed=0)
    if setup.checkpointing:
        checkpoint_activations(policy.model)
    return policy


class _Marks:
    """Closes a span where each layer begins on the way up, and where each layer's input has its gradient on the way
    down."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._upward = True

    def forward_done(self) -> None:
        self._upward = False
        self._ledger.mark("forward done")

    @contextmanager
    def on(self, policy: Policy, n_layers: int) -> Iterator[None]:
        layers = layers_of(policy.model, n_layers) or ()
        hooks = [self._hook(i) for i in range(len(layers))]
        handles = [
            layer.register_forward_pre_hook(hook, with_kwargs=True) for layer, hook in zip(layers, hooks, strict=True)
        ]

        def short_step(way: Straight, layer: Layer, hidden: Tensor, *rest: Any) -> Tensor:
            hooks[layer.index](None, (hidden,), {})
            return stepped(way, layer, hidden, *rest)

        stepped = Straight.step
        try:
            with mock.patch.object(Straight, "step", short_step):  # it does not call the layers' modules
                yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, index: int) -> Callable[..., None]:
        seen: list[bool] = []

        def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not self._upward or seen:  # recomputed under checkpointing, or a second pass for the reference
                return
            seen.append(True)
            self._ledger.mark(f"up {index}")
            hidden = args[0] if args else kwargs["hidden_states"]
            if index and hidden.requires_grad:
                hidden.register_hook(lambda _: self._ledger.mark(f"down {index}"))

        return before


def repeat_middle(
    spans: Sequence[Span], n_traced: int, n_layers: int, more: Sequence[Span] | None = None
) -> list[Span]:
    """The spans of `n_layers` layers from those of three: the second layer's, up and down, repeated.

    `more` are the spans of one layer more: what it adds to a span that is there once (what all layers held until then
    and let go of together) is added for each further layer.
    """
    extra = n_layers - n_traced
    # A span is labelled by the mark that closes it: "up 2" closes layer 1 on the way up, "down 1" on the way down.
    middle = {f"up {n_traced - 1}", f"down {n_traced - 2}"}
    grown = {} if more is None else {span.label: span for span in _from_top(more, n_traced + 1)}
    out: list[Span] = []
    for span in spans:
        if span.label in middle:
            out += [span] * (1 + extra)
            continue
        if (other := grown.get(span.label)) is not None:
            end = span.end + extra * (other.delta - span.delta)
            peak = span.peak + extra * (other.rise - span.rise)
            span = Span(span.label, span.start, peak, end, span.flops + extra * (other.flops - span.flops))
        out.append(span)
    return out


def _from_top(spans: Sequence[Span], n_layers: int) -> Iterator[Span]:
    """Spans of one layer more under the labels that they have with one less; the repeated ones left out."""
    last = n_layers - 1
    names = {f"up {last}": None, f"down {last - 1}": None, f"up {last - 1}": None, f"down {last}": f"down {last - 1}"}
    for span in spans:
        name = names.get(span.label, span.label)
        if name is not None:
            yield Span(name, span.start, span.peak, span.end, span.flops)


def _highest(spans: Sequence[Span]) -> tuple[int, int]:
    """(peak, alive when the forward pass is over), replaying the spans one after the other."""
    live = peak = kept = 0
    for span in spans:
        peak = max(peak, live + span.rise)
        live += span.delta
        if span.label == "forward done":
            kept = live
    return peak, kept


def _mapped(value: Any, make: Callable[[Tensor], Tensor]) -> Any:
    """The same batch with each tensor made anew."""
    if isinstance(value, Tensor):
        return make(value)
    if isinstance(value, tuple):
        return tuple(_mapped(item, make) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = {f.name: _mapped(getattr(value, f.name), make) for f in dataclasses.fields(value)}
        return type(value)(**parts)
    return value


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _tensors(item)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for f in dataclasses.fields(value):
            yield from _tensors(getattr(value, f.name))
