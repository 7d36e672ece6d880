"""MLflow, opened quietly and quickly, and runs logged to it once.

The default store is one SQLite file in the home; MLFLOW_TRACKING_URI names any other MLflow store. MLflow is imported
on use only: it takes longer to import than most commands take to run.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from posttrain.errors import ArtefactError
from posttrain.registry.files import ensure_home, staged, writing

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_KEY = "posttrain.run_key"
DATABASE = "mlflow.db"
METRICS_PER_CALL = 1000  # limits of MLflow's batch call
PARAMS_PER_CALL = 100
PARAM_LENGTH = 6000

Series = Sequence[tuple[int, float]]  # (step, value)


def tracking_uri(home: Path) -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{home / DATABASE}"


def own_database(home: Path) -> Path | None:
    """The SQLite file in the home, or None where the environment names another store."""
    return None if os.environ.get("MLFLOW_TRACKING_URI") else home / DATABASE


def open_client(home: Path) -> MlflowClient:
    """A client of the tracking store and registry; creates the default one on first use."""
    _hush()
    uri = tracking_uri(home)
    database = own_database(home)
    with faults(home):
        if database is not None:
            _prepare(database)
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def _hush() -> None:
    """Before the import: no telemetry whatever the environment says, no chatter unless it asks for some."""
    os.environ.update(MLFLOW_DISABLE_TELEMETRY="true", DO_NOT_TRACK="true")
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "3")  # seconds, not minutes, until a dead server is named
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It prints a traceback of what it then raises; `faults` says it once and in words.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


@contextmanager
def faults(home: Path) -> Iterator[None]:
    """Turn what MLflow, SQLAlchemy and SQLite raise into an error that names the store."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        with writing(home):
            yield
    except (MlflowException, SQLAlchemyError, sqlite3.Error) as error:
        says = (str(error).splitlines() or [type(error).__name__])[0]
        raise ArtefactError(
            f"the MLflow store says: {_without_password(says)}",
            where=_without_password(tracking_uri(home)),
            remedy="Check that MLFLOW_TRACKING_URI names a reachable store, or unset it to use the file in the home.",
        ) from error


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@\s]*@", "//", text)


def _prepare(database: Path) -> None:
    if database.exists():
        # MLflow would retry a file that is no database for minutes.
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA schema_version").fetchone()
    else:
        _create(database)


def _create(database: Path) -> None:
    """Run MLflow's migrations in memory and put the result on disk in one piece.

    On disk each of about 400 statements would wait for the disk, and a kill would leave a half-migrated file.
    """
    import sqlalchemy
    from mlflow.store.db import utils

    ensure_home(database.parent)
    engine = sqlalchemy.create_engine("sqlite://", poolclass=sqlalchemy.StaticPool)
    utils._initialize_tables(engine)
    with staged(database) as directory:
        finished = directory / DATABASE
        with engine.connect() as memory, closing(sqlite3.connect(finished)) as file:
            source = memory.connection.driver_connection
            assert isinstance(source, sqlite3.Connection)
            source.backup(file)
        with suppress(FileExistsError):  # another process was first; its file may hold rows already
            os.link(finished, database)
    engine.dispose()


def log_run(
    client: MlflowClient,
    experiment: str,
    run_name: str,
    *,
    key: str,
    params: Mapping[str, Any],
    metrics: Mapping[str, float | Series],
    tags: Mapping[str, str],
    artifacts: str | None,
) -> str:
    """Log one finished run under `key`. A second call with the same key completes or returns the first's run."""
    from mlflow.entities import Metric, Param

    experiment_id = _experiment(client, experiment, artifacts)
    assert "'" not in key
    found = client.search_runs([experiment_id], f"tags.`{RUN_KEY}` = '{key}'", max_results=1)
    run = found[0] if found else client.create_run(experiment_id, run_name=run_name, tags={**tags, RUN_KEY: key})
    run_id: str = run.info.run_id
    if run.info.status == "FINISHED":
        return run_id
    flat = [Param(name, value) for name, value in flatten(params).items()]
    for start in range(0, len(flat), PARAMS_PER_CALL):
        client.log_batch(run_id, params=flat[start : start + PARAMS_PER_CALL])
    # One time stamp for all points: MLflow then drops those an interrupted call has logged already.
    points = [
        Metric(_clean(name), value, run.info.start_time, step)
        for name, series in metrics.items()
        for step, value in (series if isinstance(series, Sequence) else [(0, series)])
    ]
    for start in range(0, len(points), METRICS_PER_CALL):
        client.log_batch(run_id, metrics=points[start : start + METRICS_PER_CALL])
    client.set_terminated(run_id)
    return run_id


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    experiment_id: str = found.experiment_id if found else client.create_experiment(name, artifacts)
    return experiment_id


def flatten(params: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """{"lora": {"r": 8}} becomes {"lora.r": "8"}. Too long a value is cut where everyone can see it."""
    flat: dict[str, str] = {}
    for key, value in params.items():
        name = _clean(f"{prefix}{key}")
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{name}."))
            continue
        text = value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
        if len(text) > PARAM_LENGTH:
            note = f"… ({len(text)} characters; all of it is in manifest.json)"
            text = text[: PARAM_LENGTH - len(note)] + note
        flat[name] = text
    return flat


def _clean(name: str) -> str:
    """MLflow names hold letters, digits and _ - . : / and spaces."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:250]
