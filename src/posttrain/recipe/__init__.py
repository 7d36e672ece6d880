"""Recipes: YAML in, a checked `Recipe` out. Torch-free."""

from posttrain.recipe.faults import Fault, RecipeFaults
from posttrain.recipe.load import load_recipe
from posttrain.recipe.model import Recipe, Stage
from posttrain.recipe.views import NOT_MEANING, ExplainLine, canonical_json, diff, explain, fingerprint, json_schema
from posttrain.recipe.yaml_lines import Document, read_yaml

__all__ = [
    "NOT_MEANING",
    "Document",
    "ExplainLine",
    "Fault",
    "Recipe",
    "RecipeFaults",
    "Stage",
    "canonical_json",
    "diff",
    "explain",
    "fingerprint",
    "json_schema",
    "load_recipe",
    "read_yaml",
]
