"""Measurements that have a table of their own: ``python -m benchmarks NAME``.

- `whole_steps`: whole steps of all ways to train, within so many minutes.
- `scaling`: the bytes between ranks, on paper and counted.
- `mixed_routes`: routes of several experts, or none.
- `lora_languages`: LoRA of many languages, beside PEFT.
- `trainer_compile`: the Trainer of transformers, compiled.
"""
