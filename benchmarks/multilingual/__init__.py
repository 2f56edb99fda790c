"""The main job: lemmatization of real words in 54 languages by universal, family and language experts.

``python -m benchmarks.multilingual --help`` lists the options; ``notes/data.md`` describes the words.
"""
