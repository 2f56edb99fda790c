"""The contenders that our engines are timed beside: a floor, hand-written models, and other packages.

A new contender is a file here, which says what it computes. `contender` holds the terms, and
`benchmarks.grouped.contest` makes the contenders of a contest.
"""
