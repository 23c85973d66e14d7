"""Checkpoints: the newest complete round, durable and never half-written.

``round-00003.safetensors`` holds the adapter, and the moments of a server optimizer and control variates where there
are any; ``state.json`` names it with its SHA-256 and is replaced last, by a rename. So whatever moment a crash picks,
``state.json`` points at a whole file.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from common.atomic import write_atomic
from common.errors import RunError
from common.tensors import Tensors
from common.variates import marked, parted
from server.variates import Controls

FORMAT = 3
MOMENTS = "moments/"
"""What the names of a server optimizer's moments begin with in the file."""


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
        moments: of the server optimizer; empty without one.
        controls: control variates; empty without them.
    """

    round: int
    adapter: Tensors
    config_digest: str
    base_fingerprint: str
    run: str
    clip_norm: float | None = None
    moments: Tensors = field(default_factory=dict)
    controls: Controls = field(default_factory=Controls)


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint durably, then remove the older ones."""
    tensors = checkpoint.adapter | {MOMENTS + name: value for name, value in checkpoint.moments.items()}
    tensors |= marked(checkpoint.controls.shared)
    content = save({name: value.contiguous() for name, value in sorted(tensors.items())})
    path = folder / f"round-{checkpoint.round:05d}.safetensors"
    write_atomic(path, content)
    state: dict[str, object] = {
        "format": FORMAT,
        "round": checkpoint.round,
        "file": path.name,
        "sha256": hashlib.sha256(content).hexdigest(),
        "config_digest": checkpoint.config_digest,
        "base_fingerprint": checkpoint.base_fingerprint,
        "run": checkpoint.run,
        "clip_norm": checkpoint.clip_norm,
    }
    if checkpoint.controls.shared:
        state["variates_taken"] = dict(sorted(checkpoint.controls.taken.items()))
        state["variates_weights"] = dict(sorted(checkpoint.controls.weights.items()))
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
        tensors, shared = parted(load(content))
        moments = {name: value for name, value in tensors.items() if name.startswith(MOMENTS)}
        return Checkpoint(
            int(state["round"]),
            {name: value for name, value in tensors.items() if name not in moments},
            str(state["config_digest"]),
            str(state["base_fingerprint"]),
            str(state["run"]),
            None if state["clip_norm"] is None else float(state["clip_norm"]),
            {name.removeprefix(MOMENTS): value for name, value in moments.items()},
            Controls(
                shared,
                {str(site): int(number) for site, number in state.get("variates_taken", {}).items()},
                {str(site): float(weight) for site, weight in state.get("variates_weights", {}).items()},
            ),
        )
    except FileNotFoundError:
        raise RunError(f"{folder} has no checkpoint; expected one to resume from. Run without --resume.") from None
    except (ValueError, KeyError, TypeError, SafetensorError, OSError) as error:
        raise RunError(
            f"checkpoint in {folder} cannot be read ({type(error).__name__}); expected state.json and the file it "
            "names. Start afresh."
        ) from None
