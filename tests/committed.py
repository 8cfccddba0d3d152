"""Where the committed test data is. (Not in conftest.py: which of several a test would import is left to chance.)"""

from pathlib import Path

DATA = Path(__file__).parent / "data"
HUB = DATA / "hub" / "HuggingFaceM4"
LLAVA = HUB.parent / "llava-hf"
PHOTOGRAPHS = sorted(path.name for path in (DATA / "images").iterdir() if path.suffix in (".jpg", ".png"))
