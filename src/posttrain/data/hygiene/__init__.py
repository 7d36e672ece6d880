"""Checks on the rows themselves: duplicates, evaluation items among them, labels that contradict each other."""

from posttrain.data.hygiene.contamination import overlaps
from posttrain.data.hygiene.labels import audit_pairs

__all__ = ["audit_pairs", "overlaps"]
