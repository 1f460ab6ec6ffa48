"""Makes tests/ importable, for real_tokenizers."""

import pathlib
import sys

sys.path[:0] = [p for p in (str(pathlib.Path(__file__).resolve().parents[1]),) if p not in sys.path]
