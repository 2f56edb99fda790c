"""Words as the networks meet them.

As a run reads them:

- `rules`: edit rules, which make lemmas of forms.
- `corpus`: words of the installed package, split by lemma, cached.
- `affixes`, `counts`, `evidence`: the rules likely for a form, and the training words that speak for each.
- `suffix_table`: the baseline without training.
- `vocabulary`: ids of characters, languages and rules, and words as tensors.
- `data`: all of that for the languages of a run.
"""
