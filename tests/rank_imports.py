"""What every rank of a test needs, imported once by the process that all ranks are forked from; it computes nothing."""

import contextlib
import gc
import io
import os
import sys
from pathlib import Path

import leap_dist.zero  # first: it keeps DeepSpeed from importing MLflow

os.environ.update(OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])

with contextlib.redirect_stdout(io.StringIO()):  # DeepSpeed tells of its builds
    import deepspeed  # noqa: F401
    import transformers.models.bert.modeling_bert  # noqa: F401

    import leap_dist.train.loop  # noqa: F401

gc.freeze()  # DeepSpeed collects garbage whenever it builds a stage 3 engine: what is imported is none
