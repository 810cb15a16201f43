"""Training: one plain loop on accelerate, for one process or many.

Whatever happens in step k depends on (seed, k) and on the state of the optimisers only, so that a run that was killed and
resumed gives the same numbers as one that was not. Gradients are averaged over processes by hand: an objective may then
call the model as often and in whatever way it likes.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fewstep.checkpoints import last_checkpoint, last_step, read_checkpoint, shorten_log, write_checkpoint
from fewstep.core.checks import check_counts, check_not_negative, check_positive
from fewstep.core.noise import Noise, mix
from fewstep.core.objective import Objective
from fewstep.core.signals import stop_signals
from fewstep.processes import check_shared, process


class Batches(Protocol):
    """Training data indexed by step and item; the whole batch is spread over the processes."""

    def count(self, step: int) -> int:
        """Return the number of items of this step, over all processes."""

    def batch(self, step: int, items: Iterable[int]) -> Any:
        """Return the given items of this step."""


Streaming = Callable[[tuple[int, ...], range, torch.device], Noise]


def one_each(words: tuple[int, ...], items: range, device: torch.device) -> Noise:
    """Return a stream for every item from `words` and the item alone."""
    return Noise([mix(*words, item) for item in items], device=device)


@dataclass(frozen=True)
class TrainingOptions:
    """How a model is optimised.

    Attributes:
        steps: optimiser steps of the whole run.
        lr: peak learning rate.
        warmup: steps of linear warm-up; a cosine takes the rate from there to `lr_final` times its peak.
        lr_final: final share of the learning rate.
        betas: AdamW's decay rates.
        weight_decay: AdamW's weight decay.
        clip: largest norm of a player's gradient.
        ema: decay of the averaged weights; early on it is min(ema, (1 + n) / (10 + n)).
        precision: "no" or "bf16" (autocast).
        accumulate: pieces in which each process computes its share of the batch.
        seed: seed of the noise.
        log_every: steps between lines of the log.
        validate_every: steps between validations.
        checkpoint_every: steps between checkpoints.
        tensorboard: also write TensorBoard events.
    """

    steps: int = 10_000
    lr: float = 8e-4
    warmup: int = 300
    lr_final: float = 0.0
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "bf16"
    accumulate: int = 1
    seed: int = 0
    log_every: int = 20
    validate_every: int = 500
    checkpoint_every: int = 500
    tensorboard: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision must be 'no' or 'bf16', not {self.precision!r}")
        check_counts(self, "steps", "accumulate", "log_every", "validate_every", "checkpoint_every")
        check_counts(self, "warmup", "seed", least=0)
        check_positive(self, "lr", "clip")
        check_not_negative(self, "lr_final", "weight_decay")
        if not 0 <= self.ema < 1 or len(self.betas) != 2 or not all(0 <= b < 1 for b in self.betas):
            raise ValueError("0 <= ema < 1 and two betas in [0, 1) are needed")

    def rate(self, step: int) -> float:
        """Return the learning rate of step `step`, counted from 0."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = min(1.0, (step - self.warmup) / max(1, self.steps - self.warmup))
        return self.lr * (self.lr_final + (1 - self.lr_final) * (1 + math.cos(math.pi * done)) / 2)


@dataclass
class Trainer:
    """Trains `model` on `objective` and keeps everything in the folder `out`.

    Attributes:
        model: what is trained; changed in place.
        objective: the loss.
        data: the batches.
        out: folder of checkpoints and of `log.jsonl`.
        options: how.
        validate: figures of the averaged model for the log; runs on the main process.
        export: called with the averaged model after every checkpoint and at the end, on the main process.
        describe: facts that a checkpoint must share with the run that resumes from it.
        cpu: stay on the CPU even where an accelerator is present.
        streams: how the items of a step get their randomness, `one_each` unless said otherwise.
    """

    model: nn.Module
    objective: Objective
    data: Batches
    out: Path
    options: TrainingOptions = field(default_factory=TrainingOptions)
    validate: Callable[[nn.Module], dict[str, float]] | None = None
    export: Callable[[nn.Module], None] | None = None
    describe: dict[str, Any] = field(default_factory=dict)
    cpu: bool = False
    streams: Streaming = one_each

    def __post_init__(self) -> None:
        self.accelerator = process(self.cpu)
        self.out = Path(self.out)
        self.model.to(self.accelerator.device).train()
        self.ema = copy.deepcopy(self.model).eval().requires_grad_(False)
        # walking through modules takes its time
        self._weights: list[list[Tensor]] = [list(m.parameters()) for m in (self.ema, self.model)]
        self._buffers = [list(m.buffers()) for m in (self.ema, self.model)]
        self.players = {name: list(ps) for name, ps in self.objective.players(self.model).items()}
        self._others = {name: self._trained_without(ps) for name, ps in self.players.items()}
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        self._owners = {name: self._owner(name) for name in self.players}
        self.step = 0
        self._writer: Any = None
        self._share_weights()

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.step >= self.options.steps

    def run(self, resume: bool = True) -> nn.Module:
        """Train to `options.steps` and return the averaged model; `resume` continues from the last checkpoint.

        On SIGINT or SIGTERM the current step is finished, a checkpoint is written and the averaged model of that moment
        is returned; `finished` is then False.

        Raises:
            ValueError: the last checkpoint does not fit this run, there is one and `resume` is False, or not all processes see it.
            FloatingPointError: a gradient is not finite.
        """
        self._start(resume)
        window: list[dict[str, float]] = []
        with stop_signals() as stopped, self._progress() as advance:
            while not self.finished and not self._anyone(stopped()):
                started = time.perf_counter()
                figures = self._train_step()
                window.append({**figures, "seconds_per_step": time.perf_counter() - started})
                advance()
                if self._due(self.options.log_every):
                    self._log({**_means(window), "lr": self.options.rate(self.step - 1)})
                    window.clear()
                if self._due(self.options.checkpoint_every):
                    self.save()  # before anything that can fail and is not needed to go on
                if self._due(self.options.validate_every):
                    self._validate()
        self.save()
        self.accelerator.wait_for_everyone()  # a launcher stops the main process as soon as another leaves with an error
        self._close()
        return self.ema

    def run_whole(self, resume: bool = True) -> nn.Module:
        """Do what `run` does, to the last step.

        Raises:
            KeyboardInterrupt: the training was told to stop; a checkpoint was written first.
        """
        model = self.run(resume)
        if not self.finished:
            raise KeyboardInterrupt(f"stopped after step {self.step} of {self.options.steps}; the same command goes on")
        return model

    def save(self) -> None:
        """Write a checkpoint of this moment; on the main process only."""
        if not self.accelerator.is_main_process:
            return
        states = {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()}
        write_checkpoint(self.out, self.step, self.model, self.ema, states, self.describe)
        if self.export is not None:
            self.export(self.ema)

    def _train_step(self) -> dict[str, float]:
        """Let every player take one step on this step's batch."""
        options, metrics = self.options, {}
        for turn, (player, params) in enumerate(self.players.items()):
            optimizer = self.optimizers[self._owners[player]]
            for group in optimizer.param_groups:
                group["lr"] = options.rate(self.step)
            with _held(self._others[player]):
                figures = self._gradients(player, turn)
            norm = float(nn.utils.clip_grad_norm_(params, options.clip))
            if not math.isfinite(norm):
                raise FloatingPointError(f"the gradient of {player!r} is not finite at step {self.step}")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            metrics.update({f"{player}/{name}": value for name, value in {**figures, "grad_norm": norm}.items()})
        self.step += 1
        self._average()
        return metrics

    def _gradients(self, player: str, turn: int) -> dict[str, float]:
        """Put the gradient of the whole batch's mean loss into the player's parameters; return the figures."""
        from accelerate.utils import send_to_device

        totals: dict[str, float] = {}
        pieces = self._pieces()
        for items in pieces:
            batch = send_to_device(self.data.batch(self.step, items), self.accelerator.device)
            noise = self.streams((self.options.seed, self.step, turn), items, self.accelerator.device)
            with self._autocast():
                loss, figures = self.objective.loss(player, self.model, batch, noise)
            (loss / len(pieces)).backward()
            for name, value in {"loss": float(loss.detach()), **figures}.items():
                totals[name] = totals.get(name, 0.0) + value / len(pieces)
        self._reduce_gradients(self.players[player])
        return self._mean(totals)

    def _pieces(self) -> list[range]:
        """Return the items of this process in this step, in `accumulate` equal pieces."""
        count, world, parts = self.data.count(self.step), self.accelerator.num_processes, self.options.accumulate
        size, rest = divmod(count, world * parts)
        if rest or not size:
            raise ValueError(f"a batch of {count} cannot be split evenly over {world} processes x {parts} pieces")
        first = self.accelerator.process_index * parts * size
        return [range(first + k * size, first + (k + 1) * size) for k in range(parts)]

    @torch.no_grad()
    def _average(self) -> None:
        """Move the averaged weights towards the current ones; buffers are copied."""
        decay = min(self.options.ema, (1 + self.step) / (10 + self.step))
        averages, current = self._weights
        torch._foreach_lerp_(averages, current, 1 - decay)
        for average, buffer in zip(*self._buffers, strict=True):
            average.copy_(buffer)

    def _trained_without(self, params: list[nn.Parameter]) -> list[nn.Parameter]:
        """Return the trained parameters that are not among `params`."""
        mine = {id(p) for p in params}
        return [p for p in self.model.parameters() if id(p) not in mine and p.requires_grad]

    def _owner(self, player: str) -> str:
        """Return the player whose optimiser `player` uses: its own, or that of an earlier one with the same parameters."""
        mine = {id(p) for p in self.players[player]}
        for name in self.optimizers:
            shared = mine & {id(p) for p in self.players[name]}
            if shared and len(shared) == len(mine) == len(self.players[name]):
                return name
            if shared:
                raise ValueError(f"{name!r} and {player!r} share some of their parameters; they must share all or none")
        o, params = self.options, self.players[player]
        self.optimizers[player] = torch.optim.AdamW(
            params, lr=o.lr, betas=o.betas, weight_decay=o.weight_decay, fused=True
        )
        return player

    def _autocast(self) -> torch.autocast:
        device = self.accelerator.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.options.precision == "bf16")

    def _due(self, every: int) -> bool:
        return self.step % every == 0

    def _start(self, resume: bool) -> None:
        """Continue from the last checkpoint, if there is one; forget what was logged after it."""
        folder = last_checkpoint(self.out)
        check_shared(self.accelerator, self.out, last_step(self.out))
        if folder is not None:
            if not resume:
                raise ValueError(f"{folder} is there already: resume from it, or choose another output folder")
            self._load(folder)
        if self.accelerator.is_main_process:
            shorten_log(self.out / "log.jsonl", self.step)

    def _load(self, folder: Path) -> None:
        """Take over a checkpoint; options are those of this run."""
        self.step, states = read_checkpoint(folder, self.model, self.ema, self.describe)
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(states[name])
            for group in optimizer.param_groups:
                group.update(betas=self.options.betas, weight_decay=self.options.weight_decay)

    def _validate(self) -> None:
        if self.validate is not None and self.accelerator.is_main_process:
            with torch.no_grad():
                self._log({f"validation/{name}": value for name, value in self.validate(self.ema).items()})
        self.accelerator.wait_for_everyone()

    def _log(self, figures: dict[str, float]) -> None:
        """Append one line to log.jsonl, and to TensorBoard where asked for."""
        if not self.accelerator.is_main_process:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        with (self.out / "log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": self.step, "time": round(time.time(), 1), **figures}) + "\n")
        if self.options.tensorboard:
            if self._writer is None:
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(self.out / "tensorboard"), purge_step=self.step)
            for name, value in figures.items():
                self._writer.add_scalar(name, value, self.step)

    def _close(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def _share_weights(self) -> None:
        """Give every process the main one's initial weights."""
        if self.accelerator.num_processes > 1:
            for value in [*self.model.state_dict().values(), *self.ema.state_dict().values()]:
                torch.distributed.broadcast(value, 0)

    def _reduce_gradients(self, params: list[nn.Parameter]) -> None:
        if self.accelerator.num_processes == 1:
            return
        for p in params:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        flat = torch.cat([p.grad.flatten() for p in params if p.grad is not None])
        torch.distributed.all_reduce(flat)
        flat /= self.accelerator.num_processes
        for p, part in zip(params, flat.split([p.numel() for p in params]), strict=True):
            p.grad = part.view_as(p)

    def _mean(self, figures: dict[str, float]) -> dict[str, float]:
        """Return the mean of each figure over the processes."""
        if self.accelerator.num_processes == 1:
            return figures
        values = torch.tensor([figures[name] for name in sorted(figures)], device=self.accelerator.device)
        torch.distributed.all_reduce(values)
        return dict(zip(sorted(figures), (values / self.accelerator.num_processes).tolist(), strict=True))

    def _anyone(self, stopped: bool) -> bool:
        """Return whether any process was told to stop, so that all of them leave at the same step."""
        if self.accelerator.num_processes == 1:
            return stopped
        flag = torch.tensor(float(stopped), device=self.accelerator.device)
        torch.distributed.all_reduce(flag)
        return bool(flag > 0)

    @contextmanager
    def _progress(self) -> Iterator[Callable[[], None]]:
        if not self.accelerator.is_main_process:
            yield lambda: None
            return
        from rich.progress import Progress

        with Progress(transient=True) as bar:
            task = bar.add_task("training", total=self.options.steps, completed=self.step)
            yield lambda: bar.advance(task)


def _means(window: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of every figure over the steps of `window`."""
    return {name: sum(figures[name] for figures in window) / len(window) for name in window[0]}


@contextmanager
def _held(params: list[nn.Parameter]) -> Iterator[None]:
    """Take `params` for constants: a player's gradients do not reach the others' weights during its turn."""
    for p in params:
        p.requires_grad_(False)
    try:
        yield
    finally:
        for p in params:
            p.requires_grad_(True)
