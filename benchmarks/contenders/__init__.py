"""Who is timed. A new contender is a file here, which documents its computation.

Its name goes into `contender`, its maker into `models`, or into the file of its stage; ``report/roster.py`` has its
colour and its meaning.

- `contender`: the names, and the terms of a contest.
- `models`: those that run whole hierarchies, by name.
- `planning`, `moving`, `products`: those of one stage: a plan, the rows' way, products by expert.
- `dense`, `bare`: floors, which do less.
- `stack` with `layouts` and `planned`: code that a user could write by hand.
- `vmapped`, `foreign`: PyTorch's way, and other packages.
"""
