"""Make ``control_pb2.py`` from ``control.proto``: ``python -m common.control.generate``. A test holds them in step."""

from __future__ import annotations

import importlib.resources
import sys
from pathlib import Path

from common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
PROTO = "common/control/control.proto"


def generate(folder: Path) -> None:
    """Write the generated modules under ``folder``, in common/control/.

    Raises:
        ConfigError: if the compiler is missing or fails.
    """
    try:
        from grpc_tools import protoc
    except ImportError:
        raise ConfigError("grpcio-tools is not installed; expected it. Install the extra 'dev'.") from None
    known = importlib.resources.files("grpc_tools") / "_proto"
    outputs = [f"--python_out={folder}", f"--pyi_out={folder}", f"--grpc_python_out={folder}"]
    if protoc.main(["protoc", f"-I{ROOT}", f"-I{known}", *outputs, PROTO]) != 0:
        raise ConfigError(f"{PROTO} cannot be compiled; expected proto3. See the message above.")


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
