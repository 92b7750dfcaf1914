"""Where users have the API, and without the opt-outs that other tests set (first_party.py)."""

import os
import subprocess
import sys

import pytest
from host import ROOT
from installed import CACHE, CLIS
from servers import linux

# By file, what the real CLI does there as elsewhere (what arrives, rebuilt as continued), and what
# it does there alone.
TESTS = {
    "fidelity": "written",
    "rebuilt": "same_arrives and (subscription or key-helper)",
    "tools": "five_rounds and True",
    "renewal": "test",
}


@linux
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can say where api.anthropic.com is")
@pytest.mark.parametrize("name", TESTS)
def test_at_the_apis_own_address_all_arrives_as_elsewhere(name: str) -> None:
    if not CLIS:
        pytest.skip("the real CLI is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    command += [f"tests/test_{name}.py", "-k", TESTS[name]]
    # HOME is another one here, without what was fetched before.
    environ = {**os.environ, "XDG_CACHE_HOME": str(CACHE), "CLIS": next(iter(CLIS))}
    environ["FIRST_PARTY"] = "1"
    done = subprocess.run(
        command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-9000:]
