"""Checkpoints that any number of ranks writes, and any other number reads, with any sharding.

Tensors stand under their names in the model in one process: every rank saves and reads the tensors that it holds. An
optimizer's state goes by the same names. A parameter without state (its expert was never routed to) has none after
loading.

==================  ====================================================================================
file                purpose
==================  ====================================================================================
`agreement`         ranks act together: all succeed, or all raise the same `CheckpointError`
`manifest`          a checkpoint directory's content, as JSON, with checks for damage
`experts`           the order of experts: ids are positions in it
`staging`           this rank's part of saved tensors, in the host's memory
`pieces`            tensors as bytes in files, each with its checksum
`optimizer_state`   an optimizer's state by name: to save, and back to its parameters' devices
`saving`            `save_checkpoint`: write a new folder, flush, commit in one step, delete old folders
`loading`           `load_checkpoint` and `load_file`: read and verify everything before any change
`single_file`       `write_file`, and one file as content to load
==================  ====================================================================================

A directory looks like this::

    checkpoint.json     the manifest; replacing this file commits a checkpoint
    data-<token>/       the files of one save, which the manifest names
        rank-0.bin      the bytes of tensors, one after another

[Note: No code in a checkpoint] DCP plans which rank writes and reads which part of a tensor. DCP's files are not used:
their metadata is a pickle, and a pickle runs its author's code. Here all but tensors' bytes is JSON, and nothing in
a directory is ever unpickled.
"""

from .loading import load_checkpoint, load_file
from .saving import save_checkpoint
from .single_file import write_file

__all__ = ["load_checkpoint", "load_file", "save_checkpoint", "write_file"]
