"""Looking inside a model: watch what its stages hold, change it, explain what it answered.

    from minivlm.inside import watch, edit, zero

    with watch(model, "decoder layer *") as seen:
        model.generate(**inputs, max_new_tokens=8)
    with edit(model, {"decoder layer 2, attention heads": zero(head=3)}):
        model.generate(**inputs, max_new_tokens=8)

docs/inside.md has eight short scripts.
"""

from minivlm.inside.attribution import Attribution, attribute
from minivlm.inside.drawing import sheet, spotlight, table
from minivlm.inside.edit import Edit, add, block, edit, replace, zero
from minivlm.inside.geometry import latents, to_image, to_patches
from minivlm.inside.lens import Lens, logit_lens
from minivlm.inside.stages import stages
from minivlm.inside.watch import Seen, watch

__all__ = [
    "Attribution",
    "Edit",
    "Lens",
    "Seen",
    "add",
    "attribute",
    "block",
    "edit",
    "latents",
    "logit_lens",
    "replace",
    "sheet",
    "spotlight",
    "stages",
    "table",
    "to_image",
    "to_patches",
    "watch",
    "zero",
]
