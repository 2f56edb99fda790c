"""Experts come and go: a model's experts change while it lives. See notes/experts.md.

- `structure`: a config's structure with an expert more, less, or of another name.
- `alone`: which models can't change, for they are spread over ranks.
- `newcomer`: makes a new expert, and warm-starts it.
- `shares`: a group's shares of parameters, their order and names.
- `places`: the places of parameters in optimizers' groups, and each expert's state there.
- `grouping`: the group of a new expert's parameters.
- `changes`: adding, removing and renaming.
- `order`: the order of experts, in the metadata of a ``state_dict``.
- `subsets`: a smaller model of some experts.
"""
