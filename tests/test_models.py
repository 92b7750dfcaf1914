"""The models that a CLI lists, and which of them one process takes."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from client import Json, request_body
from host import STANDIN
from processes import pool_of
from servers import KEEP, Serve, Server

import sessions
from bridge import model_list
from translate import MODEL_PREFIX, parse_request, read_info


def test_the_model_list_is_the_clis_own(real: Server) -> None:
    page = real.call("GET", "/v1/models?limit=1000&beta=true").json
    ids = [model["id"] for model in page["data"]]
    assert "claude-cli/sonnet" in ids
    assert any(name.startswith("claude-sonnet-") for name in ids)
    assert len(set(ids)) == len(ids)
    assert (page["has_more"], page["first_id"], page["last_id"]) == (False, ids[0], ids[-1])
    for model in page["data"]:
        assert model["type"] == "model"
        assert model["lifecycle"] == "active"
        assert model["display_name"]
        assert model["created_at"]


def test_abilities_of_a_model_are_those_of_the_clis_list_in_its_own_words(
    real: Server,
) -> None:
    """The SDK's own type wants ten `capabilities`, of which the CLI knows two."""
    models = real.call("GET", "/v1/models").json["data"]
    found = {model["id"]: model["claude_cli"] for model in models}
    sonnet = found["claude-cli/sonnet"]
    assert sonnet["supportsEffort"] is True
    assert "high" in sonnet["supportedEffortLevels"]
    assert not any("capabilities" in model for model in models)
    # Older CLIs (to 2.1.285) say nothing of their Haiku, which has no effort.
    assert all(key.startswith("support") for key in found["claude-cli/haiku"])


def test_the_model_list_is_always_whole(real: Server) -> None:
    whole = real.call("GET", "/v1/models").json
    for query in ("limit=1", f"after_id={whole['last_id']}", "before_id=nope", "limit=x"):
        answer = real.call("GET", "/v1/models?" + query)
        assert (answer.status, answer.json) == (200, whole)


def test_a_model_is_found_by_id_and_alias_and_another_is_404(real: Server) -> None:
    for name in ("sonnet", "claude-cli/sonnet", "claude-cli%2Fsonnet"):
        assert real.call("GET", "/v1/models/" + name).json["id"] == "claude-cli/sonnet"
    answer = real.call("GET", "/v1/models/no-such%2Fmodel")
    assert (answer.status, answer.json["error"]["type"]) == (404, "not_found_error")
    assert real.call("DELETE", "/v1/models").status == 405


def test_a_model_is_listed_under_its_full_id_and_under_its_alias_and_once() -> None:
    default = {"value": "default", "resolvedModel": "claude-opus-5", "displayName": "Opus"}
    opus = {"value": "opus", "resolvedModel": "claude-opus-5", "supportsEffort": True, "new": 1}
    found = model_list(read_info({"models": [default, opus]}))
    assert list(found) == ["claude-opus-5", "claude-cli/default", "claude-cli/opus"]
    assert [model["display_name"] for model in found.values()] == [
        "Opus",
        "Opus",
        "claude-cli/opus",
    ]
    assert [model["claude_cli"] for model in found.values()] == [{}, {}, {"supportsEffort": True}]
    assert model_list(read_info({})) == {}


GOOD = {"value": "opus", "resolvedModel": "claude-opus-5"}


@pytest.mark.parametrize(
    ("models", "names"),
    [
        (None, []),
        ([GOOD, {"value": "odd"}], ["claude-opus-5", "claude-cli/opus"]),
        (
            [{"resolvedModel": "claude-odd-1"}, {"value": None, "resolvedModel": "x"}, GOOD, 5],
            ["claude-opus-5", "claude-cli/opus"],
        ),
        ([{"value": "odd", "resolvedModel": None}], []),
    ],
    ids=["null", "no full name", "no name", "null as full name"],
)
def test_a_model_without_its_names_is_left_out_of_the_list(
    serve: Serve, tmp_path: Path, models: Any, names: list[str]
) -> None:
    cli = tmp_path / "claude"
    lines = [
        f"#!{sys.executable}",
        "import sys",
        f"sys.path.insert(0, {str(STANDIN.parent)!r})",
        "import stand_in",
        f"stand_in.MODELS = {models!r}",
        "stand_in.main()",
    ]
    cli.write_text("\n".join(lines))
    cli.chmod(0o755)
    page = serve(bin=cli).call("GET", "/v1/models")
    assert page.status == 200
    assert [model["id"] for model in page.json["data"]] == names
    ends = (names[0], names[-1]) if names else (None, None)
    assert (page.json["first_id"], page.json["last_id"]) == ends


# ---------------------------------------------------------------- one process for many


def test_each_model_that_a_cli_lists_answers_without_being_named_at_its_start(
    serve: Serve, cli: Path, since: Callable[[], list[Json]]
) -> None:
    """So that one spare serves all of them.  Of others a CLI silently takes its default."""
    server = serve(bin=cli)
    hello = server.call("GET", "/v1/models")
    names = [model["id"] for model in hello.json["data"]]
    assert len(names) > 3
    pool = pool_of(server)
    for name in names:
        answer = server.post("SAY x", model=name)
        assert answer.status == 200, (name, answer.body)
        full_name = pool.cli.info.full_name(name.removeprefix(MODEL_PREFIX))
        assert since()[-1]["body"]["model"] == full_name.removesuffix("[1m]")
    # 2.1.285 lists one of them under its full name alone.
    alone = {m.full_name for m in pool.cli.info.models if m.name == m.full_name}
    # Processes that are asked what they announce to a model are started for it.
    kinds = {item.kind.model for item in list(pool.room.sessions) if not item.kind.is_probe}
    assert kinds - alone == {""}


THOUGHT = [
    "a",
    {
        "role": "assistant",
        "content": [
            {"type": "thinking", "thinking": "hm", "signature": "c2ln"},
            {"type": "text", "text": "b"},
        ],
    },
    "SAY x",
]


def past(body: Json) -> list[Json]:
    """The messages of the conversation, without what 2.1.285 announces among them."""
    return [message for message in body["messages"] if message["role"] != "system"]


NAMES = ("sonnet", "Sonnet", "opus[1m]", "best", "opusplan", "claude-sonnet-5[1m]")


@pytest.mark.parametrize("name", NAMES)
def test_thinking_of_the_past_arrives_by_whatever_name_the_model_is_asked(
    real: Server, since: Callable[[], list[Json]], name: str
) -> None:
    """The CLI drops that of another model than its own, whatever that is called."""
    answer = real.post(THOUGHT, model=name, thinking={"type": "enabled", "budget_tokens": 1024})
    assert (answer.status, answer.text) == (200, "x")
    [row] = since()
    assert past(row["body"])[1] == THOUGHT[1]


# A gateway's names in the CLI's settings, or its variables -> what arrives, by alias.
NAMED: dict[str, tuple[Json, dict[str, str]]] = {
    "one for all": (
        {"env": {"ANTHROPIC_MODEL": "glm-4.6"}},
        {"sonnet": "claude-sonnet", "opus": "claude-opus", "haiku": "claude-haiku"},
    ),
    "one for sonnet": (
        {"env": {"ANTHROPIC_DEFAULT_SONNET_MODEL": "glm-4.6"}},
        {"sonnet": "glm-4.6", "opus": "claude-opus", "haiku": "claude-haiku"},
    ),
    "another family for sonnet": (
        {"env": {"ANTHROPIC_DEFAULT_SONNET_MODEL": "claude-opus-5-5"}},
        {"sonnet": "claude-opus", "haiku": "claude-haiku"},
    ),
    "a default": ({"model": "haiku"}, {"sonnet": "claude-sonnet", "opus": "claude-opus"}),
}


@pytest.mark.parametrize(
    ("name", "by"),
    [
        ("one for all", "variables"),
        ("one for sonnet", "settings"),
        ("another family for sonnet", "variables"),
        ("a default", "settings"),
    ],
)
def test_where_the_user_names_models_an_alias_is_answered_by_the_one_that_it_means(
    serve: Serve,
    cli: Path,
    environment: Path,
    since: Callable[[], list[Json]],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    by: str,
) -> None:
    """The CLI then takes no other model from a conversation that it resumes."""
    settings, models = NAMED[name]
    variables = settings.get("env", {})
    if by == "settings":
        (environment / ".claude").mkdir()
        (environment / ".claude/settings.json").write_text(json.dumps(settings))
        server = serve(bin=cli, keep_env=KEEP, setting_sources="user")
    else:
        for key, value in variables.items():
            monkeypatch.setenv(key, value)
        server = serve(bin=cli, keep_env=(*KEEP, *variables))
    server.call("GET", "/v1/models")  # from now on the list is known
    for alias, model in models.items():
        answer = server.post(THOUGHT, model=alias)
        assert (answer.status, answer.text) == (200, "x")
        body = since()[-1]["body"]
        assert body["model"].startswith(model)
        assert past(body)[1] == THOUGHT[1]


def test_where_an_administrator_has_settings_each_model_is_named(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    server = serve()
    server.call("GET", "/v1/models")
    kind = pool_of(server).inspector.kind
    request = parse_request(json.dumps(request_body("hello")).encode())
    assert kind(request).model == ""
    monkeypatch.setattr(sessions, "MANAGED", (str(tmp_path),))
    assert kind(request).model == "sonnet"


def test_an_alias_that_may_not_be_used_is_answered_by_no_other_model(
    serve: Serve, cli: Path, environment: Path
) -> None:
    (environment / ".claude").mkdir()
    (environment / ".claude/settings.json").write_text('{"availableModels": ["opus"]}')
    server = serve(bin=cli, keep_env=KEEP, setting_sources="user")
    assert server.post("SAY x", model="opus").status == 200
    assert server.post("SAY x", model="sonnet").status != 200


def test_only_models_under_a_short_name_are_taken_from_a_conversation_and_none_of_a_clouds() -> (
    None
):
    models = [
        {"value": "sonnet", "resolvedModel": "claude-sonnet-5-5"},
        {"value": "claude-old-1", "resolvedModel": "claude-old-1"},  # it runs this one
    ]
    info = read_info({"models": models, "account": {"apiProvider": "firstParty"}})
    names = ("sonnet", "claude-sonnet-5-5", "claude-old-1", "opus")
    assert [info.takes_from_conversation(name) for name in names] == [True, True, False, False]
    for provider in ("bedrock", "vertex", "foundry"):
        of_cloud = read_info({"models": models, "account": {"apiProvider": provider}})
        assert not any(map(of_cloud.takes_from_conversation, names))
    assert not read_info({}).takes_from_conversation("sonnet")
