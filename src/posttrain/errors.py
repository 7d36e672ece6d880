"""Every fault a user can cause or meet, with the exit code the command line returns for it.

A message says what was wrong, where (file:line or row id), the value, the rule and the remedy. `assert` is
only for our own bugs; anything a user can trigger is a `PosttrainError`.
"""

from __future__ import annotations

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USAGE = 2
EXIT_DATA = 3
EXIT_GATE = 4
EXIT_DOES_NOT_FIT = 5
EXIT_INTERRUPTED = 130


class PosttrainError(Exception):
    """A fault with a remedy. `where` is a file:line, a row id or a path; it is printed first."""

    exit_code = EXIT_INTERNAL

    def __init__(self, what: str, *, where: str = "", remedy: str = "") -> None:
        self.what, self.where, self.remedy = what, where, remedy
        super().__init__(f"{where + ': ' if where else ''}{what}{' ' + remedy if remedy else ''}")

    def locate(self, where: str) -> None:
        """Say where, unless that is said: who raised it may not know the file or the stage it works for."""
        if not self.where:
            self.where = where
            self.args = (f"{where}: {self}",)


class RecipeError(PosttrainError):
    """The recipe or the command line is wrong; nothing was loaded."""

    exit_code = EXIT_USAGE


class DataError(PosttrainError):
    """A data file, row, template or suite is wrong."""

    exit_code = EXIT_DATA


class ModelError(PosttrainError):
    """A model or adapter cannot be found or used as asked."""

    exit_code = EXIT_USAGE


class GateRefused(PosttrainError):
    """The gate said no and the recipe says stop."""

    exit_code = EXIT_GATE


class DoesNotFit(PosttrainError):
    """The machine lacks what the recipe asks for: memory, disk, a device, a kernel feature."""

    exit_code = EXIT_DOES_NOT_FIT


class ArtefactError(PosttrainError):
    """A checkpoint, artefact or registry entry is missing, corrupt or cannot be written."""

    exit_code = EXIT_DOES_NOT_FIT


class TrainingStopped(PosttrainError):
    """A health rule stopped training: NaN, dead reward signal, too many failed checkers."""

    exit_code = EXIT_DATA


class Interrupted(PosttrainError):
    """The user interrupted; the last checkpoint is on disk."""

    exit_code = EXIT_INTERRUPTED
