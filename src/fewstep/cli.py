"""The command `fewstep`. Everything heavy is imported inside the commands, so that `fewstep --help` answers at once."""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer
from rich.markup import escape
from typer.core import TyperGroup

from fewstep import __version__
from fewstep.commands.benching import BenchCommand
from fewstep.commands.consoles import console, errors
from fewstep.commands.density import density
from fewstep.commands.extras import OperatorCommand, check_words, operator_options


class _Commands(TyperGroup):
    """Says where an interrupted command stopped, which typer alone does not."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stopped:
            errors.print(escape(str(stopped) or "interrupted"), highlight=False)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    name="fewstep",
    help="Posterior samples of a photograph from a diffusion model in a few network calls, with honest uncertainty.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
bench = typer.Typer(help="Benchmarks: what the methods give on problems whose answer is known.", no_args_is_help=True)
app.add_typer(bench, name="bench")
app.add_typer(density, name="density")

Sigma = Annotated[float | None, typer.Option(help="Noise standard deviation in units of [0, 1] images.")]
Operator = Annotated[str | None, typer.Option(help="How the photograph was degraded; see `fewstep operators`.")]
Antithetic = Annotated[
    bool | None,
    typer.Option("--antithetic/--independent", help="Pairs with opposite noise, as by default where they are even."),
]
Seed = Annotated[int, typer.Option(help="Sample k depends on the measurement, the seed and k alone.")]
Schedule = Annotated[Path | None, typer.Option(help="A file of `fewstep tune`: solver, settings and times.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, ...; a GPU where there is one.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress bar.")]
TrainSteps = Annotated[int | None, typer.Option(help="Steps, instead of those of the recipe.")]
Resume = Annotated[bool, typer.Option(help="Go on from the last checkpoint in --out.")]


def _show_version(asked: bool) -> None:
    if asked:
        console.print(f"fewstep {__version__}", highlight=False)
        raise typer.Exit


@app.callback()
def fewstep(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """See the help of `app`; options of `fewstep` itself."""


@app.command(cls=OperatorCommand)
def restore(  # noqa: PLR0913, PLR0917 - one parameter is one option
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="INPUT", help="A photograph, or a folder of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("restored"),
    operator: Operator = None,
    sigma: Sigma = None,
    method: Annotated[str | None, typer.Option(help="The sampler; see `fewstep methods`.")] = None,
    preset: Annotated[
        str | None, typer.Option(help="Named settings; 'jpeg' for JPEG, 'photo' where there are such, else 'paper'.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the method; short for --set steps=N.")] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="field=value of the method; repeatable.")] = None,
    solver: Annotated[
        str | None, typer.Option(help="A solver that steps with the method's prediction; --steps is then its.")
    ] = None,
    schedule: Schedule = None,
    samples: Annotated[int, typer.Option(help="How many samples.")] = 8,
    antithetic: Antithetic = None,
    seed: Seed = 0,
    prior: Annotated[str, typer.Option(help="Name or folder of the prior.")] = "natural",
    simulate: Annotated[bool, typer.Option("--simulate", help="INPUT is clean: degrade it first, then score.")] = False,
    level: Annotated[float, typer.Option(help="Probability of the intervals.")] = 0.9,
    lpips_weights: Annotated[Path | None, typer.Option(help="LPIPS weights, a file or folder.")] = None,
    window: Annotated[int, typer.Option(help="Side of the windows of the network, pixels; bounds the memory.")] = 512,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Draw what a photograph may have been, and say how far each pixel can be trusted.

    A JPEG is recognised by itself and restored from its own compression; everything else needs --operator. Options of the
    operators (--factor, --kernel, ...) are those of `fewstep operators`, further fields of a method go through --set.
    """
    from fewstep.commands.restoring import run
    from fewstep.options import assignments
    from fewstep.task import Settings

    fields: dict[str, Any] = {**({"steps": steps} if steps is not None else {}), **assignments(assign or [])}
    chosen = Settings(
        operator=operator,
        operator_fields=operator_options(context),
        sigma=sigma,
        method=method or "",
        preset=preset,
        method_fields=fields,
        solver=solver,
        schedule=schedule,
        samples=samples,
        antithetic=antithetic,
        seed=seed,
        prior=prior,
        simulate=simulate,
        level=level,
        lpips_weights=str(lpips_weights) if lpips_weights else None,
        window=window,
        device=device,
    )
    raise typer.Exit(run(path, out, chosen, console, errors, quiet=quiet))


@app.command(cls=OperatorCommand)
def simulate(
    context: typer.Context,
    path: Annotated[Path, typer.Argument(metavar="INPUT", help="A clean photograph.")],
    operator: Annotated[str, typer.Option(help="How to degrade it; see `fewstep operators`.")],
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("simulated"),
    sigma: Sigma = None,
    seed: Seed = 0,
) -> None:
    """Degrade a photograph: writes measurement.png, measurement.safetensors (exact) or .jpg, truth.png, simulation.json."""
    from fewstep.commands.simulating import run

    run(path, out, operator, operator_options(context), sigma, seed)
    console.print(f"written to {escape(str(out))}")


@app.command()
def methods(
    name: Annotated[str | None, typer.Argument(help="One method, with its fields and presets.")] = None,
    kind: Annotated[str, typer.Option(help="methods (posterior samplers) or solvers (prior samplers).")] = "methods",
) -> None:
    """List the methods: source, what they need of the operator, network calls, what they converge to."""
    from fewstep.commands import listing

    console.print(listing.one_method(name, kind) if name else listing.all_methods(kind))


@app.command()
def operators(name: Annotated[str | None, typer.Argument(help="One operator.")] = None) -> None:
    """List the operators and their options."""
    from fewstep.commands import listing

    console.print(listing.operator_table(name))


@app.command()
def cite(
    name: Annotated[str, typer.Argument(help="A method.")],
    kind: Annotated[str, typer.Option(help="methods, solvers, teachers, ...")] = "methods",
) -> None:
    """Print the BibTeX entry of a method."""
    from fewstep.core.registry import get

    console.print(get(name, kind).reference.bibtex(), markup=False, highlight=False)


@app.command()
def doctor() -> None:
    """Print versions, devices and known problems of this installation."""
    from fewstep.commands import health

    problems = health.show(console)
    raise typer.Exit(1 if problems else 0)


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A recipe: a .yaml file, or the name of a shipped one.")],
    data: Annotated[Path, typer.Argument(help="Folder of photographs, or the file of digits.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and what is trained.")],
    steps: TrainSteps = None,
    resume: Resume = True,
) -> None:
    """Train a prior or a sampler by a recipe; started again with the same --out, it goes on where it stopped.

    Interrupted, it writes a checkpoint first and exits with code 130. Runs on several processes or machines under
    `accelerate launch -m fewstep train ...`.
    """
    from fewstep import recipes
    from fewstep.processes import until_the_end

    with until_the_end():
        recipes.train(recipe, data, out, steps, resume)
        _say_written(out)


@app.command()
def train_prior(
    data: Annotated[Path, typer.Argument(help="Folder of photographs.")],
    out: Annotated[Path, typer.Option(help="Folder for checkpoints and the prior.")],
    recipe: Annotated[str, typer.Option(help="A recipe: a .yaml file, or the name of a shipped one.")] = "natural",
    steps: TrainSteps = None,
    resume: Resume = True,
) -> None:
    """Train a prior: short for `fewstep train natural`."""
    from fewstep.processes import until_the_end
    from fewstep.recipes import train_prior as run

    with until_the_end():
        run(recipe, data, out, steps, resume)
        _say_written(out)


def _say_written(out: Path) -> None:
    """Print what a training wrote, on one of its processes."""
    from fewstep.processes import process
    from fewstep.recipes import written

    if process().is_main_process:
        for line in written(out):
            console.print(escape(line), highlight=False)


Size = Annotated[int | None, typer.Option(help="Height and width, where the prior takes any; 64 if absent.")]
Label = Annotated[int | None, typer.Option("--cond", help="Class, for a prior that knows classes.")]


@app.command()
def sample(  # noqa: PLR0913, PLR0917 - one parameter is one option
    prior: Annotated[str, typer.Argument(help="Name or folder of the prior.")],
    solver: Annotated[
        str | None, typer.Option(help="See `fewstep methods --kind solvers`; that of the schedule, or dpmpp.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of the solver.")] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="field=value of the solver; repeatable.")] = None,
    samples: Annotated[int, typer.Option(help="How many.")] = 16,
    seed: Annotated[int, typer.Option(help="Sample k depends on the seed and k alone.")] = 0,
    label: Label = None,
    size: Size = None,
    schedule: Schedule = None,
    chunk: Annotated[int, typer.Option(help="Samples that go through the network at once.")] = 64,
    out: Annotated[Path | None, typer.Option(help="Folder for samples.safetensors and sampling.json.")] = None,
    grid_image: Annotated[Path | None, typer.Option(help="PNG of all samples side by side.")] = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Draw samples of a prior in a few network calls."""
    from fewstep.commands.sampling import Drawing, Source, sample
    from fewstep.options import assignments

    drawing = Drawing(solver, steps, assignments(assign or []), schedule, samples, seed, chunk)
    source = Source(prior, size, label, device)
    sample(source, drawing, console, out=out, grid_image=grid_image, quiet=quiet)


@app.command()
def tune(  # noqa: PLR0913, PLR0917 - one parameter is one option
    prior: Annotated[str, typer.Argument(help="Name or folder of the prior.")],
    out: Annotated[Path, typer.Option(help="File of the schedule, .json.")],
    method: Annotated[str, typer.Option(help="ays, ggdm or s3.")] = "ggdm",
    steps: Annotated[int, typer.Option(help="Steps of the schedule.")] = 10,
    solver: Annotated[str, typer.Option(help="What the times are for; s3 finds its own.")] = "dpmpp",
    assign: Annotated[list[str] | None, typer.Option("--set", help="field=value of the method; repeatable.")] = None,
    seed: Annotated[int, typer.Option(help="Of everything drawn.")] = 0,
    label: Label = None,
    size: Size = None,
    device: Device = None,
    quiet: Quiet = False,
) -> None:
    """Fit a schedule to a prior and a number of steps, for `fewstep sample --schedule`.

    Interrupted, it goes on where it stopped when it is started again with the same --out.
    """
    from fewstep.commands.sampling import Source, tune
    from fewstep.options import assignments

    fields = assignments(assign or [])
    source = Source(prior, size, label, device)
    tune(source, method, steps, out, console, solver=solver, seed=seed, fields=fields, quiet=quiet)


@app.command()
def calibrate(  # noqa: PLR0913, PLR0917 - one parameter is one option
    network: Annotated[str, typer.Argument(help="A trained sampler: name or folder.")],
    photos: Annotated[Path, typer.Argument(metavar="FOLDER", help="Photographs that it was not trained on.")],
    level: Annotated[list[float] | None, typer.Option(help="Probability of the intervals, .9; repeatable.")] = None,
    samples: Annotated[list[int] | None, typer.Option(help="Samples per photograph, 8; repeatable.")] = None,
    antithetic: Antithetic = None,
    limit: Annotated[int | None, typer.Option(help="The last photographs in sorted order, so many of them.")] = None,
    crop: Annotated[int, typer.Option(help="Side of the square in the middle of each, pixels.")] = 128,
    recipe: Annotated[
        str | None, typer.Option(help="Whose operators to calibrate for; the sampler's if absent.")
    ] = None,
    operator: Annotated[list[str] | None, typer.Option(help="Only these of its operators; repeatable.")] = None,
    apart: Annotated[
        list[str] | None,
        typer.Option(help="Field whose choices are calibrated apart, or field=15,30 to cut a range; repeatable."),
    ] = None,
    assign: Annotated[list[str] | None, typer.Option("--set", help="field=value of ud2m; repeatable.")] = None,
    worst: Annotated[
        float | None,
        typer.Option(help="Most that one photograph counts: share of its pixels missed; 3 (1 - level) if absent."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of measurements and samples.")] = 0,
    device: Device = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a copy of the sampler with calibration.json.")] = None,
) -> None:
    """Calibrate the intervals of a trained sampler, per family of operators; `restore` uses what lies beside the weights."""
    from fewstep.calibrated import Plan
    from fewstep.commands.calibrating import Job, run
    from fewstep.options import assignments, cuts

    plan = Plan(
        tuple(level or [0.9]),
        tuple(numbers := samples or [8]),
        crop,
        worst,
        seed,
        words=tuple(operator or []),
        apart=cuts(apart or []),
        antithetic=not any(k % 2 for k in numbers) if antithetic is None else antithetic,
    )
    run(Job(network, photos, assignments(assign or []), recipe, limit, device, out), plan, console)


def _bench(name: str, text: str) -> None:
    def command(context: typer.Context) -> None:
        from fewstep.commands.benching import run

        run(name, context.args)

    settings = {"allow_extra_args": True, "ignore_unknown_options": True}
    bench.command(name, cls=BenchCommand, help=text, context_settings=settings)(command)


_bench("gaussian", "Distance to the exact posterior of Gaussian problems.")
_bench("mixture", "Distance to the exact posterior of mixture problems.")
_bench("denoise", "PSNR of a prior as a denoiser.")
_bench("images", "PSNR, SSIM, LPIPS and coverage on photographs.")
_bench("unfolded", "UD2M before and after training, on mixtures with known posteriors.")
_bench("solvers", "Solvers at few network calls on mixtures and on a network, and under a guided sampler.")
_bench("densities", "Samplers of unnormalised densities, one step and more, beside Monte Carlo at equal calls.")
_bench("srds", "Depth and time of the solver that is parallel in time.")
_bench("schedulers", "Our solvers beside the schedulers of diffusers: what they give and what they cost.")
_bench("speed", "Cost of the loop, and deepinv beside it.")
_bench("calibration", "Coverage of intervals task by task, on photographs that nothing was fitted to.")
_bench("startup", "What importing costs, and how soon the command line answers.")


@bench.command()
def table(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A report of a benchmark.")],
    out: Annotated[Path | None, typer.Option(help="Markdown file; the terminal where absent.")] = None,
) -> None:
    """Print the tables of a benchmark's report as Markdown."""
    from fewstep.bench.table import main as print_table

    print_table(file, out)


def main() -> NoReturn:
    """Run the command; bad input is one red line on stderr and exit code 2 (FEWSTEP_DEBUG=1 shows the traceback)."""
    signal.signal(signal.SIGTERM, _terminate)
    if isinstance(sys.stdout, io.TextIOWrapper):  # the names of files may be no valid text; stderr is so by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        check_words(sys.argv[1:])
        app()
    except (ValueError, OSError, FloatingPointError, NotImplementedError) as error:
        if os.environ.get("FEWSTEP_DEBUG") == "1":
            raise
        errors.print(f"[bold red]error:[/] {escape(' '.join(str(error).split()))}", highlight=False)
        sys.exit(2)
    sys.exit(0)


def _terminate(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    main()
