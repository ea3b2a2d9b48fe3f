"""What the Hub refuses and what breaks on the way: retried and done, or said and nothing published."""

from __future__ import annotations

import hashlib
import traceback
from pathlib import Path

import pytest

from mhconvert.errors import PublishError
from mhconvert.hub.push import push
from mhconvert.hub.upload_errors import Attempts
from mhconvert.progress import Progress
from tests.donors import make_donor
from tests.hub.pushing import COMMIT, REPO, files_at, pushed
from tests.hub.stand_in_write_hub import TOKEN, Fault, Repo, WriteHub

RETRIED = [
    ("POST /api/repos/create", 429, {"Retry-After": "7"}),
    ("POST /api/repos/create", 500, {}),
    ("POST /api/repos/create", 0, {}),
    ("GET /api/models/", 503, {}),
    ("POST /api/validate-yaml", 502, {}),
    ("POST .*/preupload/", 500, {}),
    ("POST .*/preupload/", 429, {"Retry-After": "7"}),
    ("POST .*/lfs/objects/batch", 500, {}),
    ("PUT /blob/", 500, {}),
    ("PUT /blob/", 0, {}),
    (COMMIT, 429, {"Retry-After": "7"}),
    (COMMIT, 500, {}),
    (COMMIT, 0, {}),
    ("GET .*/tree/", 500, {}),
    ("GET .*/tree/[0-9a-f]{40}", 0, {}),
]


@pytest.mark.parametrize(("at", "status", "headers"), RETRIED)
def test_what_passes_is_tried_again(
    hub: WriteHub, checkpoint: Path, slept: list[float], at: str, status: int, headers: dict[str, str]
) -> None:
    hub.faults.append(Fault(at, status, times=2, headers=headers))
    result = push(checkpoint, REPO, sleep=slept.append)
    assert hub.faults[0].times == 0
    assert result["commit"] == hub.repos[REPO].branches["main"]
    assert files_at(hub).keys() == {path.name for path in checkpoint.iterdir()}
    assert (pushed(hub), hub.count("PUT /blob/") - 2 * at.startswith("PUT")) == (1, 1)
    assert len(slept) == 2
    assert slept[0] >= 7 if headers else slept[0] <= slept[1]


def test_a_commit_whose_answer_is_lost_is_not_made_twice(
    hub: WriteHub, checkpoint: Path, slept: list[float]
) -> None:
    hub.faults.append(Fault(COMMIT, 0, late=True))
    result = push(checkpoint, REPO, sleep=slept.append)
    assert (hub.count(COMMIT), pushed(hub), slept) == (1, 1, [2.0])
    assert result["commit"] == hub.repos[REPO].branches["main"]


@pytest.mark.parametrize(
    ("at", "status", "words"),
    [
        ("POST /api/repos/create", 401, "does not accept the token (401): expired, revoked or mistyped"),
        (
            "POST /api/repos/create",
            403,
            f"the token may not write to {REPO} (403): it needs the role 'write'",
        ),
        ("POST .*/preupload/", 403, "write access to repositories of tester"),
        ("POST .*/preupload/", 404, f"{REPO} is not there for this token (404)"),
        ("POST .*/lfs/objects/batch", 403, "(403)"),
        (COMMIT, 401, "run 'hf auth login', or set HF_TOKEN"),
        (COMMIT, 403, "an organisation in which you may write: the Hub's own reason"),
        (COMMIT, 409, "a conflict (409): something else is changing"),
        (COMMIT, 412, "a conflict (412)"),
        (COMMIT, 413, "the Hub answers 413: the Hub's own reason; push again later"),
    ],
)
def test_what_is_refused_is_said_at_once(
    hub: WriteHub, checkpoint: Path, slept: list[float], at: str, status: int, words: str
) -> None:
    hub.faults.append(Fault(at, status, times=99, error="the Hub's own reason"))
    with pytest.raises(PublishError) as error:
        push(checkpoint, REPO, sleep=slept.append)
    assert words in str(error.value)
    assert (slept, pushed(hub)) == ([], 0)


@pytest.mark.parametrize(
    ("at", "status", "words"),
    [
        ("POST /api/repos/create", 500, "making the repository failed: the Hub answers 500 after 5 tries"),
        ("PUT /blob/", 500, "uploading failed: the Hub answers 500 after 5 tries"),
        ("PUT /blob/", 0, "uploading failed: no connection to http://127.0.0.1"),
        (COMMIT, 429, "uploading failed: the Hub answers 429 after 5 tries"),
        (COMMIT, 0, "after 5 tries (RemoteProtocolError"),
    ],
)
def test_what_does_not_pass_publishes_nothing(
    hub: WriteHub, checkpoint: Path, slept: list[float], at: str, status: int, words: str
) -> None:
    hub.faults.append(Fault(at, status, times=99))
    with pytest.raises(PublishError) as error:
        push(checkpoint, REPO, sleep=slept.append)
    assert words in str(error.value)
    assert "what has arrived is not sent twice" in str(error.value)
    assert pushed(hub) == 0
    assert [wait for wait in slept if wait in (2.0, 4.0, 8.0, 16.0)][-1] in (8.0, 16.0)


def test_the_next_push_goes_on_where_one_was_cut_short(
    hub: WriteHub, checkpoint: Path, slept: list[float]
) -> None:
    hub.faults.append(Fault(COMMIT, 500, times=5))
    with pytest.raises(PublishError):
        push(checkpoint, REPO, sleep=slept.append)
    assert (pushed(hub), hub.count("PUT /blob/")) == (0, 1)
    push(checkpoint, REPO)
    assert (pushed(hub), hub.count("PUT /blob/")) == (1, 1)


def test_only_the_shard_that_failed_is_sent_again(hub: WriteHub, tmp_path: Path, slept: list[float]) -> None:
    folder = make_donor(tmp_path / "donor", shards=3)
    second = hashlib.sha256((folder / "model-00002-of-00003.safetensors").read_bytes()).hexdigest()
    hub.faults.append(Fault(f"PUT /blob/{second}", 500, times=99))
    with pytest.raises(PublishError, match="uploading failed: the Hub answers 500 after 5 tries"):
        push(folder, REPO, sleep=slept.append)
    assert (pushed(hub), len(hub.blobs), second in hub.blobs) == (0, 2, False)
    hub.faults.clear()
    hub.requests.clear()
    push(folder, REPO)
    assert [request for request in hub.requests if request.startswith("PUT")] == [f"PUT /blob/{second}"]
    assert pushed(hub) == 1


def test_a_hub_that_wants_an_hour_is_not_waited_for(
    hub: WriteHub, checkpoint: Path, slept: list[float]
) -> None:
    hub.faults.append(Fault(COMMIT, 429, times=99, headers={"Retry-After": "3600"}))
    with pytest.raises(PublishError, match="the Hub answers 429"):
        push(checkpoint, REPO, sleep=slept.append)
    assert slept == []


def test_what_the_xet_client_cannot_send_is_tried_again(slept: list[float]) -> None:
    answers = iter([RuntimeError("CAS service error"), "sent"])

    def work() -> str:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    told: list[Progress] = []
    assert Attempts(REPO, TOKEN, told.append, slept.append)("uploading", work) == "sent"
    assert slept == [2.0]
    assert told[0].message == "uploading: no connection (RuntimeError); again in 2 s"


def test_a_file_that_is_missing_on_the_hub_is_no_success(hub: WriteHub, checkpoint: Path) -> None:
    hub.loses = "modeling_mla.py"
    with pytest.raises(PublishError, match=r"is not whole: at commit \w{40} the Hub lacks modeling_mla\.py"):
        push(checkpoint, REPO)


def test_a_repository_of_others_in_which_one_may_write(hub: WriteHub, checkpoint: Path) -> None:
    """An organisation in which one may write files but make no repository."""
    repo = hub.repos["org/theirs"] = Repo()
    repo.commit("main", {}, "initial commit")
    hub.faults.append(Fault("POST /api/repos/create", 403, times=99))
    assert push(checkpoint, "org/theirs")["commit"] == repo.branches["main"]


def test_with_a_token_that_is_wrong(hub: WriteHub, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(PublishError, match=r"does not accept the token \(401\)") as error:
        push(checkpoint, REPO)
    assert "hf_wrong" not in str(error.value)


def test_a_token_that_an_error_repeats_is_not_shown(hub: WriteHub, checkpoint: Path) -> None:
    hub.faults.append(Fault(COMMIT, 403, error=f"{TOKEN} may not write"))
    with pytest.raises(PublishError, match=r"\[token\] may not write") as error:
        push(checkpoint, REPO)
    assert TOKEN not in "".join(traceback.format_exception(error.value))
