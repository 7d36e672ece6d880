"""The C kernels against slow float64 twins, at their edges, and what happens where they are not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_policy
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from posttrain.models.load import choose_layout
from posttrain.models.native import check, kernels, library

needs_kernels = pytest.mark.skipif(library.built().path is None, reason=library.built().fault)


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine that has built nothing yet; the folder it would build in."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    library.built.cache_clear()
    yield tmp_path / "posttrain"
    library.built.cache_clear()


@needs_kernels
def test_they_are_in_use_where_they_can_be_built() -> None:
    assert kernels.fault() is None
    assert kernels.serve(torch.zeros(2), None, torch.nn.Parameter(torch.zeros(1)))
    assert not kernels.serve(torch.zeros(2, dtype=torch.float64))
    assert not kernels.serve(torch.zeros(2, device="meta"))


def slow_attention(q: Tensor, k: Tensor, v: Tensor, rows: list[tuple[int, ...]], scale: float, window: int) -> Tensor:
    """Query by query, head by head, from the definition."""
    out = torch.zeros_like(q)
    for start, length, prefix_start, prefix in rows:
        for i in range(length):
            seen = [*range(prefix_start, prefix_start + prefix), *range(start, start + i + 1)][-window:]
            for head in range(q.shape[1]):
                own = head * k.shape[1] // q.shape[1]
                weights = (k[seen, own] @ q[start + i, head] * scale).softmax(0)
                out[start + i, head] = weights @ v[seen, own]
    return out


@needs_kernels
@pytest.mark.parametrize("size", [1, 16, 20, 64])
@pytest.mark.parametrize("window", [None, 1, 7])
@pytest.mark.parametrize(("heads", "kv"), [(2, 2), (6, 2), (3, 1)])
def test_attention_is_its_definition(size: int, window: int | None, heads: int, kv: int) -> None:
    """A prompt with three answers (one of a single token), a row longer than a block, and a row of one token."""
    rows = [(0, 19, 0, 0), (19, 1, 0, 19), (20, 31, 0, 19), (51, 7, 0, 19), (58, 50, 0, 0), (108, 1, 0, 0)]
    n = 109
    draw = torch.Generator().manual_seed(size)
    q, k, v, g = (torch.randn(n, h, size, generator=draw) for h in (heads, kv, kv, heads))
    wide = [x.double().requires_grad_() for x in (q, k, v)]
    exact = slow_attention(*wide, rows, 0.4, window or n)
    exact.backward(g.double())
    laid = kernels.Rows.of(rows[::-1])
    out, lse = kernels.attend(q, k, v, laid, 0.4, window)
    torch.testing.assert_close(out.double(), exact.detach(), atol=1e-5, rtol=0)
    found = kernels.attend_backward(g, (q, k, v, out, lse), laid, 0.4, window)
    for ours, leaf in zip(found, wide, strict=True):
        torch.testing.assert_close(ours.double(), leaf.grad, atol=3e-5, rtol=0)
    again = kernels.attend_backward(g, (q, k, v, out, lse), laid, 0.4, window)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), "threads must not change sums"


def folded(logit_RV: Tensor, target_R: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """(logp, entropy), `width` columns at a time."""
    kept_4R = torch.zeros(4, len(logit_RV))
    kept_4R[0] = -torch.inf
    for first in range(0, logit_RV.shape[1], width):
        kernels.fold(logit_RV[:, first : first + width].clone(), target_R, 1.0, kept_4R, first)
    top_R, sum_R, dot_R, at_R = kept_4R
    return at_R - top_R - sum_R.log(), sum_R.log() - dot_R / sum_R


@needs_kernels
def test_a_number_that_is_none_is_not_lost() -> None:
    """NaN and infinity on the way in are seen on the way out, in the rows they are in and in no other."""
    rows = kernels.Rows.of([(0, 20, 0, 0), (20, 20, 0, 0)])
    for bad in (float("nan"), float("inf")):
        q, k, v = (torch.randn(40, 1, 8) for _ in range(3))
        k[3] = bad
        out, _ = kernels.attend(q, k, v, rows, 1.0, None)
        assert out[:3].isfinite().all() and out[20:].isfinite().all()
        assert not out[3:20].isfinite().all()
        x = torch.randn(2, 40)
        x[0, 3] = bad
        assert not kernels.norm(x, torch.ones(40), 1e-6)[0][0].isfinite().all()
        logp, entropy = kernels.score(x.clone(), torch.tensor([1, 1]), 1.0)
        assert not logp[0].isfinite() and not entropy[0].isfinite() and logp[1].isfinite()
        for width in (40, 16, 7):  # the bad one in the first block, alone in it or not
            logp, entropy = folded(x, torch.tensor([1, 1]), width)
            assert not logp[0].isfinite() and not entropy[0].isfinite() and logp[1].isfinite()
    gated = kernels.gate(torch.tensor([float("nan"), 1e30, -1e30, 0.0]), torch.ones(4))
    torch.testing.assert_close(gated, torch.tensor([float("nan"), 1e30, -0.0, 0.0]), equal_nan=True)


@needs_kernels
def test_a_number_that_is_none_stays_so_whatever_its_bits() -> None:
    """The bits of memory nobody wrote to, all ones, are one too."""
    for bits in (-1, 0x7FC00001, -0x3FFFFF):
        bad = torch.tensor([bits], dtype=torch.int32).view(torch.float32)
        assert bad.isnan()
        logits = torch.zeros(1, 64)
        logits[0, 5] = bad
        logp, entropy = kernels.score(logits.clone(), torch.tensor([1]), 1.0)
        assert logp.isnan() and entropy.isnan()
        logp, entropy = folded(logits, torch.tensor([1]), 16)
        assert logp.isnan() and entropy.isnan()
        assert kernels.gate(bad.repeat(32), torch.ones(32)).isnan().all()


@needs_kernels
def test_scores_that_are_all_minus_infinity_do_not_show_what_is_hidden() -> None:
    q, v = torch.ones(3, 1, 16), torch.ones(3, 1, 16)
    k = torch.full((3, 1, 16), float("-inf"))
    out, _ = kernels.attend(q, k, v, kernels.Rows.of([(0, 3, 0, 0)]), 1.0, None)
    assert out.isnan().all()
    block = torch.zeros(1, 1, 4, 16)
    at = torch.zeros(1, dtype=torch.int64)
    prompt = torch.full((1, 1, 1, 16), float("-inf"))
    places = (at, at, at + 1)
    step = kernels.decode_attend(q[:1], k[:1], v[:1], prompt, prompt, places, [(block, block.clone())], 0, 1.0, None)
    assert step.isnan().all()


@needs_kernels
@pytest.mark.parametrize("lowest", [float("-inf"), torch.finfo(torch.float32).min])
def test_tokens_that_cannot_be_drawn_add_nothing(lowest: float) -> None:
    """In whole vectors and in what is left over; 20 equal logits of 40: ln 20 each way."""
    logits, target = torch.full((2, 40), lowest), torch.tensor([20, 39])
    logits[:, 20:] = 3.0
    slope = torch.empty_like(logits)
    whole = [kernels.score(logits.clone(), target, 1.0, slope_RV=s) for s in (slope, None)]
    for logp, entropy in (*whole, *(folded(logits, target, n) for n in (40, 20, 16, 7))):
        torch.testing.assert_close(logp, torch.full((2,), -2.9957323), atol=1e-6, rtol=0)
        torch.testing.assert_close(entropy, torch.full((2,), 2.9957323), atol=1e-6, rtol=0)
    torch.testing.assert_close(slope[:, :20], torch.zeros(2, 20), atol=0, rtol=0)


@needs_kernels
@pytest.mark.parametrize("target", [-1, 40])
def test_a_target_outside_the_vocabulary_is_refused(target: int) -> None:
    slope = torch.zeros(2, 40)
    with pytest.raises(IndexError, match="40 tokens"):
        kernels.score(torch.randn(2, 40), torch.tensor([0, target]), 1.0, slope_RV=slope)
    assert (slope[1] == 0).all()


@needs_kernels
def test_angles_of_another_size_than_the_heads_are_refused() -> None:
    """Of half the size where an architecture turns a part of each head; torch refuses to multiply them too."""
    x, angle = torch.randn(5, 2, 16), torch.randn(5, 1, 8)
    with pytest.raises(ValueError, match="cannot be turned"):
        kernels.turn(x, None, 0.0, angle, angle)
    with pytest.raises(ValueError, match="cannot be turned"):
        kernels.turn_backward(x, angle, angle, None, False)


@needs_kernels
def test_large_scores_neither_overflow_nor_lose_the_largest() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0], [float("-inf"), 2.0, 2.0], [-88.0, 0.0, 88.0]])
    target = torch.tensor([0, 1, 0])
    slope = torch.empty_like(logits)
    logp, entropy = kernels.score(logits.clone(), target, 1.0, slope_RV=slope)
    exact = logits.double().log_softmax(-1)
    torch.testing.assert_close(logp.double(), exact.gather(1, target[:, None])[:, 0], atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(entropy, torch.tensor([0.0, 0.6931472, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(slope.double(), exact.exp() - F.one_hot(target, 3), atol=1e-6, rtol=0)
    for width in (3, 2, 1):
        logp, entropy = folded(logits, target, width)
        torch.testing.assert_close(logp.double(), exact.gather(1, target[:, None])[:, 0], atol=1e-5, rtol=1e-6)
        torch.testing.assert_close(entropy, torch.tensor([0.0, 0.6931472, 0.0]), atol=1e-6, rtol=0)
    q = torch.full((4, 1, 4), 100.0)
    out, _ = kernels.attend(q, q.clone(), torch.randn(4, 1, 4), kernels.Rows.of([(0, 4, 0, 0)]), 10.0, None)
    assert out.isfinite().all()


@needs_kernels
def test_exponentials_are_as_exact_as_torch_s() -> None:
    """Through a softmax of two: p = 1 / (1 + exp(x)), over the whole range of float32's exponents."""
    x = torch.linspace(-104, 0, 20_001)
    slope = torch.empty(len(x), 2)
    kernels.score(torch.stack([torch.zeros_like(x), x], 1), torch.zeros(len(x), dtype=torch.int64), 1.0, slope_RV=slope)
    exact = (x.double().exp() / (1 + x.double().exp())).float()
    torch.testing.assert_close(slope[:, 1], exact, atol=2e-38, rtol=4e-7)


@needs_kernels
@pytest.mark.parametrize("n_threads", [1, 2])
def test_any_number_of_threads_gives_the_same_but_for_rounding(n_threads: int) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(n_threads)
        name, gap = check.largest_gap(n_threads)
    finally:
        torch.set_num_threads(before)
    assert gap <= kernels.SAME, name


@contextmanager
def doubles() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


def refused(*_: object) -> None:
    raise AssertionError("the check's own tensors were kept for somebody else's backward pass")


@needs_kernels
@pytest.mark.parametrize(
    "around",
    [
        lambda: torch.autocast("cpu", torch.bfloat16),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.device("meta"),
        lambda: torch.autograd.graph.saved_tensors_hooks(refused, refused),
        FakeTensorMode,
        doubles,
    ],
)
def test_where_they_are_first_asked_for_does_not_matter(around: Callable[[], AbstractContextManager[object]]) -> None:
    kernels.fault.cache_clear()
    try:
        with around():
            assert kernels.fault() is None
    finally:
        kernels.fault.cache_clear()


@needs_kernels
@pytest.mark.parametrize("kernel", ["attend", "norm", "gate", "score"])
def test_a_kernel_that_is_wrong_is_found_and_none_is_used(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(kernels, kernel)

    def wrong(*arguments: object, **options: object) -> object:
        found = right(*arguments, **options)
        first = found[0] if isinstance(found, tuple) else found
        first.mul_(1.001)
        return found

    monkeypatch.setattr(kernels, kernel, wrong)
    kernels.fault.cache_clear()
    try:
        assert "differs from torch's" in str(kernels.fault())
        assert not kernels.serve(torch.zeros(1))
    finally:
        kernels.fault.cache_clear()


def test_switched_off_by_name(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.SWITCH, "off")
    assert library.built() == library.Built(None, "switched off by POSTTRAIN_KERNELS")
    assert not fresh.exists()


def test_without_a_compiler(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(fresh))
    assert library.built().fault == "no C compiler (cc) is installed"


def test_a_compiler_that_fails_is_quoted(fresh: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "cc"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no OpenMP here" >&2; exit 1\n')
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    assert library.built().fault == f"{compiler} could not build them: no OpenMP here"
    assert not list(fresh.glob("*.so"))


@needs_kernels
def test_a_compiler_with_arguments(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "env cc -g0")
    found = library.built()
    assert found.fault == "" and found.path is not None and found.path.parent == fresh


@needs_kernels
def test_a_user_without_a_home(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr("os.path.expanduser", lambda path: path)
    found = library.built().path
    assert found is not None and found.parent.parent == fresh.parent / "temporary"


@needs_kernels
def test_a_link_that_somebody_else_made_is_not_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    assert library._is_ours(link)
    theirs = os.stat_result((*link.lstat()[:4], os.getuid() + 1, *link.lstat()[5:]))
    monkeypatch.setattr(Path, "lstat", lambda _: theirs)
    assert not library._is_ours(link)


@needs_kernels
def test_built_once_and_again_when_the_source_changes(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = library.built().path
    assert first is not None and first.parent == fresh and [*fresh.iterdir()] == [first]
    made = first.stat().st_mtime_ns
    library.built.cache_clear()
    assert library.built().path == first and first.stat().st_mtime_ns == made
    monkeypatch.setattr(library, "FLAGS", (*library.FLAGS, "-DANOTHER"))
    library.built.cache_clear()
    assert library.built().path not in (None, first)


@needs_kernels
def test_a_folder_that_others_may_write_to_is_not_trusted(fresh: Path, tmp_path: Path) -> None:
    fresh.mkdir()
    fresh.chmod(0o777)
    found = library.built().path
    assert found is not None and found.parent.parent == tmp_path / "temporary"


@needs_kernels
def test_training_is_the_same_with_and_without_them() -> None:
    """One process with them and one without: the same loss and gradients but for rounding."""
    script = (
        "import sys, torch; sys.path.insert(0, 'tests'); from tiny import tiny_policy, mixed_trees; "
        "from posttrain.models.native import kernels; "
        "p = tiny_policy('qwen3', seed=0); s, _ = p.score(mixed_trees()); s.logp_N.sum().backward(); "
        "print(kernels.fault()); norms = [q.grad.norm() for q in p.model.parameters()]; "
        "print(*[float(x) for x in (*s.logp_N, *norms)])"
    )
    root = Path(__file__).parents[2]
    said = [
        subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=root,
            env=dict(os.environ) | {"PYTHONPATH": str(root / "src"), library.SWITCH: switch},
        ).stdout.splitlines()
        for switch in ("", "off")
    ]  # fmt: skip
    assert [lines[0] for lines in said] == ["None", "switched off by POSTTRAIN_KERNELS"]
    with_them, without = (torch.tensor([float(x) for x in lines[1].split()]) for lines in said)
    torch.testing.assert_close(with_them, without, atol=1e-5, rtol=1e-5)
    assert not torch.equal(with_them, without)


def test_a_model_that_must_do_without_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = tiny_policy("qwen3", seed=0)
    policy.notes.clear()
    monkeypatch.setattr(kernels, "fault", lambda: "no C compiler (cc) is installed")
    choose_layout(policy, "auto")
    assert policy.notes == ["the kernels for CPUs are not in use, which is slower: no C compiler (cc) is installed"]
