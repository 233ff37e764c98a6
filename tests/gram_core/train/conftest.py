"""The objective once more, example by example from the paper; a batch to try it on; whole runs."""

import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from gram_core.model.gram import GRAM
from gram_core.model.recursion import State
from gram_core.train.checkpoint import Checkpoints, Progress
from gram_core.train.ema import EMA
from gram_core.train.engine import PlainEngine, Supervised
from gram_core.train.loop import TrainConfig, make_slots, train
from gram_core.train.objective import Batch, ObjectiveConfig, Verifier
from gram_core.train.optim import OptimConfig
from gram_core.train.slots import Slots

STEPS = 3  # supervision steps that a trace holds


def even_sum(inputs: Tensor, answers: Tensor) -> Tensor:
    """Stands for a task's verifier: right for about half of all answers."""
    return (answers.sum(-1) + inputs.sum(-1)) % 2 == 0


@pytest.fixture(scope="session")
def verify() -> Verifier:
    return even_sum


@pytest.fixture
def make_batch() -> Callable[..., tuple[Batch, Tensor]]:
    """Six slots in the middle of their trajectories, at every step, and noise for `count`
    transitions."""

    def make(model: GRAM, count: int = 2, seed: int = 0) -> tuple[Batch, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        slots, size = 6, model.shape.length
        h, low, *noise = torch.randn(
            2 + count, slots, model.length, model.config.dim, generator=generator
        )
        target = torch.randint(1, 3, (slots, size), generator=generator).byte()
        target[1, 3:] = 0
        target[4, :10] = 0
        batch = Batch(
            state=State(h, low),
            inputs=torch.randint(1, 3, (slots, size), generator=generator).byte(),
            target=target,
            puzzle=torch.zeros(slots, dtype=torch.int32),
            step=torch.tensor([2, 1, 0, 2, 1, 0]),
            last=torch.tensor([True, False, True, True, True, False]),
            may_halt=torch.zeros(slots, dtype=torch.bool),
            trace=torch.randn(slots, STEPS, model.config.dim, generator=generator),
        )
        return batch, torch.stack(noise)

    return make


@dataclass
class Expected:
    loss: Tensor
    h: Tensor
    trace: Tensor
    terms: dict[str, tuple[float, float]]


def divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p) of one example per position; of point masses by convention."""
    if q.std is None:
        return 0.5 * (q.mean - p.mean).square().sum(-1)[0]
    return kl_divergence(Normal(q.mean, q.std), Normal(p.mean, p.std)).sum(-1)[0]


def cross_entropy(logits: Tensor, target: Tensor, kind: str) -> Tensor:
    """Mean of -log p over the tokens of one answer that are not padding."""
    if kind == "softmax":
        score = logits.exp()
    else:
        score = torch.where(logits < 0, 1 / (1 - logits.clamp(max=0)), logits + 1)
    terms = [-(s[y] / s.sum()).log() for s, y in zip(score, target.tolist(), strict=True) if y]
    return torch.stack(terms).mean()


def binary(logit: Tensor, right: float | Tensor) -> Tensor:
    """-log likelihood of a coin with P(1) = sigmoid(logit)."""
    return -(right * torch.sigmoid(logit).log() + (1 - right) * torch.sigmoid(-logit).log())


def one_example(
    model: GRAM, o: ObjectiveConfig, batch: Batch, noise: Tensor, row: int, follows_prior: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Transitions of one slot: its final h, what it is charged and its plain KL."""
    cut = slice(row, row + 1)
    twin = model.config.guidance == "none"
    e_x = model.embed(batch.inputs[cut], batch.puzzle[cut])
    state = State(batch.state.h[cut], batch.state.l[cut])
    charged = plain = torch.zeros(())
    for t in range(len(noise)):
        final = t == len(noise) - 1
        learns = final or not model.config.deep_supervision
        if not learns:
            state = state.detach()
        proposal = model.recursion(state, e_x)
        if not learns:
            proposal = proposal.detach()
        u = proposal.h
        if twin:
            state = proposal
            continue
        p = model.prior(u)
        q = model.posterior(u, model.embed_answer(batch.target[cut]))
        chosen = q if not follows_prior and (final or o.rollout == "posterior") else p
        eps = chosen.mean if chosen.std is None else chosen.mean + chosen.std * noise[t, cut]
        state = State(u + eps, proposal.l)
        if not learns:
            state = state.detach()
        if final or o.kl == "every":
            weighed = o.balance * divergence(q.detach(), p)
            weighed = weighed + (1 - o.balance) * divergence(q, p.detach())
            if o.kl_reduction == "mean":
                weighed = weighed / model.config.dim
            for position in weighed:
                free = position if position > o.free_bits else position.detach() * 0 + o.free_bits
                charged = charged + free / model.shape.length
            plain = plain + divergence(q, p).sum().detach() / model.shape.length
    return state.h, charged, plain


def head_terms(
    model: GRAM, o: ObjectiveConfig, trace: Tensor, step: int, quality: dict[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Halt loss, value loss and continuation loss of one slot from its features so far."""
    q = [model.halt(feature) for feature in trace[: step + 1]]
    halt = binary(q[step][0], quality[o.halt_target])
    errors = [(model.value(f) - quality[o.value_target]) ** 2 for f in trace[: step + 1]]
    last = len(trace) - 1  # of N_sup: after it nothing goes on
    onward = []
    for s in range(step):
        halt_next, go_on_next = torch.sigmoid(q[s + 1]).detach()
        best = halt_next if s + 1 == last else torch.maximum(halt_next, go_on_next)
        onward.append(binary(q[s][1], best))
    none = torch.zeros(())
    return halt, torch.stack(errors).mean(), torch.stack(onward).mean() if onward else none


@pytest.fixture(scope="session")
def reference() -> Callable[..., Expected]:
    """The loss of a supervision step, one example after the other."""

    def step_loss(
        model: GRAM, o: ObjectiveConfig, batch: Batch, noise: Tensor, prior_rows: int
    ) -> Expected:
        twin = model.config.guidance == "none"
        lists: dict[str, list[Tensor]] = defaultdict(list)
        states, traces, onward, charges = [], [], [], []
        for row, (step, last) in enumerate(
            zip(batch.step.tolist(), batch.last.tolist(), strict=True)
        ):
            by_prior = row < prior_rows and not twin
            h, charged, plain = one_example(model, o, batch, noise, row, by_prior)
            logits, target = model.decode(h)[0], batch.target[row]
            nll = cross_entropy(logits, target, o.cross_entropy)
            answer = logits.argmax(-1)
            hits = [a == y for a, y in zip(answer.tolist(), target.tolist(), strict=True) if y]
            quality = {
                "token": sum(hits) / len(hits),
                "exact": float(all(hits)),
                "valid": float(even_sum(batch.inputs[row], answer)),
            }
            seen = h[0, 0] if model.config.head_input == "first" else h[0].mean(0)
            trace = batch.trace[row].clone()
            trace[step] = seen.detach()
            if not by_prior:
                lists["reconstruction"].append(nll)
                if not twin:
                    charges.append(charged)
                    lists["kl"].append(plain)
                if last:
                    lists["token_accuracy"].append(torch.tensor(quality["token"]))
                    lists["exact"].append(torch.tensor(quality["exact"]))
            if (by_prior or twin) and last:
                lists["prior_reconstruction"].append(nll.detach())
                lists["prior_token_accuracy"].append(torch.tensor(quality["token"]))
                lists["prior_exact"].append(torch.tensor(quality["exact"]))
                lists["prior_valid"].append(torch.tensor(quality["valid"]))
            if twin or by_prior == (o.heads_on == "prior"):
                halt, value, more = head_terms(model, o, trace, step, quality)
                lists["halt_loss"].append(halt)
                said = float(model.halt(trace[step])[0].detach() >= 0)
                lists["halt_accuracy"].append(torch.tensor(float(said == quality[o.halt_target])))
                if last:
                    lists["value_loss"].append(value)
                    onward.append(more)
            states.append(h.detach())
            traces.append(trace)

        def mean(values: list[Tensor]) -> Tensor:
            return sum(values, torch.zeros(())) / max(1, len(values))

        loss = mean(lists["reconstruction"]) + o.beta * mean(charges)
        loss = loss + o.halt_weight * mean(lists["halt_loss"])
        # Of all that learn, one in N ends at an iteration on average.
        usual = len(lists["halt_loss"]) / batch.trace.shape[1]
        loss = loss + o.value_weight * sum(lists["value_loss"], torch.zeros(())) / (usual or 1)
        if model.config.halting == "q_learning":
            loss = loss + o.halt_weight * sum(onward, torch.zeros(())) / (usual or 1)
        terms = {
            name: (math.fsum(float(v.detach()) for v in values), float(len(values)))
            for name, values in lists.items()
        }
        return Expected(loss, torch.cat(states), torch.stack(traces), terms)

    return step_loss


@dataclass
class Run:
    """A run of training and its parts; `reported` are the rows that it told its caller."""

    engine: PlainEngine
    slots: Slots
    config: TrainConfig
    reported: list[dict[str, float]]
    ema: EMA | None = None
    progress: Progress | None = None

    def go(self, checkpoints: Checkpoints | None = None, kill_at: int | None = None) -> "Run":
        """Train; with `kill_at`, stop dead as that iteration is reported."""

        def report(row: dict[str, float]) -> None:
            if row["step"] == kill_at:
                raise KeyboardInterrupt
            self.reported.append(row)

        parts = train(self.engine, self.slots, self.config, checkpoints, report)
        self.ema, self.progress = parts
        return self


@pytest.fixture
def make_run(make_model, examples, queens4) -> Callable[..., Run]:
    """A fresh run of six iterations on 4x4 boards, a checkpoint after the third."""

    def make(
        model_settings: Mapping[str, Any] = MappingProxyType({}),
        halt_bias: float | None = None,
        device: str = "cpu",
        **settings: Any,
    ) -> Run:
        defaults = {
            "steps": 6,
            "batch": 6,
            "prior_slots": 0.3,
            "log_every": 1,
            "checkpoint_every": 3,
            "ema": 0.9,
            "engine": "plain",
            "compile": False,
            "optim": OptimConfig(lr=1e-2, warmup=2),
        }
        config = TrainConfig(**{**defaults, **settings})
        model = make_model(stir=0.0, **model_settings)
        if halt_bias is not None:
            torch.nn.init.constant_(model.halt.map.bias, halt_bias)
        module = Supervised(
            model.to(device),
            ObjectiveConfig(),
            queens4.on(device).verify,
            prior_rows=config.prior_rows(model.config),
            precision=config.precision,
        )
        engine = PlainEngine(module, config.optim, config.accumulate)
        return Run(engine, make_slots(engine, examples, config), config, [])

    return make
