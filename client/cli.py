"""``fedtune-client``: the command of a partner site."""

from __future__ import annotations

from collections.abc import Callable

from client.commands import budget, policy, running, set_up
from common.console import new_app

app = new_app(
    "fedtune-client",
    "A partner site: set it up and run it, hold runs to its policy, and know what was spent of its privacy budget.",
)

COMMANDS: tuple[Callable[..., None], ...] = (
    set_up.init, set_up.enroll, set_up.check, running.up, running.status, running.down, running.logs,
    budget.plan, budget.ledger, set_up.systemd, running.agent,
)  # fmt: skip
for command in COMMANDS:
    app.command()(command)
app.command("new-ledger")(budget.new_ledger)
app.add_typer(policy.app, name="policy")


def main() -> None:
    """Entry point of ``fedtune-client``."""
    app()


if __name__ == "__main__":
    main()
