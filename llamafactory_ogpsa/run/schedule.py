"""When a run computes a new basis."""

from dataclasses import KW_ONLY, dataclass


@dataclass
class Schedule:
    """The refresh schedule of a run: every K optimizer steps, starting before the first, and sooner if that helps.

    A tensor may have no reference gradient at the first refresh although it gets one later: the gradient of LoRA's `A`
    is zero while `B` is, and `B` stays zero while the learning rate is (warm-up) and while the scaler skips steps. So
    a refresh is repeated before the first step after the weights have changed, as long as tensors without a direction
    are left. If a repeated refresh gives no further tensor a direction, it is the last repeated one of the run.

    Attributes:
        interval: K, in optimizer steps.
        refreshed_at: the step of the last refresh; None before the first.
        moved: True if an optimizer step has changed weights since then.
        searching: True while some tensor has no direction and may still get one.
        covered: the most tensors with a direction after any refresh.
    """

    interval: int
    _: KW_ONLY
    refreshed_at: int | None = None
    moved: bool = False
    searching: bool = True
    covered: int = 0

    def is_due(self, step: int) -> bool:
        """Return whether the step after `step` optimizer steps begins with a refresh.

        A step may begin twice, the second time with gradients (an epoch's remainder carried over); it refreshes once.
        """
        if step == self.refreshed_at:
            return False
        return self.refreshed_at is None or step % self.interval == 0 or (self.searching and self.moved)

    def refreshed(self, step: int, covered: int, tensors: int) -> None:
        """Record a refresh after `step` optimizer steps that gave `covered` of `tensors` tensors a direction."""
        fruitless = self.moved and self.refreshed_at is not None and covered <= self.covered
        self.searching = self.searching and covered < tensors and not fruitless
        self.covered = max(self.covered, covered)
        self.refreshed_at, self.moved = step, False

    def stepped(self, moved: bool) -> None:
        """Record an optimizer step; `moved`: weights changed (not at learning rate zero, or if the scaler skips)."""
        self.moved = self.moved or moved


def count_refreshes(steps: int, interval: int, repeated: bool) -> int:
    """Return the number of refreshes in a run; `repeated`: one will be repeated, because LoRA's `B` is zero."""
    return -(-steps // interval) + int(repeated and steps > 1 and interval > 1)
