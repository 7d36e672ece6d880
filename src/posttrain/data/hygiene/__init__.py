"""Checks on the rows themselves: duplicates, evaluation items among them, labels that contradict each other."""

from posttrain.data.hygiene.contamination import overlaps

__all__ = ["overlaps"]
