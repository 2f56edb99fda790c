"""Experts in other people's models: a hierarchy behind each of a host's modules.

In: any ``nn.Module``, a config, a factory of experts. Out: the same module, whose forward pass runs the experts of the
plan at hand. In reading order: `where` finds the places; `runs` holds each thread's plan, and gives a recomputation the
plan of its own forward pass; `place` runs a hierarchy behind a module; `hosts` finds such modules; `root` takes
``plan=`` out of the host's keywords; `attaching` puts hierarchies in and takes them away; `routed` lets them follow a
plan; `adapters` changes all of them alike; `files` saves and loads them; `merging` folds linear experts into the host.
"""
