"""Running a search: propose, price, train to the next rung, stop or go on, until the best are at their end.

What is done next follows from the study alone, so a search that is killed anywhere and resumed does what the
undisturbed one would have done; only when it is done depends on the machine.
"""

from __future__ import annotations

import logging
import math
import os
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from search.children import Child, Children, Death
from search.proposals import Known, propose
from search.rungs import (
    Bracket,
    Plan,
    Stop,
    below_median,
    brackets,
    halving,
    rung_shares,
    to_the_end,
    with_rungs,
)
from search.space import Params, all_values, proposed, search_space
from search.study import GIGABYTE, Standing, Study, Trial, objective_values
from search.trial_runs import TrialRuns
from search.worker import Begin, Done, Failed, Message, Point, Prefixes, Told, Train
from tasks.config import Range, Settings, TrainSettings
from tasks.errors import InputError, StepError
from tasks.models.device import on_gpu
from tasks.models.folder import ModelFolder
from tasks.prepare.splits import load_splits
from tasks.progress import Bar, progress
from tasks.publish import StepOutput
from tasks.train.trial import Reached, drop_trial

log = logging.getLogger(__name__)

PROPOSALS_A_TRIAL = 10
"""No more is proposed after this many proposals for each trial wanted, those over the budget too."""

LEVEL_TRIALS = 10
"""The sampler compares losses at the farthest rung that so many trials have reached."""

DEATHS = 2
"""A trial whose process was killed so often does not fit. The first kill may have been meant for another."""

LOOK_S = 1.0

UNITS_S = {"s": 1, "min": 60, "h": 3600, "d": 86400}


@dataclass
class _Work:
    """A trial that a child is training to a rung."""

    number: int
    rung: int
    step: int


class Search:
    """A search under way.

    Args:
        study: held by this process.
        budget_bytes: no trial alone, nor those at work together, may be expected to need more.
        price: the expected peak memory of a training, in bytes.
        runs: where the trials are recorded.
    """

    def __init__(
        self,
        study: Study,
        settings: Settings,
        model: ModelFolder,
        data: StepOutput,
        budget_bytes: int,
        price: Callable[[TrainSettings], int],
        runs: TrialRuns,
    ) -> None:
        self.study, self.settings, self.budget_bytes = study, settings, budget_bytes
        self._space = settings.search
        self._model, self._data, self._price, self._runs = model, data, price, runs
        self._layers = int(model.language_config()["num_hidden_layers"])
        self._distributions = search_space(self._space, self._layers)
        self._shares = rung_shares(self._space)
        self._train_rows = load_splits(data.path)["train"]
        self._workers = self._fixed("workers", lambda: count_workers(settings))
        self._work: dict[Child, _Work] = {}
        self._started, self._before_s = time.monotonic(), float(study.attributes.get("seconds", 0.0))

    def run(self) -> list[Trial]:
        """All trials, in order of their numbers, when none of them can go on."""
        with (
            Children(self._begin(), self._workers) as children,
            self._runs,
            progress("search", total=100) as bar,
        ):
            shown = _Shown(bar, self)
            if self._plan().runs or self._next_bracket() is not None:
                self._record_prefixes(children)
            while True:
                plan = self._plan()
                for stop in plan.stops:
                    self._stop(stop)
                started = self._start(plan, children)
                if not started and children.free and self._may_propose(plan):
                    self._propose()
                    continue
                if not children.busy:
                    break
                for child, message in children.messages(LOOK_S):
                    self._hear(child, message, children)
                shown.update()
        return [self.study.trials[number] for number in sorted(self.study.trials)]

    def settings_of(self, params: Params) -> tuple[TrainSettings, tuple[int, ...]]:
        """What a proposal trains, and the updates at each of its rungs."""
        settings = proposed(self.settings, params, self._layers)
        return with_rungs(settings, self._train_rows, self._shares, self._longest_epochs())

    def done_share(self) -> float:
        """How much of the training there will be is done; a guess where `time` ends the search."""
        planned = planned_lengths(self.settings)
        if math.isinf(planned):
            return min(0.99, self._seconds() / duration_s(self._space.time or "1s"))
        at_work = {work.number: work.step for work in self._work.values()}
        done = sum(
            max(trial.step, at_work.get(trial.number, 0)) / trial.standing.rung_steps[-1]
            for trial in self.study.trials.values()
        )
        return min(1.0, done / planned)

    def at_work(self) -> list[_Work]:
        """The trials that children are training."""
        return list(self._work.values())

    def _fixed(self, name: str, choose: Callable[[], int]) -> int:
        """What was chosen when the search began, whatever would be chosen now."""
        if name not in self.study.attributes:
            self.study.remember(**{name: choose()})
        return int(self.study.attributes[name])

    def _begin(self) -> Begin:
        return Begin(self._model, self._data, self.settings.evaluate, self._space.scores)

    def _seconds(self) -> float:
        return self._before_s + time.monotonic() - self._started

    def _longest_epochs(self) -> float:
        epochs = self._space.epochs
        if epochs is None:
            return self.settings.train.epochs
        return (
            epochs.high if isinstance(epochs, Range) else max(epochs) if isinstance(epochs, tuple) else epochs
        )

    def _record_prefixes(self, children: Children) -> None:
        """Compute the frozen layers for all depths of the space, in one pass, before the first trial.

        Where that cannot be, each trial says so and computes for itself.
        """
        settings, _ = self.settings_of(propose(self._distributions, [], self._space.seed, "tpe") or {})
        depths = self._distributions.get("num_layers")
        numbers = tuple(all_values(depths)) if depths else (settings.num_layers,)
        for _ in range(DEATHS):
            child = children.start(Prefixes(settings, numbers))
            while isinstance(message := child.receive(), Told | Point):
                _pass_on(message)
            if not isinstance(message, Death):
                children.rest(child)
                break
            children.lose(child)
            if message.broken:
                raise StepError(message.reason)
        if isinstance(message, Death | Failed):
            log.warning("the frozen layers could not be computed for all trials: %s", message.reason)

    def _entrants(self) -> list[Trial]:
        """The proposals that were not over the budget, in their order."""
        trials = (self.study.trials[number] for number in sorted(self.study.trials))
        return [trial for trial in trials if trial.state != "over budget"]

    def _brackets(self) -> list[tuple[Bracket, list[Trial]]]:
        """Every bracket with its trials; one that gets no more proposals is as large as they are many."""
        entrants, closed = self._entrants(), bool(self.study.attributes.get("closed"))
        filled = []
        for bracket in brackets(self._space, len(self._shares)):
            members = [each for each in entrants if each.standing.first_rung == bracket.first]
            filled.append((Bracket(bracket.first, len(members)) if closed else bracket, members))
        return filled

    def _plan(self) -> Plan:
        """What the rules say of the trials as they stand."""
        rungs = len(self._shares)
        plans = []
        for bracket, members in self._brackets():
            entrants = [trial.entrant() for trial in members]
            if self._space.rungs == "halving":
                plans.append(halving(entrants, bracket, rungs, self._space.reduction))
            elif self._space.rungs == "median":
                plans.append(below_median(entrants, rungs, self._lag() - 1))
            else:
                plans.append(to_the_end(entrants, rungs))
        runs = (run for plan in plans for run in plan.runs if self._waits(run[0]))
        stops = (stop for plan in plans for stop in plan.stops if self._waits(stop.number))
        return Plan(tuple(runs), tuple(stops))

    def _waits(self, number: int) -> bool:
        at_work = any(work.number == number for work in self._work.values())
        return self.study.trials[number].state == "waiting" and not at_work

    def _stop(self, stop: Stop) -> None:
        trial = self.study.update(stop.number, state="pruned", reason=stop.reason)
        self._runs.retag(trial)
        drop_trial(self.settings_of(trial.params)[0], self._model, self._data)
        log.info("trial %d stops: %s", stop.number, stop.reason)

    def _start(self, plan: Plan, children: Children) -> int:
        """Set free children to work, as far as the budget goes; how many trials were begun."""
        begun = 0
        for number, rung in plan.runs:
            needed = self.study.trials[number].standing.predicted_bytes
            if not children.free or (self._work and self._bytes_at_work() + needed > self.budget_bytes):
                break
            trial = self.study.trials[number]
            settings, rung_steps = self.settings_of(trial.params)
            self._runs.open(number, settings)
            until = None if rung == len(rung_steps) - 1 else rung_steps[rung]
            order = Train(settings, until, self.budget_bytes, needed)
            self._work[children.start(order)] = _Work(number, rung, trial.step)
            begun += 1
        return begun

    def _bytes_at_work(self) -> int:
        return sum(self.study.trials[work.number].standing.predicted_bytes for work in self._work.values())

    def _lag(self) -> int:
        """A proposal may be made when fewer trials than this, the last ones, are unfinished: it knows nothing
        of these in any case, so that it does not depend on which child was faster."""
        return 1 if self._workers == 1 else 2 * self._workers

    def _known_count(self, entrants: list[Trial]) -> int:
        """So many of the first entrants the next proposal knows of."""
        return max(0, len(entrants) - self._lag() + 1)

    def _may_propose(self, plan: Plan) -> bool:
        """Whether the next proposal is due, and all that it has to know is known."""
        if plan.runs or self.study.attributes.get("closed") or self._next_bracket() is None:
            return False
        entrants = self._entrants()
        if not all(map(self._settled, entrants[: self._known_count(entrants)])):
            return False
        first = self._next_bracket()
        earlier = [each for each in entrants if each.standing.first_rung != first]
        return not any(each.state == "waiting" for each in earlier)

    def _settled(self, trial: Trial) -> bool:
        """Whether later proposals may know of it."""
        if self._space.rungs == "halving" and trial.state == "waiting":
            return len(trial.losses) > trial.standing.first_rung
        return trial.state != "waiting"

    def _next_bracket(self) -> int | None:
        """The first rung of the next proposal; None when there are enough."""
        open_ones = (bracket.first for bracket, members in self._brackets() if len(members) < bracket.size)
        return next(open_ones, None)

    def _propose(self) -> None:
        """Add the next proposal, or close the search to proposals."""
        first = self._next_bracket()
        trials = len(self.study.trials)
        too_many = trials >= PROPOSALS_A_TRIAL * max(self._space.trials, len(self._entrants()))
        params = None if self._time_is_up() or too_many else self._proposal()
        if params is None or first is None:
            self.study.remember(closed=True)
            log.info("no more proposals after %d", trials)
            return
        settings, rung_steps = self.settings_of(params)
        predicted = self._price(settings)
        standing = Standing("waiting", predicted, rung_steps, first)
        if predicted > self.budget_bytes:
            reason = (
                f"{predicted / GIGABYTE:.2f} GB expected, the budget is {self.budget_bytes / GIGABYTE:.2f} GB"
            )
            standing = Standing("over budget", predicted, rung_steps, first, reason=reason)
            log.info("trial %d: %s: not started", trials, reason)
        self.study.add(params, self._distributions, standing, self.budget_bytes)

    def _proposal(self) -> Params | None:
        entrants = self._entrants()
        hidden = {trial.number for trial in entrants[self._known_count(entrants) :]}
        trials = [self.study.trials[number] for number in sorted(self.study.trials)]
        level = self._level([trial for trial in trials if trial.number not in hidden])
        known = [self._known(trial, level, trial.number in hidden) for trial in trials]
        return propose(
            self._distributions, known, self._space.seed, self._space.sampler, len(self.study.objectives)
        )

    def _level(self, trials: list[Trial]) -> int:
        """The farthest rung that enough trials have reached to compare them there."""
        reached = [len(trial.losses) for trial in trials if trial.state not in ("over budget", "infeasible")]
        levels = range(len(self._shares) - 1, -1, -1)
        return next((level for level in levels if sum(n > level for n in reached) >= LEVEL_TRIALS), 0)

    def _known(self, trial: Trial, level: int, hidden: bool) -> Known:
        standing = trial.standing
        if trial.state == "over budget":
            return Known(trial.params, violation=standing.predicted_bytes / self.budget_bytes - 1)
        if hidden:
            return Known(trial.params)
        if trial.state in ("infeasible", "failed") or not trial.losses:
            return Known(trial.params, violation=1.0)
        if len(trial.losses) <= level:
            return Known(trial.params, (trial.losses[-1],), stopped_at=len(trial.losses))
        if self.study.objectives == ["loss"]:
            return Known(trial.params, (trial.losses[level],))
        return Known(trial.params, objective_values(trial, self.study.objectives))

    def _time_is_up(self) -> bool:
        """Whether the rest of the time is needed by the trials that will go on."""
        if not self._space.time or not self._entrants():
            return False
        rungs = len(self._shares)
        share = (
            1 / (1 + (rungs - 1) * (1 - 1 / self._space.reduction)) if self._space.rungs == "halving" else 1
        )
        return self._seconds() >= share * duration_s(self._space.time)

    def _hear(self, child: Child, message: Message | Death, children: Children) -> None:
        work = self._work[child]
        if isinstance(message, Point):
            work.step = max(work.step, message.step)
            self._runs.report(work.number, message.step, message.metrics)
        elif isinstance(message, Told):
            _pass_on(message, f"trial {work.number}: ")
        else:
            del self._work[child]
            if isinstance(message, Death):
                children.lose(child)
            else:
                children.rest(child)
            self._end_of(work, message)
            self._runs.close(work.number)
            self.study.remember(seconds=self._seconds())

    def _end_of(self, work: _Work, message: Done | Failed | Death) -> None:
        """Write down how the training to a rung went."""
        if isinstance(message, Done) and message.reached:
            self._reached(work.number, message.reached, message.scores)
        elif isinstance(message, Failed) and message.kind == "input":
            raise InputError(message.reason)
        elif isinstance(message, Failed):
            state = "infeasible" if message.kind == "memory" else "failed"
            self._give_up(work.number, state=state, reason=message.reason)
        elif isinstance(message, Death):
            self._died(work.number, message)

    def _reached(self, number: int, reached: Reached, scores: Mapping[str, float]) -> None:
        self.study.update(
            number,
            state="trained" if reached.ended_by else "waiting",
            val_losses=reached.val_losses,
            ended_by=reached.ended_by,
            seconds=reached.seconds,
            measured_bytes=reached.peak_bytes,
            adapter=str(reached.adapter or ""),
            scores=dict(scores),
        )

    def _died(self, number: int, death: Death) -> None:
        if death.broken:
            raise StepError(death.reason)
        deaths = self.study.trials[number].standing.deaths + 1
        if death.aborted or deaths >= DEATHS:
            self._give_up(number, state="infeasible", reason=death.reason, deaths=deaths)
        else:
            self.study.update(number, deaths=deaths)
            log.warning("trial %d: %s; it goes on from its checkpoint in a new one", number, death.reason)

    def _give_up(self, number: int, **changes: Any) -> None:
        trial = self.study.update(number, **changes)
        drop_trial(self.settings_of(trial.params)[0], self._model, self._data)
        log.warning("trial %d is %s: %s", number, trial.state, trial.standing.reason)


class _Shown:
    """The search on the screen: how far, the best so far, what is at work and what it takes."""

    def __init__(self, bar: Bar, search: Search) -> None:
        self._bar, self._search, self._percent = bar, search, 0.0

    def update(self) -> None:
        """Show how it stands."""
        percent = 100 * self._search.done_share()
        self._bar.advance(max(0.0, percent - self._percent), self._note())
        self._percent = max(percent, self._percent)

    def _note(self) -> str:
        search = self._search
        trials = search.study.trials.values()
        known = [trial for trial in trials if trial.standing.val_losses]
        best = min(known, key=lambda trial: (trial.val_loss, trial.number), default=None)
        begun = sum(trial.state != "over budget" for trial in trials)
        wanted = "" if search.settings.search.time else f" of {search.settings.search.trials}"
        parts = [f"trials {begun}{wanted}"]
        if best:
            parts.append(f"best {best.val_loss:.4f} (trial {best.number})")
        for work in search.at_work():
            steps = search.study.trials[work.number].standing.rung_steps
            parts.append(
                f"trial {work.number} rung {work.rung + 1}/{len(steps)} {work.step}/{steps[work.rung]}"
            )
        at_work = sum(search.study.trials[work.number].standing.predicted_bytes for work in search.at_work())
        parts.append(f"{at_work / GIGABYTE:.1f} of {search.budget_bytes / GIGABYTE:.1f} GB")
        return " · ".join(parts)


def planned_lengths(settings: Settings) -> float:
    """How many trainings of full length the search amounts to; infinite where `time` ends it."""
    search, shares = settings.search, rung_shares(settings.search)
    if search.time or search.rungs != "halving":
        return math.inf if search.time else search.trials
    total = 0.0
    for bracket in brackets(search, len(shares)):
        members, before = int(bracket.size), 0.0
        for share in shares[bracket.first :]:
            total += members * (share - before)
            members, before = max(1, members // search.reduction), share
    return total


def count_workers(settings: Settings) -> int:
    """Trials side by side: as asked for; else one on a GPU, and on CPU one a core, but never most of them."""
    if settings.search.workers:
        return settings.search.workers
    if on_gpu():
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, math.ceil(settings.search.trials / 4)))


def duration_s(text: str) -> float:
    """Seconds of `8h`, `90min`, `30 s`."""
    number, unit = re.fullmatch(r"([\d.]+)\s*(s|min|h|d)", text).groups()  # type: ignore[union-attr]
    return float(number) * UNITS_S[unit]


def _pass_on(message: Message, prefix: str = "") -> None:
    """Say what a child said: warnings, as its every step is not for the person."""
    if isinstance(message, Told):
        level = message.level if message.level >= logging.WARNING else logging.DEBUG
        logging.getLogger(message.name).log(level, "%s%s", prefix, message.text)
