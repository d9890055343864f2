"""The one place that touches DeepSpeed."""

import sys

from leap_dist.zero.lean_imports import LeanImports

sys.meta_path.insert(0, LeanImports())
