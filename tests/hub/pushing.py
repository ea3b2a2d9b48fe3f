"""What the tests of a push share: names, and what is on the stand-in afterwards."""

from __future__ import annotations

from tests.hub.stand_in_write_hub import WriteHub

REPO = "tester/tiny-mla"
COMMIT = r"POST /api/models/.+/commit/"


def files_at(hub: WriteHub, repo: str = REPO, branch: str = "main") -> dict[str, bytes]:
    """What is on the branch, without what the Hub itself puts there."""
    found = hub.repos[repo].at(branch)
    assert found is not None
    return {path: content for path, content in found.items() if path != ".gitattributes"}


def pushed(hub: WriteHub, repo: str = REPO) -> int:
    """How many commits were made, without the first one of the Hub."""
    return len(hub.repos[repo].commits) - 1 if repo in hub.repos else 0
