"""`python -m minivlm`, and so `torchrun -m minivlm`."""

import sys

from minivlm.app.cli import main

sys.exit(main())
