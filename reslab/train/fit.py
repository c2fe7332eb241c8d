"""The training loop. One screen for the loop, one function for the step.

Every random choice is drawn from the seed and from where the training is, so one that was killed and resumed takes the same
steps as one that was not: on a CPU, bit for bit.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from reslab.data.batches import Batch, Batches
from reslab.data.boxes import Crops
from reslab.data.preprocess import Preprocess
from reslab.errors import WorkError
from reslab.host import release_freed_memory, use_huge_pages
from reslab.interval import share
from reslab.nets.fused import norm_together, use_fused
from reslab.nets.torch import ResNet
from reslab.nets.winograd import use_winograd
from reslab.run import Run
from reslab.seeds import seed_of
from reslab.tensors import below, read_tensors, write_tensors
from reslab.train.board import Board
from reslab.train.feed import LAYERS, Feed
from reslab.train.hardware import Machine
from reslab.train.optim import Average, keep_gradients, lr_at, optimizer, set_lr, uphill
from reslab.train.passes import Pass, ReplayedPass, ReplayedUpdate, Work
from reslab.train.pieces import RunningStatistics, pieces
from reslab.train.plan import Plan, low_size, ready
from reslab.train.recipe import PLATEAU, Recipe, check_shares
from reslab.train.state import Progress, load_state, save_state

LOG_SECONDS = 1.0  # between two `step` records
GENTLE_ERROR = 0.8  # training error below which warmup_lr ends
GROWN = 4  # steps at one image size after which the heap grows no more
PAGING = 0.02  # of the time that is left, at most, for huge pages: a step gains some hundredths by them


class Interrupted(Exception):
    """Ctrl-C, SIGTERM or SIGHUP: the step was finished and the state saved. `signal` is its number."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}; the state is saved")
        self.signal = signum


class Show(Protocol):
    """What a training tells whoever watches."""

    def step(self, epoch: int, epochs: int, step: int, steps: int, facts: dict[str, float]) -> None: ...

    def epoch(self, epoch: int, epochs: int, facts: dict[str, float]) -> None: ...

    def say(self, text: str) -> None: ...


class Training:
    """A net, its data and a plan, and how far they are. `run_to_end` does the rest."""

    def __init__(
        self, net: ResNet, train: Batches, val: Batches, preprocess: Preprocess, recipe: Recipe, plan: Plan, run: Run,
        machine: Machine, show: Show, deadline: float | None = None,
    ) -> None:  # fmt: skip
        self.net, self.train, self.val, self.preprocess = net, train, val, preprocess
        self.recipe, self.plan, self.run, self.machine, self.show = recipe, plan, run, machine, show
        self.deadline = deadline  # time.monotonic() at which the training is to end, if it has a budget
        self.board: Board | None = None
        self.logged = 0.0  # when the last `step` record was written
        self.alike = 0, 0  # the image size of the last step, and how many there were of it in a row
        self.optimizer = optimizer(net, recipe, plan.precision)
        keep_gradients(net)
        self.shared = machine.share(ready(net, plan, recipe))  # after the optimiser has frozen what is to be frozen
        self.statistics = RunningStatistics(net)
        self.average = Average(net, recipe.ema) if recipe.ema else None
        self.progress = Progress(steps=plan.steps, gentle=recipe.warmup_lr > 0)
        self.class_weights = self._class_weights() if recipe.balance == "weights" else None
        self.feed = Feed(train, preprocess, recipe, plan.steps_per_epoch, machine.device)
        self.state_file = run.path / "state" / "last.safetensors"
        self.best_file = run.path / "state" / "best.safetensors"
        assert recipe.batch_size is not None and recipe.micro_batch is not None and recipe.image_size is not None
        self.batch_size, self.micro_batch, self.image_size = recipe.batch_size, recipe.micro_batch, recipe.image_size
        check_shares(self.batch_size, self.micro_batch, machine.world)
        self.pixels_on = machine.place_of_pixels(train.nbytes + val.nbytes)
        self.share = self.batch_size // machine.world  # of a batch, this process's
        work = Pass(self.shared, recipe, plan.precision, machine, self.share // self.micro_batch, self.class_weights)
        replayed = plan.replayed and machine.replays  # a run may resume on another machine
        self.work: Work = ReplayedPass(work) if replayed else work
        self.update: Callable[[], object] = ReplayedUpdate(self.optimizer.step) if replayed else self.optimizer.step

    def resume(self) -> None:
        """Continues where the state file stopped."""
        self.progress = load_state(self.state_file, self.net, self.optimizer, self.average)

    def run_to_end(self) -> None:
        """All steps that are left; afterwards the writer's net holds the weights to keep.

        Raises Interrupted after a signal and WorkError when the loss is not finite; both leave a state to resume from.
        """
        p, recipe = self.progress, self.recipe
        start = time.monotonic() - p.seconds
        saved = time.monotonic()
        if p.step == 0:
            self._save()
        with interrupts() as caught:
            while (p.step < p.steps and not self._is_stale()) or p.seen:  # `seen` is 0 only after an epoch's end
                epoch = (p.step - bool(p.seen)) // self.plan.steps_per_epoch
                began = time.monotonic() - p.step_seconds
                for batch in self._batches(epoch, p.step - epoch * self.plan.steps_per_epoch):
                    stop = self._step(batch, caught)
                    self._settle()
                    now = time.monotonic()
                    p.seconds, p.step_seconds = now - start, now - began
                    if stop or now - saved >= recipe.save_every:
                        self._save()
                        saved = time.monotonic()
                    if stop:
                        raise Interrupted(stop)
                self._end_epoch(epoch)
                p.seconds = time.monotonic() - start
                self._save()
                saved = time.monotonic()
                if stop := self._agree(caught):
                    raise Interrupted(stop)
        if self._is_stale():
            self.show.say(f"stopped early: {p.stale_epochs} epochs without a better val top-1")
        use_winograd(self.net, False)
        use_fused(self.net, False)
        norm_together(self.net, 0)
        self._take_weights()

    def _epochs(self) -> int:
        return replace(self.plan, steps=self.progress.steps).epochs

    @property
    def kept_epoch(self) -> int:
        """The epoch whose weights are kept."""
        return self.progress.best_epoch if self.recipe.keep == "best" else -(-self.progress.step // self.plan.steps_per_epoch)

    def _is_stale(self) -> bool:
        return 0 < self.recipe.patience <= self.progress.stale_epochs

    def _step(self, batch: Batch, caught: list[int]) -> int:
        """One update of the weights. Returns the signal that the writer caught, so that all stop after the same step; or 0."""
        p, recipe = self.progress, self.recipe
        lr = self._lr()
        self.shared.train()
        if recipe.freeze == "trunk":
            self.net.eval()  # a frozen trunk keeps its statistics too
        set_lr(self.optimizer, lr)
        self.optimizer.zero_grad(set_to_none=False)
        signum = caught[0] if caught and self.machine.is_writer else 0
        told = torch.cat([self._gradients(batch), torch.tensor([signum], dtype=torch.float64, device=self.machine.device)])
        loss_sum, correct, seen, stop = self.machine.total(told).tolist()
        if not math.isfinite(loss_sum):
            raise self._diverged(f"the loss must be finite; it was {loss_sum / seen}", lr)
        if recipe.sam and p.step >= round(recipe.sam_from * p.steps):
            self._climb(batch)
        if recipe.clip:
            nn.utils.clip_grad_norm_(self.net.parameters(), recipe.clip)
        self.update()
        p.step += 1
        if self.average:
            self.average.update(self.net, p.step)
        p.loss_sum, p.correct, p.seen = p.loss_sum + loss_sum, p.correct + correct, p.seen + int(seen)
        self._tell(lr)
        return int(stop)

    def _settle(self) -> None:
        """Huge pages for the heap, once it has grown to what steps of this size need; under a memory budget it is trimmed instead."""
        size = self._size(self.progress.step - 1)
        self.alike = size, self.alike[1] + 1 if self.alike[0] == size else 1
        if self.alike[1] == GROWN and self.plan.memory is None and self.machine.device.type == "cpu":
            p, low = self.progress, self.recipe.low_resolution or 0.0
            use_huge_pages(PAGING * self.plan.seconds(p.steps, low, p.step))

    def _gradients(self, share: Batch, measures: bool = True) -> Tensor:
        """Leaves the mean gradient of the whole batch in the parameters, and its statistics in the norms where it `measures` them.

        Sums over this share, float64 (3): loss, right answers, images.
        """
        told = torch.zeros(3, dtype=torch.float64, device=self.machine.device)
        parts = list(pieces(share, self.share // self.micro_batch))
        first = self.machine.rank * (self.share // self.micro_batch)
        alone = len(parts) == self.machine.world == 1
        before = torch.zeros(0) if alone else self.statistics.read()
        after = torch.zeros_like(before)
        for index, part in enumerate(parts):
            if index:
                self.statistics.rewind(before)
            number = first + index  # of the micro-batch in the whole batch
            x, targets = self.feed.shown(part, self.progress.step, number, self._size(self.progress.step))
            torch.manual_seed(seed_of(self.recipe.seed, LAYERS, self.progress.step, number))  # dropout and stochastic depth draw from it
            with nullcontext() if part is parts[-1] else self.machine.gather_later(self.shared):
                loss, right = self.work(x, targets)
            n = len(part.items)
            told += torch.stack([loss.double() * n, right.double(), torch.full_like(loss, n, dtype=torch.float64)])
            if not alone:
                after += self.statistics.read()
        if measures and not alone:
            self.statistics.write_mean(after, len(parts), self.machine)
        return told

    def _climb(self, batch: Batch) -> None:
        """Takes the gradient again, uphill of here. The running statistics stay those of here."""
        before = self.statistics.read()
        with uphill(self.net, self.recipe.sam):
            self.optimizer.zero_grad(set_to_none=False)
            self._gradients(batch, measures=False)
        self.statistics.rewind(before)

    def _diverged(self, what: str, lr: float) -> WorkError:
        if self.machine.is_writer:
            self.run.record("warning", text="the training diverged", step=self.progress.step, lr=lr)
        return WorkError(
            f"{what} at step {self.progress.step} with lr {lr:.3g}; the step was not kept, the last good state is: "
            f"train into a new --out with --lr {self.recipe.lr / 10:.2g}, --clip 1 or --precision fp32"
        )

    def _batches(self, epoch: int, done: int) -> Iterator[Batch]:
        """What is left of an epoch, this process's share of each batch."""
        last = min(self.plan.steps_per_epoch, self.progress.steps - epoch * self.plan.steps_per_epoch)
        order, first = self.feed.order(epoch), epoch * self.plan.steps_per_epoch + done
        boxes = self.feed.boxes(epoch, order)
        left = np.arange(done * self.batch_size, last * self.batch_size).reshape(-1, self.machine.world, self.share)
        mine = left[:, self.machine.rank].reshape(-1)
        crops = None if boxes is None else Crops(boxes[mine], lambda number: self._size(first + number))
        yield from self.train.epoch(self.share, order[mine], crops, self.pixels_on, trained=True)

    def _size(self, step: int) -> int:
        low = step < round((self.recipe.low_resolution or 0) * self.progress.steps)
        return low_size(self.image_size, self.recipe.low_size) if low else self.image_size

    def _lr(self) -> float:
        p = self.progress
        if p.gentle:
            enough = min(100, self.plan.steps_per_epoch - 1) * self.batch_size
            p.gentle = p.seen < enough or 1 - p.correct / max(1, p.seen) >= GENTLE_ERROR
        return self.recipe.warmup_lr if p.gentle else lr_at(self.recipe, p.step / p.steps, p.lr_drops)

    def _end_epoch(self, epoch: int) -> None:
        p = self.progress
        self._check_finite()
        train = {"loss": p.loss_sum / p.seen, "top1": p.correct / p.seen}
        started = time.monotonic()
        self._make_room()
        val = self.evaluate()
        self.plan = replace(self.plan, val_seconds=time.monotonic() - started)
        better = val["top1"] >= p.best_top1  # of equals the later, trained longer
        p.stale_epochs = 0 if val["top1"] > p.best_top1 else p.stale_epochs + 1
        if better:
            p.best_top1, p.best_epoch = val["top1"], epoch + 1
        if self.machine.is_writer:
            if better and self.recipe.keep == "best":
                write_tensors(self.best_file, {f"net.{name}": t for name, t in self._weights().items()})
            self.run.record("epoch", epoch=epoch + 1, step=p.step, seconds=round(p.seconds, 3), image_size=self._size(p.step - 1), **train)
            self.run.record("val", epoch=epoch + 1, step=p.step, **val)
        if self.board:
            self.board.write("train", p.step, train)
            self.board.write("val", p.step, val)
        self.show.epoch(epoch + 1, self._epochs(), {"loss": train["loss"], "top1": train["top1"], "val_top1": val["top1"]})
        if self.recipe.schedule == "plateau" and p.stale_epochs and p.stale_epochs % PLATEAU == 0:
            p.lr_drops += 1
        p.gentle = p.gentle and 1 - train["top1"] >= GENTLE_ERROR  # an epoch of one step is judged nowhere else
        p.loss_sum, p.correct, p.seen = 0.0, 0.0, 0
        self._replan()

    def _replan(self) -> None:
        """Under a budget, counts again at the measured speed how many steps fit: machines slow down and speed up."""
        p, low = self.progress, self.recipe.low_resolution or 0.0
        if self.deadline is None or p.step >= p.steps:
            return
        planned = replace(self.plan, val_seconds=0.0).seconds(p.steps, low) - replace(self.plan, val_seconds=0.0).seconds(p.steps, low, p.step)
        pace = max(0.01, p.step_seconds / planned)
        steps = self.machine.agree(self.plan.steps_within(self.deadline - time.monotonic(), low, p.step, pace))
        steps = min([steps, *(int(p.step / share) for share in self._turns() if 0 < share * p.steps <= p.step)])  # what has begun is not taken back
        if self.machine.is_writer:
            self.run.record("replan", steps=steps, pace=pace)
        p.steps = steps

    def _turns(self) -> list[float]:
        """Shares of the training at which something changes at once: the image size, the gradient, the learning rate."""
        recipe = self.recipe
        drops = recipe.milestones if recipe.schedule == "step" else ()
        return [recipe.low_resolution or 0.0, recipe.sam_from if recipe.sam else 0.0, *drops]

    def evaluate(self) -> dict[str, float]:
        """Loss, top-1 and top-5 on val, of the averaged weights where there are any. Every image is counted once."""
        own = {name: t.clone() for name, t in self.net.state_dict().items()} if self.average else {}
        if self.average:
            self.net.load_state_dict(self.average.tensors)
        self.net.eval()
        sums = torch.zeros(4, dtype=torch.float64)
        positions = np.array_split(np.arange(len(self.val.items)), self.machine.world)[self.machine.rank]
        with torch.no_grad(), self.machine.autocast(self.plan.precision):
            for batch in self.val.epoch(2 * self.micro_batch, positions, device=self.pixels_on):
                logits = self.net(self.preprocess(batch.pixels, self.machine.device)).float().cpu()
                found = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
                loss = cross_entropy(logits, batch.labels, reduction="sum")
                sums += torch.stack([loss, found[:, 0].sum(), found.sum(), torch.tensor(len(logits))])
        if self.average:
            self.net.load_state_dict(own)
        total, right, top5, n = self.machine.total(sums.to(self.machine.device)).tolist()
        facts = {"loss": min(total / n, 1e9) if math.isfinite(total) else 1e9, "n": int(n), **share("top1", int(right), int(n))}
        return facts | (share("top5", int(top5), int(n)) if self.net.spec.num_classes > 5 else {})

    def _weights(self) -> dict[str, Tensor]:
        return self.average.tensors if self.average else self.net.state_dict()

    def _take_weights(self) -> None:
        if not self.machine.is_writer:
            return  # the file is on the writer's disk
        if self.recipe.keep == "best":
            self.net.load_state_dict(below(read_tensors(self.best_file)[0], "net."))
        elif self.average:
            self.net.load_state_dict(self.average.tensors)

    def _check_finite(self) -> None:
        if not all(torch.isfinite(t).all() for t in self.net.parameters()):
            raise self._diverged("the weights must be finite; some are not", self._lr())

    def _save(self) -> None:
        self._check_finite()
        if self.machine.is_writer:
            self._make_room()
            save_state(self.state_file, self.net, self.optimizer, self.average, self.progress)

    def _make_room(self) -> None:
        """What follows is no training step, so it was not counted into the memory budget; without the heap's holes there is room for it."""
        if self.plan.memory is not None and self.machine.device.type == "cpu":
            release_freed_memory()

    def _agree(self, caught: list[int]) -> int:
        """The signal that the writer caught, so that all stop after the same step; 0 when there was none."""
        return self.machine.agree(caught[0] if caught else 0)

    def _class_weights(self) -> Tensor:
        counts = np.bincount(self.train.images.labels[self.train.items], minlength=len(self.train.images.classes))
        return torch.tensor(counts.sum() / (len(counts) * counts), dtype=torch.float32, device=self.machine.device)

    def _tell(self, lr: float) -> None:
        """Loss and top-1 are means since the epoch began: of one step they would say little."""
        p = self.progress
        facts = {"loss": p.loss_sum / p.seen, "top1": p.correct / p.seen, "lr": lr}
        now = time.monotonic()
        if self.machine.is_writer and now - self.logged > LOG_SECONDS:
            self.logged = now
            self.run.record("step", step=p.step, **facts)
            if self.board:
                self.board.write("step", p.step, facts)
        epoch, step = divmod(p.step - 1, self.plan.steps_per_epoch)
        self.show.step(epoch + 1, self._epochs(), step + 1, self.plan.steps_per_epoch, facts)


@contextmanager
def interrupts() -> Iterator[list[int]]:
    """Collects SIGINT, SIGTERM and SIGHUP (not below nohup) instead of dying of them; the list holds the numbers that came."""
    caught: list[int] = []

    def note(signum: int, frame: FrameType | None) -> None:
        caught.append(signum)

    try:
        hangup = [signal.SIGHUP] if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN else []
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM, *hangup)}
    except ValueError:  # not the main thread: whoever started us there handles signals
        yield caught
        return
    try:
        yield caught
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
