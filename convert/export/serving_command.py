"""`mhconvert serve`: the command of an engine that serves a folder or a file, with the options it was found to need."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mhconvert.errors import ExportError, MhconvertError
from mhconvert.progress import Listener

from ..bare_process.known_code import may_run_code
from ..checkpoint import identity
from ..checkpoint.fingerprint import of_folder
from ..storage.atomic_files import write_json
from ..storage.folder_kind import is_adapter
from ..storage.safetensors_reader import read_json
from . import forms

ENGINES = ("vllm", "llama-server", "transformers")
DTYPES = ("bfloat16", "float32")
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

    def __post_init__(self) -> None:
        """Raises ExportError for an engine or a dtype that there is not."""
        for name, value, known in (
            ("engine", self.engine, ("auto", *ENGINES)),
            ("dtype", self.dtype, DTYPES),
        ):
            if value not in known:
                raise ExportError(f"{name} '{value}' is not one of {', '.join(known)}")

    @property
    def interpreter(self) -> str:
        return str(Path(self.python).expanduser()) if self.python else sys.executable

    @cached_property
    def vllm_device(self) -> str:
        """What vLLM would run on, as it says itself; "" where it does not."""
        asked = "import vllm.platforms as p; print(p.current_platform.device_type)"
        command = [self.interpreter, "-I", "-c", asked]
        done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
        return (done.stdout.split() or [""])[-1]


def serving(
    reference: str, server: Server, output: str | None = None, on_progress: Listener | None = None
) -> dict[str, Any]:
    """engine, model (the folder or file that is served), exported (whether it was written now) and command.

    A checkpoint of mhconvert's own class is exported for an engine that does not know the class, unless that was done
    before and the checkpoint is still the same.

    Args:
        output: where an export is written; None: where `mhconvert export` would.
    Raises:
        ExportError: for an adapter, a form that the engine does not take, an engine that is missing, a port in use.
    """
    path = Path(reference).expanduser()
    if is_adapter(path):
        raise ExportError(
            f"{reference} is an adapter; serve what `mhconvert merge {reference} -o OUT` writes"
        )
    if not path.is_dir() and not _is_gguf(path):
        raise ExportError(f"{reference} is neither a model folder nor a .gguf file")
    engine = server.engine if server.engine != "auto" else _first(path, server)
    require_installed(engine, server)
    _require_free(server.host, server.port)
    model, exported = _form(path, engine, server, output, on_progress)
    command = COMMANDS[engine](model, server)
    return {"engine": engine, "model": str(model), "exported": exported, "command": command}


def _is_gguf(path: Path) -> bool:
    return path.is_file() and path.suffix.lower() == ".gguf"


def require_installed(engine: str, server: Server) -> None:
    """Raises ExportError where the engine is not installed, with how to get it."""
    if engine == "llama-server":
        if shutil.which("llama-server") is None:
            raise ExportError("there is no llama-server on the PATH; it comes with llama.cpp (run: b11549)")
        return
    needed = ("vllm",) if engine == "vllm" else ("transformers", "fastapi", "uvicorn", "openai", "pydantic")
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


def _first(path: Path, server: Server) -> str:
    """The engine that `auto` means."""
    if _is_gguf(path):
        return "llama-server"
    if not _has(server.interpreter, ("vllm",)):
        return "transformers"
    try:
        if _is_own_class(path):
            _planned(path, server)
    except MhconvertError:
        return "transformers"
    return "vllm"


def _is_own_class(path: Path) -> bool:
    return identity.converted_method(str(path)) is not None and not identity.exported(str(path))


def _planned(path: Path, server: Server) -> dict[str, Any]:
    """The report of the form that vLLM takes. Raises MhconvertError where there is none for its device."""
    planned = forms.export_checkpoint(str(path), "auto", forms.Options(dry_run=True, force=True))
    place = "CPUs" if server.vllm_device == "cpu" else "GPUs"
    for engine, serves, why in planned.get("engines", []):
        if engine.lower().startswith("vllm") and engine.endswith(place) and not serves:
            raise ExportError(f"{engine} would refuse {path} as {planned['to']}: {why}")
    return planned


def _form(
    path: Path, engine: str, server: Server, output: str | None, on_progress: Listener | None
) -> tuple[Path, bool]:
    """What the engine is given, and whether it was exported now."""
    if _is_gguf(path):
        if engine != "llama-server":
            raise ExportError(f"{path} is a GGUF file, which is served by --engine llama-server")
    elif engine == "llama-server":
        if not _is_own_class(path):
            raise ExportError(
                f"llama-server reads GGUF files: write {path} as one with llama.cpp's converter, and serve that"
            )
        return _exported(path, "gguf", Path(output or f"{path.resolve().name}-bf16.gguf"), on_progress)
    elif engine == "vllm" and _is_own_class(path):
        to = str(_planned(path, server)["to"])
        return _exported(path, to, Path(output or f"{path.resolve().name}-{to}"), on_progress)
    if output is not None:
        raise ExportError(f"{path} is served as it is: leave out --output")
    return path, False


def _exported(path: Path, to: str, output: Path, on_progress: Listener | None) -> tuple[Path, bool]:
    """The export of `path` in the form `to`, and whether it was written now.

    A file beside it says what it was made from, so that it is written once, and again when the checkpoint changes.
    """
    record, made_from = (
        output.with_name(f"{output.name}.served.json"),
        {"fingerprint": of_folder(path), "to": to},
    )
    ours = output.exists() and record.is_file()
    if ours and read_json(record) == made_from:
        return output, False
    if output.exists() and not ours:
        raise ExportError(
            f"{output} is there already; serve it by its name if it is the export, or name another --output"
        )
    forms.export_checkpoint(str(path), to, forms.Options(output=str(output), force=ours), on_progress)
    write_json(record, made_from)
    return output, True


def _require_free(host: str, port: int) -> None:
    """Raises ExportError where nothing can listen on the port."""
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ExportError(f"--host {host} is no address of this machine: {error.strerror}") from None
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(address)
        except OSError as error:
            raise ExportError(
                f"{host}:{port} cannot be served: {error.strerror}; choose another --port"
            ) from None


def _code_options(model: Path, server: Server) -> list[str]:
    """--trust-remote-code where the folder has code that mhconvert ships, or that the user trusts."""
    return ["--trust-remote-code"] if may_run_code(model, server.trust_remote_code) else []


def _vllm(model: Path, server: Server) -> list[str]:
    return [
        *(server.interpreter, "-I", "-m", "vllm.entrypoints.cli.main", "serve", str(model)),
        *("--host", server.host, "--port", str(server.port), "--dtype", server.dtype),
        *_code_options(model, server),
        *(CPU_ONLY if server.vllm_device == "cpu" else ()),
    ]


def _llama_server(model: Path, server: Server) -> list[str]:
    return ["llama-server", "--model", str(model), "--host", server.host, "--port", str(server.port)]


def _transformers(model: Path, server: Server) -> list[str]:
    return [
        *(server.interpreter, "-I", "-m", "transformers.cli.transformers", "serve", str(model)),
        *("--host", server.host, "--port", str(server.port), "--dtype", server.dtype),
        *_code_options(model, server),
    ]


COMMANDS: dict[str, Callable[[Path, Server], list[str]]] = {
    "vllm": _vllm,
    "llama-server": _llama_server,
    "transformers": _transformers,
}
