"""`fewstep density fit` and `distill`: a training into a folder, which holds checkpoints, the sampler and its card."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.markup import escape

from fewstep.checkpoints import last_checkpoint, last_step
from fewstep.commands.density_card import density_card
from fewstep.commands.density_runs import command_line, described, load, notes, show
from fewstep.commands.density_target import RUN, Named, read_run
from fewstep.core.files import HEADER, check_target, read_header, write_bytes
from fewstep.core.names import suggestion
from fewstep.core.registry import get
from fewstep.densities.base import DensitySampler
from fewstep.densities.diagnosis import summary
from fewstep.densities.distill import METHODS, POLISHES
from fewstep.densities.distill import distill as train_student
from fewstep.densities.fit import FitOptions
from fewstep.densities.fit import fit as train_teacher
from fewstep.densities.report import summary_rows
from fewstep.densities.teachers._base import Teacher
from fewstep.densities.whitened import Whitened
from fewstep.options import typed_fields
from fewstep.records import versions, write_record

CHECK = 1024  # draws that say how good a trained sampler is
Built = TypeVar("Built")


@dataclass(frozen=True)
class Job:
    """A training and its folder.

    Attributes:
        named: the density.
        out: the folder.
        options: how it is trained; `out` is that of the job.
        resume: whether to go on from a checkpoint in the folder.
    """

    named: Named
    out: Path
    options: FitOptions
    resume: bool = True

    def claim(self, facts: Mapping[str, Any]) -> None:
        """Note in the folder what it is for.

        Raises:
            ValueError: it is for another density or teacher, there is a checkpoint that must not be used, or accelerate is
                missing.
        """
        if importlib.util.find_spec("accelerate") is None:
            raise ValueError("training needs accelerate; pip install fewstep[train]")
        check_target(self.out / RUN)
        begun = last_checkpoint(self.out) is not None or (self.out / HEADER).is_file()  # else there is nothing to lose
        before = read_run(self.out) if begun and (self.out / RUN).is_file() else None
        if before and before["target"] != self.named.record:
            raise ValueError(f"{self.out} is of another density, {described(before['target'])}; choose another folder")
        if before and before.get("teacher_sha256") != facts.get("teacher_sha256"):
            raise ValueError(f"{self.out} was not distilled from this teacher; choose another folder")
        if not self.resume and last_checkpoint(self.out) is not None:
            raise ValueError(f"{self.out} holds checkpoints: resume from them, or choose another folder")
        self.out.mkdir(parents=True, exist_ok=True)
        if before is None:
            self._record(facts, steps_done=0, interrupted=True)

    def finish(
        self,
        sampler: DensitySampler,
        facts: Mapping[str, Any],
        further: Mapping[str, int],
        begin: float,
        console: Console,
        errors: Console,
    ) -> int:
        """Write the sampler and its card; return the exit code, 130 where the training was interrupted.

        `further` has the folders of the trainings that may follow the first, in their order, and the steps of each.
        """
        sampler.save(self.out)
        done, seconds = last_step(self.out), time.perf_counter() - begin
        last = [name for name in further if (self.out / name).is_dir()][-1:]
        stopped = done < self.options.train_steps or any(last_step(self.out / name) < further[name] for name in last)
        quality = {} if stopped else summary(sampler.sample(CHECK, seed=self.options.seed))
        record = self._record(facts, steps_done=done, interrupted=stopped, seconds=seconds, quality=quality)
        write_bytes(self.out / "README.md", density_card(self.named, record, read_header(self.out)).encode())
        if stopped:
            where = (
                f"after step {done} of {self.options.train_steps}"
                if done < self.options.train_steps
                else f"in {last[0]}"
            )
            errors.print(f"interrupted {where}; run again to go on")
            return 130
        console.print(f"{done} steps, {seconds:.1f} s: {escape(str(self.out))}", highlight=False)
        show(console, summary_rows(quality, self.named.density))
        return 0

    def _record(self, facts: Mapping[str, Any], **more: Any) -> dict[str, Any]:
        options = {f.name: getattr(self.options, f.name) for f in fields(FitOptions) if f.name != "out"}
        record = {"target": self.named.record, **facts, "options": options, **more}
        record |= {"command": command_line(), "versions": versions()}
        write_record(self.out / RUN, record)
        return record


def fit(job: Job, teacher: Teacher, loss: str | None, console: Console, errors: Console) -> int:
    """Train a sampler of a density into the folder of `job`; return the exit code."""
    facts: dict[str, Any] = {
        "sampler": teacher.describe(),
        "loss": loss or teacher.default_loss,
        "reference": str(teacher.reference),
    }
    teacher.objective(Whitened(job.named.density), facts["loss"])  # a wrong name fails before anything is written
    job.claim(facts)
    begin = time.perf_counter()
    with notes(errors):
        sampler = train_teacher(
            job.named.density, sampler=teacher, loss=loss, options=replace(job.options, out=job.out)
        )
        further = dict.fromkeys(teacher.further, job.options.train_steps)
        return job.finish(sampler, facts, further, begin, console, errors)


def distill(job: Job, teacher: Path | None, student: Any, console: Console, errors: Console) -> int:
    """Train a student of the sampler in `teacher` into the folder of `job`; return the exit code."""
    found, folder = load(job.named, teacher, "--teacher", errors)
    if folder.resolve() == job.out.resolve():
        raise ValueError("teacher and student need folders of their own")
    facts = {
        "sampler": {"name": type(student).__module__.rpartition(".")[2], "settings": repr(student)},
        "reference": str(student.reference),
        "teacher": str(folder),
        "teacher_sha256": read_header(folder)["sha256"],
        "polish": student.polish,
    }
    if getattr(found, "denoiser", None) is None:
        raise ValueError(f"{folder} holds a sampler of few steps already, of which nothing can be distilled")
    job.claim(facts)
    begin = time.perf_counter()
    with notes(errors):
        sampler = train_student(found, student, options=replace(job.options, out=job.out))
        return job.finish(sampler, facts, dict.fromkeys(POLISHES, student.polish), begin, console, errors)


def split(words: Mapping[str, str], kind: type | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return the assignments that belong to the density and those of the sampler `kind`: "target.x", or what only it has."""
    own = set() if kind is None else {f.name for f in fields(kind)}
    for_target, for_sampler = {}, {}
    for name, value in words.items():
        head = name.partition(".")[0].replace("-", "_")
        if name.startswith("target."):
            for_target[name.removeprefix("target.")] = value
        elif head in own:
            for_sampler[name] = value
        else:
            for_target[name] = value
    return for_target, for_sampler


def built(start: Built, values: Mapping[str, str], owner: str) -> Built:
    """Return a frozen dataclass with fields as given in text; "net.width" is the field `width` of its field `net`."""
    plain = {name: value for name, value in values.items() if "." not in name}
    inner: dict[str, dict[str, str]] = {}
    for name, value in values.items():
        head, dot, rest = name.partition(".")
        if dot:
            inner.setdefault(head.replace("-", "_"), {})[rest] = value
    found = typed_fields(type(start), plain, owner)
    for head, own in inner.items():
        part = getattr(start, head, None)
        if not is_dataclass(part):
            raise ValueError(f"{owner}: {head} has no fields of its own")
        found[head] = built(part, own, f"{owner}: {head}")
    return replace(start, **found)  # type: ignore[type-var]


def teacher_of(name: str, preset: str | None, values: Mapping[str, str]) -> Teacher:
    """Return the teacher called `name` with the settings `preset`; ValueError where there is none, or not such a field."""
    kind = get(name, "teachers")
    return built(kind() if preset is None else kind.preset(preset), values, f"sampler {name}")


def student_of(name: str, preset: str | None, values: Mapping[str, str]) -> Any:
    """Return the method of distillation called `name`, with the settings `preset`."""
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {suggestion(name, METHODS)}")
    kind = METHODS[name]
    return built(kind() if preset is None else kind.preset(preset), values, f"method {name}")
