"""The contenders beside our engines: a floor, hand-written models, and other packages.

A new contender is a file here, which documents its computation. `contender` holds the terms, and
`models.MODELS` names those that run whole hierarchies.
"""
