"""`logo pool card`: a model card for a pool."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Any

from logo.adapters.files import NOTES
from logo.adapters.format import own_name
from logo.adapters.notes import checked, read_notes
from logo.adapters.upkeep.card import PICTURE, Card
from logo.cli.options import Json, usual
from logo.cli.output import note, out, print_json
from logo.cli.pool.common import Folder, OnBadAdapter, refusals, without_checkpoints
from logo.errors import DataError, StorageError, UsageError
from logo.folders import replace_file
from logo.hub.names import is_repo_id


def card(
    folder: Folder,
    base_model: str | None = usual(None, "The base model's name on the Hub.", "the one the adapters name"),
    repo: str | None = usual(
        None, "Where the pool will be found on the Hub.", "the folder itself", metavar="REPO[/FOLDER]"
    ),
    title: str | None = usual(None, "The card's heading.", "the folder's name"),
    licence: str | None = usual(None, "The licence, by the Hub's name, such as apache-2.0.", True, "--license"),
    study: Path | None = usual(
        None, "The JSON of `logo eval study`, or its picture; the picture is copied.", metavar="FILE"
    ),
    replace: bool = usual(False, "Overwrite an existing card."),
    on_bad_adapter: OnBadAdapter = "error",
    json: Json = False,
) -> None:
    """Write README.md into a pool: what is in it, how to use it with LoGo, PEFT and vLLM, and where it comes from.

    Example: `logo pool card adapters/ --repo org/my-loras --study study.json`
    """
    from logo.adapters.upkeep.publishing import CARD

    # To leave damaged adapters out, they have to be found first, as in `opened`.
    pool, checkpoints = without_checkpoints(folder, on_bad_adapter, verify=on_bad_adapter == "skip")
    if (folder / NOTES).is_symlink():  # its content is printed in the card
        checked(folder / NOTES, folder)
    numbers, picture = (None, None) if study is None else _study(study)
    files = [folder / CARD, *([folder / PICTURE] if picture is not None else [])]
    for file in files:
        if file.exists() and not replace:
            raise UsageError(f"{file} exists already; add --replace to overwrite it")
    made = Card(
        title=title or own_name(folder),
        adapters=list(pool),
        root=folder,
        notes=read_notes(folder),
        base_model=base_model,
        place=repo or str(folder),
        licence=licence,
        study=numbers,
        picture=picture is not None or (folder / PICTURE).is_file(),
    )
    if made.base is None or not is_repo_id(made.base):
        found = made.base or (f"several: {', '.join(made.bases)}" if made.bases else "none is named")
        note(f"no base model on the Hub is known ({found}): name one with --base-model")
    if picture is not None:
        replace_file(folder / PICTURE, picture)
    replace_file(folder / CARD, str(made).encode())
    if json:
        report = {"files": [str(file) for file in files], "base_model": made.base, "adapters": list(pool.names)}
        print_json({**report, "refused": refusals(pool.refused), "left_out": checkpoints})
    else:
        out.print(f"{', '.join(map(str, files))}: written", markup=False)


def _study(file: Path) -> tuple[dict[str, Any] | None, bytes | None]:
    """The numbers and the picture of a study: from its JSON file with the picture beside it, or a picture alone."""
    picture = file if file.suffix.lower() == ".png" else file.with_suffix(".png")
    numbers = None
    try:
        if file != picture:
            numbers = json_format.loads(file.read_text(encoding="utf-8"))
            if not isinstance(numbers, dict) or "signals" not in numbers:
                raise DataError(f"{file}: expected the JSON that `logo eval study` writes")
        drawn = picture.read_bytes() if picture.is_file() or file == picture else None
    except OSError as error:
        raise StorageError(f"{error.filename}: cannot be read ({error.strerror})") from error
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{file}: expected the JSON that `logo eval study` writes: {error}") from error
    if drawn is not None and not drawn.startswith(b"\x89PNG"):
        raise DataError(f"{picture}: expected a PNG")
    return numbers, drawn
