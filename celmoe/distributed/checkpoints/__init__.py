"""Checkpoints that any number of ranks writes, and any other number reads, whatever is spread how.

Tensors stand under the names that they have in the model in one process: every rank saves what it holds, and reads what
it holds. An optimizer's state goes by the same names, and what has none (an expert that was never routed to) has none
after loading.

==================  ====================================================================================
file                what it does
==================  ====================================================================================
`agreement`         ranks act together: all succeed, or all raise the same `CheckpointError`
`manifest`          what a checkpoint's directory holds, as JSON, and how damage of it is told
`pieces`            tensors as bytes in files, each with its checksum
`optimizer_state`   an optimizer's state by name: to save, and back to its parameters' devices
`saving`            `save_checkpoint`: written beside, flushed, committed in one step, swept
`loading`           `load_checkpoint` and `load_file`: all read and verified before anything changes
`single_file`       `write_file`, and one file as content to load
==================  ====================================================================================

A directory looks so::

    checkpoint.json     the manifest; whoever replaces it commits a checkpoint
    data-<token>/       the files of one save, which the manifest names
        rank-0.bin      the bytes of tensors, one after another

[Note: No code in a checkpoint] DCP plans which rank writes and reads which part of a tensor. Its files are not used:
their metadata is a pickle, and a pickle runs its author's code. Here all but tensors' bytes is JSON, and nothing in
a directory is ever unpickled.
"""

from .loading import load_checkpoint, load_file
from .saving import save_checkpoint
from .single_file import write_file

__all__ = ["load_checkpoint", "load_file", "save_checkpoint", "write_file"]
