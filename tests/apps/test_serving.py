"""Serving: health, programs that ask instead of visitors, and what the containers name."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import httpx
import pytest
from gradio_client import Client
from typer.testing import CliRunner

from mmkit.apps import launch_studio
from mmkit.cli import app

ROOT = Path(__file__).parent.parent.parent


def test_health_is_told_without_a_password_and_to_the_right_name_only(tmp_path):
    studio, url = launch_studio(["gmm"], block=False, host="0.0.0.0", auth={"ada": "right"})
    try:
        url = url.rstrip("/").replace("localhost", "127.0.0.1")
        answer = httpx.get(f"{url}/healthz")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok"})
        assert answer.headers["cache-control"] == "no-store"
        assert "set-cookie" not in answer.headers
        assert httpx.head(f"{url}/healthz").status_code == 200
        assert httpx.post(f"{url}/healthz", json={}).status_code == 404
        assert httpx.get(f"{url}/healthz", headers={"host": "evil.example"}).status_code == 421
        assert httpx.get(f"{url}/config").status_code == 401
    finally:
        studio.close(verbose=False)


def test_every_page_has_an_endpoint_for_programs_and_keeps_its_own_buttons_closed(launch):
    from mmkit.registry import APPS

    url = launch()
    config = httpx.get(f"{url}/config").json()
    offered = {
        name.strip("/")
        for name in Client(url, verbose=False).view_api(return_format="dict", print_info=False)["named_endpoints"]
    }
    others = {
        "medical": "segment_medical",
        "splats": "render_splats",
        "slam": "map_recording",
        "points": "classify_cloud",
    }
    for page in APPS.names():  # an endpoint is called as its page, with more words behind, or as these
        assert any(name.startswith(others.get(page, page)) for name in offered), page
    private = [fn for fn in config["dependencies"] if fn["api_visibility"] == "private"]
    assert private
    assert not offered & {fn["api_name"] for fn in private}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.cuda"])
def test_what_a_container_names_exists(name):
    text = (ROOT / "deploy" / name).read_text(encoding="utf-8")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    copied = {
        source for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for source in line.split() if source[:2] != "--"
    }
    assert all((ROOT / source).exists() for source in copied)
    needed = {folder.split("/")[0] for folder in project["tool"]["setuptools"]["package-dir"].values()}
    assert needed | {"pyproject.toml", project["project"]["readme"], *project["project"]["license-files"]} == copied
    for extras in re.findall(r"\./build\[([\w,]+)\]", text):
        assert set(extras.split(",")) <= project["project"]["optional-dependencies"].keys()
    (command,) = re.findall(r'^CMD \["mmkit", (.+)\]$', text, re.M)
    words = re.findall(r'"([^"]+)"', command)
    shown = CliRunner().invoke(app, [words[0], "--help"], env={"COLUMNS": "300", "TERM": "dumb"}).output
    assert all(word in shown for word in words if word.startswith("--"))
    assert "/healthz" in text
