"""The Hugging Face Hub and what stands in its way: the real client against a small Hub of our own."""

import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants, hf_api
from huggingface_hub.utils import close_session

import arcflow
from arcflow import cli, config, student
from arcflow.families import loading
from arcflow.sampling import open
from arcflow.student import adapter
from arcflow.world.teacher import teacher_folder
from tests.support.pipelines import perturb, sample

# diffusers still passes it when it asks for a config
pytestmark = pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument")

COMMIT = "0123456789" * 4


class Answers(BaseHTTPRequestHandler):
    """A folder of repositories, over as much of the Hub's protocol as a download needs."""

    def do_GET(self) -> None:
        words = self.path.split("?")[0].strip("/").removeprefix("api/models/").split("/")
        repository = self.server.root / words[0] / words[1]
        files = [path for path in repository.rglob("*") if path.is_file()]
        if not files:
            return self.refuse(401, "RepoNotFound")  # as the Hub answers whoever is not logged in
        if words[2:3] == ["resolve"]:
            return self.send_file(repository / "/".join(words[4:]), gated="gated" in words[1])
        if words[2:3] == ["tree"]:
            listed = [(path.relative_to(repository).as_posix(), path.stat().st_size) for path in files]
            return self.send(json.dumps([{"type": "file", "path": p, "size": n, "oid": p} for p, n in listed]).encode())
        names = [{"rfilename": path.relative_to(repository).as_posix()} for path in files]
        return self.send(json.dumps({"id": "/".join(words[:2]), "sha": COMMIT, "siblings": names}).encode())

    do_HEAD = do_GET

    def send_file(self, file: Path, gated: bool) -> None:
        if gated or not file.is_file():
            return self.refuse(*((401, "GatedRepo") if gated else (404, "EntryNotFound")))
        self.send(
            file.read_bytes(), {"ETag": f'"{file.stat().st_mtime_ns}-{file.stat().st_ino}"', "X-Repo-Commit": COMMIT}
        )

    def send(self, body: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def refuse(self, status: int, reason: str) -> None:
        self.send(b"", {"X-Error-Code": reason}, status)

    def log_message(self, *words) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A Hub on this machine, with an empty cache before it; `root` is the folder of its repositories."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    server.root = tmp_path / "hub"
    thread = threading.Thread(target=server.serve_forever, args=[0.01])
    thread.start()
    point_at(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    close_session()
    yield server
    close_session()
    server.shutdown()
    server.server_close()
    thread.join()


def point_at(monkeypatch, address: str) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(hf_api.api, "endpoint", address)


def go_offline(monkeypatch) -> None:
    """What HF_HUB_OFFLINE=1 does before Python starts."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


@pytest.fixture
def two_steps(flux, hub):
    """An adapter in a subfolder of owner/name, another beside it."""
    student.build(flux.transformer, modes=4, rank=2)
    perturb(flux.transformer)
    for name in ("two-steps", "four-steps"):
        adapter.save_adapter(flux.transformer, hub.root / "owner/name" / name)
    student.remove(flux.transformer)
    return hub.root / "owner/name/two-steps"


def test_an_adapter_is_fetched_once_and_is_there_offline(flux, two_steps, monkeypatch):
    wanted = sample(arcflow.attach(flux, two_steps))
    arcflow.detach(flux)
    assert torch.equal(sample(arcflow.attach(flux, "owner/name:two-steps")), wanted)
    arcflow.detach(flux)
    go_offline(monkeypatch)
    assert torch.equal(sample(arcflow.attach(flux, "owner/name:two-steps")), wanted)
    with pytest.raises(ValueError, match="'owner/name' is not completely in the cache: .* HF_HUB_OFFLINE"):
        arcflow.attach(flux, "owner/name:four-steps")


@pytest.mark.parametrize(
    ("path", "where"), [("owner/name", "top folder"), ("owner/name:one-step", "subfolder 'one-step'")]
)
def test_a_missing_subfolder_is_named_with_those_there_are(flux, two_steps, path, where):
    there = "'owner/name:four-steps', 'owner/name:two-steps'"
    with pytest.raises(ValueError, match=f"has no adapter in its {where}: expected adapter.safetensors .*{there}"):
        arcflow.attach(flux, path)


def test_a_repository_without_any_adapter_is_shown(flux, hub):
    (hub.root / "owner/other").mkdir(parents=True)
    (hub.root / "owner/other/README.md").write_text("Nothing.")
    with pytest.raises(ValueError, match="It holds none; see https://huggingface.co/owner/other/tree/main"):
        arcflow.attach(flux, "owner/other")


def load_base(name: str) -> None:
    loading.load_pipe(config.Model(base=name))


def load_adapter(name: str) -> None:
    adapter.read_info(name)


def load_transformer(name: str) -> None:
    open.open_transformer(name, "flux")


EVERY_WAY = pytest.mark.parametrize("load", [load_base, load_adapter, load_transformer], ids=lambda f: f.__name__)


@EVERY_WAY
def test_a_repository_that_is_not_there_is_a_question_of_spelling(hub, load):
    with pytest.raises(
        ValueError, match="no folder 'owner/typo' here and no such repository.*Check the spelling.*run `hf auth login`"
    ):
        load("owner/typo")


@EVERY_WAY
def test_a_gated_repository_wants_its_license_and_a_login(hub, load):
    gated = hub.root / "owner/gated"
    (gated / "transformer").mkdir(parents=True)
    for name in ("model_index.json", "transformer/config.json", "arcflow.json", "adapter.safetensors"):
        (gated / name).write_text("{}")
    license = "'owner/gated' is gated.*Accept its license at https://huggingface.co/owner/gated and run `hf auth login`"
    with pytest.raises(ValueError, match=license):
        load("owner/gated")


@EVERY_WAY
def test_offline_without_a_copy_says_which_variable_and_what_to_fetch(hub, load, monkeypatch):
    go_offline(monkeypatch)
    with pytest.raises(ValueError, match="HF_HUB_OFFLINE is set. Unset that, or run `hf download owner/name` once"):
        load("owner/name")


@pytest.mark.parametrize("load", [load_base, load_adapter])  # a transformer alone is asked for six times, in 23 seconds
def test_a_hub_out_of_reach_is_a_question_of_the_connection(hub, load, monkeypatch):
    point_at(monkeypatch, "http://127.0.0.1:9")  # nobody answers there
    with pytest.raises(ValueError, match="no folder 'owner/name' here.*the Hugging Face Hub cannot be reached. Check"):
        load("owner/name")


def test_a_base_that_is_half_there_is_named_with_what_is_wrong(flux, tmp_path):
    flux.save_pretrained(tmp_path)
    weights = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated or damaged .*diffusion_pytorch_model.*fetch it again"):
        load_base(str(tmp_path))
    (tmp_path / "model_index.json").unlink()
    with pytest.raises(ValueError, match="no file named model_index.json.*expected a whole folder"):
        load_base(str(tmp_path))


@pytest.mark.slow
def test_a_base_of_the_hub_is_sampled_and_drawn_again_offline(hub, tmp_path, capsys, monkeypatch):
    """Sizes are refused when no more than configurations are here; weights are known by what is in the cache."""
    shutil.copytree(teacher_folder(), hub.root / "owner/base")
    (hub.root / "owner/base/whole.safetensors").write_bytes(b"beside it, for others")
    words = ["sample", "--model", "owner/base", "--adapter", open.adapter_of("world", "world")]
    words += ["--prompt", "a red ring", "--device", "cpu", "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit):
        cli.main([*words, "--height", "17"])
    assert "height = 17: expected a multiple of 16" in capsys.readouterr().err
    cached = tmp_path / "cache" / "models--owner--base"
    assert not list(cached.rglob("*.safetensors"))
    cli.main([*words, "--height", "64"])
    assert "new images: 1;" in capsys.readouterr().out and not list(cached.rglob("whole.safetensors"))
    go_offline(monkeypatch)
    cli.main([*words, "--height", "64"])
    assert "new images: 0;" in capsys.readouterr().out
    cli.main([*words, "--height", "64", "--seed", "5"])
    assert "new images: 1;" in capsys.readouterr().out


def test_the_command_line_says_it_in_a_line(hub, capsys):
    with pytest.raises(SystemExit):
        cli.main(["sample", "--model", "owner/typo", "--adapter", "none", "--prompt", "a red cube"])
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("arcflow: no folder 'owner/typo' here") and "Traceback" not in said
