"""Where the committed test data is. Not in conftest.py, of which there are several:
which one a test imports depends on the folders that pytest is given."""

from pathlib import Path

DATA = Path(__file__).parent / "data"
HUB = DATA / "hub" / "HuggingFaceM4"
LLAVA = HUB.parent / "llava-hf"
PHOTOGRAPHS = sorted(path.name for path in (DATA / "images").iterdir() if path.suffix in (".jpg", ".png"))
