"""Errors: what the CLI says of a failure, and what a client gets."""

import string
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from messages import QUICK, failed, first_turns, synthetic

import translate
from translate import ApiError, result_error

# ---------------------------------------------------------------- what a client gets


def test_an_error_has_the_apis_envelope() -> None:
    error = ApiError(429, "slow down")
    assert error.body("req_1") == {
        "type": "error",
        "error": {"type": "rate_limit_error", "message": "slow down"},
        "request_id": "req_1",
    }
    assert str(error) == "slow down"
    detailed = ApiError(400, "no", error_type="own_error", error_code="x").body("r")
    assert detailed["error"] == {
        "type": "own_error",
        "message": "no",
        "details": {"error_code": "x"},
    }


KINDS = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    409: "conflict_error",
    413: "request_too_large",
    418: "invalid_request_error",
    429: "rate_limit_error",
    500: "api_error",
    502: "claude_cli_error",
    503: "api_error",
    504: "timeout_error",
    529: "overloaded_error",
}


@pytest.mark.parametrize(("status", "kind"), KINDS.items())
def test_a_status_has_the_type_that_the_sdks_know_for_it(status: int, kind: str) -> None:
    assert ApiError(status, "x").error_type == kind


def test_what_a_retry_cannot_mend_is_not_retried() -> None:
    final = {status for status in range(400, 600) if not ApiError(status, "x").can_retry}
    assert all(400 <= status < 500 and status not in (408, 409, 429) for status in final)
    assert {400, 401, 403, 404, 413, 422} <= final


@pytest.mark.parametrize("words", ["Authorization sk-ant-oat01-abc\\ndef0123456789012345x is no"])
def test_no_error_holds_a_token(words: str) -> None:
    message = ApiError(502, words).message
    assert message == "Authorization sk-ant-*** is no"


# ---------------------------------------------------------------- the status

# (the `result`, the error's status, type and message)
STATUSES: list[tuple[Any, int, str, str]] = [
    (failed(api_error_status=400, result="no"), 400, "invalid_request_error", "no"),
    (failed(api_error_status=403, result="no"), 403, "permission_error", "no"),
    (failed(api_error_status=500, result="no"), 500, "api_error", "no"),
    (failed(api_error_status=503, result="no"), 503, "api_error", "no"),
    (failed(api_error_status=502, result="no"), 502, "api_error", "no"),  # a proxy's
    # verdicts of the CLI itself
    (failed(result="Prompt is too long"), 400, "invalid_request_error", "prompt is too long"),
    (failed(result="API Error: Overloaded"), 529, "overloaded_error", "Overloaded"),
    (failed(api_error_status=None, result="other"), 502, "claude_cli_error", "other"),
    # what is no status
    (failed(api_error_status=200, result="other"), 502, "claude_cli_error", "other"),
    (failed(api_error_status=600, result="other"), 502, "claude_cli_error", "other"),
    (failed(api_error_status="429", result="other"), 502, "claude_cli_error", "other"),
    (failed(api_error_status=True, result="other"), 502, "claude_cli_error", "other"),
    (failed(api_error_status=429.5, result="other"), 502, "claude_cli_error", "other"),
    # where the text stands
    (failed(result=None, errors=["a", "b"]), 502, "claude_cli_error", "a; b"),
    (failed(result="", errors=["a", 5]), 502, "claude_cli_error", "a; 5"),
    (failed(result="c", errors=["a"]), 502, "claude_cli_error", "c"),
    (failed(result=5, errors=5), 502, "claude_cli_error", "5"),
]
ENDED = "the claude CLI ended the turn with an error"
STATUSES += [
    ({"type": "result", "is_error": True}, 502, "claude_cli_error", ENDED),
    (failed(result="", errors=[]), 502, "claude_cli_error", ENDED),
    (failed(result=None, errors=[""]), 502, "claude_cli_error", ENDED),
    (failed(result=None, errors="x"), 502, "claude_cli_error", ENDED),
]


@pytest.mark.parametrize(("result", "status", "kind", "message"), STATUSES)
def test_a_failed_result_keeps_its_status_and_text(
    result: Any, status: int, kind: str, message: str
) -> None:
    error = result_error(result, None, None)
    assert (error.status, error.error_type, error.message) == (status, kind, message)


def test_a_missing_login_says_how_to_mend_it_and_is_not_retried() -> None:
    for turn in first_turns("not_logged_in").values():
        error = turn.play().error
        assert error
        assert (error.status, error.can_retry) == (401, False)
        assert error.message == (f"Not logged in · Please run /login ({translate.LOGIN_CURE})")


def test_nothing_is_added_to_the_words_for_a_login_that_the_api_refuses() -> None:
    said = "Failed to authenticate. API Error: 401 OAuth token has expired"
    error = result_error(failed(api_error_status=401, result=said), None, None)
    assert (error.status, error.message) == (401, "OAuth token has expired")
    for turn in first_turns("error_401").values():
        error = turn.play().error
        assert error
        assert (error.status, error.can_retry) == (401, False)
        assert error.message == "Invalid API key · Fix external API key"


def test_nothing_is_added_to_the_words_for_a_model_that_nobody_knows() -> None:
    for said, message in (
        ("API Error: 404 model: claude-x", "model: claude-x"),
        ("There's an issue with it. Run --model.", "There's an issue with it. Run --model."),
    ):
        error = result_error(failed(api_error_status=404, result=said), None, None)
        assert (error.status, error.error_type, error.message) == (404, "not_found_error", message)


def test_an_error_is_from_the_api_if_it_has_a_status_of_the_api() -> None:
    for scenario, is_from_api in (
        ("error_400", True),
        ("error_401", True),
        ("error_429", True),
        ("error_529", True),
        ("not_logged_in", False),
    ):
        for version, turn in first_turns(scenario).items():
            error = turn.play().error
            assert error
            assert error.is_from_api == is_from_api, (version, scenario)
    assert not result_error(failed(result="other"), None, None).is_from_api
    assert not ApiError(401, "x").is_from_api


# ---------------------------------------------------------------- the API's own message

ADVICE = (
    ". This is a server-side issue, usually temporary — try again in a moment. "
    "If it persists, check your inference gateway (127.0.0.1:1)."
)
JSON_BODY = '{"type":"error","error":{"type":"own_error","message":"too\\nlong"},"request_id":"r"}'
# The CLI's text -> (the API's message, the error.type where the text says it).
TEXTS: dict[str, tuple[str, str]] = {
    "no": ("no", ""),
    "API Error: 400 no": ("no", ""),
    "API Error: no": ("no", ""),
    "API Error: 400 no\nand no": ("no\nand no", ""),
    "API Error: Request rejected (429) · slow down": ("slow down", ""),
    "Failed to authenticate. API Error: 401 OAuth token has expired": (
        "OAuth token has expired",
        "",
    ),
    f"API Error: 529 Overloaded{ADVICE}": ("Overloaded", ""),
    f"API Error: 500 Internal server error{ADVICE}": ("Internal server error", ""),
    f"API Error: 400 {JSON_BODY}": ("too\nlong", "own_error"),
    f"API Error: 500 {JSON_BODY}{ADVICE}": ("too\nlong", "own_error"),
    f"API Error: Request rejected (429) · {JSON_BODY}": ("too\nlong", "own_error"),
    # what only looks like the body of an error
    'API Error: 400 {"error"': ('{"error"', ""),
    'API Error: 400 {"error": 5}': ('{"error": 5}', ""),
    'API Error: 400 {"error": "no"}': ('{"error": "no"}', ""),
    'API Error: 400 {"message": "no"}': ('{"message": "no"}', ""),
    "API Error: 400 [1]": ("[1]", ""),
    "API Error: 400 5": ("5", ""),
    "see API Error: 400 no": ("see API Error: 400 no", ""),
    'API Error: 400 {"error": {"message": "no"}}': ("no", ""),
    f"API Error: 500 {ADVICE}": (f"API Error: 500 {ADVICE}", ""),
    'API Error: 400 {"error": {"type": "x", "message": ""}}': (
        '{"error": {"type": "x", "message": ""}}',
        "x",
    ),
    'API Error: 400 {"error": {"type": null, "message": null}}': (
        '{"error": {"type": null, "message": null}}',
        "",
    ),
}


@pytest.mark.parametrize(("said", "parts"), TEXTS.items(), ids=lambda value: repr(value)[:50])
def test_the_apis_own_message_is_taken_out_of_the_clis_text(
    said: str, parts: tuple[str, str]
) -> None:
    message, kind = parts
    error = result_error(failed(api_error_status=400, result=said), None, None)
    assert (error.message, error.error_type) == (message, kind or "invalid_request_error")


def test_the_assistant_event_before_a_failure_says_its_type_and_code() -> None:
    """2.1.330 keeps them there."""
    result = failed(api_error_status=400, result=f"API Error: 400 {JSON_BODY}")
    event = synthetic(api_error_type="tool_error", api_error_code="bad_tool")
    error = result_error(result, event, None)
    assert (error.error_type, error.error_code) == ("tool_error", "bad_tool")
    assert error.message == "too\nlong"
    for odd in (synthetic(), synthetic(api_error_type=None, api_error_code=5), None):
        error = result_error(result, odd, None)
        assert (error.error_type, error.error_code) == ("own_error", "")


def test_a_recorded_refusal_keeps_its_code() -> None:
    for version, turn in first_turns("error_code").items():
        error = turn.play().error
        assert error
        assert error.status == 403
        known = "" if version == "2.1.197" else "bad_place"
        assert error.error_code == known, version


# ---------------------------------------------------------------- any text


@settings(max_examples=120, **QUICK)
@given(
    st.sampled_from(["", "API Error: ", "API Error: 500 ", "API Error: Request rejected (429) · "]),
    st.text()
    | st.text(string.printable)
    | st.sampled_from(["{", "null", JSON_BODY[:40], JSON_BODY]),
    st.sampled_from(["", ADVICE]),
)
def test_any_text_is_an_error_with_a_message(before: str, said: str, after: str) -> None:
    error = result_error(failed(result=f"{before}{said}{after}"), None, None)
    assert error.message
    assert error.error_type
