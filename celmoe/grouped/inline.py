"""Graphs within a graph, written out in place of the call that holds them."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

__all__ = ["inline_checkpoints"]


def inline_checkpoints(module: fx.GraphModule) -> None:
    """Have a traced graph make the calls inside `torch.utils.checkpoint.checkpoint` itself.

    The results are the same. The graph keeps values that checkpoints would compute again in the backward pass.
    """
    graph, is_changed = module.graph, False
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target is not torch.ops.higher_order.tag_activation_checkpoint:
            continue
        body, *given = node.args
        inner = getattr(module, str(body.target))
        inline_checkpoints(inner)
        taken = [each for each in inner.graph.nodes if each.op == "placeholder"]
        names = dict(zip(taken, given, strict=True))
        with graph.inserting_before(node):
            outputs: Any = graph.graph_copy(inner.graph, names)
        for user in list(node.users):
            # The call gives a tuple, and each user of the call picks one item.
            user.replace_all_uses_with(outputs[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)
        is_changed = True
    if is_changed:
        module.recompile()
