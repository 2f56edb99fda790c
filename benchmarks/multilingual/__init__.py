"""The main job: lemmatization of real words in 54 languages by universal, family and language experts.

``python -m benchmarks.multilingual --help`` lists the options; ``notes/data.md`` describes the words. Lowest last:

- `cli`, `options`, `console`: the command line, and the terminal.
- `job`: from the first word to the report; `further` lets a finished run go on, `adding` gives it a language.
- `lemmatize`: the finished network in use.
- `studies`: the job's parts measured: ways to run it, levels taken out, languages that come later.
- `results`: what a run leaves: accuracy, tables, figures, a page.
- `learning`: batches, network, losses, steps, checkpoints, several ranks.
- `words`: dictionaries, edit rules, and what is known of a form before training.
"""
