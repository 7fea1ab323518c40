"""The gated LoRA on any linear module: `y = W x + B (g ⊙ (A x))`, with another gate `g` in every row or token.

A forward hook adds the low-rank term to the output of the base module while a mixture is active. Without one there is
no hook, so outputs equal the base model's bit by bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from logo.mixing.cache import Stack

# The arguments by which models take the cache of earlier columns.
_CACHES = ("past_key_values", "cache", "cache_params", "state")


# Integers as wide as numbers of so many bytes, for masks of all their bits.
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
# Copying the factors that a row uses takes about as long as multiplying so many of its tokens by them.
_COPIED = 128


@dataclass(frozen=True)
class Gate:
    """What the responses to a stack are multiplied by, (..., R) or (rows, 1, r).

    A gate of 0 gives 0 even if the response is not finite, so an adapter that overflows affects only the rows that use
    it.
    """

    value: Tensor
    open: Tensor | None  # all bits are 1 where an adapter acts, and 0 elsewhere; None: it acts everywhere
    columns: Tensor | None = None  # (rows, r), of the stack, that each row multiplies; None: every row multiplies all


class Gates:
    """The weight of each of n adapters, per row of the batch or per token.

    Args:
        weights: (rows, n) on the host, or one row for any batch. A batch of a multiple of the rows (beam search,
            several return sequences, flattened tokens) repeats every row that many times.
        per_token: the rows of `weights` are tokens, as a packed or (rows, length) batch is laid out in memory.
    """

    def __init__(self, weights: Tensor, *, per_token: bool = False) -> None:
        self._weights = weights
        self._per_token = per_token
        self._gates: dict[tuple[Any, ...], tuple[Tensor, Gate]] = {}  # and their owners, which stay alive

    def at(self, stack: Stack, lead: torch.Size, *, own: bool = True) -> Gate:
        """The gate of one module, whose input is (*lead, d_in).

        Args:
            own: whether each row may multiply only the columns that it uses, where that is faster.

        Raises:
            ValueError: the gates are those of another number of rows or tokens.
        """
        # Modules that the same adapters touch share one owner, and so one gate.
        key = (id(stack.owner), lead, own, stack.A.device, stack.A.dtype)
        if key in self._gates:
            return self._gates[key][1]
        rows = len(self._weights)
        count = lead.numel() if self._per_token else lead[0]
        if rows != 1 and (count != rows if self._per_token else count % rows):
            unit = "tokens" if self._per_token else "rows"
            raise ValueError(f"gates for {rows} {unit} cannot serve a batch of {count} {unit}")
        value = self._weights.to(stack.A.dtype).index_select(1, stack.owner)  # (rows, R)
        if rows not in (1, count):
            value = value.repeat_interleave(count // rows, dim=0)
        columns = None
        if own and rows != 1 and not self._per_token and len(lead) == 2:
            columns = _used(value, lead[1])
        if columns is not None:
            value = value.gather(1, columns)
        if rows != 1:  # a single row serves any shape
            value = value.view(*(lead if self._per_token else (count, *[1] * (len(lead) - 1))), -1)
        acts = value != 0
        open_bits = None if bool(acts.all()) else -acts.to(_BITS[value.element_size()])
        # On CUDA the copies have read the host memory when the calls return, and do not wait for running kernels.
        place: dict[str, Any] = {"device": stack.A.device, "non_blocking": stack.A.device.type == "cuda"}
        gate = Gate(
            value.to(**place),
            None if open_bits is None else open_bits.to(**place),
            None if columns is None else columns.to(**place),
        )
        self._gates[key] = stack.owner, gate
        return gate


def _used(value: Tensor, tokens: int) -> Tensor | None:
    """The columns (rows, r) whose gate (rows, R) is not 0, as many as the row with most has, and others in rows with
    fewer; None if multiplying every row of so many tokens by all columns takes no longer, or if the copies would take
    more than twice the memory of what they are multiplied by."""
    acts = value != 0
    most_used = max(1, int(acts.sum(dim=1).max()))
    all_cost = value.shape[1] * tokens
    own_cost = most_used * (tokens + _COPIED)
    if all_cost <= own_cost or most_used > 2 * tokens:
        return None
    return acts.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :most_used]


class OpeningGates:
    """Gates that open at a position: `g(row, column) = w if column >= begin(row, adapter) else 0`.

    A column is a position in the batch, counted with padding and cached tokens; `follow`, a hook on the model, is told
    which columns each pass reads. Weights and begins are (rows, n). Once all gates are open, they are ordinary `Gates`,
    one per row.
    """

    def __init__(self, weights: Tensor, begins: Tensor) -> None:
        self._weights = weights
        self._begins = begins
        self._open = Gates(weights)
        self._batch = len(weights)  # rows of the current forward pass
        self._count = 0  # columns that were read up to now
        self._columns: Tensor | None = None  # of the current forward pass; None: all gates are open
        self._at_head: Tensor | None = None  # those of them that the output head gets, if they are not the last ones
        self._gates: dict[int, Gates] = {}  # of the current pass, by the number of tokens

    def follow(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Takes note of the columns that a forward pass of the model is about to read."""
        candidates = (*args[:1], kwargs.get("input_ids"), kwargs.get("inputs_embeds"))
        inputs = next(tensor for tensor in candidates if tensor is not None)
        cache = next((kwargs[name] for name in _CACHES if kwargs.get(name) is not None), None)
        seen = 0
        if cache is not None:
            with suppress(AttributeError, ValueError):  # linear attention keeps no columns
                seen = int(cache.get_seq_length())
            if not seen and inputs.shape[1] <= self._count:  # else it reads all of it again (OpenAI GPT)
                seen = self._count  # MiniMax's cache says 0 if the first layer is of linear attention
        self._batch = inputs.shape[0]
        self._count = seen + inputs.shape[1]
        self._columns = None if seen >= int(self._begins.max()) else torch.arange(seen, self._count)
        at_head = kwargs.get("logits_to_keep")
        self._at_head = seen + at_head.cpu() if isinstance(at_head, Tensor) else None
        self._gates.clear()

    def at(self, stack: Stack, lead: torch.Size, *, own: bool = True) -> Gate:
        """As `Gates.at`, for all tokens of the pass or for those columns of each row that an output head gets."""
        if self._columns is None:
            return self._open.at(stack, lead, own=own)
        rows = len(self._weights)
        width = len(self._columns)
        tokens = lead.numel()
        count = tokens // self._batch  # of each row
        if self._batch % rows or tokens % self._batch or count > width:
            raise ValueError(f"gates for {rows} rows of {width} tokens cannot serve {tokens} tokens")
        if tokens not in self._gates:
            columns = self._columns[width - count :]
            if self._at_head is not None and count < width:
                columns = self._at_head
            gates = torch.where(columns[:, None] >= self._begins[:, None], self._weights[:, None], 0.0)
            gates = gates.repeat_interleave(self._batch // rows, dim=0)  # (batch, columns, n)
            self._gates[tokens] = Gates(gates.flatten(0, 1), per_token=True)
        return self._gates[tokens].at(stack, lead)


@contextmanager
def opening(model: nn.Module, weights: Tensor, begins: Tensor) -> Iterator[Gates | OpeningGates]:
    """`OpeningGates` that follow the forward passes of the model inside the block; `Gates` if all are always open."""
    if not begins.any():
        yield Gates(weights)
        return
    gates = OpeningGates(weights, begins)
    hook = model.register_forward_pre_hook(gates.follow, with_kwargs=True)
    try:
        yield gates
    finally:
        hook.remove()


def added(
    stack: Stack, gates: Gates | OpeningGates, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor
) -> Tensor:
    """The output of a module and `B (g ⊙ (A x))`, in the stack's dtype, of its input (..., d_in), or of tokens (...) if
    it is an embedding; with the first two arguments bound, a forward hook."""
    x = inputs[0]
    A = stack.A
    B = stack.B
    if x.is_floating_point():
        gate = gates.at(stack, x.shape[:-1])
        if gate.columns is not None:
            A = A[gate.columns]  # (rows, r, d_in)
            B = B[gate.columns]  # (rows, r, d_out)
        response = x.to(A.dtype) @ A.mT  # (..., R) or (rows, tokens, r)
    else:
        gate = gates.at(stack, x.shape, own=False)
        response = nn.functional.embedding(x, A.T)
    gated = response * gate.value
    if gate.open is not None and gated.requires_grad:
        gated = gated.masked_fill(gate.open == 0, 0)
    elif gate.open is not None:
        gated.view(gate.open.dtype).bitwise_and_(gate.open)  # on CPUs a tenth of the time of `masked_fill_`
    scale = getattr(module, "embed_scale", None)  # Gemma's embeddings multiply their output; PEFT does the same
    # The output may be changed in place: it is new, and without gradients nobody else reads it.
    if scale is not None or output.requires_grad or output.dtype != gated.dtype or not output.is_contiguous():
        term = gated @ B if scale is None else (gated @ B) * scale
        term = term.to(output.dtype)
        return output + term if output.requires_grad else output.add_(term)
    if gate.columns is not None:
        return output.baddbmm_(gated, B)
    output.view(-1, output.shape[-1]).addmm_(gated.reshape(-1, gated.shape[-1]), B)
    return output


@contextmanager
def hooked(modules: Mapping[str, nn.Module], hooks: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on modules, by path, inside the block."""
    with ExitStack() as stack:
        for path, hook in hooks.items():
            stack.callback(modules[path].register_forward_hook(hook).remove)
        yield
