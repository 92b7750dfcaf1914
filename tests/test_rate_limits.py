"""The limits of an account, as the CLI reports them."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from client import Json
from host import STANDIN
from messages import JUNK, failure, first_turns
from processes import in_pool, pool_of, take_turn, talk
from servers import KEEP, Serve, Server, both
from test_metrics import measure

from sessions import Pool
from translate import RateLimit, json_line, quota_headers, rate_limits


@both
@pytest.mark.parametrize(("seconds", "retry"), [(-100, None), (40, None), (4000, "false")])
def test_a_rate_limit_says_when_it_ends_and_whether_to_wait(
    serve: Serve, stream: bool, seconds: int, retry: str | None
) -> None:
    began = time.time()
    answer = serve().post(f"RATELIMIT {int(began) + seconds}", stream=stream)
    assert answer.status == 429
    assert max(1, seconds - 15) <= int(answer.headers["retry-after"]) <= max(1, seconds)
    assert answer.headers.get("x-should-retry") == retry


# The first is none of the CLI's; the others are warnings as in the recording quota_warning.
REPORTED: tuple[Json, ...] = (
    {"status": "bad\nstatus", "rateLimitType": 'bad"type', "utilization": "much", "resetsAt": None},
    {
        "status": "allowed_warning",
        "resetsAt": 1700000000,
        "rateLimitType": "five_hour",
        "utilization": 0.95,
        "isUsingOverage": False,
    },
    {
        "status": "allowed_warning",
        "resetsAt": 1700000001,
        "rateLimitType": "seven_day",
        "utilization": 0.5,
        "isUsingOverage": False,
    },
)


@pytest.fixture
def limited(tmp_path: Path, serve: Serve) -> Server:
    """A bridge whose CLI tells of LIMITS, after the start of each answer; the real one tells of them
    after the end."""
    script = tmp_path / "claude"
    events = [
        json.dumps({"type": "rate_limit_event", "rate_limit_info": info}) for info in REPORTED
    ]
    (tmp_path / "limits").write_text("".join(f"{event}\n" for event in events))
    script.write_text(
        f'#!/bin/sh\n{STANDIN} "$@" | sed -u \'/"message_start"/r {tmp_path}/limits\'\n'
    )
    script.chmod(0o755)
    return serve(bin=script)


@pytest.mark.parametrize("stream", [False, True])
def test_what_the_cli_tells_of_the_accounts_limits_is_in_headers_as_of_the_api(
    limited: Server, stream: bool
) -> None:
    prefix = "anthropic-ratelimit-unified-"
    answers = [limited.post("hello", stream=stream) for _ in range(2)]
    assert [answer.text for answer in answers] == ["echo: hello; 1 messages"] * 2
    headers = answers[-1].headers
    found = {name.removeprefix(prefix): headers[name] for name in headers if prefix in name}
    assert found == {
        "status": "allowed_warning",
        "representative-claim": "seven_day",
        "reset": "1700000001",
        "5h-status": "allowed_warning",
        "5h-reset": "1700000000",
        "5h-utilization": "0.95",
        "7d-status": "allowed_warning",
        "7d-reset": "1700000001",
        "7d-utilization": "0.5",
    }


def test_what_the_cli_tells_of_the_accounts_limits_is_measured_and_on_the_page(
    limited: Server,
) -> None:
    assert limited.post().status == 200
    found = measure(limited)
    assert found("quota_utilization_ratio", limit="five_hour") == 0.95
    assert found("quota_utilization_ratio", limit="seven_day") == 0.5
    assert found("quota_utilization_ratio") == 0.95 + 0.5
    assert found("quota_resets_at_seconds", limit="five_hour") == 1700000000
    page = limited.call("GET", "/").body.decode()
    assert re.search(r"five_hour +allowed_warning, used: 0.95\n", page)
    assert re.search(r"seven_day +allowed_warning, used: 0.5\n", page)


def test_how_much_of_a_limit_is_used_can_be_unknown(server: Server) -> None:
    limit = RateLimit("allowed", resets_at=None, utilization=None)
    pool_of(server).cli.rate_limits["five_hour"] = limit
    page = server.call("GET", "/").body.decode()
    assert re.search(r"five_hour +allowed, used: not known\n", page)


def test_a_limit_that_a_hot_process_reports_is_told_also_after_a_refresh_of_the_login(
    limited: Server, environment: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    history, _ = talk(limited, "hello")
    credentials = environment / ".claude/.credentials.json"
    credentials.parent.mkdir(exist_ok=True)
    for words in ("a", "b"):
        credentials.write_text(f'{{"{words}": 1}}')
        answer = limited.post(history)
        assert answer.session == "hot"
        assert answer.headers["anthropic-ratelimit-unified-7d-utilization"] == "0.5"
        history = [*history, answer.text, words]


def test_the_limits_of_one_account_are_not_told_as_anothers(
    limited: Server, environment: Path, tmp_path: Path
) -> None:
    name = "anthropic-ratelimit-unified-7d-utilization"
    assert limited.post("first").headers[name] == "0.5"
    (tmp_path / "limits").write_text("")
    assert limited.post("second").headers[name] == "0.5"
    credentials = environment / ".claude/.credentials.json"
    credentials.parent.mkdir()
    credentials.write_text("{}")
    assert name not in limited.post("third").headers


def test_what_the_real_cli_tells_of_the_accounts_limits_is_measured(
    serve: Serve, cli: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("ANTHROPIC_API_KEY")
    monkeypatch.setenv("CLAUDE_CODE_OAUTH_TOKEN", "sk-ant-oat01-mine")
    server = serve(bin=cli, keep_env=(*KEEP, "CLAUDE_CODE_OAUTH_TOKEN"))
    first = server.post("QUOTA allowed_warning")
    server.post(["QUOTA allowed_warning", first.text, "SAY x"])
    assert measure(server)("quota_utilization_ratio", limit="five_hour") == 0.95


def test_a_limit_that_is_used_up_is_told_with_its_refusal(serve: Serve) -> None:
    server = serve()
    answer = server.post("RATELIMIT 4000000000")
    assert answer.status == 429
    assert answer.headers["anthropic-ratelimit-unified-status"] == "rejected"
    assert answer.headers["anthropic-ratelimit-unified-5h-reset"] == "4000000000"
    assert measure(server)("quota_resets_at_seconds", limit="five_hour") == 4000000000


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
        assert (error.status, error.resets_at, error.can_retry) == (429, resets_at, True)
    for turn in first_turns("quota_rejected").values():
        [info] = [e["rate_limit_info"] for e in turn.events if "rate_limit_info" in e]
        error = turn.play().error
        assert error
        assert error.resets_at == info["resetsAt"]
    for turn in first_turns("error_529").values():
        assert failure([limit, *turn.events]).resets_at is None


def test_a_limit_that_allows_again_is_no_reason_of_a_later_refusal() -> None:
    events: list[Any] = [
        {"type": "rate_limit_event", "rate_limit_info": {"status": status, "resetsAt": RESET}}
        for status in ("rejected", "allowed")
    ]
    for turn in first_turns("error_429").values():
        assert failure([*events, *turn.events]).resets_at is None


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


# ---------------------------------------------------------------- what the CLI reports, and the headers


def test_a_report_has_the_limit_that_it_is_about_last_and_whole() -> None:
    windows = {
        "five_hour": {"status": "allowed", "utilization": 0.25},
        "seven_day": {"status": "allowed", "utilization": 0.5, "resetsAt": 9},
        "odd": 5,
    }
    info = {"rateLimitType": "five_hour", "status": "allowed_warning", "unifiedWindows": windows}
    event: Any = {"type": "rate_limit_event", "rate_limit_info": info}
    assert list(rate_limits(event).items()) == [
        ("seven_day", RateLimit("allowed", 9, 0.5)),
        ("five_hour", RateLimit("allowed_warning", None, 0.25)),
    ]


def test_any_other_event_reports_none_and_an_odd_one_nothing_of_its_limit() -> None:
    for junk in JUNK:
        event: Any = {"type": "rate_limit_event", "rate_limit_info": junk}
        nothing = {"unknown": RateLimit("", None, None)} if junk and type(junk) is dict else {}
        assert rate_limits(event) == nothing
        assert rate_limits({**event, "type": "result"}) == {}


def test_headers_hold_what_is_known_of_known_limits_and_nothing_that_breaks_them() -> None:
    limits = {
        "seven_day": RateLimit("allowed", 8.4, 1 / 3),
        "new": RateLimit("allowed", None, None),
        "five_hour": RateLimit("bad\nstatus", None, 1.0),
    }
    prefix = "anthropic-ratelimit-unified-"
    found = {name.removeprefix(prefix): value for name, value in quota_headers(limits)}
    assert found == {
        "7d-status": "allowed",
        "7d-reset": "8",
        "7d-utilization": "0.333333",
        "5h-utilization": "1",
        "representative-claim": "five_hour",
    }
    assert quota_headers({}) == []


def test_the_limit_that_was_reported_last_comes_last() -> None:
    """The headers are about that one."""

    async def use(pool: Pool) -> None:
        turn, _ = await take_turn(pool, "hello")
        for name in ("five_hour", "seven_day", "five_hour"):
            info = {"rateLimitType": name, "status": "allowed"}
            event = json_line({"type": "rate_limit_event", "rate_limit_info": info})
            turn.process.lines_received([event], len(event))
        assert list(pool.cli.rate_limits) == ["seven_day", "five_hour"]

    in_pool(use)
