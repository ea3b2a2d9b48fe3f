"""`mhconvert serve`: the command of an engine that serves a folder or a file, with the options it was found to need."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mhconvert.errors import ExportError
from mhconvert.progress import Listener

from ..bare_process.known_code import require_known_code
from ..checkpoint import identity
from ..checkpoint.provenance import PROVENANCE, read_record
from ..storage.folder_kind import is_adapter
from ..storage.safetensors_reader import read_json
from . import forms

ENGINES = ("vllm", "llama-server", "transformers")
# Without these vLLM 0.32 on a CPU compiles for minutes, or turns keys by a wrong rotary operation.
CPU_ONLY = ("--enforce-eager", "--compilation-config", '{"custom_ops": ["none"]}')
HAS = "from importlib.util import find_spec; raise SystemExit(not all(find_spec(n) for n in %r))"


@dataclass(frozen=True)
class Server:
    """How a model is served.

    engine: one of ENGINES, or auto: vLLM where `python` has it and takes the model, else transformers.
    python: the interpreter of the environment that has the engine; None: this one.
    host, port: where it listens.
    dtype: of the weights and the cache; float16 is left out, as the latent's norm leaves its range.
    trust_remote_code: whether code of the folder that mhconvert does not ship may run.
    """

    engine: str = "auto"
    python: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    dtype: str = "bfloat16"
    trust_remote_code: bool = False

    @property
    def interpreter(self) -> str:
        return self.python or sys.executable


def serving(reference: str, server: Server, on_progress: Listener | None = None) -> dict[str, Any]:
    """engine, model (the folder or file that is served), exported (whether it was written now) and command.

    A checkpoint of mhconvert's own class is exported for an engine that does not know the class, into the folder that
    `mhconvert export` would take, unless its export is there already.

    Raises:
        ExportError: for an adapter, a form that the engine does not take, an engine that is missing, a port in use.
    """
    if is_adapter(Path(reference)):
        raise ExportError(
            f"{reference} is an adapter; serve what `mhconvert merge {reference} -o OUT` writes"
        )
    if not Path(reference).exists():
        raise ExportError(f"{reference} is no folder or file; serve a checkpoint, an export or a .gguf file")
    engine = server.engine if server.engine != "auto" else _first(reference, server)
    require_installed(engine, server)
    _require_free(server.host, server.port)
    model, exported = _form(reference, engine, on_progress)
    return {
        "engine": engine,
        "model": str(model),
        "exported": exported,
        "command": COMMANDS[engine](model, server),
    }


def require_installed(engine: str, server: Server) -> None:
    """Raises ExportError where the engine is not installed, with how to get it."""
    if engine == "llama-server":
        if shutil.which("llama-server") is None:
            raise ExportError("there is no llama-server on the PATH; it comes with llama.cpp")
        return
    needed = ("vllm",) if engine == "vllm" else ("transformers", "fastapi", "uvicorn")
    if not _has(server.interpreter, needed):
        wanted = "vllm" if engine == "vllm" else "'transformers[serving]'"
        raise ExportError(
            f"{server.interpreter} has not all of {', '.join(needed)}; install {wanted} there, or name the Python of "
            "an environment that has it by --python"
        )


def _has(python: str, modules: tuple[str, ...]) -> bool:
    try:
        done = subprocess.run([python, "-I", "-c", HAS % (modules,)], stdin=subprocess.DEVNULL, check=False)
    except OSError as error:
        raise ExportError(f"--python {python} cannot be run: {error.strerror}") from None
    return done.returncode == 0


def _first(reference: str, server: Server) -> str:
    """The engine that `auto` means."""
    if reference.endswith(".gguf"):
        return "llama-server"
    if not _has(server.interpreter, ("vllm",)):
        return "transformers"
    try:
        _require_form(reference)
    except ExportError:
        return "transformers"
    return "vllm"


def _require_form(reference: str) -> None:
    """Raises ExportError where the model is of our own class, and no export makes another of it."""
    if _is_own_class(reference):
        forms.export_checkpoint(reference, "auto", forms.Options(dry_run=True, force=True))


def _is_own_class(reference: str) -> bool:
    return identity.converted_method(reference) is not None and not identity.exported(reference)


def _form(reference: str, engine: str, on_progress: Listener | None) -> tuple[Path, bool]:
    """What the engine is given, and whether it was exported now."""
    path = Path(reference).expanduser()
    if engine == "llama-server":
        return (path, False) if path.suffix == ".gguf" else _exported(reference, "gguf", on_progress)
    if path.suffix == ".gguf":
        raise ExportError(f"{reference} is a GGUF file, which is served by --engine llama-server")
    if engine == "transformers" or not _is_own_class(reference):
        return path, False
    planned = forms.export_checkpoint(reference, "auto", forms.Options(dry_run=True, force=True))
    return _exported(reference, str(planned["to"]), on_progress)


def _exported(reference: str, to: str, on_progress: Listener | None) -> tuple[Path, bool]:
    """The export in the form `to` beside the working folder, written where there is none of this checkpoint."""
    source = Path(reference).expanduser().resolve()
    output = Path(f"{source.name}-{to}" if to != "gguf" else f"{source.name}.gguf")
    if _is_export_of(output, source, newer_than=source / "config.json"):
        return output, False
    options = forms.Options(output=str(output), force=_is_export_of(output, source))
    made = forms.export_checkpoint(reference, to, options, on_progress)
    return Path(made["output"]), True


def _is_export_of(output: Path, source: Path, newer_than: Path | None = None) -> bool:
    """Whether `output` is an export of the folder `source`, and newer than a file; a GGUF file says only the latter."""
    record = output / PROVENANCE if output.is_dir() else output
    if not record.exists():
        return False
    if newer_than is not None and record.stat().st_mtime < newer_than.stat().st_mtime:
        return False
    if output.is_file():
        return newer_than is not None
    return bool(read_record(output).get("exported", {}).get("source") == str(source))


def _require_free(host: str, port: int) -> None:
    """Raises ExportError where nothing can listen on the port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ExportError(
                f"{host}:{port} cannot be served: {error.strerror}; choose another --port"
            ) from None


def _code_options(model: Path, server: Server) -> list[str]:
    """--trust-remote-code where the folder has code that mhconvert ships, or that the user trusts."""
    if "auto_map" not in read_json(model / "config.json"):
        return []
    if not server.trust_remote_code:
        require_known_code(model)
    return ["--trust-remote-code"]


def _vllm(model: Path, server: Server) -> list[str]:
    device = subprocess.run(
        [server.interpreter, "-I", "-c", "import vllm.platforms as p; print(p.current_platform.device_type)"],
        capture_output=True,
        text=True,
        check=False,
    ).stdout.split()
    return [
        *(server.interpreter, "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", server.host, "--port", str(server.port), "--dtype", server.dtype),
        *_code_options(model, server),
        *(CPU_ONLY if device[-1:] == ["cpu"] else ()),
    ]


def _llama_server(model: Path, server: Server) -> list[str]:
    return ["llama-server", "--model", str(model), "--host", server.host, "--port", str(server.port)]


def _transformers(model: Path, server: Server) -> list[str]:
    return [
        *(server.interpreter, "-m", "transformers.cli.transformers", "serve", str(model)),
        *("--host", server.host, "--port", str(server.port), "--dtype", server.dtype),
        *_code_options(model, server),
    ]


COMMANDS: dict[str, Callable[[Path, Server], list[str]]] = {
    "vllm": _vllm,
    "llama-server": _llama_server,
    "transformers": _transformers,
}
