"""What the released Plano makes of our entries: its own validator and rendering, from PyPI."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from client import Json
from host import ROOT, TESTS
from installed import PYTHONS
from test_providers import completed

OPENAI = {"model": "openai/gpt-5", "access_key": "$OPENAI_API_KEY", "default": True}
LISTENER = {"type": "model", "name": "model_1", "address": "127.0.0.1", "port": 12000}


def render(folder: Path, *entries: Json, known: str = "") -> "subprocess.CompletedProcess[str]":
    """Have Plano read a file with these providers; `known` is an interface that its schema gets."""
    if "planoai" not in PYTHONS:
        pytest.skip("planoai cannot be installed here")
    document = {"version": "v0.4.0", "listeners": [LISTENER], "model_providers": entries}
    (folder / "in.yaml").write_text(yaml.safe_dump(document))
    command = [
        PYTHONS["planoai"],
        TESTS / "drivers/plano_render.py",
        folder,
        *filter(None, [known]),
    ]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def rendered(folder: Path) -> list[Any]:
    """The providers that a request can be brought to."""
    document = yaml.safe_load((folder / "out.yaml").read_text())
    return [entry for entry in document["model_providers"] if not entry.get("internal")]


def test_the_entry_for_a_released_plano_is_rendered(tmp_path: Path) -> None:
    """Any `anthropic/NAME` is brought to the bridge's address."""
    [entry] = re.findall(r"`(\{model: \"anthropic/\*\".*?\})`", (ROOT / "README.md").read_text())
    done = render(tmp_path, yaml.safe_load(entry), OPENAI)
    assert done.returncode == 0, done.stdout + done.stderr
    ours = rendered(tmp_path)[0]
    assert (ours["provider_interface"], ours["model"]) == ("anthropic", "*")
    assert (ours["protocol"], ours["endpoint"], ours["port"]) == ("http", "127.0.0.1", 14001)
    assert f"cluster: {ours['cluster_name']}" in (tmp_path / "envoy.yaml").read_text()


def test_our_completed_entries_lack_nothing_but_a_name_that_the_schema_knows(
    tmp_path: Path,
) -> None:
    path = tmp_path / "gateway.json"
    entries = [{"model": "claude-cli/*"}, {"model": "claude-cli/opus"}, OPENAI]
    path.write_text(json.dumps({"model_providers": entries}))
    ours = completed(str(path))
    done = render(tmp_path, *ours)
    assert done.returncode == 1
    assert "'claude-cli' is not one of" in done.stdout
    assert re.search("Location: model_providers → [01] → provider_interface", done.stdout)
    done = render(tmp_path, *ours, known="claude-cli")
    assert done.returncode == 0, done.stdout + done.stderr
    wildcard, opus, other = rendered(tmp_path)
    assert (wildcard["name"], wildcard["model"]) == ("claude-cli/*", "*")
    assert (opus["name"], opus["model"]) == ("claude-cli/opus", "opus")
    assert {wildcard["provider_interface"], opus["provider_interface"]} == {"claude-cli"}
    assert {wildcard["port"], opus["port"]} == {14001}
    assert other["access_key"] == "$OPENAI_API_KEY"
