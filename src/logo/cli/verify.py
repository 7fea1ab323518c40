"""`logo verify`: whether a running server answers with the base model and the adapters that it should."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from rich.table import Table
from rich.text import Text

from logo.cli.opening import open_base
from logo.cli.options import ModelOptions, positive
from logo.cli.output import BASE_ALONE, natural_width, note, one_line, out, plain_table, print_json, screen
from logo.cli.prompts import or_demo
from logo.cli.server_check import TOKENS, Check, Endpoint
from logo.errors import UsageError
from logo.prompts import Truncation, no_warnings_of_cuts
from logo.selection.texts import REQUESTS

if TYPE_CHECKING:
    from logo.core import Prompt
    from logo.engine import LoGo

AT_ONCE = 32  # requests, of different adapters
GOOD = ("ok", "no effect seen")


def verify(
    url: str,
    /,
    *,
    limit: Annotated[int, Parameter(validator=positive)] = 4,
    api_key: Annotated[str | None, Parameter(env_var="LOGO_API_KEY")] = None,
    json: bool = False,
    pool: ModelOptions = ModelOptions(),
) -> int:
    """Check that a running server answers with this base model and these adapters.

    Each adapter has to change answers, to answer where it is named, also among requests for others, and to give the
    library's answers; selections have to be the library's, unless the server has calibration prompts of its own. The
    exit code is 1 if something is wrong.

    Example: logo verify http://localhost:8000 --base-model demo

    Args:
        url: The server's address, such as http://localhost:8000.
        limit: Prompts of each adapter: its examples, or else requests of many kinds.
        api_key: Key of the server.
        json: Print JSON instead.
    """
    if not url.startswith(("http://", "https://")):
        raise UsageError(f"URL {url}: expected an address that begins with http:// or https://")
    server = Endpoint(url.rstrip("/").removesuffix("/v1"), api_key)
    served = server.pool()
    truncation = Truncation(served.max_model_len - TOKENS)
    opened = open_base(pool, or_demo(pool)).engine(served.settings, truncation=truncation)
    with closing(opened) as logo, ThreadPoolExecutor(AT_ONCE) as workers:
        wrong = [f"not on the server: {name}" for name in logo.names if name not in served.adapters]
        wrong += [f"not in the pool: {name}" for name in sorted(served.adapters.difference(logo.names))]
        requests = REQUESTS[:: max(1, len(REQUESTS) // limit)][:limit]
        prompts_of = _prompts(logo, [name for name in logo.names if name in served.adapters], limit, requests)
        prompts = list(dict.fromkeys(itertools.chain.from_iterable(prompts_of.values())))
        if not prompts:
            prompts = logo.prompts.read(requests, TOKENS)
        check = Check(server, logo, served.base_model, workers, server.has_logprobs(served.base_model))
        note(f"asking {server.url}: {len(prompts_of)} adapters, {AT_ONCE} requests at a time")
        if served.has_own_texts:
            note("selections are not compared: the server has calibration prompts of its own")
        rows = check.rows(prompts_of, prompts)
        compared = [] if served.has_own_texts else prompts
        differing = list(check.differing_selections(compared))
    wrong += differing
    ok = not wrong and all(row["verdict"] in GOOD for row in rows)
    measure = "nats per token, " + ("by log-probabilities" if check.logprobs else "by the tokens alone")
    if json:
        print_json({"ok": ok, "measure": measure, "rows": rows, "selections": len(compared), "wrong": wrong})
    else:
        table = _table(rows)
        screen(natural_width(table)).print(table)
        summary = f"numbers: {measure}; {len(compared)} selections, {len(differing)} of them not the library's"
        out.print(Text("\n".join([summary, *wrong])))
    return 0 if ok else 1


def _prompts(logo: LoGo, names: Sequence[str], limit: int, requests: Sequence[str]) -> dict[str, list[Prompt]]:
    """The prompts with which each adapter is checked: its example prompts, else the requests."""
    texts = {name: logo.fitted[name].examples[:limit] or requests for name in names}
    with no_warnings_of_cuts():  # of some, for the server and for the library alike
        return {name: logo.prompts.read(adapter_texts, TOKENS) for name, adapter_texts in texts.items()}


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    table = plain_table("adapter", ">effect", ">error", ">under load", ">allowed", "answered by", "")
    for row in rows:
        numbers = [f"{row[name]:.4f}" for name in ("effect", "error", "under_load", "allowed")]
        answered_by = ", ".join(row["answered_by"]) or BASE_ALONE
        cells = [row["adapter"] or BASE_ALONE, *numbers, answered_by, row["verdict"]]
        table.add_row(*(Text(one_line(cell)) for cell in cells))
    return table
