"""The contenders beside our engines: a floor, hand-written models, and other packages."""
