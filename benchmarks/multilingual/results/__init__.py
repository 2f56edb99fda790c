"""Reports of a run.

Lowest first:

- `evaluation`: lemmas and their accuracy, language by language.
- `facts`: the setting of a measurement.
- `tables`: files of figures and of examples, and the terminal's tables.
- `figures`: drawings, each with its numbers.
- `html`: tables in it.
- `newcomer_report`: a language that was added.
- `page`: all of it on one page.
"""
