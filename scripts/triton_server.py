"""A tritonserver that is started from an unpacked wheel, asked and stopped: for check_triton.py."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import tritonclient.grpc as over_grpc
import tritonclient.http as over_http
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

Values = Mapping[str, Any]
TYPES = {
    "budget": np.int32,
    "max_new_tokens": np.int32,
    "temperature": np.float32,
    "top_k": np.int32,
    "top_p": np.float32,
    "seed": np.int64,
    "raw": np.bool_,
}
SECONDS = 60


@dataclass(frozen=True)
class Streamed:
    """What a stream gave: pieces and ids in order, the reason, the rows of each image, or an error."""

    pieces: tuple[str, ...] = ()
    token_ids: tuple[int, ...] = ()
    responses: int = 0
    reason: str = ""
    visual_tokens: tuple[int, ...] = ()
    error: str = ""


class Server:
    """One process, and clients for it."""

    def __init__(self, process: subprocess.Popen[bytes], ports: Sequence[int], log: Path) -> None:
        self.process, self.log = process, log
        self.http_address, self.grpc_address = (f"127.0.0.1:{port}" for port in ports)
        self.http = over_http.InferenceServerClient(self.http_address, network_timeout=SECONDS)
        self.grpc = over_grpc.InferenceServerClient(self.grpc_address)

    def infer(self, model: str, values: Values, outputs: Sequence[str], way: str = "grpc") -> dict[str, np.ndarray]:
        """One request, one response."""
        module = over_http if way == "http" else over_grpc
        inputs = [_input(module, name, value) for name, value in values.items()]
        wanted = [module.InferRequestedOutput(name) for name in outputs]
        if way == "grpc":
            result = self.grpc.infer(model, inputs, outputs=wanted)
        else:  # a client of its own: tritonclient's over HTTP belongs to the thread that made it
            with over_http.InferenceServerClient(self.http_address, network_timeout=SECONDS) as client:
                result = client.infer(model, inputs, outputs=wanted)
        return {name: result.as_numpy(name) for name in outputs}

    def refusal(self, model: str, values: Values, output: str, way: str) -> str:
        """The error of a request; "" if there is none."""
        try:
            self.infer(model, values, [output], way)
        except InferenceServerException as error:
            return error.message()
        return ""

    def stream(self, values: Values, leave_after: int | None = None, outputs: Sequence[str] = ()) -> Streamed:
        """A streamed answer over a connection of its own; `leave_after` so many responses the client cancels it.

        `outputs` are those that are asked for; none for all.
        """
        arrived: Queue[tuple[Any, Any]] = Queue()
        got = Streamed()
        with over_grpc.InferenceServerClient(self.grpc_address) as client:
            client.start_stream(lambda result, error: arrived.put((result, error)))
            inputs = [_input(over_grpc, name, value) for name, value in values.items()]
            wanted = [over_grpc.InferRequestedOutput(name) for name in outputs] or None
            client.async_stream_infer("holov_answer", inputs, outputs=wanted, enable_empty_final_response=True)
            while True:
                result, error = arrived.get(timeout=SECONDS)
                if error is not None:
                    got = Streamed(got.pieces, got.token_ids, got.responses, error=error.message())
                    break
                got = _joined(got, result)
                if result.get_response().parameters["triton_final_response"].bool_param:
                    break
                if leave_after is not None and got.responses >= leave_after:
                    client.stop_stream(cancel_requests=True)
                    return got
            client.stop_stream()
        return got

    def statistics(self, model: str) -> dict[str, Any]:
        """`model_stats` of one model."""
        found: dict[str, Any] = self.http.get_inference_statistics(model)["model_stats"][0]
        return found

    def close(self) -> None:
        """Let go of the connections: the server waits for open ones before it ends."""
        self.http.close()
        self.grpc.close()

    def stubs(self) -> list[int]:
        """Process ids of the Python back end that belong to this server and are alive."""
        found = subprocess.run(["ps", "-eo", "pid,ppid,stat,args"], capture_output=True, text=True, check=True)
        rows = (line.split(None, 3) for line in found.stdout.splitlines()[1:])
        mine = [row for row in rows if int(row[1]) == self.process.pid and row[2][0] != "Z"]
        return [int(row[0]) for row in mine if "python_backend_stub" in row[3]]


def _joined(before: Streamed, result: Any) -> Streamed:
    text = result.as_numpy("text")
    if text is None:  # the mark of the end alone
        return before
    rest = {name: result.as_numpy(name) for name in ("token_ids", "finish_reason", "visual_tokens")}
    found = {name: [] if value is None else value.tolist() for name, value in rest.items()}
    return Streamed(
        (*before.pieces, text[0].decode()),
        (*before.token_ids, *found["token_ids"]),
        before.responses + 1,
        b"".join(found["finish_reason"]).decode(),
        tuple(found["visual_tokens"]),
    )


def _input(module: Any, name: str, value: Any) -> Any:
    """Bytes and texts as BYTES; lists of them have their shape, a single one [1]."""
    array = np.array(value, dtype=TYPES.get(name, np.object_)) if not isinstance(value, np.ndarray) else value
    array = array.reshape(1) if array.ndim == 0 else array
    if array.dtype == np.object_:
        flat = [item.encode() if isinstance(item, str) else item for item in array.ravel()]
        array = np.array([*flat, None], dtype=np.object_)[:-1].reshape(array.shape)
    made = module.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype))
    made.set_data_from_numpy(array)
    return made


@contextmanager
def running(dist: Path, repository: Path, work: Path) -> Iterator[Server]:
    """A server with these models, all of them ready; stopped at the end."""
    ports = _free_ports(3)
    backends = _backends(dist, work / "backends")
    prefix, site = Path(sys.base_prefix), sysconfig.get_paths()["purelib"]
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": f"{prefix / 'lib'}:{dist / 'nvidia_pytriton.libs'}",
        "PYTHONHOME": str(prefix),
        "PYTHONPATH": site,
        "HOLOV_EXPORT_SITE": site,
    }
    log = work / f"{repository.name}.log"
    binary = dist / "pytriton" / "tritonserver" / "bin" / "tritonserver"
    binary.chmod(0o755)
    words = [str(binary), f"--model-repository={repository}", f"--backend-directory={backends}"]
    for kind, port in zip(("http", "grpc"), ports, strict=False):
        words += [f"--{kind}-address=127.0.0.1", f"--{kind}-port={port}"]
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [*words, "--allow-metrics=false"], env=environment, stdout=stream, stderr=subprocess.STDOUT
        )
    server = Server(process, ports[:2], log)
    try:
        _wait(server)
        yield server
    finally:
        if process.poll() is None:
            server.close()
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(server: Server) -> None:
    """Until the server is ready.

    Raises:
        RuntimeError: it ended, or is not ready in time; the message has the end of its log.
    """
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if server.http.is_server_ready():
                return
        except (OSError, InferenceServerException):
            pass
        time.sleep(0.2)
    tail = server.log.read_text(errors="replace")[-3000:]
    raise RuntimeError(f"the server did not become ready; the end of {server.log}:\n{tail}")


def _backends(dist: Path, folder: Path) -> Path:
    """The Python back end with the stub of this Python."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    triton = dist / "pytriton" / "tritonserver"
    stub = triton / "python_backend_stubs" / version / "triton_python_backend_stub"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(triton / "backends" / "python", folder / "python")
    shutil.copy(stub, folder / "python" / stub.name)
    (folder / "python" / stub.name).chmod(0o755)
    return folder


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()
