"""The version of the CLI: one that is too old or new, and one that takes the place of another while
the bridge runs."""

import asyncio
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from client import Json, prime, request_body
from host import STANDIN, wait_until
from installed import CLIS
from processes import in_pool, open_gate, pool_of, soon, take_turn
from servers import Launch, Program, Serve, Server, printed
from stand_in import Log
from test_check import check

import bridge
from sessions import ANNOUNCES, NEWEST_TESTED, OLDEST, Cli, Kind, Pool, State
from translate import parse_request

TOO_OLD = (
    f"the claude CLI is version 2.1.100, and {OLDEST} or newer is needed: run `claude "
    "update`, or install Claude Code anew"
)
TOO_NEW = f"the claude CLI 9.9.9 is newer than {NEWEST_TESTED}, the newest that was tested"
TRIES_IT = "`claude-cli-bridge check` tries it"


def versioned(folder: Path, version: str, *lines: str) -> Path:
    """A CLI of a version, which is the stand-in otherwise, and runs `lines` before."""
    folder.mkdir(exist_ok=True)
    path = folder / f"claude-{version}"
    asked = f'[ "$1" = --version ] && echo "{version} (Claude Code)" && exit 0'
    path.write_text("\n".join(["#!/bin/sh", *lines, asked, f'exec {STANDIN} "$@"', ""]))
    path.chmod(0o755)
    return path


def page(server: Server | Program) -> str:
    return server.call("GET", "/").body.decode()


def test_a_cli_that_is_too_old_is_refused_with_a_cure_and_never_asked_anything(
    launch: Launch, tmp_path: Path
) -> None:
    runs = tmp_path / "runs"
    old = versioned(tmp_path, "2.1.100", f'echo "$*" >> {runs}')
    program = launch(CLAUDE_CLI_BIN=str(old), CLAUDE_CLI_SPARES="1")
    wait_until(lambda: any(TOO_OLD in line for line in program.lines), "the version")
    [line] = [line for line in program.lines if TOO_OLD in line]
    assert f" WARNING the claude CLI ({old}) cannot be used: " in line
    answers = [program.post(), program.post(stream=True)]
    counted = request_body("hi", max_tokens=...)
    answers.append(program.call("POST", "/v1/messages/count_tokens", counted))
    answers.append(program.call("GET", "/v1/models"))
    for answer in answers:
        assert answer.status == 502
        assert answer.json["error"] == {"type": "claude_cli_error", "message": TOO_OLD}
    deep = program.call("GET", "/healthz?deep=1")
    assert (deep.status, TOO_OLD in deep.body.decode()) == (503, True)
    assert TOO_OLD in page(program)
    status, said = check(old)
    assert (status, said["failure"]) == (1, TOO_OLD)
    assert "version" not in said  # nothing else was tried
    assert set(runs.read_text().splitlines()) == {"--version"}


def test_the_cure_for_the_cli_of_the_wheel_is_pip(serve: Serve, tmp_path: Path) -> None:
    old = versioned(tmp_path / "claude_agent_sdk", "2.1.100")
    message = serve(bin=old).post().json["error"]["message"]
    assert message.endswith("is needed: run `pip install --upgrade claude-agent-sdk`")


@pytest.mark.parametrize(
    ("version", "is_taken"),
    [
        (OLDEST, True),
        ("2.1.196", False),
        ("2.0.999", False),
        ("3.0.0", True),
        ("unknown", True),
    ],
)
def test_the_oldest_version_that_is_taken_is_the_one_that_is_named(
    serve: Serve, tmp_path: Path, version: str, is_taken: bool
) -> None:
    assert serve(bin=versioned(tmp_path, version)).post().status == (200 if is_taken else 502)


def test_a_cli_that_is_newer_than_the_tested_ones_works_with_a_warning_that_names_check(
    launch: Launch, tmp_path: Path
) -> None:
    new = versioned(tmp_path, "9.9.9")
    program = launch(CLAUDE_CLI_BIN=str(new))
    assert program.post().status == 200
    wait_until(lambda: any(TOO_NEW in line for line in program.lines), "the warning")
    [line] = [line for line in program.lines if TOO_NEW in line]
    assert " WARNING " in line
    assert TRIES_IT in line
    warned = f"{TOO_NEW}: {TRIES_IT}"
    assert warned in page(program)
    _, said = check(new, CLAUDE_CLI_WATCHDOG_SECS="2")  # the stand-in asks no API
    assert said["version"] == warned


def test_the_newest_tested_version_is_no_reason_to_warn(launch: Launch, tmp_path: Path) -> None:
    program = launch(CLAUDE_CLI_BIN=str(versioned(tmp_path, NEWEST_TESTED)))
    words = f"version {NEWEST_TESTED}\n"
    wait_until(lambda: any(line.endswith(words) for line in program.lines), "the version")
    assert not [line for line in program.lines if "newer than" in line]


# ---------------------------------------------------------------- another one in its place


def swap(link: Path, target: Path) -> None:
    """Let a link lead to another program, in one step, as an update does."""
    new = link.with_suffix(".new")
    new.symlink_to(target)
    os.replace(new, link)


def test_what_was_learnt_of_a_cli_is_forgotten_when_another_takes_its_place(
    serve: Serve, tmp_path: Path, log: Log
) -> None:
    link = tmp_path / "claude"
    link.symlink_to(versioned(tmp_path / "old", "2.1.260"))
    server = serve(bin=link, spares=1)
    pool = pool_of(server)
    for model in ("claude-opus-5-5", "sonnet"):
        assert server.post(model=model).status == 200
    counted = request_body("hi", max_tokens=...)
    assert server.call("POST", "/v1/messages/count_tokens", counted).status == 200
    wait_until(lambda: pool.starter.spares, "a spare")
    known, [spare] = pool.cli, pool.starter.spares
    assert (known.version, known.info.is_known, len(known.counts)) == ("2.1.260", True, 1)
    wait_until(lambda: spare.process.pid in log.started(), "its start")
    before = set(log.started())

    swap(link, versioned(tmp_path / "new", "2.1.270"))
    models = server.call("GET", "/v1/models")
    assert models.status == 200
    assert pool.cli is not known
    assert (pool.cli.version, dict(pool.cli.counts)) == ("2.1.270", {})
    assert spare.state is State.RETIRED
    [asked] = set(log.started()) - before  # the new one, and what it says of itself
    assert log.requests(asked) == ["initialize"]
    assert "2.1.270" in page(server)

    # A count of the old one is none of the new one.
    before = set(log.started())
    assert server.call("POST", "/v1/messages/count_tokens", counted).status == 200
    assert set(log.started()) - before


def test_a_cli_that_is_replaced_at_its_own_path_ends_the_spares_of_before(
    serve: Serve, tmp_path: Path
) -> None:
    program = tmp_path / "claude"
    os.replace(versioned(tmp_path / "old", "2.1.260"), program)
    server = serve(bin=program, spares=1)
    pool = pool_of(server)
    prime(server)
    wait_until(lambda: pool.starter.spares, "a spare")
    [spare] = pool.starter.spares
    os.replace(versioned(tmp_path / "new", "2.1.261"), program)
    assert server.post("one").status == 200
    assert (pool.cli.version, spare.state) == ("2.1.261", State.RETIRED)


def test_a_hot_conversation_of_the_old_cli_goes_on_and_a_new_one_is_the_new_clis(
    serve: Serve, tmp_path: Path, log: Log
) -> None:
    link = tmp_path / "claude"
    link.symlink_to(versioned(tmp_path / "old", "2.1.260"))
    server = serve(bin=link)
    first = server.post("one")
    swap(link, versioned(tmp_path / "new", "2.1.261"))
    second = server.post(["one", first.text, "two"])
    assert (second.status, second.session) == (200, "hot")
    assert server.post("other").session == "new"
    assert pool_of(server).cli.version == "2.1.261"


def test_a_cli_that_becomes_too_old_or_goes_away_is_an_error_until_it_is_back(
    serve: Serve, tmp_path: Path
) -> None:
    link = tmp_path / "claude"
    good = versioned(tmp_path / "good", "2.1.260")
    link.symlink_to(good)
    server = serve(bin=link)
    assert server.post("one").status == 200
    swap(link, versioned(tmp_path / "old", "2.1.100"))
    assert TOO_OLD in server.post("two").json["error"]["message"]
    link.unlink()
    answer = server.post("three")
    assert (answer.status, answer.json["error"]["type"]) == (502, "claude_cli_error")
    link.symlink_to(good)
    assert server.post("four").status == 200


def test_after_a_downgrade_of_the_real_cli_no_other_model_answers(
    serve: Serve, tmp_path: Path, since: Callable[[], list[Json]]
) -> None:
    if len(CLIS) < 2:
        pytest.skip("two versions are not installed")
    newer, *_, older = CLIS.values()
    link = tmp_path / "claude"
    link.symlink_to(newer)
    server = serve(bin=link, spares=1)
    model = "claude-haiku-4-5"
    pool = pool_of(server)
    for words in ("SAY one", "SAY two"):
        assert server.post(words, model=model).message["model"].startswith(model)
    wait_until(lambda: pool.starter.spares, "a spare of the newer one")
    swap(link, older)
    for words in ("SAY three", "SAY four"):
        assert server.post(words, model=model).message["model"].startswith(model)
    assert CLIS[pool.cli.version] == older
    rows = since()
    assert {row["body"]["model"].partition("-2")[0] for row in rows} == {model}
    agents = [json.dumps(row["headers"]) for row in rows]
    assert [pool.cli.version in agent for agent in agents] == [False, False, True, True]


# ---------------------------------------------------------------- what it announces


def asked_for(log: Log, model: str) -> int:
    """How many processes were asked what the CLI announces to a model."""
    found = [row["argv"] for row in log.started().values()]
    return sum(model in argv and "--no-session-persistence" not in argv for argv in found)


@pytest.mark.parametrize(
    ("model", "processes"), [("claude-opus-5-5", 1), ("asked.exit", 2)], ids=["came", "did not"]
)
def test_that_the_cli_announces_nothing_is_remembered_only_if_it_said_so(
    tmp_path: Path, log: Log, model: str, processes: int
) -> None:
    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        for _ in range(2):
            assert await pool.inspector.announcements_for(model, Kind()) == []
        assert asked_for(log, model) == processes

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)))


def test_what_is_announced_to_a_model_is_known_while_another_is_asked_about(
    tmp_path: Path, log: Log, gate: Path
) -> None:
    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        await pool.inspector.announcements_for("claude-opus-5-5", Kind())
        other = asyncio.create_task(pool.inspector.announcements_for("slow-start", Kind()))
        await soon(lambda: asked_for(log, "slow-start"))
        async with asyncio.timeout(10):
            await pool.inspector.announcements_for("claude-opus-5-5", Kind())
        assert not other.done()
        open_gate(gate)
        await other
        assert asked_for(log, "claude-opus-5-5") == 1

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)), queue_secs=60)


def test_who_waits_to_ask_takes_what_a_cli_that_was_replaced_meanwhile_has_said(
    tmp_path: Path, log: Log
) -> None:
    async def use(pool: Pool) -> None:
        model, inspector = "claude-opus-5-5", pool.inspector
        await inspector.look()
        async with inspector.announcing:
            asked = asyncio.create_task(inspector.announcements_for(model, Kind()))
            await soon(lambda: pool.starter.spares)
            inspector._replace_cli(pool.cli.files, "2.1.999")
            said = [{"type": "date"}]
            pool.cli.announcements[pool.cli.announcement_key(model)] = said
        assert await asked == said
        assert asked_for(log, model) == 0

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)))


def test_what_starts_while_the_cli_is_asked_takes_no_place_among_the_kinds_that_were_wanted(
    tmp_path: Path,
) -> None:
    """The request itself is noted when its answer begins: twice would push another's out."""

    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        await pool.inspector.announcements_for("claude-opus-5-5", Kind())
        assert [spare.kind for spare in pool.starter.spares] == [Kind()]
        assert not pool.starter._kinds

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)))


def test_what_starts_while_the_cli_is_asked_stays_for_its_request_and_is_one_for_all_that_leave(
    tmp_path: Path, log: Log, gate: Path
) -> None:
    """Another request, or the first spares, would end it as one that nobody wants."""

    async def use(pool: Pool) -> None:
        async def leave() -> None:
            asked = asyncio.create_task(
                pool.inspector.announcements_for("slow-start", Kind("mine"))
            )
            await soon(lambda: pool.inspector.announcing.locked() and pool.starter.spares)
            asked.cancel()
            await asyncio.wait({asked})

        await pool.inspector.look()
        await leave()
        await leave()
        asked = asyncio.create_task(pool.inspector.announcements_for("slow-start", Kind("mine")))
        await soon(pool.inspector.announcing.locked)
        for model in ("one", "another"):
            pool.starter.refill(Kind(model))
        # It is started for no model: by then the CLI will have listed them.
        assert [spare.kind for spare in pool.starter.spares] == [Kind()]
        open_gate(gate)
        await asked
        assert [spare.kind for spare in pool.starter.spares] == [Kind()]

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)), queue_secs=60, spares=2)


@pytest.mark.parametrize("spares", [0, 1])
def test_the_program_asks_at_its_start_if_it_may_start_processes_ahead_of_need(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch, spares: int
) -> None:
    """A first request finds all of it, and a process that waits at its gate."""
    monkeypatch.setattr(bridge, "LOGIN_PROBE_SECS", 0)

    async def use(pool: Pool) -> None:
        running: Any = SimpleNamespace(config=pool.config, pool=pool)
        await bridge.announce(running)
        assert asked_for(log, "sonnet") == spares
        assert [spare.kind for spare in pool.starter.spares] == [Kind()] * spares
        turn, _ = await take_turn(pool, "hello")
        assert turn.session.was_spare
        assert asked_for(log, "sonnet") == 1

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)), spares=spares)


def test_a_request_waits_for_what_is_asked_and_not_for_room(
    tmp_path: Path, log: Log, gate: Path
) -> None:
    """There is room, however few requests may wait for it."""

    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        asked = asyncio.create_task(pool.inspector.announcements_for("slow-start", Kind()))
        await soon(lambda: asked_for(log, "slow-start"))
        request = asyncio.create_task(take_turn(pool, "hello"))
        await soon(lambda: len(waiters(pool.inspector.announcing)) == 1)
        open_gate(gate)
        await asked
        await request

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)), max_queue=0, queue_secs=0)


def waiters(lock: asyncio.Lock) -> list[Any]:
    """Who waits for a lock (asyncio has no word for it)."""
    return list(lock._waiters or ())  # type: ignore[attr-defined]


def test_a_model_that_the_cli_may_not_use_keeps_no_other_from_being_asked_about(
    tmp_path: Path, log: Log
) -> None:
    """The stand-in refuses to change its model, as 2.1.285 does with one that is none of its own."""

    async def use(pool: Pool) -> None:
        await pool.inspector.look()
        await pool.inspector.announcements_for("claude-opus-5-5", Kind())
        [pid] = [pid for pid in log.started() if "set_model" in log.requests(pid)]
        others = {item.full_name for item in pool.cli.info.models} - {"claude-opus-5-5"}
        assert log.requests(pid).count("set_model") == len(others) > 1
        assert [name for name, *_ in pool.cli.announcements] == ["claude-opus-5-5"]

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)))


def test_while_a_listed_model_is_asked_about_none_is_started_for_it_but_for_another_there_is(
    tmp_path: Path,
) -> None:
    async def use(pool: Pool) -> None:
        await pool.inspector.info()
        for model in ("", "claude-old-1"):
            await pool.inspector.announcements_for(model or "sonnet", Kind(model))
        assert [spare.kind.model for spare in pool.starter.spares] == ["", "claude-old-1"]

    in_pool(use, bin=str(versioned(tmp_path, ANNOUNCES)))


def test_what_the_cli_has_reported_is_there_while_it_is_asked_something_else() -> None:
    async def use(pool: Pool) -> None:
        known = await pool.inspector.info()
        async with pool.inspector.announcing, asyncio.timeout(10):
            assert await pool.inspector.info() is known

    in_pool(use)


def test_a_request_that_is_answered_meanwhile_leaves_its_spare_to_the_sweep() -> None:
    """Whoever asks may be no request, and starts none."""

    async def use(pool: Pool) -> None:
        async with pool.inspector.announcing:
            pool.starter.refill(Kind())
        assert pool.starter.is_short

    in_pool(use, spares=1)


def test_the_model_of_a_request_stays_the_one_that_the_cli_had_as_it_came(
    environment: Path,
) -> None:
    """A process without --model runs the CLI's default if it is given an alias, and only a CLI
    that has reported its models has their names."""

    async def use(pool: Pool) -> None:
        await pool.inspector.info()
        request = parse_request(json.dumps(request_body("hello", model="haiku")).encode())
        await pool.room.enter()  # the only place
        waits = asyncio.create_task(pool.starter.fresh_session(request))
        await soon(lambda: pool.queue.length)
        (environment / ".claude").mkdir(exist_ok=True)
        (environment / ".claude/.credentials.json").write_text("{}")
        await pool.inspector.look()
        assert not pool.cli.info.is_known
        pool.room.leave()
        session = await waits
        assert (session.kind.model, session.model) == ("", "claude-haiku-5-5")

    in_pool(use, max_sessions=1)


# ---------------------------------------------------------------- what is none


def test_a_program_that_is_not_claude_code_is_called_so(launch: Launch) -> None:
    program = launch(CLAUDE_CLI_BIN="/bin/true")
    printed(program, "`--version` prints none, so it may not be Claude Code")


def test_what_a_process_of_an_older_cli_reports_is_not_the_version_of_the_newest() -> None:
    async def use(pool: Pool) -> None:
        turn, _ = await take_turn(pool, "hello")
        pool.inspector.cli = Cli(version="2.1.998")
        turn.translator.cli_version = "2.1.999"
        pool.inspector.record_version(turn)
        assert pool.cli.version == "2.1.998"

    in_pool(use)
