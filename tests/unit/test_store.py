"""The model store: one run per stage, no promotion without a verdict, a way back, and names that resolve."""

import shutil
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from registry_samples import a_report, an_artefact

import posttrain
from posttrain.errors import ArtefactError, GateRefused, ModelError
from posttrain.records import ArtefactRef
from posttrain.registry import tracking
from posttrain.registry.artefact import attach_gate
from posttrain.registry.store import FORCED, FORMER, ModelStore


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's tables, made once: migrating them takes most of a second."""
    home = tmp_path_factory.mktemp("template")
    tracking.open_client(home)
    return home / "mlflow.db"


@pytest.fixture
def store(tmp_path: Path, empty_database: Path, monkeypatch: pytest.MonkeyPatch) -> ModelStore:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    home = tmp_path / "home"
    home.mkdir()
    shutil.copyfile(empty_database, home / "mlflow.db")
    return ModelStore(home)


def made(store: ModelStore, version: str, *, passed: bool | None = True, **changes: Any) -> ArtefactRef:
    """An artefact with its own weights, judged unless `passed` is None."""
    directory = store.home / "runs" / f"sft-{version}"
    ref = an_artefact(directory, content=f"weights {version}".encode(), version=version, **changes)
    if passed is not None:
        attach_gate(directory, a_report(passed=passed, child=version))
    return ref


def log(store: ModelStore, **changes: Any) -> str:
    arguments: dict[str, Any] = {"key": "57a6" * 16, "params": {"seed": 7}, "metrics": {"loss": [(1, 0.5), (2, 0.25)]}}
    return store.log_run("helper", "sft", **arguments | changes)


# -- runs


def test_a_run_is_logged_once_with_everything_in_it(store: ModelStore) -> None:
    params = {f"key{i}": i for i in range(150)} | {
        "lora": {"r": 8, "target_modules": ["q_proj"]},
        "prompt": "x" * 7000,
        "datasets": [{"path": "größe.jsonl"}],
        "odd(key)": None,
    }
    metrics = {"loss": [(step, 1 / step) for step in range(1, 2502)], "accuracy": 0.5}
    run_id = log(store, params=params, metrics=metrics, tags={"stage": "sft"})
    assert log(store, params=params, metrics=metrics) == run_id
    run = store._client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.info.run_name == "sft"
    assert len(run.data.params) == 155
    assert run.data.params["lora.r"] == "8"
    assert run.data.params["datasets"] == '[{"path": "größe.jsonl"}]'
    assert run.data.params["odd_key_"] == "null"
    assert run.data.params["prompt"].endswith("… (7000 characters; all of it is in manifest.json)")
    assert run.data.metrics == {"loss": 1 / 2501, "accuracy": 0.5}
    history = store._client.get_metric_history(run_id, "loss")
    assert [point.step for point in history] == list(range(1, 2502))
    assert run.data.tags["stage"] == "sft"


def test_logging_that_was_killed_is_completed_not_doubled(store: ModelStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(store._client, "set_terminated", killed)
        with pytest.raises(KeyboardInterrupt):
            log(store)
    time.sleep(0.01)  # another millisecond, so that equal time stamps are no accident
    run_id = log(store)
    experiment = store._client.get_experiment_by_name("helper")
    assert [run.info.run_id for run in store._client.search_runs([experiment.experiment_id])] == [run_id]
    assert [(p.step, p.value) for p in store._client.get_metric_history(run_id, "loss")] == [(1, 0.5), (2, 0.25)]
    assert log(store, key="0" * 64) != run_id


# -- registering


def test_versions_count_up_and_the_same_artefact_stays_one_version(store: ModelStore) -> None:
    first, second = made(store, "1"), made(store, "2", passed=None)
    run_id = log(store)
    assert store.register("helper", first, run_id, {"owner": "ana"}) == 1
    assert store.register("helper", second) == 2
    assert store.register("helper", first) == 1
    newest, oldest = store.entries()
    assert (newest.version, oldest.version) == (2, 1)
    assert oldest.gate == "passed: arith-test 20.0 % → 45.0 %, gain [+17.0, +33.0] points"
    assert newest.gate == "not judged"
    assert oldest.path == first.path
    assert oldest.fingerprint == first.fingerprint
    recorded = store._client.get_model_version("helper", "1")
    assert recorded.run_id == run_id
    assert recorded.tags["owner"] == "ana"


def test_a_reference_that_no_longer_holds_is_refused(store: ModelStore) -> None:
    ref = made(store, "1")
    stale = ArtefactRef(ref.name, ref.version, ref.path, "0" * 64)
    with pytest.raises(ArtefactError, match=r"with fingerprint .* not helper-sft@1 with 000000000000"):
        store.register("helper", stale)
    for name in ("", "a/b", "a:b", "it's", "-x"):
        with pytest.raises(ArtefactError, match="cannot name a model"):
            store.register(name, ref)
    assert store.entries() == []


# -- promotion


def test_only_a_passed_verdict_promotes(store: ModelStore) -> None:
    for version, passed in (("1", True), ("2", False), ("3", None)):
        store.register("helper", made(store, version, passed=passed))
    assert store.promote("helper", 1).aliases == ("champion",)
    with pytest.raises(GateRefused, match=r"helper@2 was refused: the lower bound -0\.0100"):
        store.promote("helper", 2)
    with pytest.raises(GateRefused, match="helper@3 was never judged") as caught:
        store.promote("helper", "3")
    assert caught.value.exit_code == 4
    assert store.get("helper").version == 1
    with pytest.raises(ModelError, match="not set by hand"):
        store.set_alias("helper", "champion", 2)
    store.set_alias("helper", "candidate", 3)
    assert store.get("helper", "candidate").version == 3


def test_forcing_leaves_its_reason_behind(store: ModelStore) -> None:
    store.register("helper", made(store, "1", passed=False))
    assert store.promote("helper", 1, force_because="suite was broken").aliases == ("champion",)
    assert store._client.get_model_version("helper", "1").tags[FORCED] == "suite was broken"


def test_corrupt_files_are_not_promoted(store: ModelStore) -> None:
    ref = made(store, "1")
    store.register("helper", ref)
    (Path(ref.path) / "model.safetensors").write_bytes(b"weightz")
    with pytest.raises(ArtefactError, match=r"model\.safetensors is corrupt"):
        store.promote("helper", 1, force_because="I insist")


def test_rollback_walks_back_through_the_champions(store: ModelStore) -> None:
    for version in ("1", "2", "3"):
        store.register("helper", made(store, version))
        store.promote("helper", version)
    store.promote("helper", 3)  # again: must not count as a change
    assert store.rollback("helper").version == 2
    assert store.promote("helper", "3").version == 3
    assert store.rollback("helper").version == 2
    assert store.rollback("helper").version == 1
    with pytest.raises(ArtefactError, match="no earlier champion") as caught:
        store.rollback("helper")
    assert "versions 1, 2, 3; aliases champion = 1" in caught.value.remedy
    assert store.get("helper").version == 1


def test_rollback_survives_a_kill_between_memory_and_alias(store: ModelStore) -> None:
    for version in ("1", "2"):
        store.register("helper", made(store, version))
    store.promote("helper", 1)
    store._client.set_registered_model_tag("helper", FORMER, "[1]")  # as promote(2) killed half-way leaves it
    with pytest.raises(ArtefactError, match="no earlier champion"):
        store.rollback("helper")
    store.promote("helper", 2)
    assert store._former("helper") == [1]
    assert store.rollback("helper").version == 1


# -- resolving


def test_references_resolve_to_directories(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = made(store, "1"), made(store, "2")
    store.register("helper", one)
    store.register("helper", two)
    store.promote("helper", 1)
    store.set_alias("helper", "candidate", 2)
    expected = {"helper": one, "helper@champion": one, "helper@2": two, "helper@candidate": two, one.path: one}
    for text, ref in expected.items():
        assert store.find(text) == Path(ref.path)
    base = tmp_path / "base"
    base.mkdir()
    (base / "config.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    assert store.find("./base") == base


@pytest.mark.parametrize(
    ("ref", "said"),
    [
        ("helpr", "Did you mean 'helper'. There are: helper"),
        ("helper@9", "versions 1; aliases none"),
        ("helper", "has no version or alias 'champion'"),
        ("helper@best", "has no version or alias 'best'"),
        ("./nowhere", "no such directory"),
        ("/tmp", "holds no model"),
    ],
)
def test_what_cannot_be_found_says_what_is_there(store: ModelStore, ref: str, said: str) -> None:
    store.register("helper", made(store, "1"))
    with pytest.raises(ModelError, match=said):
        store.find(ref)


def test_a_deleted_directory_is_said_so(store: ModelStore) -> None:
    ref = made(store, "1")
    store.register("helper", ref)
    (Path(ref.path) / "manifest.json").write_text("{}")
    assert store.entries()[0].gate == "manifest unreadable"
    shutil.rmtree(ref.path)
    assert store.entries()[0].gate == "directory missing"
    with pytest.raises(ArtefactError, match=r"is registered, but its directory .* is not there"):
        store.find("helper@1")
    with pytest.raises(ArtefactError, match=r"no manifest\.json"):
        store.promote("helper", 1)


def test_a_fresh_home_is_empty_and_stays_untouched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    fresh = ModelStore(tmp_path / "home")
    assert fresh.entries() == []
    with pytest.raises(ModelError, match="Nothing is registered yet"):
        fresh.find("helper")
    assert not fresh.home.exists()


def test_a_moved_home_still_works(store: ModelStore, tmp_path: Path) -> None:
    sft = made(store, "1")
    store.register("helper", made(store, "2", parent=sft))
    store.promote("helper", 1)
    moved = tmp_path / "moved home"
    store.home.rename(moved)
    after = ModelStore(moved)
    assert after.find("helper") == moved / "runs" / "sft-2"
    assert [step.kind for step in after.lineage("helper")] == ["artefact", "artefact", "base"]


def test_lineage_reaches_the_base_with_data_and_verdicts(store: ModelStore) -> None:
    sft = made(store, "1")
    dpo = made(store, "2", passed=None, parent=sft, method="dpo")
    store.register("helper", dpo)
    young, old, base = store.lineage("helper", 1)
    assert (young.label, young.method, young.gate) == ("helper-sft@2", "dpo", None)
    assert (old.label, old.method, old.gate) == ("helper-sft@1", "sft", a_report())
    assert old.data["data/train.jsonl"].sha256 == "da7a" * 16
    assert (base.kind, base.label, base.fingerprint) == ("base", "acme/tiny-base", "ba5e" * 16)
    shutil.rmtree(sft.path)
    assert [step.kind for step in store.lineage("helper", 1)] == ["artefact", "missing"]


# -- MLflow itself


def test_another_store_can_be_named(store: ModelStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = tmp_path / "shared.db"
    shutil.copyfile(store.home / "mlflow.db", shared)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{shared}")
    ref = made(store, "1")
    assert ModelStore(store.home).register("helper", ref) == 1
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert ModelStore(store.home).entries() == []


def test_an_unreachable_server_is_named_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://ana:secret@127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(ArtefactError, match="MLFLOW_TRACKING_URI names a reachable store") as caught:
        ModelStore(tmp_path).entries()
    assert caught.value.where == "http://127.0.0.1:9"
    assert "secret" not in str(caught.value)


def test_a_damaged_database_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "mlflow.db").write_bytes(b"not a database" * 100)
    started = time.monotonic()
    with pytest.raises(ArtefactError, match="file is not a database"):
        ModelStore(tmp_path).entries()
    assert time.monotonic() - started < 10


def test_creating_the_database_never_overwrites_another_process_rows(tmp_path: Path, empty_database: Path) -> None:
    database = tmp_path / "mlflow.db"
    shutil.copyfile(empty_database, database)
    with sqlite3.connect(database) as connection:
        connection.execute("INSERT INTO registered_models (workspace, name) VALUES ('default', 'theirs')")
    tracking._create(database)
    with sqlite3.connect(database) as connection:
        assert connection.execute("SELECT name FROM registered_models").fetchall() == [("theirs",)]
    assert list(tmp_path.iterdir()) == [database]


QUIET = """
import sys
from pathlib import Path
from posttrain.registry.store import ModelStore

store = ModelStore(Path(sys.argv[1]))
store.entries()
assert "mlflow" not in sys.modules, "imported before it was needed"
store.log_run("helper", "sft", key="k", params={"seed": 7}, metrics={"loss": 0.5})
from mlflow.telemetry.utils import is_telemetry_disabled
assert is_telemetry_disabled()
assert "torch" not in sys.modules
"""


def test_first_use_says_nothing_and_sends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_LOGGING_LEVEL", "CI", "PYTEST_CURRENT_TEST"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "false")
    monkeypatch.setenv("PYTHONPATH", str(Path(posttrain.__file__).parents[1]))
    monkeypatch.chdir(tmp_path)
    ran = subprocess.run([sys.executable, "-c", QUIET, str(tmp_path / "home")], capture_output=True, text=True)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
    assert [p.name for p in tmp_path.iterdir()] == ["home"]
    assert [p.name for p in (tmp_path / "home").iterdir()] == ["mlflow.db"]
