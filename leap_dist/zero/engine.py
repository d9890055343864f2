"""initialize and finalize: DeepSpeed hosts and shards the training, LEAP runs in the optimizer step.

initialize is host, deepspeed.initialize and attach; the two ends are for whoever builds the engine in another way.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from leap_dist.config.job_file import parse_engine
from leap_dist.config.json_file import read_json
from leap_dist.config.sections import SECTIONS, EngineConfig
from leap_dist.core.counting import Counter, check_exact
from leap_dist.core.gating import MASK
from leap_dist.core.measure import amounts
from leap_dist.core.optimizer import LeapAdamW
from leap_dist.errors import UserError
from leap_dist.models.inputs import resolve_start
from leap_dist.models.kept import compute_among_kept
from leap_dist.models.measure import measure_of
from leap_dist.models.plan import prior_of, start_plan
from leap_dist.zero.agreement import agreement, engine_settings, optimizer_settings, same_outcome, same_settings
from leap_dist.zero.binding import (
    everyone,
    find_fragments,
    forward_copies,
    gather,
    hosted_parameters,
    make_communicator,
    refresh_hosted,
)
from leap_dist.zero.groups import parameter_groups
from leap_dist.zero.listener import Listener
from leap_dist.zero.ranks import Ranks, errors_only, join_ranks, several
from leap_dist.zero.refusals import check_engine_config, check_hosting, check_masters, refusals_of_deepspeed

logger = logging.getLogger(__name__)

ALL_IN_ONE = 10**15  # a ZeRO-3 sub-group that is never full: one step sees all of a gate


_HOOKS: WeakKeyDictionary[nn.Module, list[RemovableHandle | Listener]] = WeakKeyDictionary()
"""On models that are hosted: on routers if experts are pruned, on layers while scores wait for their inputs."""


def initialize(
    args: Any = None,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    model_parameters: Any = None,
    training_data: Any = None,
    lr_scheduler: Any = None,
    distributed_port: int = 29500,
    mpu: Any = None,
    dist_init_required: bool | None = None,
    collate_fn: Any = None,
    config: str | Path | Mapping[str, Any] | EngineConfig | None = None,
    mesh_param: Any = None,
    config_params: str | Path | Mapping[str, Any] | None = None,
) -> tuple[Any, Any, Any, Any]:
    """As `deepspeed.initialize`, for a config that has a "leap" section; returns what it returns.

    optimizer: None, or a new torch.optim.AdamW whose groups' lr, betas, eps and weight_decay LEAP's optimizer takes
    over; its other options are refused where they would change a step. Without one, model_parameters may be
    parameters, or groups with these keys; "train" in the config gives defaults.
    "leap.total_steps" says how many optimizer steps the run has. `engine.leap` is the LeapAdamW.

    Raises UserError, before anything is built, for what cannot work; on every rank, if it is so on one, or if the
    ranks are configured differently. What DeepSpeed refuses comes back in its own words. Collective.
    """
    if model is None:
        raise UserError("model: missing; leap_dist.initialize needs a torch.nn.Module")

    def make() -> tuple[LeapAdamW, dict[str, Any]]:
        settings = _read_config(args, config if config is not None else config_params)
        check_engine_config(settings.deepspeed, model, mpu, mesh_param, lr_scheduler, optimizer)
        return _host(model, settings, optimizer, model_parameters), engine_config(settings.deepspeed)

    base, own = _on_all_ranks(model, make, lambda: join_ranks(distributed_port, dist_init_required))
    try:
        import deepspeed

        with errors_only(), refusals_of_deepspeed():  # it warns of every optimizer that it does not know
            engine, wrapped, loader, scheduler = deepspeed.initialize(
                model=model,
                optimizer=base,
                training_data=training_data,
                lr_scheduler=lr_scheduler,
                distributed_port=distributed_port,
                dist_init_required=dist_init_required,
                collate_fn=collate_fn,
                config=own,
            )
        attach(engine)
    except BaseException:
        release(model)  # a second try is possible
        raise
    return engine, wrapped, loader, scheduler


def host(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, config: str | Path | Mapping[str, Any]
) -> LeapAdamW:
    """LEAP's optimizer for a model whose engine something else builds: Accelerate, Fabric, deepspeed.initialize.

    optimizer and config are as in `initialize`; "auto" in the config is left to whoever fills it in. Give what comes
    back in the place of `optimizer`, and call `attach` once the engine is there. The model stays as it is, but for
    hooks on its routers where experts are pruned; `release` takes them away. Raises UserError, with nothing changed,
    for what cannot work, and where the ranks are configured differently. Collective, if ranks are running.
    """

    def make() -> tuple[LeapAdamW, dict[str, Any]]:
        settings = _read_config(None, config)
        check_hosting(settings.deepspeed, model, optimizer)
        return _host(model, settings, optimizer, None), settings.deepspeed

    return _on_all_ranks(model, make, lambda: None)[0]


def _on_all_ranks(
    model: nn.Module, make: Callable[[], tuple[LeapAdamW, dict[str, Any]]], join: Callable[[], None]
) -> tuple[LeapAdamW, dict[str, Any]]:
    """The optimizer and the DeepSpeed config that `make` returns, if it does on every rank and they are alike.

    `join` is called in between, so that a mistake is reported without any rank. Raises UserError on all ranks else.
    """
    made: tuple[LeapAdamW, dict[str, Any]] | None = None
    problem = ""
    try:
        made = make()
    except UserError as error:
        if not several():
            raise
        problem = str(error)
    try:
        join()
        same_settings(Ranks.here(), {**made[1], **optimizer_settings(made[0])} if made else {}, problem)
    except BaseException:
        if made is not None:
            release(model)
        raise
    assert made is not None
    return made


def attach(engine: Any) -> None:
    """Show LEAP's optimizer where a new engine keeps its shards; before the first step. Collective.

    Raises UserError for an engine that does not step with the optimizer that `host` made, and where the ranks are
    configured differently.
    """
    base = getattr(engine, "basic_optimizer", None)
    if not isinstance(base, LeapAdamW):
        kind = f"{type(engine).__name__} that steps with {type(base).__name__}"
        raise UserError(f"engine: got a {kind}; allowed: the DeepSpeed engine with the optimizer of leap_dist.host")
    engine.leap = base
    _check_sub_group(engine, base)
    same_settings(Ranks.here(), engine_settings(engine))
    _report_slow_bf16(engine)
    if base.bound:
        raise UserError(
            "engine: the optimizer of leap_dist.host that it steps with has an engine already; one run needs one: call "
            "host again, or make a new Trainer with its LeapCallback"
        )
    fragments = find_fragments(engine)
    check_masters(fragments)
    base.bind(fragments, make_communicator(engine), forward_copies(engine), everyone(engine))
    if base.level.fixed is not None:  # masks are in place, and the weights follow
        refresh_hosted(engine)
    if base.inputs is not None:
        _HOOKS.setdefault(engine.module, []).append(Listener(engine.module, base.inputs, on=not base.level.started))
    base.check_gradient = engine.zero_optimization_stage() == 0
    for group, peak in zip(base.param_groups, getattr(engine.lr_scheduler, "max_lrs", ()), strict=False):
        group["max_lr"] = peak  # of a scheduler that sets rates, whatever the group started with
    _count_skipped(engine, base)


def _report_slow_bf16(engine: Any) -> None:
    """Say that a CPU without instructions for bf16 is slow at it: torch takes a product's numbers one by one there."""
    slow = engine.device.type == "cpu" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if slow and engine.bfloat16_enabled() and Ranks.here().rank == 0:
        logger.warning("bf16.enabled: this CPU has no instructions for bf16, and is some 8 times faster in fp32")


def _count_skipped(engine: Any, base: LeapAdamW) -> None:
    """A step that DeepSpeed skips, because the gradient is not finite, advances LEAP's schedule as any other."""
    wrapper = engine.optimizer
    if wrapper is base:  # stage 0: LEAP's step looks itself
        return
    step = wrapper.step

    def counted(*args: Any, **kwargs: Any) -> Any:
        before = base.num_steps
        result = step(*args, **kwargs)
        if base.num_steps == before:
            base.skip()
        _zero_gradients(wrapper)
        return result

    wrapper.step = counted


def _zero_gradients(wrapper: Any) -> None:
    """Of what DeepSpeed keeps from one step to the next, under stage 3 and with offloading.

    It writes there only for parameters that a step uses; one that a step does not use, such as of an expert that no
    token reached or a layer that was dropped, would have the gradient of its last use again.
    """
    by_parameter = getattr(wrapper, "accumulated_grads_in_cpu", {}).values()
    kept = [getattr(wrapper, "grad_partitions_flat_buffer", None), *by_parameter]
    for name in ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups"):
        kept += [flat.grad for flat in getattr(wrapper, name, ())]
    for gradient in kept:
        if gradient is not None:
            gradient.zero_()


def destroy(engine: Any) -> None:
    """Let go of all that keeps an engine in memory after its last use. It cannot be used any more.

    DeepSpeed's hooks on parameters are cycles that Python's collector cannot see. ZeRO-3 keeps every model that it has
    hosted in a list of its own, and in the cache of a method, which a decorator hides.
    """
    from deepspeed.runtime.zero import parameter_offload
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    engine.destroy()
    own = set(map(id, engine.module.modules()))
    stack = parameter_offload.FWD_MODULE_STACK
    stack[:] = [module for module in stack if id(module) not in own]
    for method in vars(PartitionedParameterCoordinator).values():
        for cell in getattr(method, "__closure__", None) or ():
            if hasattr(cell.cell_contents, "cache_clear"):  # other engines fill it again
                cell.cell_contents.cache_clear()


def release(model: nn.Module) -> None:
    """Make a model as it was before `host`: without hooks. Harmless where there are none."""
    for hook in _HOOKS.pop(model, []):
        hook.remove()


def finalize(engine: Any) -> dict[str, Any]:
    """Settle if that has not happened, count what is left in the weights themselves, and certify it.

    Returns target, density, unit, kept, prunable, gates, tensors, masks_sha256, and weights_sha256 over the model's
    parameters (core/counting.py says how both are made), and "note" where the density is not quite the target: why.
    Raises RuntimeError if a pruned weight is not zero, the density is not the target within one unit, or the ranks do
    not hold the same model. Collective.
    """
    ranks = Ranks.here()
    agreement(engine, ranks)
    settle(engine)
    leap: LeapAdamW = engine.leap
    counter = Counter(describe_gates(leap))
    masks = gather_masks(engine)
    for name, weight in gather_weights(engine):
        counter.add(name, weight, next(masks)[1] if name in leap.plan.covers else None)
    count = counter.result()
    described, unit, target = leap.measure.described(), leap.measure.largest(leap.plan), leap.measure.target
    kept, total = amounts(count, described.get("measure"))
    check_exact(kept, total, target, unit)
    note = leap.level.note(kept)
    certificate = {"target": target, "unit": unit, **described, **count, **({"note": note} if note else {})}
    same_outcome(ranks, certificate)
    return certificate


def describe_gates(leap: LeapAdamW) -> list[dict[str, Any]]:
    """One dict a gate: name, granularity, units, kept units, and the tensors whose weights it prunes."""
    return [
        {
            "name": gate.name,
            "granularity": gate.granularity,
            "units": gate.num_units,
            "kept_units": kept,
            "tensors": list(dict.fromkeys(part.tensor for part in gate.slices if part.counted)),
            **({"products": leap.measure.products[number]} if leap.measure.products else {}),
        }
        for number, (gate, kept) in enumerate(zip(leap.plan.gates, leap.kept_units, strict=True))
    ]


def settle(engine: Any) -> None:
    """Make the density exact and freeze the masks if the schedule has not done so; the hosted weights follow."""
    if not engine.leap.settled:
        engine.leap.settle()
        refresh_hosted(engine)


def gather_masks(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(tensor name, bool mask in its shape, on the CPU) in name order; collective."""
    return gather(engine, sorted(engine.leap.plan.covers), MASK)


def gather_weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor on the CPU) of the hosted model's parameters in name order, masked, in the parameter's dtype.

    Raises UserError if the model has lost a parameter that a gate covers. Collective.
    """
    model = getattr(engine.module, "_orig_mod", engine.module)  # where it was compiled
    trained = {id(p): name for name, p in hosted_parameters(engine)}
    found = sorted((trained.get(id(p), name), p) for name, p in model.named_parameters())
    lost = sorted(set(engine.leap.plan.covers) - {trained.get(id(p)) for _, p in found})
    if lost:
        raise UserError(
            f"model: {lost[0]} is not the parameter that was pruned: it was replaced, tied or removed after "
            "initialize; change the model before it"
        )
    masters = gather(engine, [name for name, p in found if id(p) in trained])
    for name, parameter in found:
        yield name, next(masters)[1].to(parameter.dtype) if id(parameter) in trained else _whole_parameter(parameter)


def _whole_parameter(parameter: Any) -> Tensor:
    """A frozen parameter in full, whatever holds it."""
    if not hasattr(parameter, "ds_id"):
        return parameter.detach().cpu()
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        return parameter.detach().cpu().clone()


# What initialize is made of


def _read_config(args: Any, config: str | Path | Mapping[str, Any] | EngineConfig | None) -> EngineConfig:
    if config is None:
        config = getattr(args, "deepspeed_config", None)
    if config is None:
        raise UserError('config: missing; give a dict or the path of a JSON file with a "leap" section')
    if isinstance(config, EngineConfig):
        return config
    if isinstance(config, Mapping):
        return parse_engine(config)
    if not isinstance(config, str | Path):
        raise UserError(f"config: got a {type(config).__name__}; allowed: a dict, or the path of a JSON file")
    return parse_engine(read_json(Path(config)))


def engine_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The DeepSpeed part of the config, with what LEAP needs."""
    config = {key: value for key, value in raw.items() if key not in SECTIONS}
    config["zero_allow_untested_optimizer"] = True
    config["zero_force_ds_cpu_optimizer"] = False
    zero = dict(config.get("zero_optimization") or {})
    if zero.get("stage") == 3:
        zero["sub_group_size"] = ALL_IN_ONE
    config["zero_optimization"] = zero
    return config


def _host(model: nn.Module, settings: EngineConfig, optimizer: Any, model_parameters: Any) -> LeapAdamW:
    """The optimizer of a model's gates, and hooks on its routers and norms; everything that can fail comes first."""
    leap, family, train = settings.leap, settings.family, settings.train
    if leap.permute is not None:
        raise UserError(
            f'leap.permute: got "{leap.permute}"; launch/prune.py reorders the columns of the model that it loads; '
            "remove it in a loop of your own"
        )
    if leap.score_init == "syntax":
        raise UserError(
            'leap.score_init: got "syntax"; launch/prune.py takes texts from its own task, a loop of your own has none '
            'that is known here; set it to "auto", "activation" or "magnitude"'
        )
    plan, fixed = start_plan(model, leap, family)
    prior = prior_of(model, plan, leap)
    defaults = {"lr": train.learning_rate, "weight_decay": train.weight_decay}
    groups = parameter_groups(model, plan, optimizer, model_parameters, defaults)
    start = resolve_start(model, plan, leap)
    measure = None if fixed else measure_of(model, plan, leap, family)
    config = start.config.model_copy(update={"target": measure.share(plan)}) if measure else start.config
    base = LeapAdamW(groups, plan, config, axes=start.axes, fixed=fixed, prior=prior, measure=measure, seed=train.seed)
    base.why_start = start.why
    granularities = {gate.granularity for gate in plan.gates}
    hooks: list[RemovableHandle | Listener] = [
        *compute_among_kept(model, granularities, plan.covers, family, to_prune=True)
    ]
    release(model)
    _HOOKS[model] = hooks
    return base


def _check_sub_group(engine: Any, base: LeapAdamW) -> None:
    """Under stage 3 DeepSpeed steps one sub-group at a time; a gate has to be seen whole."""
    if engine.zero_optimization_stage() != 3:
        return
    gated = [p for name, p in hosted_parameters(engine) if name in base.plan.covers]
    numel = sum(p.partition_numel() for p in gated)  # type: ignore[attr-defined]  # DeepSpeed's
    if engine.zero_sub_group_size() < numel:
        raise UserError(
            f"zero_optimization.sub_group_size: got {engine.zero_sub_group_size()}; the gated weights have to be in "
            f"one sub-group: at least {numel} here, or {ALL_IN_ONE} for any model"
        )
