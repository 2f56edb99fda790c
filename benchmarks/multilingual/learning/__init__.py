"""Networks in training.

Lowest first:

- `ranks`: what processes that share a training exchange.
- `schedule`: planned steps, learning rate, clock.
- `hierarchy`, `batches`, `network`, `losses`: levels of experts, a step's words, the model, its losses.
- `training`, `layouts`: the steps, in one process or over several.
- `checkpoint`, `serving`: all that a run needs to go on, and one language of it alone.
- `growth`, `newcomer`: a language that comes to a trained network.
"""
