"""Callbacks for other people's trainers; nothing here is imported by ``import celmoe``.

They take a `HierarchicalCELMoE`, any module that holds some, or a host with attached experts. `experts` finds the
hierarchies in a model, and measures and freezes their experts; `patience` decides whose training has ended; `lightning`
and `transformers` are the callbacks, which have the same names in both, and need the package of that name.
"""
