"""What a site answers to the coordinator's messages."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

from client.feedback import packed_update
from client.ledger.site_ledger import round_asked
from client.policy.rules import expect_plan, expect_run_spend
from client.refusals import ChangedError, log_line
from client.release import failed_release, pack_release, unpack_release
from client.site import Site
from client.start_check import self_test
from client.training.loop import train_locally
from client.training.site_round import LocalResult
from client.variates import Variates, keep_variates, variates_before
from common.codecs.codec import decode
from common.codecs.packing import Packing
from common.config.run import RunConfig
from common.errors import ConfigError, WireError
from common.factors import fixed_manifest, with_rank
from common.methods import expect_rank, method_of, personal_names, received_names, sent_names, trained_names
from common.models.adapter import AdaptedModel, fresh_factors, initial_adapter
from common.models.weak_cache import weak_cache
from common.privacy.planning import Mechanism, plan_mechanism
from common.tensors import LARGEST_WEIGHT, Tensors, fingerprint, is_usable, manifest_of
from common.variates import marked, parted, with_variates
from common.wire import (
    DescribeRequest,
    MechanismReport,
    Refusal,
    SiteDescription,
    TrainReply,
    TrainRequest,
    header_bytes,
    parse_header,
)

logger = logging.getLogger(__name__)


def answer(
    kind: str, header: bytes, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel
) -> tuple[bytes, bytes]:
    """Return header and payload of the answer to a message.

    Args:
        kind: Flower's type of the message, a key of :data:`ANSWERS`.
        header: the message's.
        payload: the message's.
        site: who is asked.
        config: the run config, as the coordinator sent it.
        model: the resident model.

    Raises:
        WireError: for a message of another kind.
        FedtuneError: what the answers raise.
    """
    if kind not in ANSWERS:
        raise WireError(f"a message of kind {kind[:20]!r}; expected one of {', '.join(ANSWERS)}.")
    return ANSWERS[kind](header, payload, site, config, model)


def answer_describe(header: bytes, site: Site, config: RunConfig, model: AdaptedModel) -> SiteDescription:
    """Describe the site for a run: base model, mechanism, and without DP its number of rows.

    Raises:
        WireError: for a request that is not for this run.
        PrivacyError: if the budget cannot be planned, the self-test fails, or the site's ledger cannot take the run.
    """
    request = parse_header(header, DescribeRequest)
    if isinstance(request, Refusal) or request.config_digest != config.digest():
        raise WireError("the request is for another run config; expected the one this site was given.")
    mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
    if site.ledger is not None:
        site.ledger.charge(mechanism)
        site.ledger.ledger.expect_ready()
    _expect_plan(site, config, mechanism)
    if mechanism is not None:
        self_test(model, config)
    expect_rank(config, site.max_rank, site.name)
    return SiteDescription(
        site=site.name,
        base_fingerprint=model.base.fingerprint,
        initial_fingerprint=fingerprint(_run_start(config, model)),
        num_examples=len(site.rows) if config.privacy.unit == "none" else None,
        mechanism=_report(mechanism),
        seeded=site.randomness.repeatable,
        max_rank=site.max_rank,
    )


@dataclass(frozen=True, eq=False)
class Assignment:
    """What a site has been asked to train, checked.

    Attributes:
        request: the request's header.
        site: who trains.
        adapter: every adapter tensor by name, to start from: received ones and those that never travel.
        names: those that are trained.
        mechanism: the planned mechanism, None without DP.
        variates: control variates, where the run has them.
    """

    request: TrainRequest
    site: Site
    adapter: Tensors
    names: frozenset[str]
    mechanism: Mechanism | None
    variates: Variates | None = None

    def correction(self) -> Tensors | None:
        """Return what every step's gradient gets added; None without control variates."""
        return None if self.variates is None else self.variates.correction()


def prepare_train(header: bytes, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel) -> Assignment:
    """Check a request to train a round; nothing is charged or trained yet.

    Raises:
        WireError: for a request that is not for this run, this base model, or is malformed.
        ChangedError: for one that is for the site as it was.
        PrivacyError: if the mechanism must not run.
    """
    request = parse_header(header, TrainRequest)
    if isinstance(request, Refusal) or request.config_digest != config.digest():
        raise WireError("the request is for another run config; expected the one this site was given.")
    if request.base_fingerprint != model.base.fingerprint:
        raise WireError("the request is for another base model; expected the one this site holds.")
    if request.round > config.federation.rounds:
        raise WireError(f"round {request.round} is beyond the run; expected at most {config.federation.rounds}.")
    if request.rank is not None and request.rank != expect_rank(config, site.max_rank, site.name):
        raise ChangedError(
            "this site's max_rank is not the one it described itself with; expected the same. The coordinator asks "
            "anew what this site is."
        )
    received, shared = parted(_received(request, payload, site, config, model))
    start = _round_start(request.round, site, config, model)
    mechanism = plan_mechanism(config, site.num_units(config.privacy.unit))
    _expect_plan(site, config, mechanism)
    if request.mechanism is not None and request.mechanism != _report(mechanism):
        raise ChangedError(
            "this site's rows are not those it described itself with, and with them its noise; expected the same. "
            "Nothing is spent: the coordinator asks anew what this site is."
        )
    if mechanism is not None:
        self_test(model, config)
    names = trained_names(config, start, request.round)
    variates = None
    if request.variates_taken is not None:
        own = variates_before(site.personal, request.run, request.variates_taken, manifest_of(shared))
        variates = Variates(shared, own)
    adapter = {**start, **_kept(request, site, config, start), **received}
    return Assignment(request, site, adapter, names, mechanism, variates)


def answer_train(
    header: bytes, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel
) -> tuple[TrainReply, bytes]:
    """Train a round and return the reply's header and the packed update.

    A site with a ledger has the round charged before it trains and the answer committed before it is sent; a request
    sent again gets the answer that was committed. Where training fails, that answer is a refusal.

    Raises:
        WireError: for a request that is not for this run, this base model, or is malformed.
        PrivacyError: if the mechanism must not run, or policy or ledger refuse; then nothing was trained.
        RoundFailedError: if training failed, now or when the round was first asked for.
    """
    assigned = prepare_train(header, payload, site, config, model)
    if site.ledger is None:
        return train_alone(assigned, config, model)
    asked = round_asked(assigned.request, payload)
    charge = site.ledger.charge(assigned.mechanism)
    if site.policy is not None and site.policy.epsilon_per_run is not None:
        site.ledger.ledger.expect_ready()  # of_run only reads, which a write that a crash cut off would refuse
        expect_run_spend(site.policy, site.ledger.of_run(asked, charge), site.ledger.budget)
    release = site.ledger.reserve(asked, charge)
    if release is None:
        try:
            release = site.ledger.commit(asked, pack_release(*train_alone(assigned, config, model)))
        except Exception as error:  # noqa: BLE001 - a round left open is trained again: with fresh noise, uncharged
            logger.error("%s failed and will not be trained again: %s", asked, log_line(error))
            release = site.ledger.commit(asked, failed_release())
    return unpack_release(release, assigned.request.nonce)


def train_alone(assigned: Assignment, config: RunConfig, model: AdaptedModel) -> tuple[TrainReply, bytes]:
    """Train one site and return the reply's header and the packed update."""
    request = assigned.request
    result = train_locally(
        model, assigned.site, config, assigned.adapter, assigned.names, request.round, assigned.mechanism,
        request.clip_norm, assigned.correction(),
    )  # fmt: skip
    return reply_train(assigned, result, config)


def reply_train(assigned: Assignment, result: LocalResult, config: RunConfig) -> tuple[TrainReply, bytes]:
    """Return the header and the packed update that tell what a site's round gave, and keep what stays at the site."""
    request, personal = assigned.request, assigned.site.personal
    sent = sent_names(config, assigned.names, request.round)
    own = assigned.names - sent
    if personal is not None and own:
        local = {name: assigned.adapter[name] + result.update[name] for name in own}
        personal.keep(request.run, request.round, local)
    reply = TrainReply(
        site=assigned.site.name,
        round=assigned.request.round,
        nonce=assigned.request.nonce,
        base_fingerprint=assigned.request.base_fingerprint,
        steps=result.steps,
        train_loss=None if config.privacy.unit == "site" else result.train_loss,
        mechanism=_report(assigned.mechanism),
        clip_norm=result.clip_norm,
    )
    sends = {name: result.update[name] for name in sent}
    if assigned.variates is not None:
        change = assigned.variates.change(result.update, config.training, result.steps)
        taken = request.variates_taken or 0
        keep_variates(personal, request.run, request.round, taken, assigned.variates.own, change)
        sends |= marked(change)
    return reply, packed_update(sends, request, assigned.site, config)


def _expect_plan(site: Site, config: RunConfig, mechanism: Mechanism | None) -> None:
    """Check a plan against the site's policy; a real site has one, and a ledger that refuses runs without noise."""
    if site.policy is not None and site.ledger is not None and mechanism is not None:
        expect_plan(site.policy, config, mechanism, site.ledger.budget)


def _received(request: TrainRequest, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel) -> Tensors:
    """Unpack what a request brings: tensors of the round's adapter, and a correction to the base.

    Raises:
        WireError: for anything that is not what the round's request must hold.
    """
    start = _round_start(request.round, site, config, model)
    manifest = manifest_of({name: start[name] for name in received_names(config, start, request.round)})
    if (request.variates_taken is not None) != config.training.control_variates:
        raise WireError("the request has control variates where the run has none, or lacks them; expected the run's.")
    if config.training.control_variates:
        sent = sent_names(config, trained_names(config, start, request.round), request.round)
        manifest |= with_variates(manifest_of({name: start[name] for name in sent}))
    if request.fixed_ranks and not method_of(config).corrects:
        raise WireError("the request has a correction to the base; expected none under this method.")
    try:
        manifest |= fixed_manifest(start, request.fixed_ranks)
    except ValueError as error:
        raise WireError(f"{error}.") from None
    received = decode(payload, manifest, Packing.of_adapter(config.communication))
    if not is_usable(received):
        raise WireError(f"the adapter holds values beyond {LARGEST_WEIGHT:g}; expected a trained adapter's.")
    return received


def _kept(request: TrainRequest, site: Site, config: RunConfig, start: Tensors) -> Tensors:
    """Return what the site kept of an earlier round of the run.

    Raises:
        ConfigError: if the method keeps something at sites and this one has no place for it.
    """
    names = personal_names(config, start)
    if not names:
        return {}
    if site.personal is None:
        raise ConfigError(
            f"aggregation.method {config.aggregation.method!r} keeps factors at each site, and this virtual site has "
            "no place for them; expected fedtune-sim, or a real site."
        )
    return site.personal.before(request.run, request.round, manifest_of({name: start[name] for name in names}))


def _round_start(number: int, site: Site, config: RunConfig, model: AdaptedModel) -> Tensors:
    """Return the whole adapter that the site derives for a round before anything is received, at the site's rank."""
    start = _start(model, config.seed)
    if method_of(config).fresh:
        start = fresh_factors(start, config.seed, number)
    return with_rank(start, expect_rank(config, site.max_rank, site.name))


def _run_start(config: RunConfig, model: AdaptedModel) -> Tensors:
    """Return the adapter that the run starts from, at the run's rank also where the site's model has a lower one."""
    if config.adapter.kind == "lora" and model.settings.r < config.adapter.rank:
        return initial_adapter(model, config.seed, config.adapter.rank)
    return _start(model, config.seed)


@weak_cache(2)
def _start(model: AdaptedModel, seed: int) -> Tensors:
    return initial_adapter(model, seed)


def _report(mechanism: Mechanism | None) -> MechanismReport | None:
    if mechanism is None:
        return None
    return MechanismReport(
        noise_multiplier=mechanism.noise_multiplier,
        sample_rate=mechanism.sample_rate,
        steps=mechanism.steps_per_round,
    )


def _described(
    header: bytes, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel
) -> tuple[bytes, bytes]:
    return header_bytes(answer_describe(header, site, config, model)), b""


def _trained(header: bytes, payload: bytes, site: Site, config: RunConfig, model: AdaptedModel) -> tuple[bytes, bytes]:
    reply, update = answer_train(header, payload, site, config, model)
    return header_bytes(reply), update


ANSWERS: dict[str, Callable[[bytes, bytes, Site, RunConfig, AdaptedModel], tuple[bytes, bytes]]] = {
    "query": _described,
    "train": _trained,
}
