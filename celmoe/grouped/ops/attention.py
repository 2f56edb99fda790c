"""Attention on all rows at once, because each row attends to itself alone; projections are products by member.

Axes: R rows, L query positions, S key positions, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F

from celmoe.grouped.values import CannotGroupError, Ragged, Rows, Stack, rows, stack

from .product import by_weights
from .table import Run, align, arguments, operation


@operation("scaled_dot_product_attention", namespaces=(F,))
def attention(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> Ragged:
    """Attend with queries, keys and values that have the row axis in one place, in front of positions and width."""
    options = dict(kwargs)
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    extra = {key: options.pop(key) for key in ("scale", "enable_gqa") if key in options}
    query, key, value, mask, dropout, is_causal = arguments(names, args, options, (None, 0.0, False))
    ragged = [query, key, value]
    if any(not isinstance(each, Rows) or each.axis > each.dim() - 3 for each in ragged):
        raise CannotGroupError(f"called {name} on other tensors than rows of positions")
    if len({(each.axis, each.factor, each.dim()) for each in ragged}) > 1:
        raise CannotGroupError(f"put samples side by side with others ({name})")
    if mask is not None:
        # The mask is aligned with the query's axes, which keys and values share.
        (_, plain_mask), _ = align(run, name, [query, mask])
    else:
        plain_mask = None
    if dropout and run.is_rehearsal:
        dropout = 0.0
    out = F.scaled_dot_product_attention(query.plain, key.plain, value.plain, plain_mask, dropout, is_causal, **extra)
    return rows(out, query.axis, query.factor)


_NAMES = (
    *("query", "key", "value", "embed_dim_to_check", "num_heads", "in_proj_weight", "in_proj_bias", "bias_k", "bias_v"),
    *("add_zero_attn", "dropout_p", "out_proj_weight", "out_proj_bias", "training", "key_padding_mask", "need_weights"),
    *("attn_mask", "use_separate_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight", "static_k"),
    *("static_v", "average_attn_weights", "is_causal"),
)
_DEFAULTS = (True, None, True, None, False, None, None, None, None, None, True, False)


@operation("multi_head_attention_forward", namespaces=(F,))
def multi_head(run: Run, func: Any, name: str, args: Any, kwargs: Any) -> tuple[Ragged, Ragged | None]:
    """Run ``nn.MultiheadAttention``, positions first, rows second ("Attention Is All You Need", 3.2.2)."""
    given = dict(zip(_NAMES, arguments(_NAMES, args, kwargs, _DEFAULTS), strict=True))
    query, key, value = given["query"], given["key"], given["value"]
    if any(not isinstance(each, Rows) or each.axis != 1 or each.dim() != 3 for each in (query, key, value)):
        raise CannotGroupError("called attention on other tensors than rows of positions")
    exotic = ("bias_k", "bias_v", "static_k", "static_v")
    if any(given[each] is not None for each in exotic) or given["add_zero_attn"]:
        raise CannotGroupError("called attention with biases or zeros beside its keys")
    width, heads = given["embed_dim_to_check"], given["num_heads"]
    packed_bias = given["in_proj_bias"]
    if query is key and key is value and not given["use_separate_proj_weight"]:
        # One product for all three.
        packed = by_weights(run, _rows_first(query), given["in_proj_weight"], packed_bias)
        projected = list(packed.plain.split(width, -1))
    else:
        if given["use_separate_proj_weight"]:
            weights = [given[f"{each}_proj_weight"] for each in "qkv"]
        else:
            weights = _parts(given["in_proj_weight"], width)
        biases = [None] * 3 if packed_bias is None else _parts(packed_bias, width)
        projected = [
            by_weights(run, _rows_first(each), weight, bias).plain
            for each, weight, bias in zip((query, key, value), weights, biases, strict=True)
        ]
    factor = query.factor
    # [R, L, D] -> [R, heads, L, D / heads]
    asks, keys, values = (each.unflatten(-1, (heads, -1)).transpose(1, 2) for each in projected)
    mask = _mask(run, given, asks, heads, factor)
    dropout = given["dropout_p"]
    if dropout and (not given["training"] or run.is_rehearsal):
        dropout = 0.0
    needs_weights = given["need_weights"]
    if needs_weights:
        scores = (asks * (asks.shape[-1] ** -0.5)) @ keys.mT
        weights_RHLS = torch.softmax(scores if mask is None else scores + mask, -1)
        weights_RHLS = F.dropout(weights_RHLS, dropout) if dropout else weights_RHLS
        out = weights_RHLS @ values
    else:
        is_causal = given["is_causal"] and mask is None
        out = F.scaled_dot_product_attention(asks, keys, values, mask, dropout, is_causal)
    joined = rows(out.transpose(1, 2).flatten(2), 0, factor)
    result = by_weights(run, joined, given["out_proj_weight"], given["out_proj_bias"])
    back = rows(result.plain.transpose(0, 1), 1, factor)
    if not needs_weights:
        return back, None
    return back, rows(weights_RHLS.mean(1) if given["average_attn_weights"] else weights_RHLS, 0, factor)


def _parts(packed: Stack, width: int) -> list[Stack]:
    return [stack(part, packed.is_reduced) for part in packed.plain.split(width, 1)]


def _rows_first(value: Rows) -> Rows:
    return rows(value.plain.transpose(0, 1), 0, value.factor)


def _mask(run: Run, given: dict[str, Any], asks: torch.Tensor, heads: int, factor: int) -> torch.Tensor | None:
    """The sum of both masks, to add to the scores ``[R, heads, L, S]``; a boolean mask's true entries are -inf."""
    found: torch.Tensor | None = None
    padding, mask = given["key_padding_mask"], given["attn_mask"]
    if given["is_causal"] and mask is not None and padding is None and not given["need_weights"]:
        return None
    if padding is not None:
        if not isinstance(padding, Rows) or padding.axis != 0 or padding.factor != factor:
            raise CannotGroupError("called attention with a padding mask that is not for rows")
        found = _added(padding.plain, asks.dtype)[:, None, None, :]
    if mask is not None:
        if isinstance(mask, Stack):
            raise CannotGroupError("called attention with a parameter for a mask")
        added = _added(mask.plain, asks.dtype)
        if isinstance(mask, Rows):
            if mask.axis != 0 or mask.dim() != 3 or mask.factor != heads * factor:
                raise CannotGroupError("called attention with a mask that is not for rows")
            added = added.unflatten(0, (-1, heads))
        elif mask.dim() != 2:
            raise CannotGroupError("called attention with a mask of fixed length along the batch axis")
        found = added if found is None else found + added
    return found


def _added(mask: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, float("-inf"))
