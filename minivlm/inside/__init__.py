"""Looking inside a model: watch what its stages hold, change it, explain what it answered.

    from minivlm.inside import watch, edit, zero

    with watch(model, "decoder layer *") as seen:
        model.generate(**inputs, max_new_tokens=8)
    with edit(model, {"decoder layer 2, attention heads": zero(head=3)}):
        model.generate(**inputs, max_new_tokens=8)

docs/inside.md has eight short scripts.
"""

from minivlm.inside.edit import Edit, add, block, edit, replace, zero
from minivlm.inside.stages import stages
from minivlm.inside.watch import Seen, watch

__all__ = ["Edit", "Seen", "add", "block", "edit", "replace", "stages", "watch", "zero"]
