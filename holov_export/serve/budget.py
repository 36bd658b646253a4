"""How many tokens an image gets, so that the first token of an answer comes in time.

Without a clock or a server of its own: time is passed in, so a simulation can drive it.
"""

from __future__ import annotations

from collections import deque

from holov_export.serve.limits import BudgetRange

#: shares of the target: it aims at the first; below the second there is room for more tokens
_AIM, _ROOM = 0.85, 0.7
#: observations between two corrections by feedback, and the share of them that may be late
_ENOUGH, _LATE_SHARE = 10, 0.1
#: a correction down by feedback is between these; one up is the third, near a level that was too much the fourth
_DEEPEST, _SHALLOWEST, _UP, _UP_SLOWLY = 0.5, 0.95, 1.12, 1.03
#: a lone answer that came early lets its budget grow by at most this
_LONE_UP = 1.5
#: idle for so many targets, the level doubles
_IDLE_DOUBLING = 4.0
_MEMORY = 0.15  # weight of the newest of a running mean


class BudgetController:
    """Lowers budgets under load and raises them again, so that nine of ten first tokens come within the target.

    Two signals, one early, one true:

    - What waits. The last of n waiting jobs gets its first token after about n times the present interval between two
      first tokens. If that is past the target, the budget falls at once by as much as it takes, before any answer
      is late. So a burst costs quality and not time.
    - What came. When more than a tenth of the newest first tokens were late, the budget falls; when the ninth of ten
      came clearly early, it rises by a small step, by a smaller one near the level that was too much last time.

    Falling is fast and rising slow, and after each step it waits for first tokens that the step has changed: so it does
    not swing. An answer that was made alone says what a budget costs without load; the budget of an idle server goes
    back to what that allows, in a few targets' time.

    Attributes:
        budgets: what it chooses from.
    """

    def __init__(self, budgets: BudgetRange) -> None:
        self.budgets = budgets
        self._level = self._alone = float(budgets.largest)
        self._edge = float(budgets.largest)
        self._recent: deque[float] = deque(maxlen=4 * _ENOUGH)
        self._changed = float("-inf")
        self._last_first: float | None = None
        self._was_waiting = False
        self._gap: float | None = None
        self._gap_level = float(budgets.largest)
        self._service = 0.0

    @property
    def budget(self) -> int:
        """What an image gets now."""
        return min(max(int(self._level), self.budgets.smallest), self.budgets.largest)

    def choose(
        self, now: float, *, waiting: int, oldest_wait: float, newest_wait: float = 0.0, alone: bool = False
    ) -> int:
        """Tokens of each image of the jobs that are taken now.

        Args:
            now: seconds.
            waiting: jobs whose decoding has not begun, these included.
            oldest_wait, newest_wait: seconds that the first and the last of them have waited.
            alone: there is only one job in hand.
        """
        target = self.budgets.target_ttft
        if target is None:
            return self.budget
        if alone:
            self._recover(now, target)
        else:
            self._look_ahead(now, target, waiting, oldest_wait, newest_wait)
        return self.budget

    def _recover(self, now: float, target: float) -> None:
        """Nothing is going on: back to what an idle server affords."""
        quiet = target if self._last_first is None else now - self._last_first
        self._set(max(self._level, min(self._alone, self._level * 2 ** (quiet / (_IDLE_DOUBLING * target)))))

    def _look_ahead(self, now: float, target: float, waiting: int, oldest_wait: float, newest_wait: float) -> None:
        """Fall as far as the first and the last of those that wait need, as if time went in proportion to budgets."""
        if self._gap is None:
            return
        aim = _AIM * target
        first = aim / max(oldest_wait + self._service, 1e-9)
        last = max(aim - newest_wait, 0.0) / max((waiting - 1) * self._gap + self._service, 1e-9)
        wanted = self._gap_level * min(first, last)
        if min(first, last) < 1 and wanted < self._level:
            self._fall_to(now, wanted)

    def observe(
        self, now: float, *, ttft: float, waited: float, budget: int | None, waiting: int = 0, alone: bool = False
    ) -> None:
        """A first token has come.

        Args:
            now: seconds.
            ttft: seconds since its job was accepted. waited: those of them before its budget was chosen.
            budget: what was chosen; None if the job asked for one itself or has no images.
            waiting: jobs whose decoding has not begun.
            alone: no other job was in hand all the time.
        """
        target = self.budgets.target_ttft
        if target is None:
            return
        self._time(now, ttft - waited, waiting)
        if budget is None:
            return
        if alone:
            self._learn_alone(now, target, ttft, budget)
        if now - ttft + waited >= self._changed:
            self._recent.append(ttft)
            self._correct(now, target, waiting)

    def _time(self, now: float, service: float, waiting: int) -> None:
        """Running means of the interval between first tokens while jobs wait, and of what it takes without waiting."""
        known = self._last_first is not None
        self._service += (_MEMORY if known else 1.0) * (service - self._service)
        if self._gap is None:
            self._gap, self._gap_level = service, self._level
        else:
            # without a queue the interval says nothing, but it is no longer than what one answer takes
            gap = now - self._last_first if self._was_waiting and self._last_first is not None else service
            if self._was_waiting or gap < self._gap:
                self._gap += _MEMORY * (gap - self._gap)
                self._gap_level += _MEMORY * (self._level - self._gap_level)
        self._last_first, self._was_waiting = now, waiting > 0

    def _learn_alone(self, now: float, target: float, ttft: float, budget: int) -> None:
        """What an idle server affords: as if the time grew in proportion to the budget, one step after the other."""
        fitting = budget * min(_AIM * target / max(ttft, 1e-9), _LONE_UP)
        if ttft > target:
            self._alone = max(fitting, self.budgets.smallest)
            self._fall_to(now, min(self._level, self._alone))
        elif ttft < _ROOM * target:
            self._alone = min(max(self._alone, fitting), self.budgets.largest)

    def _correct(self, now: float, target: float, waiting: int) -> None:
        """One step down or up, once enough first tokens have come since the last."""
        if len(self._recent) < _ENOUGH:
            return
        ranked = sorted(self._recent)
        ninth = ranked[int((1 - _LATE_SHARE) * (len(ranked) - 1))]
        if ninth > target:
            self._fall_to(now, self._level * min(max(_AIM * target / ninth, _DEEPEST), _SHALLOWEST))
        elif ninth < _ROOM * target and waiting * (self._gap or 0.0) < _ROOM * target:
            self._changed = now
            self._recent.clear()
            self._set(self._level * (_UP if self._level * _UP < self._edge else _UP_SLOWLY))

    def _fall_to(self, now: float, level: float) -> None:
        if level < self._level:
            self._edge = self._level
        self._changed = now
        self._recent.clear()
        self._set(level)

    def _set(self, level: float) -> None:
        self._level = min(max(level, self.budgets.smallest), self.budgets.largest)
