"""The engines, and the decision between them.

- `looped`: experts one after another
- `grouped`: experts of a class as one
- `cost`: what either costs; `choice`: which it is, and why
- `arrangement`: in which order rows stand for it
- `registry`: the engines by name
"""
