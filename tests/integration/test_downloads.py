"""scripts/download_hf_assets.py against a hub on this machine: what arrives, and what cannot."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from documents import DOCUMENTS, commands
from hub_server import COMMIT, HubServer, serving
from huggingface_hub.hf_api import RepoSibling

from torchtitan_flux import downloads
from torchtitan_flux.downloads import DownloadError, build_parser, choose

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "scripts" / "download_hf_assets.py"
AE = "ae.safetensors"
LARGE = 3_000_017
ONLY_AE = ("--additional_patterns", AE)


NAMES = [
    "README.md", "flux1-dev.safetensors", "model_index.json", "scheduler/scheduler_config.json",
    "text_encoder/config.json", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin",
    "text_encoder_2/model-00001-of-00002.safetensors",
    "text_encoder_2/model.safetensors.index.json", "tokenizer/vocab.json",
    "tokenizer_2/tokenizer.json", "transformer/config.json", "vae/config.json",
]  # fmt: skip
FILES = {AE: random.Random(0).randbytes(LARGE), **{name: name.encode() for name in NAMES}}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving(HubServer(dict(FILES))) as hub:
        yield hub


def start(
    hub: HubServer, tmp_path: Path, *arguments: str, token: str | None = "hf_good", **env: str
) -> subprocess.Popen[str]:
    """The script as a user who is not logged in calls it, from a folder that has assets/hf."""
    (tmp_path / "assets" / "hf").mkdir(parents=True, exist_ok=True)
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k}
    kept |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "home"), **env}
    given = ["--hf_token", token] if token else []
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), "--repo_id", hub.repo_id, *arguments, *given],
        cwd=tmp_path,
        env=kept | {"HF_HUB_DISABLE_XET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(
    hub: HubServer, tmp_path: Path, *arguments: str, status: int = 0, **more: str | None
) -> tuple[str, str]:
    """The same, to its end; both streams."""
    process = start(hub, tmp_path, *arguments, **more)
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, out + err
    assert "Traceback" not in err
    assert "hf_good" not in out + err
    return out, err


def here(tmp_path: Path) -> dict[str, bytes]:
    """What lies in the download folder, but for the hub's own notes."""
    folder = tmp_path / "assets" / "hf" / "FLUX.1-dev"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".cache" not in path.parts
    }


def test_what_is_meant_arrives_and_a_second_run_fetches_nothing(hub, tmp_path):
    assets = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    argv = ("--assets", *assets, "--additional_patterns", AE)
    listed, _ = run(hub, tmp_path, "--all", "--dry_run")
    assert all(name in listed for name in FILES if not name.endswith(".bin"))
    assert here(tmp_path) == {}
    hub.asked.clear()
    out, _ = run(hub, tmp_path, *argv, token=None, HF_TOKEN="hf_good")
    assert here(tmp_path) == {
        name: content
        for name, content in FILES.items()
        if name == AE or (name.split("/")[0] in assets and not name.endswith(".bin"))
    }
    assert f"{hub.repo_id} at {COMMIT}" in out
    assert {path.startswith("/cdn/"): token for _, path, token in hub.asked} == {
        False: "hf_good",
        True: None,
    }, "the token stays with the hub"
    hub.served.clear()
    assert "ae.safetensors  is here" in run(hub, tmp_path, *argv)[0]
    assert not hub.served


def test_cut_once_the_same_run_goes_on(hub, tmp_path):
    hub.cut_once[AE] = 1_000_003
    run(hub, tmp_path, *ONLY_AE)
    assert here(tmp_path) == {AE: FILES[AE]}


def test_a_killed_run_leaves_nothing_behind_and_keeps_a_second_one_out(hub, tmp_path):
    hub.stall_at[AE] = LARGE // 2
    folder = tmp_path / "assets/hf/FLUX.1-dev"
    first = start(hub, tmp_path, *ONLY_AE)
    try:
        assert hub.stalled.wait(60)
        assert "another download" in run(hub, tmp_path, *ONLY_AE, status=2)[1]
    finally:
        first.kill()
        first.wait()
    hub.stall_at.clear()
    assert list(folder.rglob("*.incomplete"))
    run(hub, tmp_path, *ONLY_AE)
    assert not list(folder.rglob("*.incomplete"))
    assert here(tmp_path) == {AE: FILES[AE]}


def test_a_wrong_checksum_leaves_no_file_and_a_damaged_one_is_replaced(hub, tmp_path):
    hub.corrupt.add(AE)
    assert "it was deleted" in run(hub, tmp_path, *ONLY_AE, status=1)[1]
    assert here(tmp_path) == {}
    hub.corrupt.clear()
    run(hub, tmp_path, *ONLY_AE)
    path = tmp_path / "assets/hf/FLUX.1-dev" / AE
    path.write_bytes(bytes([FILES[AE][0] ^ 1]) + FILES[AE][1:])  # of the same size
    run(hub, tmp_path, *ONLY_AE)
    assert here(tmp_path) == {AE: FILES[AE]}


def test_too_little_space_is_reported_before_anything_is_fetched(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: type("Usage", (), {"free": 2_000_000}))
    with pytest.raises(DownloadError, match="not enough space"):
        downloads.check_space(tmp_path / "new", 3_000_000)


@pytest.mark.parametrize(
    ("arguments", "token", "words"),
    [
        (ONLY_AE, None, ["gated", "--hf_token", "HF_TOKEN"]),
        (ONLY_AE, "hf_no_licence", ["accept its licence"]),
        (ONLY_AE, "hf_wrong", ["token"]),
        (("--additional_patterns", "ae.safetensor"), "hf_good", ["near: ae.safetensors"]),
        (("--assets", "text_encoder_3"), "hf_good", ["text_encoder_3", "text_encoder_2"]),
        (("--additional_patterns", "pytorch_model.bin"), "hf_good", ["pickle"]),
        ((*ONLY_AE, "--revision", "v2"), "hf_good", ["--revision"]),
        (("--all", "--repo_id", "black-forest-labs/FLUX.1-Dev"), "hf_good", ["no such repository"]),
        (("--all", "--repo_id", "a/b/c"), "hf_good", ["owner/name"]),
    ],
)
def test_what_cannot_be_is_one_message_with_status_2(hub, tmp_path, arguments, token, words):
    _, message = run(hub, tmp_path, *arguments, status=2, token=token)
    assert all(word in message for word in words), message
    assert here(tmp_path) == {}


def test_offline_and_no_hub(hub, tmp_path):
    _, message = run(hub, tmp_path, "--all", status=2, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in message
    for hub.api_answer in (b"<html>Log in to the network</html>", b"[]"):
        message = run(hub, tmp_path, "--all", status=2)[1]
        assert "does not answer like a hub" in message


def sibling(name: str) -> RepoSibling:
    return RepoSibling(rfilename=name, size=1, blob_id="0" * 40)


def test_all_that_is_wrong_is_said_at_once_and_no_name_leaves_the_folder():
    files = [sibling("tokenizer/vocab.json"), sibling("../evil")]
    with pytest.raises(DownloadError) as error:
        choose(files, ["tokeniser", "vae"], ["ae.safetensors"], everything=False)
    assert len(str(error.value).splitlines()) == 4


def test_the_kinds_of_torchtitans_script():
    """Its command lines mean the same files, where no folder has the name."""
    names = ["tokenizer.json", "config.json", "model-1.safetensors", "model.safetensors.index.json",
             "original/tokenizer.model", "README.md", "pytorch_model.bin"]  # fmt: skip
    files = [sibling(name) for name in names]
    for assets, patterns, expected in (
        (["tokenizer"], [], [0, 4]),
        (["config", "index"], [], [1, 3]),
        (["safetensors"], [], [2, 3]),
        ([], ["original/*"], [4]),
    ):
        chosen = [file.rfilename for file in choose(files, assets, patterns, False)]
        assert chosen == [names[i] for i in expected]
    assert choose(files, [], [], True) == files[:-1]


def test_documented_commands_name_what_is_there():
    files = [sibling(name) for name in FILES]
    found = [
        command.words[2:]
        for document in DOCUMENTS
        for command in commands(document)
        if command.words[:2] == ["python", "scripts/download_hf_assets.py"]
    ]
    assert found
    for argv in found:
        options = build_parser().parse_args(argv)
        assert choose(files, options.assets, options.additional_patterns, options.all)


def test_it_needs_no_torch_and_goes_where_the_configurations_look(tmp_path, monkeypatch):
    code = "import sys, torchtitan_flux.downloads; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    monkeypatch.chdir(tmp_path)
    assert downloads.default_folder() == REPO / "assets" / "hf"
    (tmp_path / "assets" / "hf").mkdir(parents=True)
    assert downloads.default_folder() == tmp_path / "assets" / "hf"
