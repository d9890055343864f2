"""A shrunk model in a folder: `save_shrunk` writes it, `load_pruned` reads it.

Where all layers lose alike and the architecture's config can say so, transformers loads it without this package.
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from leap_dist.config.family import FamilyConfig
from leap_dist.config.json_file import read_json
from leap_dist.config.section import nearest
from leap_dist.errors import UserError
from leap_dist.files import staged
from leap_dist.models.blocks import is_anchored
from leap_dist.models.hub_names import hub_state, load_from_hub, save_as_on_hub
from leap_dist.models.load import cause, others_code, quiet_transformers, refuse_kernels
from leap_dist.models.pruned_json import (
    NAME,
    KeptUnits,
    PrunedJson,
    Removed,
    check_files,
    describe_file,
    read_pruned_json,
    write_pruned_json,
)
from leap_dist.models.removal import remove_
from leap_dist.models.stacks import Parts, Renumbered, find_parts
from leap_dist.models.stock import Kept, per_layer_config, shapes_of, stock_model
from leap_dist.models.stream import NAME as STREAM

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

OF_ONE_EXPORT = ("card.json", "README.md")
"""What an export says of the weights that were exported."""


# ---------------------------------------------------------------------------------------------- saving


def save_shrunk(
    model: PreTrainedModel,
    kept: Kept,
    folder: Path,
    tokenizer: PreTrainedTokenizerBase | None = None,
    family: FamilyConfig | None = None,
    extra: Mapping[str, Any] | None = None,
) -> PrunedJson:
    """Write what `shrink_` left of `model`: weights, config, and pruned.json, which `load_pruned` reads.

    kept: what `shrink_` returned. family: what it was given. extra: anything that JSON can hold.
    An older export in `folder` is replaced; the folder appears under its name only when it is complete.
    Raises UserError if `folder` holds something else, or `kept` is not what the model was left with.
    """
    if folder.exists() and not (folder / NAME).is_file():
        raise UserError(f"{folder}: exists and holds no pruned model; remove it, or choose another folder")
    with torch.device("meta"):
        whole = type(model)(copy.deepcopy(model.config))
    parts = find_parts(whole, family)
    remove_(whole, parts, {block.structure.name: () for block in parts.blocks} | dict(kept))
    if shapes_of(whole) != shapes_of(model):
        raise UserError(
            f"{folder}: {type(model).__name__} is not what its config describes less the units that left; "
            "give what shrink_ returned when it shrank the whole model"
        )
    with quiet_transformers():
        stock = stock_model(model, parts, kept)
    with staged(folder) as partial:
        if stock:
            save_as_on_hub(stock, partial)
        else:
            with quiet_transformers():
                model.save_pretrained(partial, save_original_format=False)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)
        manifest = PrunedJson(
            model_class=type(model).__name__,
            stock=stock is not None,
            structures=tuple(
                KeptUnits(name=name, kind=kind, num_units=num_units, kept=tuple(kept[name]))
                for name, (kind, num_units) in _kinds(parts).items()
                if name in kept
            ),
            family=family,
            files={path.name: describe_file(path) for path in sorted(partial.glob("*.safetensors"))},
            per_layer_config={} if stock else per_layer_config(model.config, parts, kept),
            extra=dict(extra or {}),
        )
        write_pruned_json(partial, manifest)
    return manifest


def save_pruned(model: PreTrainedModel, folder: Path, like: Path) -> None:
    """Write a model that `load_pruned(like)` gave and that was trained since; `load_pruned(folder)` reads it.

    Config, tokenizer and what was removed are those of `like`; an adapter is merged first. An older one in `folder` is
    replaced. UserError if `like` is no pruned model, or the model has not the weights of one.
    """
    folder, like = Path(folder), Path(like)
    if folder.exists() and (not (folder / NAME).is_file() or folder.samefile(like)):
        raise UserError(f"{folder}: exists; give another folder, or that of an older pruned model other than {like}")
    manifest = read_pruned_json(like)
    if "peft" in type(model).__module__ or any(hasattr(module, "base_layer") for module in model.modules()):
        raise UserError("model: got a model with adapters; allowed: what model.merge_and_unload() returns")
    _check_shapes(like, model, check_files(like, manifest))
    with staged(folder) as partial:
        if manifest.stock:
            save_as_on_hub(model, partial)
        else:
            with quiet_transformers():
                model.save_pretrained(partial, save_original_format=False)
        for path in like.iterdir():
            own = path.name in (NAME, *OF_ONE_EXPORT) or ".safetensors" in path.name
            if path.is_file() and not own and not (partial / path.name).exists():
                shutil.copy(path, partial)
        files = {path.name: describe_file(path) for path in sorted(partial.glob("*.safetensors"))}
        write_pruned_json(partial, manifest.model_copy(update={"files": files, "extra": {}}))


def as_stock(model: PreTrainedModel, kept: Kept, family: FamilyConfig | None = None) -> PreTrainedModel | None:
    """What transformers alone makes of the folder that `save_shrunk` writes, with the same tensors; None if it cannot.

    Arguments as there. Buffers that no file holds are not filled.
    """
    with torch.device("meta"):
        whole = type(model)(copy.deepcopy(model.config))
    return stock_model(model, find_parts(whole, family), kept)


def _kinds(parts: Parts) -> dict[str, tuple[Removed, int]]:
    """The kind and the number of units of everything that can leave, by name."""
    found: dict[str, tuple[Removed, int]] = {}
    if parts.stream is not None:
        found[STREAM] = "hidden", parts.stream.width
    for stack in parts.stacks:
        found[stack.name] = "depth", len(stack.layers)
    for block in parts.blocks:
        assert block.structure.kind != "layer"
        found[block.structure.name] = block.structure.kind, block.structure.num_units
    return found


# ---------------------------------------------------------------------------------------------- loading


def load_pruned(folder: Path, attn_implementation: str | None = None) -> PreTrainedModel:
    """The model that `save_shrunk` wrote, in evaluation mode. No code and no pickle of the folder is executed.

    attn_implementation: as in transformers' `from_pretrained`; None is its default.
    Raises UserError if the folder is no pruned model, or is damaged.
    """
    folder = Path(folder)
    manifest = read_pruned_json(folder)
    files = check_files(folder, manifest)
    _check_depth(folder, files)
    with torch.device("meta"):  # no memory is taken before all shapes are known to be those of the files
        described = _build(folder, manifest, attn_implementation)
    _shrink_as_stored_(folder, manifest, described)
    _check_shapes(folder, described, files)
    model = _build(folder, manifest, attn_implementation)
    _shrink_as_stored_(folder, manifest, model)
    model = _with_weights(model, files)
    if model.can_generate() and (folder / "generation_config.json").is_file():
        from transformers import GenerationConfig

        with others_code(f"{folder}: its generation_config.json", "copy the whole folder anew"):
            model.generation_config = GenerationConfig.from_pretrained(folder)
    return model.eval()


def _shrink_as_stored_(folder: Path, manifest: PrunedJson, model: PreTrainedModel) -> None:
    """Remove the units that are not among those left, which are checked first."""
    parts = find_parts(model, manifest.family)
    kept = _kept_of(folder, manifest, model, parts)
    if not manifest.stock:
        remove_(model, parts, kept)


def _check_depth(folder: Path, files: Sequence[Path]) -> None:
    """Raises UserError for more layers than there are tensors: building them would never end."""
    config = _config_json(folder / "config.json")
    num_tensors = len({name for path in files for name in _shapes_in(path)})
    for place, value in _numbers("", config):
        key = place.rpartition(".")[2]  # max_window_layers of Qwen is a bound, and may be larger
        if key.endswith("layers") and not key.startswith("max_") and value > num_tensors:
            raise UserError(
                f"{folder / 'config.json'}: {place}: got {value}; the weight files hold {num_tensors} tensors, fewer "
                "than one a layer; copy the whole folder"
            )


def _config_json(path: Path) -> Any:
    if not path.is_file():
        raise UserError(f"{path.parent}: has no config.json; copy the whole folder")
    return read_json(path, "copy the folder again")


def _numbers(place: str, value: Any) -> Iterator[tuple[str, int]]:
    """Every integer in a config of configs, by its dotted key."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _numbers(f"{place}.{key}" if place else key, inner)
    elif isinstance(value, int):
        yield place, value


def _shapes_in(path: Path) -> dict[str, list[int]]:
    """What the head of a weight file says is in it."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: is not a safetensors file: {error}") from error


def _build(folder: Path, manifest: PrunedJson, attn_implementation: str | None) -> PreTrainedModel:
    """A model of the stored class and config, with no weights yet."""
    import transformers
    from transformers.initialization import no_init_weights

    cls = getattr(transformers, manifest.model_class, None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel) and cls.config_class):
        raise UserError(
            f"{folder / NAME}: model_class: got {manifest.model_class!r}; allowed: a model class of transformers "
            f"{transformers.__version__}"
        )
    try:
        refuse_kernels(folder)
        config = cls.config_class.from_pretrained(folder, attn_implementation=attn_implementation)
        with no_init_weights(), quiet_transformers():
            model = cls(config)
            model.tie_weights()
            return model
    except UserError:
        raise
    except Exception as error:  # whatever transformers' code comes to on the folder's config
        raise UserError(f"{folder / 'config.json'}: transformers refuses it: {cause(error)}") from error


def _kept_of(folder: Path, manifest: PrunedJson, model: nn.Module, parts: Parts) -> Kept:
    """The manifest's units, checked against the model that the config describes."""
    path, modules = folder / NAME, dict(model.named_modules())
    stored, kinds = _stored(manifest), _kinds(parts)
    for name in stored:
        if name not in kinds:
            raise UserError(f"{path}: damaged: {name}: the model has no such structure{nearest(name, kinds)}")
    for name, (kind, num_units) in kinds.items():
        if name not in stored and kind in ("depth", "hidden"):
            continue  # no layer left, no dimension
        if name not in stored:
            raise UserError(f"{path}: damaged: {name}: is missing from structures")
        described = len(stored[name].kept) if manifest.stock else stored[name].num_units
        if described != num_units:
            raise UserError(f"{path}: damaged: {name}: got {described} units; config.json gives it {num_units}")
    kept = {name: entry.kept for name, entry in stored.items()}
    for stack in parts.stacks:
        if manifest.stock or stack.name not in kept:
            continue
        if missing := next((unit for unit in stack.needed if unit not in kept[stack.name]), None):
            raise UserError(f"{path}: damaged: {stack.name}: must keep layer {missing}: other layers need it")
    for block in parts.blocks:
        if not kept[block.structure.name] and is_anchored(block, modules):
            raise UserError(f"{path}: damaged: {block.structure.name}: must keep a unit: other layers need this block")
    return kept


def _stored(manifest: PrunedJson) -> dict[str, KeptUnits]:
    """The entries of a manifest by the names that the model of its config.json has."""
    entries = {entry.name: entry for entry in manifest.structures}
    if not manifest.stock:
        return entries
    kept = {name: entry.kept for name, entry in entries.items() if entry.kind == "depth"}
    renumbered = Renumbered(kept)
    return {new: entry for name, entry in entries.items() if (new := renumbered(name)) is not None}


def _check_shapes(folder: Path, model: PreTrainedModel, files: Sequence[Path]) -> None:
    """All weights are there, each of the right shape; aliases of tied weights may be left out."""
    stored = {name: shape for path in files for name, shape in _shapes_in(path).items()}
    expected = model.state_dict(keep_vars=True)
    if not stored.keys() <= expected.keys():
        bare = {id(value): torch.empty_like(value, device="meta") for value in expected.values()}
        expected = hub_state(model, {name: bare[id(value)] for name, value in expected.items()})
    present = {id(expected[name]) for name in stored if name in expected}
    missing = [name for name, value in expected.items() if name not in stored and id(value) not in present]
    unknown = [name for name in stored if name not in expected]
    wrong = [name for name in stored if name in expected and stored[name] != list(expected[name].shape)]
    for names, problem in ((missing, "is missing"), (unknown, "is not the model's"), (wrong, "has another shape")):
        if names:
            more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
            raise UserError(f"{folder}: weights do not fit config.json and {NAME}: {names[0]} {problem}{more}")


def _with_weights(model: PreTrainedModel, files: Sequence[Path]) -> PreTrainedModel:
    """The model with the tensors of its files, by its own names or by those of the hub."""
    from safetensors import safe_open

    state: dict[str, torch.Tensor] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            # copied to aligned memory: kernels choose by alignment, and round each in their way
            state |= {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    if not state.keys() <= model.state_dict().keys():
        return load_from_hub(model, state)
    model.load_state_dict(state, strict=False, assign=True)
    model.tie_weights()
    return model
