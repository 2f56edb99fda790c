"""The main job: lemmatization of real words in 54 languages by universal, family and language experts.

``python -m benchmarks.multilingual --help`` lists the options; ``notes/data.md`` describes the words. As a run goes:

- `cli`, `options`, `arguments`, `console`: the command line, and the terminal.
- `job`: from the first word to the report; `further` lets a finished run go on.
- `corpus`, `rules`, `data`: words of the installed package, the rules that make their lemmas, cached.
- `affixes`, `counts`, `evidence`, `words`: what is known of a form before training, and words as tensors.
- `batches`, `network`, `losses`: a step's words, the model, its losses.
- `schedule`, `training`, `checkpoint`: the steps, the clock, and what a run needs to go on.
- `ranks`, `layouts`: several processes.
- `evaluation`, `suffix_table`: accuracy by language, and the baseline without training.
- `report`, `figures`, `page`, `facts`: what a run leaves.
- `compare`, `hierarchy_clock`: the same steps by other ways, and the hierarchy's share of one.
- `adding`, `growth`, `newcomer`, `newcomer_report`, `newcomers`: a language that comes later.
- `ablation`, `lemmatize`, `serving`: levels taken out; the finished network in use.
"""
