"""Measurements beside the library: the multilingual training job, the peers, and the timing suites."""
