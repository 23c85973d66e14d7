"""Checkpoints: the newest complete round, durable and never half-written.

``round-00003.safetensors`` holds the adapter; ``state.json`` names it with its SHA-256 and is replaced last, by a
rename. So whatever moment a crash picks, ``state.json`` points at a whole file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from common.atomic import write_atomic
from common.errors import RunError
from common.tensors import Tensors

FORMAT = 2


@dataclass(frozen=True)
class Checkpoint:
    """The state between two rounds.

    Attributes:
        round: rounds completed; 0 before the first.
        adapter: the tensors that change in the run, by name, and the correction to the base; float32.
        config_digest: of the run config.
        base_fingerprint: of the base model.
        run: the run's id, by which the sites' ledgers know it.
        clip_norm: where adaptive clipping stands; None without it.
    """

    round: int
    adapter: Tensors
    config_digest: str
    base_fingerprint: str
    run: str
    clip_norm: float | None = None


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably, then remove the older ones."""
    content = save({name: value.contiguous() for name, value in sorted(checkpoint.adapter.items())})
    path = folder / f"round-{checkpoint.round:05d}.safetensors"
    write_atomic(path, content)
    state = {
        "format": FORMAT,
        "round": checkpoint.round,
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "config_digest": checkpoint.config_digest,
        "base_fingerprint": checkpoint.base_fingerprint,
        "run": checkpoint.run,
        "clip_norm": checkpoint.clip_norm,
    }
    write_atomic(folder / "state.json", (json.dumps(state, indent=2) + "\n").encode())
    for old in folder.glob("round-*.safetensors"):
        if old != path:
            old.unlink(missing_ok=True)


def load_checkpoint(folder: Path) -> Checkpoint:
    """Read the newest checkpoint.

    Raises:
        RunError: if there is none, or it is damaged.
    """
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        content = (folder / Path(state["file"]).name).read_bytes()
        if state["format"] != FORMAT or hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise RunError(f"checkpoint in {folder} is damaged; expected the digest in state.json. Start afresh.")
        return Checkpoint(
            int(state["round"]),
            load(content),
            str(state["config_digest"]),
            str(state["base_fingerprint"]),
            str(state["run"]),
            None if state["clip_norm"] is None else float(state["clip_norm"]),
        )
    except FileNotFoundError:
        raise RunError(f"{folder} has no checkpoint; expected one to resume from. Run without --resume.") from None
    except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise RunError(
            f"checkpoint in {folder} cannot be read ({type(error).__name__}); expected state.json and the file it "
            "names. Start afresh."
        ) from None
