"""The main job: lemmatization of real words in 54 languages by universal, family and language experts.

``python -m benchmarks.multilingual --help`` says what can be chosen; ``notes/data.md`` says what the words are.
"""
