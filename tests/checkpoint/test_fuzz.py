"""Whatever a checkpoint's files hold, loading it ends in a UserError, or well."""

import contextlib
import hashlib
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from leap_dist.checkpoint.checkpoints import Checkpoints
from leap_dist.checkpoint.manifest import MANIFEST, with_checksum
from leap_dist.errors import UserError
from tests.checkpoint.mutations import EXAMPLES, changed_bytes, changed_json
from tests.checkpoint.test_checkpoints import checkpoint_of, this_rank
from tests.ranks import RankPools
from tests.zero.test_engine import pruned_engine

FILE = "rank-00000.safetensors"


def mutate(manifest: bytes, tensors: bytes, data: st.DataObject) -> dict[str, bytes]:
    """One of the two files changed, or both, so that the checksums fit."""
    kind = data.draw(st.sampled_from(["manifest", "sealed manifest", "tensors", "header", "sealed tensors"]))
    if kind == "manifest":
        return {MANIFEST: changed_bytes(manifest, data)}
    if kind == "tensors":
        return {FILE: changed_bytes(tensors, data)}
    body = json.loads(manifest)
    del body["sha256"]
    if kind == "sealed manifest":
        return {MANIFEST: with_checksum(changed_json(body, data))}
    if kind == "header":
        length = int.from_bytes(tensors[:8], "little")
        header = json.dumps(changed_json(json.loads(tensors[8 : 8 + length]), data)).encode()
        tensors = len(header).to_bytes(8, "little") + header + tensors[8 + length :]
    else:
        tensors = changed_bytes(tensors, data)
    body["files"][FILE] |= {"size": len(tensors), "sha256": hashlib.sha256(tensors).hexdigest()}
    return {MANIFEST: with_checksum(body), FILE: tensors}


def load_mutated(folder: str, examples: int) -> dict[str, int]:
    """How many inputs were loaded, and how many refused; anything but a UserError comes out."""
    checkpoint_of("hybrid", 2, folder, 2)
    engine, counts = pruned_engine("hybrid", 2, 1, {}), {"loaded": 0, "refused": 0}
    checkpoint = Path(folder) / "step-00000002"
    whole = {name: (checkpoint / name).read_bytes() for name in (MANIFEST, FILE)}

    @settings(max_examples=examples, deadline=None, database=None)
    @given(st.data())
    def load(data: Any) -> None:
        for name, content in (whole | mutate(whole[MANIFEST], whole[FILE], data)).items():
            (checkpoint / name).write_bytes(content)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                Checkpoints(Path(folder), this_rank()).load(engine)
            counts["loaded"] += 1
        except UserError:
            counts["refused"] += 1

    load()
    return counts


def test_nothing_but_a_user_error_comes_out_of_a_mutated_checkpoint(ranks: RankPools, tmp_path: Path) -> None:
    (counts,) = ranks(1).run(load_mutated, str(tmp_path), EXAMPLES, timeout=3600.0)
    assert counts["refused"] > EXAMPLES // 2
