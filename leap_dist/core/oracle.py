"""The oracle: LEAP the paper's way, with masks in every forward pass and gradients by autograd, on one process.

Slow and short on purpose. Every fast or sharded path is tested against it. The model's parameters are the latent
weights W; a forward pass uses W * M, with masks by a full stable sort of the scores and the straight-through
estimator of Yao et al., arXiv 2105.14636.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from leap_dist.config.leap import BY_INPUTS, LeapConfig
from leap_dist.core import thresholds as th
from leap_dist.core.gates import Gate, GatePlan
from leap_dist.core.phases import schedule_of
from leap_dist.core.rates import SOFT_BETA2
from leap_dist.core.signal import Signal
from leap_dist.core.soft import ALPHA, MEAN_PULL, NORM_PULL, curve_at, find_bias, first_scores, rest_of
from leap_dist.ops.slices import Slice
from leap_dist.ops.soft import Curve, gumbel, logistic, noise_key


class TopK(torch.autograd.Function):
    """M = top-k(S); backward: dL/dS = dL/dM for every unit, dL/dsigma = sum_u M_u dL/dM_u (Top_k's slope is 1)."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
        """Return the mask as numbers of the scores' dtype."""
        ctx.save_for_backward(mask)
        return mask.to(scores)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        """The straight-through estimator."""
        (mask,) = ctx.saved_tensors
        return grads[0], (grads[0] * mask).sum(), None


def unit_index(slices: Sequence[Slice]) -> Tensor:
    """The unit of every element of a tensor, int64 of shape (rows, cols), from the slices that cover it."""
    index = torch.full((slices[0].rows, slices[0].cols), -1)
    for part in slices:
        top, num_rows, left, num_cols = part.bounds
        rows = torch.arange(num_rows) // part.block_rows
        cols = torch.arange(num_cols) // part.block_cols
        units = part.first_unit + rows[:, None] * part.grid[1] + cols[None, :]
        index[top : top + num_rows, left : left + num_cols] = units
    return index


def top_k(scores: Tensor, keep: int) -> Tensor:
    """The mask of the `keep` largest scores along the last axis, ties to the lowest index."""
    best = torch.sort(scores, dim=-1, descending=True, stable=True).indices[..., :keep]
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True)


def best_units(gate: Gate, scores: Tensor, keep: int) -> Tensor:
    """The mask of a gate's best units: of the whole gate, or of every m neighbours where it has a pattern."""
    if gate.pattern is None:
        return top_k(scores, keep)
    rows = scores.view(-1, gate.pattern[1])
    return top_k(rows, keep // len(rows)).flatten()


def softly_chosen(scores: Tensor, pattern: tuple[int, int], key: int, curve: Curve) -> Tensor:
    """M of an n:m gate: of every group the mean of its patterns, by how likely each is to be chosen with this noise."""
    kept, of = pattern
    logits = [scores.view(-1, of)[:, list(places)].sum(1) for places in combinations(range(of), kept)]
    noise = gumbel(key, 0, len(logits) * len(logits[0]), scores.device).view(-1, len(logits))
    chosen = torch.softmax((curve.choice * torch.stack(logits, 1) + noise) / curve.tau, 1)
    mask = torch.zeros(len(chosen), of)
    for number, places in enumerate(combinations(range(of), kept)):
        ones = torch.zeros(of).index_fill_(0, torch.tensor(places), 1.0)
        mask = mask + chosen[:, number, None] * ones
    return mask.flatten()


class Oracle:
    """LEAP on one process: `step(loss)` with loss(forward) -> scalar, forward being the masked model."""

    def __init__(
        self,
        model: nn.Module,
        plan: GatePlan,
        config: LeapConfig,
        lr: float,
        weight_decay: float = 0.01,
        no_decay: Iterable[str] = (),
        max_norm: float = 0.0,
        seed: int = 0,
        prior: Sequence[Tensor] = (),
    ) -> None:
        assert config.total_steps is not None
        self.model, self.plan, self.config, self.lr, self.max_norm = model, plan, config, lr, max_norm
        self.schedule = schedule_of(config, plan)
        self.latent = dict(model.named_parameters())
        self.remaining = th.Remaining(plan)
        self.sigma = nn.Parameter(torch.full((len(plan.gates),), th.START * config.temperature))
        self.scores = [nn.Parameter(torch.zeros(gate.num_units)) for gate in plan.gates]
        self.squares: dict[str, Tensor] = {}  # of the inputs of linear layers, summed over all rows
        self.waits = config.score_init in BY_INPUTS and config.rule != "magnitude"  # for the norms of inputs
        if (config.score_init != "zero" or config.rule == "magnitude") and not self.waits:
            self._scores_from_weights(scaled=True)
        self.masks = [torch.ones(gate.num_units, dtype=torch.bool) for gate in plan.gates]
        self.num_steps, self.calibration, self.settled = 0, 1.0, False
        self.num_updates = self.num_pruning_updates = 0  # taken, in all and in the prune phase
        self.seed, self.prior = seed, prior  # prior: by gate, the mask that rule "gumbel" starts from
        self._rest = rest_of(plan, config.target)
        self.curve: Curve | None = None  # of the soft masks of rule "gumbel", where they are in place
        decayed = [p for name, p in self.latent.items() if name not in set(no_decay)]
        plain = [p for name, p in self.latent.items() if name in set(no_decay)]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        self.weight_optimizer = torch.optim.AdamW(groups, lr=lr, weight_decay=weight_decay)
        self.score_rates = [config.score_rate(gate.elementwise, self.schedule.trust) for gate in plan.gates]
        own = zip(self.scores, self.score_rates, strict=True)
        betas = (0.9, SOFT_BETA2 if config.rule == "gumbel" else 0.999)
        groups = [{"params": [scores], "lr": peak} for scores, peak in own]
        self.score_optimizer = torch.optim.Adam(groups, betas=betas)
        rate, projected = config.threshold_learning_rate, config.control == "projected"
        auto = self.schedule.threshold_rate(config.temperature, projected, elementwise=not plan.structured)
        rate = auto if rate == "auto" else rate
        self.threshold_optimizer = torch.optim.Adam([self.sigma], lr=rate)
        self.undecayed = set(no_decay)
        self.moments: dict[str, tuple[Tensor, Tensor]] = {}  # of G, where weights and scores share them
        self.task_size = th.TaskSize()
        self.signal = Signal(plan)

    def scale_rates(self, scale: float) -> None:
        """What a learning-rate scheduler does: the rates of weights and scores are `scale` times their base."""
        for group in self.weight_optimizer.param_groups:
            group["lr"] = self.lr * scale
        for group, peak in zip(self.score_optimizer.param_groups, self.score_rates, strict=True):
            group["lr"] = peak * scale

    # The forward pass

    def mask_of(self, tensor: str, units: list[Tensor] | None = None) -> Tensor:
        """M of a tensor, in its own shape: the product over the gates that cover it."""
        units = [mask.float() for mask in self.masks] if units is None else units
        product = torch.ones(())
        for cover in self.plan.covers[tensor]:
            product = product * units[cover.gate][unit_index(cover.slices).flatten()]
        return product.reshape(self.latent[tensor].shape)

    def masked_weights(self, units: list[Tensor] | None = None) -> dict[str, Tensor]:
        """All parameters, the gated ones as W * M."""
        gated = {name: self.latent[name] * self.mask_of(name, units) for name in self.plan.covers}
        return {**self.latent, **gated}

    def step(self, loss: Callable[[Callable[..., Any]], Tensor]) -> Tensor:
        """One optimizer step; `loss` is called once with the masked model's forward function."""
        sigmas = self.sigma.unbind()
        units = [TopK.apply(s, t, m) for s, t, m in zip(self.scores, sigmas, self.masks, strict=True)]
        units = units if self.curve is None else self.soft_units(self.curve)
        hosted = self.masked_weights(units)
        for name in self.plan.covers:
            hosted[name].retain_grad()
        with self._watching():
            value = loss(lambda *args, **kwargs: functional_call(self.model, hosted, args, kwargs))
        for parameter in (*self.latent.values(), *self.scores, self.sigma):
            parameter.grad = None
        value.backward()
        self._clip(hosted)
        self._hold_silent(hosted)
        self._regularise()
        if self.curve is not None:
            self.sigma.grad = torch.zeros_like(self.sigma)
            if self.config.control == "paper":
                self._add_published(self.curve)
        assert self.sigma.grad is not None
        self.sigma.grad = self.remaining.share_gradient(self.sigma.grad).to(self.sigma)
        self._update({name: hosted[name].grad for name in self.plan.covers})
        self.num_updates += 1
        self.num_pruning_updates += self.schedule.phase(self.num_steps) != "dense"
        self.num_steps += 1
        if not self.settled and self.schedule.phase(self.num_steps - 1) != "dense":
            self._hold_level()
        return value.detach()

    def skip(self) -> None:
        """A step whose gradient is not finite: the schedule moves, and nothing else."""
        self.num_steps += 1

    def _hold_silent(self, hosted: dict[str, Tensor]) -> None:
        """No gradient for thresholds of weights whose scale the loss does not depend on (core/signal.py)."""
        if self.config.rule != "leap" or self.settled or self.sigma.grad is None:
            return
        self._task = self.sigma.grad
        if not self.signal.is_known:
            squares = torch.zeros(len(self.plan.gates), dtype=torch.float64)
            for name, covers in self.plan.covers.items():
                if (grad := hosted[name].grad) is not None:
                    for cover in covers:
                        squares[cover.gate] += (grad * hosted[name]).detach().double().square().sum()
            self.signal.add(self._task, squares)
        self.sigma.grad = self.signal.heard(self.sigma.grad)

    def _regularise(self) -> None:
        """Add lambda dL_reg/dsigma, in the prune phase of LEAP under control "paper"."""
        config = self.config
        prune = not self.settled and self.schedule.phase(self.num_steps) == "prune"
        if config.rule != "leap" or config.control != "paper" or not prune:
            return
        remaining = self.remaining.ratio(torch.sigmoid(self.sigma.double() / config.temperature))
        loss = (remaining - config.target / self.calibration).clamp(min=0) ** 2
        (grad,) = torch.autograd.grad(loss, self.sigma)
        grad = grad * self.remaining.free
        assert self.sigma.grad is not None
        if config.lambda_max == "auto":
            adam = self.threshold_optimizer.param_groups[0]
            beta1, beta2 = adam["betas"]
            size = self.task_size.follow(self._task, beta2, self.num_pruning_updates + 1)
            scale = th.balanced_lambda(loss.item(), grad, size, adam["lr"], beta1)
        else:
            scale = th.adaptive_lambda(loss.item(), config.target, config.lambda_max, config.lambda_min)
        self.sigma.grad += scale * grad

    def _clip(self, hosted: dict[str, Tensor]) -> None:
        """Clip as a sharded engine does: by the norm of dL/d(W * M), before anything else is made of it."""
        if not self.max_norm:
            return
        grads = [hosted[name].grad for name in self.latent]
        norm = torch.stack([g.norm() for g in grads if g is not None]).norm()
        scale = min(1.0, self.max_norm / (norm.item() + 1e-6))
        for parameter in (*self.latent.values(), *self.scores, self.sigma, *map(hosted.get, self.plan.covers)):
            if parameter is not None and parameter.grad is not None:
                parameter.grad.mul_(scale)

    # The update

    def _update(self, grads: dict[str, Tensor | None]) -> None:
        """grads: G = dL/d(W * M)."""
        if self.config.shares_moments:
            for name, grad in grads.items():
                gate = next((c.gate for c in self.plan.covers[name] if self.plan.gates[c.gate].elementwise), None)
                if grad is not None and gate is not None:
                    self._step_shared(name, gate, grad)
        if not self.config.frozen:
            self.weight_optimizer.step()
        moves = self.config.rule not in ("magnitude", "gumbel") or self.curve is not None
        if moves and not self.settled:
            self.score_optimizer.step()
            if self.config.rule == "leap" and self.schedule.phase(self.num_steps) == "prune":
                self.threshold_optimizer.step()

    def _step_shared(self, name: str, gate: int, grad: Tensor) -> None:
        """W and its element scores by the moments of G alone (leap.score_moments "shared"), in place of their Adam."""
        weight, scores, adam = self.latent[name], self.scores[gate], self.weight_optimizer.param_groups[0]
        weight.grad = scores.grad = None
        mask = self.mask_of(name)
        beta1, beta2 = adam["betas"]
        first, second = self.moments.get(name, (torch.zeros_like(grad), torch.zeros_like(grad)))
        grad = grad * mask if self.settled else grad
        first, second = beta1 * first + (1 - beta1) * grad, beta2 * second + (1 - beta2) * grad**2
        self.moments[name] = first, second
        m = first / (1 - beta1 ** (self.num_updates + 1))
        root = (second / (1 - beta2 ** (self.num_updates + 1))).sqrt()
        with torch.no_grad():
            if not self.settled:
                units = [mask.float() for mask in self.masks]
                units[gate] = torch.ones_like(units[gate])
                step = self.mask_of(name, units) * weight * m / (weight.abs() * root + adam["eps"])
                scores.sub_(self.score_optimizer.param_groups[gate]["lr"] * step.flatten())
            decay = 0.0 if name in self.undecayed else adam["weight_decay"]
            weight.sub_(adam["lr"] * (decay * weight + mask * m / (root + adam["eps"])))

    # Soft masks, of rule "gumbel"

    def soft_units(self, curve: Curve) -> list[Tensor]:
        """M of the units of every gate, by autograd; noise is numbered by element, or over all structured units."""
        found = []
        for index, (gate, scores) in enumerate(zip(self.plan.gates, self.scores, strict=True)):
            number, first = self._numbered(index)
            if gate.pattern:
                found.append(softly_chosen(scores, gate.pattern, noise_key(curve.key, number), curve))
                continue
            noise = logistic(noise_key(curve.key, number), first, gate.num_units, scores.device)
            found.append(torch.sigmoid((curve.alpha * scores + noise + curve.bias) / curve.tau))
        return found

    def _numbered(self, index: int) -> tuple[int, int]:
        """(number of a gate, index of its first unit) in the noise."""
        elementwise = self.plan.gates[index].elementwise
        return (index, 0) if elementwise else (len(self.plan.gates), self.plan.units(index).start)

    def _add_published(self, curve: Curve) -> None:
        """Add the gradient of 7 |mean M - target| - 10 (1 - t/T) sum ||M W|| / sum ||W||, without one for W."""
        units, left = self.soft_units(curve), 1.0 - (curve.alpha - ALPHA[0]) / (ALPHA[1] - ALPHA[0])
        mean = torch.cat(units).mean()
        weights = {name: self.latent[name].detach() for name in self.plan.covers}
        masked = [(w * self.mask_of(name, units)).norm() for name, w in weights.items()]
        whole = torch.stack([w.norm() for w in weights.values()]).sum()
        loss = MEAN_PULL * (mean - self.config.target).abs() - NORM_PULL * left * torch.stack(masked).sum() / whole
        for scores, grad in zip(self.scores, torch.autograd.grad(loss, self.scores), strict=True):
            assert scores.grad is not None
            scores.grad += grad

    def _hold_soft(self) -> None:
        """The soft masks of the next forward pass."""
        if self.curve is None:
            rest = self._rest.level(self.config.target)
            shares = torch.tensor([p[0] / p[1] if (p := gate.pattern) else rest for gate in self.plan.gates])
            kept = self.prior or self._best(self.remaining.keep_counts(shares))
            for index, scores in enumerate(self.scores):
                by_mask = None if self.config.score_init == "zero" else kept[index]
                scores.copy_(first_scores(by_mask, *self._numbered(index), self.seed, scores))
        sizes = [gate.unit_sizes.double() for gate in self.plan.gates]

        def evaluate(bias: float) -> tuple[float, float]:
            self.curve = curve_at(self.schedule, self.num_steps, bias, self.seed)
            mean = slope = 0.0
            for gate, size, mask in zip(self.plan.gates, sizes, self.soft_units(self.curve), strict=True):
                mean += (size * mask).sum().item() / self.plan.prunable
                free = 0.0 if gate.pattern else (size * mask * (1.0 - mask)).sum().item()
                slope += free / self.curve.tau / self.plan.prunable
            return mean, slope

        if self.config.control == "projected" and self._rest.num:
            level = self._rest.whole(self.schedule.level(self.num_steps))
            find_bias(evaluate, level, self.curve.bias if self.curve else 0.0)
        else:
            evaluate(0.0)

    def _settle_soft(self) -> None:
        """Thresholds that keep the best scores of all gates together; then masks are as in other rules."""
        self.curve = None
        if not self._rest.num:
            return
        free = [index for index, gate in enumerate(self.plan.gates) if not gate.pattern]
        sizes = [self.plan.gates[i].unit_sizes.double().expand(self.plan.gates[i].num_units) for i in free]
        scores, order = torch.sort(torch.cat([self.scores[i] for i in free]).detach(), descending=True, stable=True)
        enough = torch.cat(sizes)[order].cumsum(0) >= self.config.target * self.plan.prunable - self._rest.kept
        worst = scores[int(enough.nonzero()[0])]  # of those that stay
        shares = torch.stack([(own >= worst).double().mean() for own in self.scores])
        for group in self.plan.tied:
            num = torch.tensor([self.plan.gates[i].num_units for i in group], dtype=torch.float64)
            shares[list(group)] = shares[list(group)] @ num / num.sum()
        self.sigma.copy_(torch.logit(shares.clamp(1e-9, 1.0 - 1e-9)) * self.config.temperature)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """While scores wait for their start: sum the squares of what every linear layer is given."""

        def see(name: str, layer: nn.Module, given: tuple[Tensor, ...]) -> None:
            rows = given[0].detach().double().reshape(-1, given[0].shape[-1])
            self.squares[name] = self.squares.get(name, torch.zeros(())) + rows.square().sum(0)

        linear = {n: m for n, m in self.model.named_modules() if isinstance(m, nn.Linear) and self.waits}
        hooks = [m.register_forward_pre_hook(partial(see, f"{name}.weight")) for name, m in linear.items()]
        yield
        for hook in hooks:
            hook.remove()

    def _scores_from_weights(self, scaled: bool) -> None:
        """S_u = mean |W|, or mean |W_ij| ||x_j|| where inputs were seen, added to what is there; of heads and neurons
        over the matrices that take them as inputs; with gradients mean |W_ij| ||x_j||^3/4 g_ij^1/4 over all of them,
        g the root of Adam's second moment, and of heads and neurons the root of the product with the sum of ||x_j||
        over the matrices that take them as inputs, both over their means.

        Single weights of which inputs were seen are over the mean of their row, all else over that of the gate.
        """
        for index, gate in enumerate(self.plan.gates):
            by_row = bool(self.squares) and gate.elementwise and not gate.pattern
            gradients = bool(self.squares) and self.config.score_init == "gradient"
            of_units = bool(self.squares) and gate.granularity in ("head", "neuron")
            sums, flows = torch.zeros(2, gate.num_units, dtype=torch.float64)
            for tensor, covers in self.plan.covers.items():
                for cover in covers:
                    seen = tensor in self.squares or not self.squares
                    output = of_units and all(part.block_rows >= part.bounds[1] for part in cover.slices)
                    if of_units and not gradients:
                        seen = output
                    if cover.gate == index and self.plan.counted(tensor) and seen:
                        size = self.latent[tensor].detach().abs().double()
                        if output and gradients:
                            flow = self.squares[tensor].sqrt().expand_as(size)
                            flows.index_add_(0, unit_index(cover.slices).flatten(), flow.flatten())
                        if gradients:
                            own = self.weight_optimizer.state[self.latent[tensor]]
                            moment = self.moments[tensor][1] if tensor in self.moments else own["exp_avg_sq"]
                            moment = moment.clamp(min=torch.finfo(torch.float32).tiny).double()
                            size = size * self.squares[tensor] ** 0.375 * moment**0.125
                        elif self.squares:
                            size = size * self.squares[tensor].sqrt()
                        size = size / size.mean(1, keepdim=True) if by_row else size
                        sums.index_add_(0, unit_index(cover.slices).flatten(), size.flatten())
            mean = sums.sum() / gate.num_weights if scaled and not by_row else 1.0
            start = sums / gate.unit_sizes / mean
            start = (start * flows / flows.mean()).sqrt() if flows.any() else start
            self.scores[index].data.mul_(float(self.waits)).add_(start)

    def _count(self, keep: list[int]) -> int:
        units = [mask.float() for mask in self._best(keep)]
        return int(sum(self.mask_of(name, units).sum() for name in self.plan.covers if self.plan.counted(name)))

    def _best(self, keep: list[int]) -> list[Tensor]:
        gates = zip(self.plan.gates, self.scores, keep, strict=True)
        return [best_units(gate, scores.detach(), num) for gate, scores, num in gates]

    @torch.no_grad()
    def _hold_level(self) -> None:
        """Thresholds and masks of the next forward pass."""
        config = self.config
        if config.rule == "magnitude":
            self._scores_from_weights(scaled=False)
        if self.waits:
            self._scores_from_weights(scaled=True)
            self.waits, self.squares = False, {}
        settle = self.schedule.phase(self.num_steps) == "settle"
        if config.rule == "gumbel" and not settle:
            self._hold_soft()
            return
        if config.rule == "gumbel":
            self._settle_soft()
        level = 0.0 if settle else self.schedule.level(self.num_steps)
        self.sigma.copy_(self.remaining.with_patterns(self.sigma, config.temperature, level))
        if settle:
            sigma, keep = th.project_exact(self.remaining, self.sigma, config.temperature, config.target, self._count)
            self.sigma.copy_(sigma)
            self.settled = True
        elif config.control == "projected" or config.rule != "leap":
            sigma, self.calibration = th.project_level(
                self.remaining, self.sigma, config.temperature, level, self.calibration, self._count
            )
            self.sigma.copy_(sigma)
        if not settle:
            k = th.keep_ratio(self.sigma, config.temperature)
            keep = self.remaining.keep_counts(k)
            if config.control == "paper" and not self.plan.linear:
                density = self._count(keep) / self.plan.prunable
                self.calibration = th.calibrate(density, self.remaining.ratio(self.remaining.made(k)).item())
        self.masks = self._best(keep)
