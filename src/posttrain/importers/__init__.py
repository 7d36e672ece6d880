"""Configurations of other trainers as recipes, with an account of every key. Torch-free."""

from posttrain.importers.ledger import Added, Carried, Left
from posttrain.importers.run import TOOLS, Imported, import_file

__all__ = ["TOOLS", "Added", "Carried", "Imported", "Left", "import_file"]
