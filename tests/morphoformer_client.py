"""morphoformer at work, as a program of its own: it runs on the ``celmoe`` that its path holds.

    python morphoformer_client.py VERSION FOLDER OTHERS_FOLDER

The program's only line about celmoe asks which one was imported. It runs at the same time as its like on the other
library. For each case it writes three results with ``torch.save``: one pass through the model, ten AdamW steps of the
client's own trainer on a few words, and ten more steps of the trainer on the other's checkpoint.
`tests.test_morphoformer` runs and compares.
"""

import random
import shutil
import sys
import time
from pathlib import Path

import torch

LANGUAGES = {"ru": "slavic", "pl": "slavic", "fr": "romance", "it": "romance", "de": "germanic"}
LETTERS = {"ru": "абвгдежз", "pl": "ąęłabcdz", "fr": "éàcabderu", "it": "aeioubcd", "de": "äöüßabst"}
WORDS, BATCH, EPOCHS = 45, 9, 2  # five batches twice: ten steps

COMMON = """
[data]
train_path = "{folder}/train.tsv"
dev_path = "{folder}/train.tsv"  # so that the loss falls: the trainer writes a checkpoint only then
max_len = 12
max_features = 4

[optimizer]
lr = 0.003

[train]
stage = "{stage}"
epochs = {epochs}
batch_size = {batch}
warmup_steps = 2
total_steps = 60
device = "cpu"
mixed_precision = false
log_interval = 5
output_dir = "{output}"

[languages]
{languages}

[model]
d_model = 16
dim_ff = 24
num_heads = 2
num_kv_heads = 1
dropout = 0.2
max_positions = 32
feature_dim = 6
adapter_bottleneck = 4
universal_layers = 2
family_layers = 1
language_layers = 1
"""

# Position-aware fusion, gradient scales beside the flag, typed experts, an expert of another depth.
TYPED = """
fusion_type = "position_aware"
fusion_max_positions = 8

[[model.hierarchy.levels]]
name = "universal"
routing = "constant"
fallback_expert = "core"
experts = { core = { num_layers = 2 } }

[[model.hierarchy.levels]]
name = "family"
routing = "family"
experts_from = "families"
default_num_layers = 1
default_stop_gradient_from_parent = true
default_gradient_scale = 0.3
experts = { germanic = { expert_type = "ablaut" }, romance = { gradient_scale = 0.0 } }

[[model.hierarchy.levels]]
name = "language"
routing = "language"
experts_from = "languages"
default_num_layers = 1
default_stop_gradient_from_parent = false
default_gradient_scale = 0.5
default_expert_type = "affix"
experts = { de = { num_layers = 2 }, pl = { stop_gradient_from_parent = true, gradient_scale = 1.0 } }
"""

CASES = {
    "4.7.7": {"joint": ("joint", ""), "language": ("language", "")},
    "6.0.0": {"joint": ("joint", ""), "typed": ("joint", TYPED)},
}


def write_words(folder):
    generator = random.Random(7)
    lines = []
    for index in range(WORDS):
        language = list(LANGUAGES)[index % len(LANGUAGES)]
        word = "".join(generator.choice(LETTERS[language]) for _ in range(generator.randint(3, 8)))
        tags = ";".join(generator.sample(["V", "N", "PST", "PRS", "SG", "PL"], 2))
        lines.append(f"{word}\t{tags}\t{word}{LETTERS[language][:2]}\t{language}")
    (folder / "train.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def configured(folder, case, stage, model_lines):
    from morphoformer.config.loader import load_config

    languages = "\n".join(f'{name} = {{ family = "{family}" }}' for name, family in LANGUAGES.items())
    places = {"folder": folder.as_posix(), "output": (folder / case).as_posix(), "languages": languages}
    text = COMMON.format(stage=stage, epochs=EPOCHS, batch=BATCH, **places) + model_lines
    (folder / f"{case}.toml").write_text(text, encoding="utf-8")
    return load_config(folder / f"{case}.toml")


def criterion_of(version, model, config):
    from chartoken import PAD

    if version == "4.7.7":
        from trainkit import MultiLevelSequenceLoss

        return MultiLevelSequenceLoss(pad_id=PAD)
    from morphoformer.config.schema import LossBridgeDef, LossCompositionConfig
    from morphoformer.training.hierarchy_loss import FlexibleHierarchyLoss

    composition = LossCompositionConfig(
        level_weights={"universal": 0.25, "family": 0.35, "language": 0.5},
        bridges=[LossBridgeDef("near", "family", "language", 0.5, "l2_hidden")],
    )
    return FlexibleHierarchyLoss(pad_id=PAD, composition=composition, level_order=model.level_names)


def flat_tensors(output):
    found = {}
    for name, value in output.items():
        if isinstance(value, torch.Tensor):
            found[name] = value.detach().clone()
        elif isinstance(value, dict):
            found.update({f"{name}.{inner}": each for inner, each in flat_tensors(value).items()})
    return found


def one_pass(version, config):
    """A forward and backward of a fresh model; two languages are absent."""
    from morphoformer.model.model import Morphoformer

    torch.manual_seed(11)
    language_to_id = {name: index for index, name in enumerate(sorted(config.languages))}
    model = Morphoformer(config, vocab_size=30, feature_vocab_size=9, language_to_id=language_to_id)
    initial = {name: value.clone() for name, value in model.state_dict().items()}
    source, target = torch.randint(1, 30, (10, 12)), torch.randint(1, 30, (10, 12))
    present = torch.tensor(
        [language_to_id[name] for name in ("ru", "de", "fr", "ru", "de", "de", "fr", "ru", "fr", "ru")]
    )
    output = model(source, present, torch.randint(0, 9, (10, 4)), (torch.rand(10, 4) > 0.3).float())
    losses = criterion_of(version, model, config)(output, target)
    losses.total.backward()
    return {
        "initial": initial,
        "output": flat_tensors(output),
        "loss": losses.total.detach(),
        "grads": {
            name: None if parameter.grad is None else parameter.grad.clone()
            for name, parameter in model.named_parameters()
        },
        "decoded": model.greedy_decode(source, present, torch.zeros(10, 4, dtype=torch.long), torch.ones(10, 4)),
    }


def trained(config, seed, resume=None):
    from morphoformer.training.trainer import MorphoformerTrainer

    torch.manual_seed(seed)
    best = MorphoformerTrainer(config).train(resume_checkpoint=resume)
    return torch.load(best, weights_only=True)


def wait_for(path, seconds=90):
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"{path} was not written within {seconds} s")
        time.sleep(0.1)


def main(version, folder, others_folder):
    folder, others_folder = Path(folder), Path(others_folder)
    folder.mkdir(parents=True)
    write_words(folder)
    torch.set_num_threads(1)
    results = {case: {} for case in CASES[version]}
    configs = {case: configured(folder, case, *details) for case, details in CASES[version].items()}
    for case, config in configs.items():
        results[case]["pass"] = one_pass(version, config)
        results[case]["trained"] = trained(config, seed=13)
        shutil.copy(folder / case / "best.pt", folder / f"{case}.pt")
    (folder / "checkpoints are written").touch()
    wait_for(others_folder / "checkpoints are written")
    for case, config in configs.items():
        config.train.epochs = 2 * EPOCHS
        results[case]["resumed"] = trained(config, seed=17, resume=others_folder / f"{case}.pt")
    import celmoe

    results["celmoe"] = celmoe.__file__
    torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
