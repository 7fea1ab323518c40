"""Routes that add and remove adapters while the server runs, like vLLM's; all adapters have to be below one folder."""

from __future__ import annotations

from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response

from logo.api.errors import ApiError, bad_request, not_found, shown_line
from logo.api.requests import LoadAdapter, UnloadAdapter
from logo.api.validation import shown
from logo.errors import AdapterError, PoolError
from logo.serving.answers import Answers
from logo.serving.routes import ERRORS, TEXT

router = APIRouter(responses=ERRORS, tags=["Adapters"])


@router.post("/v1/load_lora_adapter", **TEXT)
async def load(body: LoadAdapter, request: Request) -> Response:
    """Adds an adapter to the pool; if a check fails, nothing changes."""
    answers: Answers = request.app.state.answers
    folder = inside(request.app.state.settings.adapter_changes, body.lora_path)
    answers.models().check_new(body.lora_name, replace=body.load_inplace)
    try:
        await answers.service.add(folder, body.lora_name, replace=body.load_inplace)
    except AdapterError as error:
        if error.name != body.lora_name:  # another adapter of the pool
            raise
        raise bad_request(shown_line(str(error)), "lora_path") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter", **TEXT)
async def unload(body: UnloadAdapter, request: Request) -> Response:
    """Removes an adapter from the pool; requests that have selected it are still answered with it."""
    answers: Answers = request.app.state.answers
    answers.models().check_there(body.lora_name)
    try:
        await answers.service.remove(body.lora_name)
    except PoolError as error:  # another request removed it meanwhile
        raise not_found(str(error), "lora_name") from error
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


def inside(root: Path, path: str) -> Path:
    """Resolves the folder that a client names, absolute or relative to `root`.

    Raises:
        ApiError: it is outside of `root`, or is no folder.
    """
    try:
        found = (root / path).resolve()
        is_folder = found.is_dir()
    except (OSError, RuntimeError, ValueError):  # too long a path, or links in a circle
        raise bad_request(
            f"lora_path: expected a path, found {shown(path)}, which leads nowhere", "lora_path"
        ) from None
    if not found.is_relative_to(root.resolve()):
        raise ApiError(
            403,
            f"lora_path: expected a folder inside the one this server was given, found {shown(path)}",
            "invalid_request_error",
            "lora_path",
            "forbidden",
        )
    if not is_folder:
        raise not_found(f"lora_path: expected a folder, found none at {shown(path)}", "lora_path")
    return found
