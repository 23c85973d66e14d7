"""Where a run stands, also when no ServerApp works on it: from the control service, or else from its files."""

from __future__ import annotations

from typing import Any

from common.errors import ConfigError, RunError
from server.outcome import bytes_passed
from server.run_place import RunPlace
from server.state_folder import StateFolder


def run_line(place: RunPlace) -> dict[str, Any]:
    """Return one line on a run."""
    submission = place.submission()
    config = submission.config()
    return {
        "run": place.name,
        "state": submission.state,
        "live": place.is_live(),
        "completed_rounds": place.completed_rounds(),
        "rounds": config.federation.rounds,
        "submissions": submission.fence,
        "asked": submission.asked,
        "reason": submission.reason,
    }


def round_lines(place: RunPlace) -> list[dict[str, Any]]:
    """Return the records of complete rounds, with the evaluation after each."""
    metrics = {record["round"]: record["metrics"] for record in place.folder.iterate_records("evaluation")}
    return [
        {**record, "metrics": metrics[record["round"]]["overall"] if record["round"] in metrics else None}
        for record in place.folder.iterate_records("round")
    ]


def run_view(state: StateFolder, place: RunPlace, *, tcp: bool = False) -> dict[str, Any]:
    """Return where a run stands with the names of RunView in control.proto, its submission, and who was left out.

    Args:
        state: the state folder.
        place: the run's.
        tcp: ask over TCP.
    """
    line = run_line(place)
    if line["live"]:
        from server.control.client import connected

        try:
            with connected(state, place, state.config(), tcp=tcp) as client:
                return {**client.status(), "left_out": _left_out(place), "submission": line}
        except RunError:
            pass  # it is just starting or ending: what it wrote down counts
    return {**_from_files(place), "left_out": _left_out(place), "submission": line}


def _left_out(place: RunPlace) -> list[str]:
    """Return why sites that were connected take no part in the run, as it was found when it last started."""
    starts = list(place.folder.iterate_records("start"))
    return list(starts[-1].get("left_out", {}).values()) if starts else []


def _from_files(place: RunPlace) -> dict[str, Any]:
    """Return the view of a run that nobody works on."""
    submission = place.submission()
    config = submission.config()
    rounds = list(place.folder.iterate_records("round"))
    evaluations = list(place.folder.iterate_records("evaluation"))
    last = rounds[-1] if rounds else None
    started = next(iter(place.folder.iterate_records("start")), None)
    answered = {} if last is None else last["sites"]
    names = sorted(set(started["sites"] if started else ()) | set(answered))
    blank = {"status": "idle", "reason": None, "bytes_up": 0, "bytes_down": 0}
    sites = [
        {"site": name, "answered_after_s": None}
        | {key: answered.get(name, blank)[key] or blank[key] or ("" if key == "reason" else 0) for key in blank}
        for name in names
    ]
    spent: dict[str, float] = {}
    if rounds and config.privacy.is_local:
        from server.summary import epsilon_by_site  # which loads torch

        spent = epsilon_by_site(rounds, config)
    done = place.completed_rounds()
    return {
        "run": place.name,
        "phase": "ended" if submission.over else "waiting",
        "round": done,
        "rounds": config.federation.rounds,
        "completed_rounds": done,
        "sites": sites,
        "round_elapsed_s": None,
        "round_timeout_s": config.federation.round_timeout_s,
        "sites_per_round": config.federation.sites_per_round or 0,
        "epsilon": max(spent.values(), default=None),
        "bytes_up": sum(bytes_passed(record, "bytes_up") for record in rounds),
        "bytes_down": sum(bytes_passed(record, "bytes_down") for record in rounds),
        "metrics": evaluations[-1]["metrics"]["overall"] if evaluations else {},
        "paused": False,
        "stops_after_round": False,
        "ended": submission.state if submission.over else "",
        "reason": submission.reason or "",
    }


def expect_adapter(place: RunPlace) -> None:
    """Check that a run has left an adapter.

    Raises:
        ConfigError: if it has not.
    """
    if not (place.folder.adapter / "adapter_config.json").is_file():
        raise ConfigError(
            f"run {place.name!r} has no adapter yet; expected a run that is over. End it after the round in progress "
            f"with: fedtune-server stop {place.name} --after-round"
        )
