"""What scripts/download_hf_assets.py chooses, fetches and refuses; huggingface_hub is replaced."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from documents import DOCUMENTS, commands
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils.sha import git_hash

from torchtitan_flux import downloads
from torchtitan_flux.downloads import DownloadError, build_parser, choose, main

REPO = Path(__file__).resolve().parents[2]
NAMES = [
    "README.md", "ae.safetensors", "flux1-dev.safetensors", "model_index.json",
    "scheduler/scheduler_config.json", "text_encoder/config.json", "text_encoder/model.safetensors",
    "text_encoder/pytorch_model.bin", "text_encoder_2/model.safetensors", "tokenizer/vocab.json",
    "tokenizer_2/tokenizer.json", "transformer/config.json", "vae/config.json",
]  # fmt: skip


def siblings(names: list[str]) -> list[RepoSibling]:
    return [
        RepoSibling(rfilename=name, size=len(name), blob_id=git_hash(name.encode()))
        for name in names
    ]


@pytest.fixture
def hub(tmp_path, monkeypatch) -> SimpleNamespace:
    """A repository whose files hold their own names, below tmp_path."""
    hub = SimpleNamespace(fetched=[], damage=b"", gated=False)

    def fetch(repo, name, revision, local_dir, token):
        assert (revision, token) == ("c0ffee", "hf_good")
        hub.fetched.append(name)
        path = Path(local_dir, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(hub.damage or name.encode())

    def look(url, token):
        if hub.gated:
            raise OSError("Access to this model is restricted")

    info = SimpleNamespace(sha="c0ffee", siblings=siblings(NAMES))
    api = SimpleNamespace(model_info=lambda *args, **more: info)
    monkeypatch.setattr(downloads, "HfApi", lambda token: api)
    monkeypatch.setattr(downloads, "hf_hub_download", fetch)
    monkeypatch.setattr(downloads, "get_hf_file_metadata", look)
    common = ("--repo_id", "owner/FLUX", "--local_dir", str(tmp_path), "--hf_token", "hf_good")
    hub.run = lambda *argv: main([*common, *argv])
    return hub


def test_what_is_meant_arrives_and_only_what_is_wrong_is_fetched_again(hub, tmp_path, capsys):
    hub.run("--all", "--dry_run")
    assert not list(tmp_path.iterdir())
    argv = ("--assets", "text_encoder", "tokenizer", "--additional_patterns", "ae.safetensors")
    hub.run(*argv)
    assert hub.fetched == [NAMES[1], NAMES[5], NAMES[6], NAMES[9]]
    assert "c0ffee" in capsys.readouterr().out
    hub.fetched.clear()
    (tmp_path / "FLUX/ae.safetensors").write_text("AE.safetensors")  # of the same size
    leftover = tmp_path / "FLUX/.cache/huggingface/download/a.b.incomplete"  # of a killed run
    leftover.parent.mkdir(parents=True)
    leftover.touch()
    hub.run(*argv)
    assert not leftover.exists()
    assert hub.fetched == ["ae.safetensors"]
    assert (tmp_path / "FLUX/ae.safetensors").read_text() == "ae.safetensors"


@pytest.mark.parametrize(
    ("argv", "changes", "status", "words"),
    [
        (["--additional_patterns", "ae.safetensor", "*.bin"], {}, 2, "not in the repository"),
        (["--additional_patterns", "*.bin"], {}, 2, "a pickle"),
        (["--all"], {"gated": True}, 1, "licence"),
        (["--all"], {"damage": b"x"}, 1, "README.md: its checksum is wrong"),
    ],
)
def test_what_cannot_be_is_one_message(hub, argv, changes, status, words, tmp_path, capsys):
    vars(hub).update(changes)
    with pytest.raises(SystemExit) as leaving:
        hub.run(*argv)
    assert leaving.value.code == status
    assert words in capsys.readouterr().err
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_too_little_space_is_reported_before_anything_is_fetched(hub, monkeypatch):
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda path: SimpleNamespace(free=9))
    with pytest.raises(SystemExit, match="2"):
        hub.run("--all")
    assert not hub.fetched


def test_all_that_is_wrong_is_said_at_once_and_no_name_leaves_the_folder():
    files = siblings(["tokenizer/vocab.json", "../evil"])
    with pytest.raises(DownloadError) as error:
        choose(files, ["tokeniser", "vae"], ["ae.safetensors"], everything=False)
    assert len(str(error.value).splitlines()) == 4


def test_the_kinds_of_torchtitans_script():
    """Its command lines mean the same files, where no folder has the name."""
    names = ["tokenizer.json", "config.json", "model-1.safetensors", "model.safetensors.index.json",
             "original/tokenizer.model", "README.md", "pytorch_model.bin"]  # fmt: skip
    files = siblings(names)
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
    found = [
        command.words[2:]
        for document in DOCUMENTS
        for command in commands(document)
        if command.words[:2] == ["python", "scripts/download_hf_assets.py"]
    ]
    assert found
    for argv in found:
        options = build_parser().parse_args(argv)
        names = siblings(NAMES)
        assert choose(names, options.assets, options.additional_patterns, options.all)


def test_it_needs_no_torch_and_goes_where_the_configurations_look(tmp_path, monkeypatch):
    code = "import sys, torchtitan_flux.downloads; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    monkeypatch.chdir(tmp_path)
    assert downloads.default_folder() == REPO / "assets" / "hf"
    (tmp_path / "assets" / "hf").mkdir(parents=True)
    assert downloads.default_folder() == tmp_path / "assets" / "hf"
