"""Generate the committed stubs of `v1/federation.proto`; run after every change of that file."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOM = Path(__file__).resolve().parent
PROTO = "fedmosaic/protos/v1/federation.proto"
OUTPUTS = ("federation_pb2.py", "federation_pb2.pyi", "federation_pb2_grpc.py", "federation_pb2_grpc.pyi")


def generate(destination: Path) -> dict[str, bytes]:
    """Content of every stub by file name, compiled in an existing, empty folder; protoc reports on stderr."""
    # protoc looks for the mypy plug-ins on PATH; they are installed beside this interpreter.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    # A process of its own: one that has loaded the compiler cannot load TenSEAL any more.
    command = [
        *(sys.executable, "-m", "grpc_tools.protoc"),
        # The virtual folder gives the stubs their import path, wherever the room stands on disk.
        f"-Ifedmosaic/protos/v1={ROOM / 'v1'}",
        f"--python_out={destination}",
        f"--grpc_python_out={destination}",
        f"--mypy_out=quiet:{destination}",
        f"--mypy_grpc_out=quiet:{destination}",
        PROTO,
    ]
    if subprocess.run(command, env={**os.environ, "PATH": path}, check=False).returncode != 0:  # noqa: S603  # our own
        raise RuntimeError(f"protoc failed on {PROTO}; its messages are above")
    return {name: (destination / Path(PROTO).parent / name).read_bytes() for name in OUTPUTS}


def main() -> None:
    """Write the stubs beside the proto file."""
    with tempfile.TemporaryDirectory() as scratch:
        for name, content in generate(Path(scratch)).items():
            (ROOM / "v1" / name).write_bytes(content)


if __name__ == "__main__":
    main()
