"""Ready experts: small, cited, and each of them runs grouped and stacks.

- `dense`: `Linear`, an affine map; `MLP`, two layers; `GLU`, a gated MLP. Take an `MLP` or a `GLU` for experts that are
  the model's own layers, and a `Linear` for the least that can be learned, or for what is to be folded away later.
- `bottleneck`: `Houlsby` and `Pfeiffer`, adapters in a pretrained network. Take `Pfeiffer` first: it has half as many
  parameters a layer, because it stands in one place a layer and not in two.
- `lora`: `LoRA`, a low-rank change of a linear layer that all experts share. Take it to be able to fold an expert away.
  `BasedExpert` is for experts of your own that share a frozen module.
- `prefix`: `Prefix`, attention to learned keys and values.
- `convolution`: `Convolution`, a look at the neighbouring positions.
- `block`: `Block`, a whole transformer block: the most that an expert can do.
- `arguments`, `layers`, `positions`: checks of arguments, small layers, and masks, for all of them.

Experts that add something to their rows begin as the identity: attached to a pretrained network, they change nothing
before they are trained. `notes/zoo.md` compares sizes, and says how to write an expert that runs grouped.
"""

from celmoe.based import BasedExpert

from .block import Block
from .bottleneck import Houlsby, Pfeiffer
from .convolution import Convolution
from .dense import GLU, MLP, Linear
from .lora import LoRA
from .prefix import Prefix

__all__ = ["GLU", "MLP", "BasedExpert", "Block", "Convolution", "Houlsby", "Linear", "LoRA", "Pfeiffer", "Prefix"]
