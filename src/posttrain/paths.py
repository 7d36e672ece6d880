"""Where things lie: files named by a recipe, files carried by the package (`builtin:…`) and the user's home folder."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from posttrain.errors import RecipeError

ASSETS = Path(__file__).parent / "assets"
BUILTIN = "builtin:"
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
FILE_NAME = re.compile(r".*\.(jsonl?|gz|csv|tsv|txt|parquet|arrow|feather|zip|zst|bz2|xz|ya?ml)", re.IGNORECASE)


def resolve(path: str, base: Path) -> Path:
    """The existing file or folder that `path` names: packaged (`builtin:…`), absolute, or relative to `base`."""
    if path.startswith(BUILTIN):
        return _resolve_builtin(path)
    found = base / expanded(path)
    if not path or not found.exists():
        raise RecipeError(f"{path or 'an empty path'} does not exist in {base}.", remedy=_nearest(found))
    return found


def may_be_on_hub(path: str) -> bool:
    """Whether a data set's path reads like owner/name. A file or folder of that name comes first."""
    return HUB_NAME.fullmatch(path) is not None and FILE_NAME.fullmatch(path) is None


def builtins() -> list[str]:
    """Every name `builtin:` understands: model folders, suites, data files, recipes."""
    if not ASSETS.is_dir():
        return []
    names = []
    for top in sorted(ASSETS.iterdir()):
        holds_a_model = (top / "config.json").exists()
        if top.is_dir() and not holds_a_model:
            names += [file.relative_to(ASSETS).as_posix() for file in sorted(top.rglob("*")) if file.is_file()]
        elif holds_a_model:
            names.append(top.name)
    return [BUILTIN + name for name in names]


def home_dir(option: str | None = None) -> Path:
    """Where runs, artefacts and the registry live: the option, else POSTTRAIN_HOME, else ./posttrain-home."""
    chosen = option or os.environ.get("POSTTRAIN_HOME") or "posttrain-home"
    return expanded(chosen).absolute()


def expanded(path: str) -> Path:
    """`~` and `~name` as the folders they stand for."""
    try:
        return Path(path).expanduser()
    except RuntimeError as error:  # nobody of that name, or no home at all
        raise RecipeError(f"{path}: {error}", remedy="Write the folder out.") from None


def _resolve_builtin(path: str) -> Path:
    found = (ASSETS / path.removeprefix(BUILTIN)).resolve()
    inside = found != ASSETS.resolve() and found.is_relative_to(ASSETS.resolve())
    if inside and found.exists():
        return found
    known = builtins()
    close = difflib.get_close_matches(path, known, n=1)
    meant = f"Did you mean {close[0]}? " if close else ""
    raise RecipeError(
        f"{path} is not part of the package.", remedy=f"{meant}There are: {', '.join(known) or 'none installed'}."
    )


def _nearest(missing: Path) -> str:
    """What stands where the missing file was looked for: close names first, else everything of that kind."""
    folder = missing.parent
    if not folder.is_dir():
        return f"The folder {folder} does not exist either."
    names = sorted(entry.name for entry in folder.iterdir())
    close = difflib.get_close_matches(missing.name, names, n=3)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    alike = [name for name in names if Path(name).suffix == missing.suffix][:8]
    return f"{folder} holds {', '.join(alike)}." if alike else f"{folder} holds no {missing.suffix or 'such'} file."
