"""Serving the studio: to whom, with which passwords and limits, behind the guard."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from mmkit.apps import limits
from mmkit.apps.frame import build_studio
from mmkit.apps.guard import LOOPBACK, Guard
from mmkit.apps.look import CSS, HEAD, theme
from mmkit.apps.sessions import workspace
from mmkit.apps.visitors import Visitors
from mmkit.data.images import MAX_PIXELS
from mmkit.errors import InputError
from mmkit.memory import keep_freed_memory, return_freed_memory
from mmkit.ops.compiling import KERNELS, compile_ahead, cpu_kernels
from mmkit.registry import APPS

MAX_DELAY = 30.0
"""Seconds between two tries of a password, after many wrong ones."""


def launch_studio(
    names: Iterable[str] | None = None,
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    max_file_size: str | int = limits.MAX_FILE_SIZE,
    quota: str | int = limits.DISK_QUOTA,
    allow_hosts: Iterable[str] = (),
    open_browser: bool = False,
    block: bool = True,
    auth: tuple[str, str] | Mapping[str, str] | str | os.PathLike[str] | None = None,
    mcp: bool = False,
) -> tuple[gr.Blocks, str]:
    """Serve the studio on this machine.

    Args:
        names: the pages; `None` takes all.
        host: "127.0.0.1" is reachable from this machine only. Anything else needs `auth`; stand a TLS proxy in front.
        port: `None` takes 7860 or the next free one.
        max_file_size: larger uploads are refused.
        quota: bytes of all uploads and results together.
        allow_hosts: names under which the studio may be reached, besides localhost and plain addresses.
        open_browser: open a browser window.
        block: wait until Ctrl-C.
        auth: (user, password), {user: password}, or a file of lines user:password.
        mcp: offer the endpoints as MCP tools too (needs `gradio[mcp]`).

    Returns:
        The running studio (`.close()` ends it) and its URL; the URL is also printed.

    Raises:
        InputError: unknown page, a host without passwords, a size that is none, or the port is taken.
    """
    names = None if names is None else list(names)
    passwords = _passwords(auth)
    local = host in LOOPBACK
    if not local and not passwords:
        raise InputError(
            f"{host} can be reached by others, who could use the studio and read its answers. Give passwords (--auth FILE with lines "
            "user:password), or stay on 127.0.0.1."
        )
    limits.DISK_QUOTA = str(limits.in_bytes(quota))
    max_upload = limits.in_bytes(max_file_size)
    limits.MAX_FILE_SIZE = limits.of_bytes(max_upload)
    files = workspace().files
    _set_process(str(files))
    studio = build_studio(names)
    _reach_own_server()
    Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # where gradio itself decodes (ImageEditor), PIL refuses above twice this
    own_name = () if local or host in ("0.0.0.0", "::") else (host,)

    @contextlib.asynccontextmanager
    async def behind_the_guard(app: Any) -> AsyncIterator[None]:
        # Around all of gradio's own middleware, which answers other localhost ports before anything inside it could refuse.
        app.middleware_stack = Guard(
            app.middleware_stack,
            Visitors(str(files), _paths(studio.config)),
            [f"/{page[0]}" for page in studio.pages],
            hosts=[*allow_hosts, *own_name],
            any_address=not local,
            max_upload=max_upload,
            head=HEAD,
            mcp=mcp,
        )
        yield

    try:
        _, url, _ = studio.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            quiet=True,
            share=False,
            auth=_checker(passwords) if passwords else None,
            show_error=False,
            max_file_size=max_upload,
            allowed_paths=[],
            state_session_capacity=200,
            enable_monitoring=False,
            run_history=False,
            ssr_mode=False,
            mcp_server=mcp,
            footer_links=["api", "settings"],
            theme=theme(),
            css=CSS,
            app_kwargs={"lifespan": behind_the_guard},
        )
    except OSError as error:
        raise InputError(f"The studio cannot listen on {host}:{port or 7860}: {error}. Choose another port.") from error
    print(f"mmkit studio: {url}", flush=True)
    if block:
        compile_ahead()
        threading.Thread(target=load_ahead, args=(names,), name="mmkit-load", daemon=True).start()
        studio.block_thread()
    return studio, url


def _passwords(auth: tuple[str, str] | Mapping[str, str] | str | os.PathLike[str] | None) -> dict[str, str]:
    """User -> password; empty where nobody is asked."""
    if isinstance(auth, tuple):
        return dict([auth])
    return read_passwords(auth) if isinstance(auth, (str, os.PathLike)) else dict(auth or {})


def _set_process(files: str) -> None:
    """What holds for the whole process, before components are built."""
    keep_freed_memory()  # the sweeper gives it back
    os.environ["GRADIO_TEMP_DIR"] = files  # read when components are built: uploads and pictures go there
    os.environ.setdefault("GRADIO_ANALYTICS_MAX_EVENTS", "200")  # kept, and summed up at every event
    os.environ.setdefault("MPLBACKEND", "agg")  # gradio asks for it at every event; to find one takes 15 MB
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "256")  # not 1024: every size of picture has its own


def load_ahead(names: Iterable[str] | None = None) -> None:
    """Load what the first answers of the pages `names` (default: all) need, one page after the other, so that no visitor waits for it.

    What cannot be loaded is said by the page when it is asked.
    """
    import matplotlib.pyplot  # noqa: F401 - gradio imports it at the first event

    for op in KERNELS:
        cpu_kernels(op)
    for name in APPS.names() if names is None else names:
        with contextlib.suppress(Exception):
            if (load := APPS.get(name).load) is not None:
                load()
    return_freed_memory()
    print("mmkit studio: all models are loaded", flush=True)


def read_passwords(path: str | os.PathLike[str]) -> dict[str, str]:
    """{user: password} of a file with lines "user:password"; empty lines and those that begin with # do not count.

    Raises `InputError` when it cannot be read, a line has no user or password, or there is none.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path} cannot be read as a file of passwords: {error}.") from error
    found = {}
    for i, line in enumerate(lines, 1):
        if line.strip() and not line.startswith("#"):
            user, colon, password = line.strip().partition(":")
            if not (user.strip() and colon and password):
                raise InputError(f"{path}, line {i}: expected user:password.")
            found[user.strip()] = password
    if not found:
        raise InputError(f"{path} names no user. Write lines like user:password.")
    return found


_pause = asyncio.sleep


def _checker(passwords: dict[str, str]) -> Callable[[str, str], Any]:
    """Whether a user's password is right. After each wrong one the next try waits twice as long; tries wait in one line.

    A coroutine, which gradio awaits though its types do not name it."""
    wrong, last, line = 0, 0.0, asyncio.Lock()

    async def check(user: str, password: str) -> bool:
        nonlocal wrong, last
        async with line:
            if time.monotonic() - last > 10 * MAX_DELAY:
                wrong = 0
            if wrong:
                await _pause(min(0.25 * 2 ** (wrong - 1), MAX_DELAY))
            known = passwords.get(user, secrets.token_hex())
            right = secrets.compare_digest(password.encode(), known.encode()) and user in passwords
            wrong, last = (0, last) if right else (min(wrong + 1, 16), time.monotonic())
            return right

    return check


def _paths(config: Any) -> frozenset[str]:
    """The files that the pages themselves show."""
    return frozenset(json.loads(quoted) for quoted in Visitors.PATH.findall(json.dumps(config, default=str).encode()))


def _reach_own_server() -> None:
    """Gradio probes its own address when it starts; a proxy in the environment must not be asked for it."""
    for key in ("NO_PROXY", "no_proxy"):
        hosts = [h for h in os.environ.get(key, "").split(",") if h]
        os.environ[key] = ",".join(dict.fromkeys([*hosts, "127.0.0.1", "localhost"]))
