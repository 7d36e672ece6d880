"""A recipe from base model to registered champion: every stage starts from the last accepted model, is judged
against it on held-out items, and is registered only when it passes.

Everything is found again by what it means. A stage's fingerprint covers its parent, its settings, its data, its
suite, the template's file and the seed; its working directory and its artefact carry that fingerprint in their names.
So running a recipe again finds finished stages finished, goes on with a started one, and redoes what changed.
"""

from posttrain.pipeline.history import RunReport, run
from posttrain.pipeline.identity import Parent, base_hash, file_hash, model_source
from posttrain.pipeline.stage import StageOutcome

__all__ = ["Parent", "RunReport", "StageOutcome", "base_hash", "file_hash", "model_source", "run"]
