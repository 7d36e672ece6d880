"""From a stage's files to its trees: prepared once, kept in the home under a hash of all that decides them.

A changed file, format, tokenizer, template, setting or line of the code that prepares gives another hash. What is
found is compared with its checksums before it is used; a directory that was damaged is prepared again, aloud.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Container, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import posttrain.data
from posttrain.data.formats import Dropped, Source, stream
from posttrain.data.job import KINDS, Job
from posttrain.data.ledger import ROWS, Bucket, Counts
from posttrain.data.length import in_words
from posttrain.data.prepare import Screen, Summary, prepare, refuse_losses
from posttrain.data.sources import content_hash
from posttrain.data.store import PreparedTrees, token_type
from posttrain.errors import ArtefactError, DataError
from posttrain.methods.screens import screening, screens_of
from posttrain.methods.stage import Stage, StageResult, refuse_beyond_positions
from posttrain.recipe import canonical_json
from posttrain.registry.files import staged, verify, write_directory, writing
from posttrain.registry.home import note_use, preparing
from posttrain.reporting import Reporter, duration
from posttrain.settings import DatasetSettings, RowsSettings, StageSettings
from posttrain.train.loop import Trained

EVALUATION_ROWS = "rows-eval.jsonl"  # the ledger of eval_datasets, beside that of the training rows
MIN_ENDING = 0.5  # share of the answers that must end: below, most of them were cut
SOURCES = "sources"  # in prepared.json, beside the summary
# What else decides rows and token ids; Python's own version stands for its Unicode tables.
LIBRARIES = ("tokenizers", "transformers", "jinja2", "numpy", "py3langid", "pyarrow", "datasets")
CODE = ("data", "settings", "methods/screens.py", "methods/prepared.py", "records.py", "seeds.py", "intervals.py")
COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Prepared:
    """Rows of a stage, ready to be trained or evaluated on."""

    trees: PreparedTrees
    summary: Summary
    sources: tuple[Source, ...]

    @property
    def counts(self) -> Counts:
        return self.summary.counts


@dataclass(frozen=True)
class Wanted:
    """What decides prepared rows. `content` identifies what each source holds; `screening` what decides the screens'
    verdicts."""

    datasets: Sequence[DatasetSettings]
    content: tuple[str, ...]
    job: Job
    screening: Any

    @property
    def is_pinned(self) -> bool:
        """A stream from the Hub may bring other rows tomorrow, unless its commit is named."""
        return all(not d.streaming or COMMIT.fullmatch(d.revision or "") for d in self.datasets)

    def key(self, renderer: Any) -> str:
        meaning = {
            "datasets": [dataset.model_dump() for dataset in self.datasets],
            "content": self.content,
            "job": asdict(self.job),
            "screening": self.screening,
            "template": renderer.fingerprint,
            "tokenizer": tokenizer_fingerprint(renderer.tokenizer),
            "code": code_fingerprint(),
        }
        return hashlib.sha256(canonical_json(meaning).encode()).hexdigest()[:32]


def training_rows(stage: Stage, s: RowsSettings, kind: str) -> Prepared:
    """The rows to train on: screened, fitted to max_length, accounted for in rows.jsonl."""
    refuse_beyond_positions(stage, s.max_length)
    found = _rows(stage, s, s.datasets, kind, Bucket.TRAINED, screens_of(stage, s, kind), screening(stage, s), ROWS)
    for line in (
        *found.sources,
        *found.summary.notes,
        *_lengths(found),
        found.counts.summary(),
        _supervised(found.counts),
    ):
        stage.reporter.line(f"{stage.name}: {line}")
    return found


def evaluation_rows(stage: Stage, s: StageSettings, kind: str) -> Prepared | None:
    """The rows of eval_datasets, None without any. They obey the same length rule and have a ledger of their own."""
    if not s.eval_datasets:
        return None
    return _rows(stage, s, s.eval_datasets, kind, Bucket.EVALUATED, [], [], EVALUATION_ROWS)


def kept_rows(
    stage: Stage, datasets: Sequence[DatasetSettings], found: Prepared, ids: Container[str], kind: str
) -> list[Any]:
    """The rows whose trees were kept, with what their trees do not hold: gold answers, thumbs. They stay in memory."""
    rows = stream(datasets, stage.resolve, KINDS[kind].row)
    kept = [row for row in rows if not isinstance(row, Dropped) and row.id in ids]
    first = [source.sha256 for source in found.sources]
    _refuse_changed(zip(datasets, rows.sources, first, strict=True))
    return kept


def refuse_unending(stage: Stage, found: Prepared) -> None:
    """The model learns to stop only from answers that end with a token the sampler stops on, and that carries loss."""
    n_answers, n_ending = found.summary.n_answers, found.summary.n_ending
    if not n_answers:
        return  # plain text, which is not there to teach stopping
    end = stage.renderer.template.end.strip()
    cut = f"; {n_answers - n_ending:,} were cut and stay open" if n_ending < n_answers else ""
    stage.reporter.line(
        f"{stage.name}: {n_ending:,} of {n_answers:,} answers end with {end}, where sampling stops{cut}"
    )
    if n_ending < MIN_ENDING * n_answers:
        raise DataError(
            f"{f'only {n_ending:,}' if n_ending else 'not one'} of {n_answers:,} answers ends with {end} as a token "
            "with loss, so the model would learn to go on rather than to stop.",
            where=found.summary.first_id,
            remedy="Raise max_length so that whole answers fit, or set on_overflow: drop.",
        )


def stage_result(trained: Trained, found: Prepared, evaluation: Prepared | None) -> StageResult:
    return StageResult(trained, found.sources, found.counts, evaluation.counts if evaluation else None)


def _lengths(found: Prepared) -> list[str]:
    return [in_words(found.summary.lengths)] if found.summary.lengths else []


def _supervised(counts: Counts) -> str:
    by_source = ", ".join(f"{source} {count.supervised_tokens:,}" for source, count in counts.sources.items())
    return f"{counts.supervised_tokens:,} tokens carry loss" + (f" ({by_source})" if len(counts.sources) > 1 else "")


def _rows(
    stage: Stage,
    s: RowsSettings,
    datasets: Sequence[DatasetSettings],
    kind: str,
    bucket: Bucket,
    screens: Sequence[Screen],
    deciding: Any,
    ledger: str,
) -> Prepared:
    job = Job(
        kind=kind,
        bucket=bucket,
        max_length=s.max_length,
        on_overflow=s.on_overflow,
        token_type=token_type(len(stage.renderer.tokenizer)),
        loss_on=getattr(s, "loss_on", "assistant"),
        room=getattr(s, "max_completion_length", 0) if kind == "task" else 0,
    )
    content = tuple(content_hash(dataset, stage.resolve) for dataset in datasets)
    wanted = Wanted(datasets, content, job, deciding)
    folder = stage.prepared / wanted.key(stage.renderer)
    waiting = f"{stage.name}: another run prepares the same rows; waiting for it"
    with preparing(folder, on_wait=lambda: stage.reporter.line(waiting)):
        note_use(stage.place.directory, folder)
        found = _found(folder, stage.reporter, stage.name) if wanted.is_pinned else None
        if found is None:
            write_directory(folder, lambda aside: _fill(aside, stage, s, wanted, screens, ledger), replace=True)
            found = _open(folder)
        else:
            _keep_ledger(folder / ROWS, stage, ledger)
    refuse_losses(found.counts, s.max_drop_rate)
    return found


def _keep_ledger(rows: Path, stage: Stage, name: str) -> None:
    """Where every row ended, beside the stage's other files; also of a stage that stops here."""
    final = stage.place.directory / name
    with staged(final) as scratch, writing(final):
        shutil.copyfile(rows, scratch / name)
        (scratch / name).replace(final)


def _fill(
    directory: Path, stage: Stage, s: RowsSettings, wanted: Wanted, screens: Sequence[Screen], ledger: str
) -> None:
    """Prepare into a directory that nobody sees yet."""
    rows = stream(wanted.datasets, stage.resolve, KINDS[wanted.job.kind].row)
    began = time.monotonic()
    with stage.reporter.task(f"{stage.name} rows", None) as task:

        def progress(n_rows: int, n_tokens: int, n_processes: int) -> None:
            processes = {"processes": str(n_processes)} if n_processes > 1 else {}
            task.update(n_rows, _rates(n_rows, n_tokens, time.monotonic() - began) | processes)

        summary = prepare(
            rows, screens, stage.renderer, wanted.job, directory, processes=s.dataset_num_proc, progress=progress
        )
    _keep_ledger(directory / ROWS, stage, ledger)
    # What is streamed was hashed only while it passed.
    _refuse_changed(
        (d, source, known)
        for d, source, known in zip(wanted.datasets, rows.sources, wanted.content, strict=True)
        if not d.streaming
    )
    refuse_losses(summary.counts, s.max_drop_rate)
    summary.write(directory, **{SOURCES: [asdict(source) for source in rows.sources]})
    counts, rates = summary.counts, _rates(summary.counts.n_rows, summary.n_tokens, time.monotonic() - began)
    told = ", ".join(f"{value} {name}" for name, value in rates.items())
    stage.reporter.line(
        f"{stage.name}: {counts.n_rows:,} rows prepared in {duration(time.monotonic() - began)} ({told})"
    )


def _rates(n_rows: int, n_tokens: int, seconds: float) -> dict[str, str]:
    return {"rows/s": f"{n_rows / max(seconds, 1e-9):,.0f}", "tokens/s": f"{n_tokens / max(seconds, 1e-9):,.0f}"}


def _open(folder: Path) -> Prepared:
    summary, more = Summary.read(folder)
    return Prepared(PreparedTrees(folder), summary, tuple(Source(**source) for source in more[SOURCES]))


def _found(folder: Path, reporter: Reporter, name: str) -> Prepared | None:
    """What was prepared before, if it is whole."""
    if not folder.exists():
        return None
    try:
        verify(folder)
        found = _open(folder)
    except (ArtefactError, OSError, ValueError, KeyError, TypeError) as fault:
        reporter.line(f"{name}: rows prepared before are damaged and are prepared again: {fault}")
        return None
    reporter.line(f"{name}: rows were prepared before, in {folder}")
    return found


def _refuse_changed(read: Iterable[tuple[DatasetSettings, Source, str]]) -> None:
    """The rows must come from the very bytes that the hash stands for."""
    for dataset, source, expected in read:
        if source.sha256 != expected:
            raise DataError(
                "the stream gave other rows the second time."
                if dataset.streaming
                else "the file changed while it was read.",
                where=source.path,
                remedy="Run again when nothing writes to it any more.",
            )


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of what a tokenizer does to text; of its files where it has no description of itself."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer.save_pretrained(folder)
            parts = [(path.name, path.read_bytes().hex()) for path in sorted(Path(folder).iterdir())]
    else:
        described = json.loads(backend.to_str())
        # Set anew by each call that asks for them; ours never do.
        parts = [(key, value) for key, value in sorted(described.items()) if key not in ("truncation", "padding")]
    return hashlib.sha256(canonical_json([type(tokenizer).__name__, parts]).encode()).hexdigest()


@cache
def code_fingerprint() -> str:
    """Hash of the code that prepares: ours line by line, and the versions of the libraries it stands on."""
    package = Path(posttrain.data.__file__).parents[1]
    files = sorted(
        file for part in CODE for file in ([package / part] if part.endswith(".py") else (package / part).rglob("*.py"))
    )
    parts = [(file.relative_to(package).as_posix(), file.read_text(encoding="utf-8")) for file in files]
    versions = [(name, _version(name)) for name in LIBRARIES]
    return hashlib.sha256(json.dumps([parts, versions, sys.version]).encode()).hexdigest()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"
