"""The options of `fewstep density`. What the commands do is imported when they run, so that help answers at once."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fewstep.commands.consoles import console, errors

if TYPE_CHECKING:
    from fewstep.commands.density_target import Named

density = typer.Typer(
    help="Samplers of an unnormalised density: train, distil to one step, draw with weights, diagnose.",
    no_args_is_help=True,
)

# fields of the density are options that only it knows: they are read when it has been found
OPEN = {"allow_extra_args": True, "ignore_unknown_options": True}
FIELDS = "Fields of TARGET are options too, after it: see `fewstep density targets NAME`; of a function --dim, --low, --high, "
FIELDS += (
    "--score (its name) and --log-z. --low 0 bounds every coordinate, --low 0,none,-1 the first and the third of three."
)

Target = Annotated[
    str,
    typer.Argument(
        metavar="TARGET",
        help="A density: a name of `fewstep density targets`, module:function, file.py:function, or a folder that was trained.",
    ),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(
        "--set", help="field=value of the sampler (net.width=32 too), else of TARGET; target.field=value of both."
    ),
]
Out = Annotated[Path, typer.Option(help="Folder for checkpoints, the sampler and its card.")]
Steps = Annotated[int, typer.Option(help="Optimiser steps.")]
Batch = Annotated[int, typer.Option(help="Items per step.")]
Rate = Annotated[float, typer.Option(help="Peak learning rate.")]
Average = Annotated[float, typer.Option(help="Decay of the averaged weights, which are those that are kept.")]
OwnSteps = Annotated[int | None, typer.Option(help="Optimiser steps; the sampler's own if absent, mostly 2000.")]
OwnBatch = Annotated[int | None, typer.Option(help="Items per step; the sampler's own if absent, mostly 256.")]
OwnRate = Annotated[float | None, typer.Option(help="Peak learning rate; the sampler's own if absent, mostly 0.002.")]
OwnAverage = Annotated[
    float | None, typer.Option(help="Decay of the averaged weights that are kept; the sampler's own if absent.")
]
Every = Annotated[int, typer.Option(help="Steps between checkpoints.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")]
Gpu = Annotated[bool, typer.Option("--gpu", help="Train on the accelerator, where there is one.")]
Folder = Annotated[Path | None, typer.Option("--from", help="Folder of the sampler, where TARGET is not it.")]
Num = Annotated[int, typer.Option(help="How many draws.")]
DrawSteps = Annotated[int | None, typer.Option(help="Steps of a draw; the sampler's own if absent.")]
Seed = Annotated[int, typer.Option(help="Of everything random; draw k depends on the seed and k alone.")]
Chunk = Annotated[int, typer.Option(help="Draws that go through the network at once.")]
Level = Annotated[float, typer.Option(help="Probability of the interval of log Z.")]
Fields = Annotated[list[str] | None, typer.Option("--set", help="field=value of TARGET; repeatable.")]


@density.command(context_settings=OPEN, epilog=FIELDS)
def fit(  # noqa: PLR0913, PLR0917 - one parameter is one option
    context: typer.Context,
    target: Target,
    out: Out,
    sampler: Annotated[str, typer.Option(help="A name of `fewstep density samplers`.")] = "dis",
    loss: Annotated[
        str | None, typer.Option(help="kl, log_variance, trajectory_balance; the sampler's own if absent.")
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Named settings of the sampler: narrow, modes or many, of matched.")
    ] = None,
    assign: Assign = None,
    train_steps: OwnSteps = None,
    batch: OwnBatch = None,
    lr: OwnRate = None,
    ema: OwnAverage = None,
    seed: Seed = 0,
    whiten: Annotated[bool, typer.Option(help="Find coordinates in which N(0, I) is a fair guess first.")] = True,
    checkpoint_every: Every = 500,
    resume: Resume = True,
    gpu: Gpu = False,
) -> None:
    """Train a sampler of a density; started again with the same --out, it goes on where it stopped.

    Interrupted, it keeps a checkpoint and the sampler as it is, and exits with code 130.
    """
    from fewstep.commands import density_training as training
    from fewstep.core.registry import get
    from fewstep.densities.fit import options_for
    from fewstep.options import assignments

    for_target, own = training.split(assignments(assign or []), get(sampler, "teachers"))
    teacher = training.teacher_of(sampler, preset, own)
    own_or_given = {"train_steps": train_steps, "batch": batch, "lr": lr, "ema": ema}
    others = {"seed": seed, "whiten": whiten, "cpu": not gpu, "checkpoint_every": checkpoint_every}
    options = options_for(teacher, **own_or_given, **others)
    job = training.Job(_named(context, target, for_target, teacher), out, options, resume)
    raise typer.Exit(training.fit(job, teacher, loss, console, errors))


@density.command(context_settings=OPEN, epilog=FIELDS)
def distill(  # noqa: PLR0913, PLR0917 - one parameter is one option
    context: typer.Context,
    target: Target,
    out: Out,
    teacher: Annotated[Path | None, typer.Option(help="Folder of the teacher, where TARGET is not it.")] = None,
    method: Annotated[str, typer.Option(help="A method of distillation, of `fewstep density samplers`.")] = "cdds",
    preset: Annotated[
        str | None, typer.Option(help="Named settings of the method: narrow, many, paper, averaged.")
    ] = None,
    assign: Assign = None,
    train_steps: Steps = 8000,
    batch: Batch = 1024,
    lr: Rate = 4e-3,
    ema: Average = 0.999,
    seed: Seed = 0,
    checkpoint_every: Every = 500,
    resume: Resume = True,
    gpu: Gpu = False,
) -> None:
    """Train a map that does in one step what a trained sampler does in many; it resumes as `fit` does."""
    from fewstep.commands import density_training as training
    from fewstep.densities.fit import FitOptions
    from fewstep.options import assignments

    given = assignments(assign or [])
    for_target, own = training.split(given, type(training.student_of(method, preset, {})))
    student = training.student_of(method, preset, own)
    options = FitOptions(train_steps, batch, lr, ema, seed, cpu=not gpu, checkpoint_every=checkpoint_every)
    job = training.Job(_named(context, target, for_target, student), out, options, resume)
    raise typer.Exit(training.distill(job, teacher, student, console, errors))


@density.command(context_settings=OPEN, epilog=FIELDS)
def sample(  # noqa: PLR0913, PLR0917 - one parameter is one option
    context: typer.Context,
    target: Target,
    folder: Folder = None,
    num: Num = 10_000,
    steps: DrawSteps = None,
    seed: Seed = 0,
    chunk: Chunk = 4096,
    weights: Annotated[bool, typer.Option(help="Compute importance weights too.")] = True,
    level: Level = 0.95,
    out: Annotated[
        Path | None, typer.Option(help="File for the draws and their log-weights: .safetensors, .npz or .csv.")
    ] = None,
    assign: Fields = None,
) -> None:
    """Draw from a trained sampler, and say what the weights say: ESS, log Z with an interval, k-hat, calls."""
    from fewstep.commands import density_runs as runs
    from fewstep.options import assignments

    drawing = {"num": num, "steps": steps, "seed": seed, "chunk": chunk, "weights": weights, "level": level}
    runs.sample(_named(context, target, assignments(assign or [])), folder, drawing, out, console, errors)


@density.command(context_settings=OPEN, epilog=FIELDS)
def diagnose(  # noqa: PLR0913, PLR0917 - one parameter is one option
    context: typer.Context,
    target: Target,
    folder: Folder = None,
    draws: Annotated[Path | None, typer.Option(help="File of draws, .safetensors or .npz, instead.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for report.html and result.json.")] = Path("diagnosis"),
    num: Num = 10_000,
    steps: DrawSteps = None,
    seed: Seed = 0,
    chunk: Chunk = 4096,
    rows: Annotated[
        int, typer.Option(help="Draws that distances are computed from; cost grows with the square.")
    ] = 1000,
    level: Level = 0.95,
    assign: Fields = None,
) -> None:
    """Compare draws with their density: weights, marginals, modes, distances beside those of exact draws."""
    from fewstep.commands import density_runs as runs
    from fewstep.options import assignments

    drawing = {"num": num, "steps": steps, "seed": seed, "chunk": chunk, "weights": True, "level": level}
    named = _named(context, target, assignments(assign or []))
    runs.diagnosis(named, folder, drawing, out, console, errors, file=draws, rows=rows)


@density.command(context_settings=OPEN, epilog=FIELDS)
def export(
    context: typer.Context,
    target: Target,
    out: Annotated[Path, typer.Option(help="File: .pt2 (torch.export), or .onnx where onnx is installed.")],
    folder: Folder = None,
    steps: Annotated[int, typer.Option(help="How often the map is applied.")] = 1,
    assign: Fields = None,
) -> None:
    """Write the map of a distilled sampler, z -> x, as a program that does not need this library."""
    from fewstep.commands import density_runs as runs
    from fewstep.options import assignments

    runs.export(_named(context, target, assignments(assign or [])), folder, out, steps, console, errors)


@density.command()
def targets(name: Annotated[str | None, typer.Argument(help="One density, with its fields.")] = None) -> None:
    """List the densities that are known, with what is known of them."""
    from fewstep.commands import density_runs as runs

    own = [command.callback for command in density.registered_commands if command.callback is not None]
    taken = {parameter for function in own for parameter in inspect.signature(function).parameters}
    console.print(runs.target_table(name, taken))


@density.command()
def samplers(name: Annotated[str | None, typer.Argument(help="One sampler, with its fields.")] = None) -> None:
    """List the samplers that `fit` trains and the methods of `distill`."""
    from fewstep.commands import density_runs as runs

    console.print(runs.sampler_table(name))


def _named(context: typer.Context, target: str, fields: dict[str, str], method: Any = None) -> Named:
    """Return the density, with `fields` and the options that the command does not know, nor the settings of `method`."""
    from dataclasses import fields as fields_of

    from fewstep.commands.density_runs import notes
    from fewstep.commands.density_target import find
    from fewstep.options import pairs

    if target.startswith("-"):
        raise ValueError(f"TARGET comes first, before the options, got {target!r}")
    known: list[Any] = [name.removeprefix("--") for p in context.command.params for name in p.opts]
    known += [field.name for field in fields_of(method)] if method is not None else []
    with notes(errors):
        return find(target, {**fields, **pairs(context.args)}, known)
