"""What our engines are timed against: a floor, hand-written models, and other packages."""
