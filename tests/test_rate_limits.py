"""The limits of an account, as the CLI reports them."""

from typing import Any

import pytest
from messages import failure, first_turns

RESET = 1800000000
LIMITS: list[tuple[Any, float | None]] = [
    ({"status": "rejected", "resetsAt": RESET, "rateLimitType": "five_hour"}, RESET),
    ({"status": "allowed_warning", "resetsAt": RESET, "rateLimitType": "five_hour"}, None),
    # what was not seen of a CLI
    ({"status": "rejected", "resetsAt": RESET + 0.5}, RESET + 0.5),
    ({"status": "rejected", "resetsAt": None}, None),
    ({"status": "rejected", "resetsAt": "soon"}, None),
    ({"status": "rejected"}, None),
    (None, None),
]


@pytest.mark.parametrize(("info", "resets_at"), LIMITS)
def test_a_rejected_rate_limit_says_when_it_ends(info: Any, resets_at: float | None) -> None:
    limit = {"type": "rate_limit_event", "rate_limit_info": info}
    for turn in first_turns("error_429").values():
        error = failure([limit, *turn.events])
        assert (error.status, error.resets_at, error.retry) == (429, resets_at, True)
    for turn in first_turns("quota_rejected").values():
        [info] = [e["rate_limit_info"] for e in turn.events if "rate_limit_info" in e]
        error = turn.play().error
        assert error
        assert error.resets_at == info["resetsAt"]
    for turn in first_turns("error_529").values():
        assert failure([limit, *turn.events]).resets_at is None


def test_of_two_limits_that_reject_the_later_reset_counts() -> None:
    windows = {
        "five_hour": {"status": "rejected", "resetsAt": RESET},
        "seven_day": {"status": "rejected", "resetsAt": RESET + 800},
    }
    for name, window in windows.items():
        info = {**window, "rateLimitType": name, "unifiedWindows": windows}
        limit = {"type": "rate_limit_event", "rate_limit_info": info}
        for turn in first_turns("error_429").values():
            assert failure([limit, *turn.events]).resets_at == RESET + 800
