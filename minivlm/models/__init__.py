"""The three families, one file each.

Every import of one passes here, where the base class gets what other libraries call on a model (`tools.py`), so that
the files to be read stay free of it.
"""

from minivlm.models import base, tools

tools.equip(base.VisionLanguageModel)
