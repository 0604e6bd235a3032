"""scripts/download_hf_assets.py against a hub on this machine: what arrives, and what cannot."""

import hashlib
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import huggingface_hub.constants
import pytest
from documents import claimed
from hub_server import COMMIT, HubServer, serving

from torchtitan_flux.downloads import command
from torchtitan_flux.downloads import fetch as fetching
from torchtitan_flux.downloads.choose import DownloadError, RemoteFile, choose
from torchtitan_flux.downloads.hub import Hub

REPO = Path(__file__).resolve().parents[2]
SCRIPT = REPO / "scripts" / "download_hf_assets.py"
AE = "ae.safetensors"
LARGE = 3_000_017  # several chunks, no multiple of one


def content(size: int) -> bytes:
    return random.Random(size).randbytes(size)


FILES = {
    AE: content(LARGE),
    "README.md": b"---\nlicense: other\n---\n",
    "flux1-dev.safetensors": content(40_003),
    "model_index.json": b"{}\n",
    "scheduler/scheduler_config.json": b'{"shift": 3.0}\n',
    "text_encoder/config.json": b'{"hidden_size": 768}\n',
    "text_encoder/model.safetensors": content(70_001),
    "text_encoder/pytorch_model.bin": b"not to be read",
    "text_encoder_2/model-00001-of-00002.safetensors": content(50_021),
    "text_encoder_2/model-00002-of-00002.safetensors": content(30_011),
    "text_encoder_2/model.safetensors.index.json": b'{"weight_map": {}}\n',
    "tokenizer/vocab.json": b"{}",
    "tokenizer_2/tokenizer.json": b'{"model": {}}',
}


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with serving(HubServer(dict(FILES))) as hub:
        yield hub


def environment(hub: HubServer, home: Path, **more: str) -> dict[str, str]:
    """Of a user who is not logged in."""
    kept = {
        k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()
    }
    return (
        kept | {"HF_ENDPOINT": hub.address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"} | more
    )


def run(
    hub: HubServer, tmp_path: Path, *arguments: str, token: str | None = "hf_good", **env: str
) -> subprocess.CompletedProcess[str]:
    """The script as a user calls it, from an empty folder that has assets/hf."""
    (tmp_path / "assets" / "hf").mkdir(parents=True, exist_ok=True)
    given = ["--hf_token", token] if token else []
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--repo_id", hub.repo_id, *arguments, *given],
        cwd=tmp_path,
        env=environment(hub, tmp_path / "home", **env),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stderr
    assert "hf_good" not in done.stdout + done.stderr
    return done


def here(tmp_path: Path) -> dict[str, bytes]:
    """What lies in the download folder, but for the lock."""
    folder = tmp_path / "assets" / "hf" / "FLUX.1-dev"
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".download.lock"
    }


def refused(done: subprocess.CompletedProcess[str], status: int, *words: str) -> None:
    """It ended with this status and one message that has these words."""
    assert done.returncode == status, done.stdout + done.stderr
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    for word in words:
        assert word in done.stderr


def downloads(hub: HubServer) -> list[str]:
    """Contents asked for, by path."""
    return [path for method, path, _ in hub.asked if method == "GET" and "/api/" not in path]


def test_the_autoencoder_arrives_and_a_second_run_fetches_nothing(hub, tmp_path):
    done = run(hub, tmp_path, "--additional_patterns", AE)
    assert done.returncode == 0, done.stderr
    assert here(tmp_path) == {AE: FILES[AE]}
    assert f"{hub.repo_id} at {COMMIT[:12]}" in done.stdout
    assert re.search(r"to fetch: 1 file, 3 MB; free: \d", done.stdout)

    again = run(hub, tmp_path, "--additional_patterns", AE)
    assert again.returncode == 0
    assert "ae.safetensors  is here" in again.stdout
    assert hub.served[AE] == LARGE


def test_parts_of_the_pipeline_without_pickles(hub, tmp_path):
    assets = ["text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler"]
    done = run(hub, tmp_path, "--assets", *assets, token=None, HF_TOKEN="hf_good")
    assert done.returncode == 0, done.stderr
    wanted = {
        n: c for n, c in FILES.items() if n.split("/")[0] in assets and not n.endswith(".bin")
    }
    assert here(tmp_path) == wanted
    assert "pytorch_model.bin: left out, a pickle" in done.stdout


def test_the_token_stays_with_the_hub(hub, tmp_path):
    run(hub, tmp_path, "--additional_patterns", AE)
    tokens = {path.startswith("/cdn/"): token for _, path, token in hub.asked}
    assert tokens == {False: "hf_good", True: None}


def test_the_stored_login_serves(hub, tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "token").write_text("hf_good\n")
    assert run(hub, tmp_path, "--additional_patterns", "*.md", token=None).returncode == 0
    assert here(tmp_path) == {"README.md": FILES["README.md"]}


def test_a_dry_run_shows_sizes_and_leaves_nothing(hub, tmp_path):
    done = run(hub, tmp_path, "--all", "--dry_run")
    assert done.returncode == 0, done.stderr
    for name in FILES:
        assert name in done.stdout
    assert downloads(hub) == []
    assert os.listdir(tmp_path / "assets" / "hf") == []


def test_killed_at_half_the_next_run_fetches_the_rest(hub, tmp_path):
    half = LARGE // 2
    hub.stall_at[AE] = half
    (tmp_path / "assets" / "hf").mkdir(parents=True)
    first = subprocess.Popen(
        [sys.executable, str(SCRIPT), "--repo_id", hub.repo_id, "--hf_token", "hf_good",
         "--additional_patterns", AE],
        cwd=tmp_path, env=environment(hub, tmp_path / "home"), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        assert hub.stalled.wait(60)
        part = fetching.part_path(
            tmp_path / "assets" / "hf" / "FLUX.1-dev" / AE,
            RemoteFile(AE, LARGE, hub.sha256(AE), True),
        )
        while not (part.exists() and part.stat().st_size >= 1 << 20):  # what it has written
            assert first.poll() is None
            hub.over.wait(0.05)
        busy = run(hub, tmp_path, "--additional_patterns", AE)
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    refused(busy, 2, "another download is writing")

    kept = part.stat().st_size
    assert set(here(tmp_path)) == {part.name}
    hub.stall_at.clear()
    hub.served.clear()
    done = run(hub, tmp_path, "--additional_patterns", AE)
    assert done.returncode == 0, done.stderr
    assert "of it are here" in done.stdout
    assert hub.served[AE] == LARGE - kept
    assert here(tmp_path) == {AE: FILES[AE]}


@pytest.fixture
def inside(hub, tmp_path, monkeypatch):
    """The same in this process, with things in it replaced."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(fetching, "PAUSES", (0.0,))

    def download(*arguments: str) -> None:
        argv = [
            "--repo_id",
            hub.repo_id,
            "--local_dir",
            str(tmp_path / "assets" / "hf"),
            *arguments,
        ]
        options = command.build_parser().parse_args(argv)
        command.download(Hub(hub.repo_id, token="hf_good", endpoint=hub.address), options)

    return download


def test_cut_at_half_for_good_the_next_run_fetches_the_rest(hub, tmp_path, inside):
    half = LARGE // 2
    hub.cut_at[AE] = half
    with pytest.raises(DownloadError, match="cut at 1,500,008 of 3,000,017 bytes") as error:
        inside("--additional_patterns", AE)
    assert error.value.status == 1
    assert [(name[-5:], len(c)) for name, c in here(tmp_path).items()] == [(".part", half)]
    assert hub.served[AE] == half

    hub.cut_at.clear()
    hub.served.clear()
    inside("--additional_patterns", AE)
    assert hub.served[AE] == LARGE - half
    assert here(tmp_path) == {AE: FILES[AE]}


def test_cut_once_the_same_run_goes_on(hub, tmp_path, inside):
    hub.cut_once[AE] = 1_000_003
    inside("--additional_patterns", AE)
    assert hub.served[AE] == LARGE
    assert here(tmp_path) == {AE: FILES[AE]}


def test_a_server_without_ranges_starts_over(hub, tmp_path, inside):
    hub.cut_once[AE] = 1_000_003
    hub.no_ranges = True
    inside("--additional_patterns", AE)
    assert hub.served[AE] == LARGE + 1_000_003
    assert here(tmp_path) == {AE: FILES[AE]}


@pytest.mark.parametrize("name", [AE, "text_encoder/config.json"])
def test_a_wrong_checksum_leaves_no_file(hub, tmp_path, inside, name):
    hub.corrupt.add(name)
    with pytest.raises(DownloadError, match=rf"{name}: what was sent is not .*it was deleted") as e:
        inside("--additional_patterns", "tokenizer/*", name)
    assert e.value.status == 1
    assert name not in here(tmp_path)
    assert not any(found.endswith(".part") for found in here(tmp_path))

    hub.corrupt.clear()
    inside("--additional_patterns", "tokenizer/*", name)
    assert here(tmp_path) == {n: FILES[n] for n in ("tokenizer/vocab.json", name)}


def test_bytes_damaged_in_the_part_are_noticed(hub, tmp_path, inside):
    hub.cut_at[AE] = LARGE // 2
    with pytest.raises(DownloadError, match="cut at"):
        inside("--additional_patterns", AE)
    (part,) = (tmp_path / "assets" / "hf" / "FLUX.1-dev").glob("*.part")
    part.write_bytes(bytes(LARGE // 2))
    hub.cut_at.clear()
    with pytest.raises(DownloadError, match="it was deleted"):
        inside("--additional_patterns", AE)
    inside("--additional_patterns", AE)
    assert here(tmp_path) == {AE: FILES[AE]}


def test_a_file_of_another_content_is_replaced_in_one_move(hub, tmp_path, inside, capsys):
    path = tmp_path / "assets" / "hf" / "FLUX.1-dev" / AE
    path.parent.mkdir(parents=True)
    old = bytes([FILES[AE][0] ^ 1]) + FILES[AE][1:]  # of the same size
    path.write_bytes(old)
    stale = path.with_name(f"{AE}.0123456789ab.part")
    stale.write_bytes(b"of an older revision")
    hub.cut_at[AE] = 1_000_003
    with pytest.raises(DownloadError, match="cut at"):
        inside("--additional_patterns", AE)
    assert path.read_bytes() == old
    hub.cut_at.clear()
    inside("--additional_patterns", AE)
    assert "differs from the one here" in capsys.readouterr().out
    assert here(tmp_path) == {AE: FILES[AE]}


def test_too_little_space_is_said_before_anything_is_fetched(hub, tmp_path, inside, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(DownloadError, match="3 MB needed, 2 MB free; make room") as error:
        inside("--additional_patterns", AE)
    assert error.value.status == 2
    assert here(tmp_path) == {}
    assert downloads(hub) == []

    # what an earlier run has fetched is not needed again
    part = fetching.part_path(
        tmp_path / "assets" / "hf" / "FLUX.1-dev" / AE, RemoteFile(AE, LARGE, hub.sha256(AE), True)
    )
    part.write_bytes(FILES[AE][:1_100_000])
    inside("--additional_patterns", AE)
    assert here(tmp_path) == {AE: FILES[AE]}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_disk_that_fills_up_on_the_way(hub, tmp_path):
    folder = tmp_path / "assets" / "hf" / "FLUX.1-dev"
    folder.mkdir(parents=True)
    (folder / f"{AE}.{hub.sha256(AE)[:12]}.part").symlink_to("/dev/full")
    done = run(hub, tmp_path, "--additional_patterns", AE)
    refused(done, 1, "disk full", AE, str(folder))
    assert not (folder / AE).exists()


def test_no_token(hub, tmp_path):
    done = run(hub, tmp_path, "--additional_patterns", AE, token=None)
    refused(done, 2, "needs a token", "--hf_token", "HF_TOKEN", "hf auth login", "/settings/tokens")
    assert here(tmp_path) == {}


def test_a_refused_token(hub, tmp_path):
    done = run(hub, tmp_path, "--additional_patterns", AE, token="hf_wrong")
    refused(done, 2, "refuses the token of --hf_token")
    assert "hf_wrong" not in done.stderr


def test_a_token_or_an_address_that_cannot_be_one():
    with pytest.raises(DownloadError, match="--hf_token has characters"):
        Hub("owner/name", token="hf_…")
    for address in ("huggingface.co", "http://", "http://[bad", "http://localhost:99999"):
        with pytest.raises(DownloadError, match="HF_ENDPOINT = "):
            Hub("owner/name", endpoint=address)


def test_a_licence_not_accepted(hub, tmp_path):
    done = run(hub, tmp_path, "--additional_patterns", AE, "--dry_run", token="hf_no_licence")
    refused(done, 2, "accept its licence", f"{hub.address}/{hub.repo_id}")


def test_access_lost_on_the_way(hub, tmp_path, inside):
    inside("--additional_patterns", "README.md")
    hub.gated_for = ("hf_good",)
    remote = RemoteFile(AE, LARGE, hub.sha256(AE), True)
    client = Hub(hub.repo_id, token="hf_good", endpoint=hub.address)
    client.commit = COMMIT
    with pytest.raises(DownloadError, match="accept its licence") as error:
        fetching.fetch(client, remote, tmp_path / AE)
    assert error.value.status == 1
    assert not (tmp_path / AE).exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--additional_patterns", "ae.safetensor"], ["ae.safetensor:", "near: ae.safetensors"]),
        (["--assets", "text_encoder_3"], ["text_encoder_3", "near: text_encoder_2", "safetensors"]),
        (["--additional_patterns", "pytorch_model.bin"], ["pickle"]),
        (["--additional_patterns", AE, "--revision", "v2"], ["--revision v2", "it has main"]),
        (
            ["--additional_patterns", AE, "--repo_id", "black-forest-labs/FLUX.1-Dev"],
            ["no such repository", "near: black-forest-labs/FLUX.1-dev"],
        ),
        (["--additional_patterns", AE, "--repo_id", "a/b/c"], ["owner/name"]),
        (
            ["--additional_patterns", AE, "--local_dir", "../nothing/../file"],
            ["no folder that can"],
        ),
    ],
    ids=["file", "folder", "pickle", "revision", "repository", "name", "place"],
)
def test_what_is_not_there(hub, tmp_path, arguments, words):
    (tmp_path / "run").mkdir()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "file").write_text("")
    refused(run(hub, tmp_path / "run", *arguments), 2, *words)
    assert downloads(hub) == []


def test_all_that_is_wrong_is_said_at_once():
    files = [RemoteFile("tokenizer/vocab.json", 1, "0" * 40, False)]
    with pytest.raises(DownloadError) as error:
        choose(files, ["tokeniser", "vae"], ["ae.safetensors"], everything=False)
    assert [line.split(":")[0] for line in str(error.value).splitlines()] == [
        "--assets tokeniser", "--assets vae", "--additional_patterns ae.safetensors"
    ]  # fmt: skip


def test_the_kinds_of_torchtitans_script():
    """Its command lines mean the same files, where no folder has the name."""
    names = ["tokenizer.json", "config.json", "model-1.safetensors", "model.safetensors.index.json",
             "original/tokenizer.model", "README.md", "pytorch_model.bin"]  # fmt: skip
    files = [RemoteFile(name, 1, "0" * 40, False) for name in names]

    def chosen(*assets: str, patterns: tuple[str, ...] = (), everything: bool = False) -> list[str]:
        return [file.name for file in choose(files, assets, patterns, everything).files]

    assert chosen("tokenizer") == ["tokenizer.json", "original/tokenizer.model"]
    assert chosen("config", "index") == ["config.json", "model.safetensors.index.json"]
    assert chosen("safetensors") == ["model-1.safetensors", "model.safetensors.index.json"]
    names.insert(0, "model.safetensors.index.fp16.json")
    files.insert(0, RemoteFile(names[0], 1, "0" * 40, False))
    assert chosen("index") == [names[0], "model.safetensors.index.json"]
    assert chosen(patterns=("original/*",)) == ["original/tokenizer.model"]
    assert chosen(everything=True) == names[:-1]


def test_a_file_name_that_leaves_the_folder_is_refused(hub, tmp_path):
    hub.files["../../evil.safetensors"] = b"x"
    refused(run(hub, tmp_path, "--all"), 2, "../../evil.safetensors: refused")
    assert here(tmp_path) == {}


def test_offline_by_choice_and_by_fate(hub, tmp_path):
    done = run(hub, tmp_path, "--additional_patterns", AE, HF_HUB_OFFLINE="1")
    refused(done, 2, "HF_HUB_OFFLINE is set")
    # port 9 of this machine: nothing listens there
    done = run(hub, tmp_path, "--additional_patterns", AE, HF_ENDPOINT="http://127.0.0.1:9")
    refused(done, 2, "no connection to http://127.0.0.1:9", "HTTPS_PROXY")


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ((200, b"<html>Log in to the network</html>"), "does not answer like a hub"),
        ((200, b"[]"), "does not answer like a hub"),
        ((503, b""), "answered with status 503"),
    ],
)
def test_what_is_no_hub_or_has_a_fault(hub, inside, answer, words):
    hub.api_says = answer
    with pytest.raises(DownloadError, match=words) as error:
        inside("--all")
    assert error.value.status == 2


def test_nothing_asked_for(hub, tmp_path):
    done = run(hub, tmp_path)
    assert done.returncode == 2
    assert "--assets, --additional_patterns or --all" in done.stderr


def test_the_default_place_is_where_the_configurations_look(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.default_folder() == REPO / "assets" / "hf"
    (tmp_path / "assets" / "hf").mkdir(parents=True)
    assert command.default_folder() == tmp_path / "assets" / "hf"


def test_the_git_checksum_is_gits(tmp_path):
    (tmp_path / "config.json").write_bytes(b"{}\n")
    blob = RemoteFile("config.json", 3, "0967ef424bce6791893e9a57bb952f80fd536e93", lfs=False)
    assert fetching.is_right(tmp_path / "config.json", blob)
    sha256 = RemoteFile("config.json", 3, hashlib.sha256(b"{}\n").hexdigest(), lfs=True)
    assert fetching.is_right(tmp_path / "config.json", sha256)
    (tmp_path / "config.json").write_bytes(b"[]\n")
    assert not fetching.is_right(tmp_path / "config.json", blob)


def test_it_needs_no_torch():
    code = "import sys, torchtitan_flux.downloads.command; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_wheel_has_it_as_a_module():
    argv = [sys.executable, "-m", "torchtitan_flux.downloads", "--help"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert "--additional_patterns" in done.stdout


def test_documented_commands_fetch_what_they_name(tmp_path, monkeypatch, capsys):
    """As they stand, from a hub that has FLUX.1-dev and one that has FLUX.1-schnell."""
    files = {**FILES, "transformer/config.json": b"{}\n", "vae/config.json": b"{}\n"}
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_good")
    for number, one in enumerate(
        claimed(__file__, "test_documented_commands_fetch_what_they_name")
    ):
        python, script, *argv = (word.replace("<token>", "hf_good") for word in one.words)
        assert (python, REPO / script) == ("python", SCRIPT)
        options = command.build_parser().parse_args(argv)
        here = tmp_path / str(number)
        (here / "assets" / "hf").mkdir(parents=True)
        monkeypatch.chdir(here)
        with serving(HubServer(files, options.repo_id)) as hub:
            # HF_ENDPOINT is read when huggingface_hub is imported
            monkeypatch.setattr(command, "Hub", partial(Hub, endpoint=hub.address))
            command.main(argv)
        wanted = [
            name
            for name in files
            if (name.split("/")[0] in options.assets or name in options.additional_patterns)
            and not name.endswith(".bin")
        ]
        assert set(options.assets) <= {name.split("/")[0] for name in wanted}
        assert set(options.additional_patterns) <= set(wanted)
        said = capsys.readouterr().out
        assert all(name in said for name in wanted)
        folder = here / "assets" / "hf" / options.repo_id.split("/")[1]
        assert all((folder / name).is_file() != options.dry_run for name in wanted)


def test_the_line_to_copy_in_the_script_is_understood():
    text = SCRIPT.read_text().split('"""')[1].replace("\\\\\n", " ")
    lines = re.findall(r"^ *python scripts/download_hf_assets.py (.*)", text, re.MULTILINE)
    assert lines
    for line in lines:
        options = command.build_parser().parse_args(shlex.split(line))
        assert options.assets or options.additional_patterns
