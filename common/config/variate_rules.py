"""What SCAFFOLD's control variates go with, and why not with the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.methods import METHODS, method_of

if TYPE_CHECKING:
    from common.config.run import RunConfig


def expect_control_variates(config: RunConfig) -> None:
    """Check that ``training.control_variates`` makes sense with the rest of the run config.

    Raises:
        ValueError: naming the other key and the reason.
    """
    training = config.training
    if not training.control_variates:
        return
    plain = training.optimizer == "sgd" and training.momentum == 0
    if not plain or training.schedule != "constant" or training.warmup > 0:
        raise ValueError(
            "training.control_variates is set, but only plain steps of one rate tell the mean gradient of a round "
            "(x - y) / (K lr); expected training.optimizer 'sgd', momentum 0, schedule 'constant' and warmup 0"
        )
    if training.proximal_mu > 0:
        raise ValueError(
            "training.control_variates and proximal_mu are both set, and the variates would take up its pull; "
            "expected one of them"
        )
    if config.privacy.unit != "none":
        raise ValueError(
            f"training.control_variates is set under privacy.unit {config.privacy.unit!r}: a site's variate is a "
            "second release of its gradients that no mechanism here is charged for, and puts a round's noise into "
            "every step of later ones; expected unit 'none', or control_variates false"
        )
    if not method_of(config).optimizable:
        able = ", ".join(repr(name) for name, method in METHODS.items() if method.optimizable)
        raise ValueError(
            f"aggregation.method {config.aggregation.method!r} does not train in the same coordinates every round, so "
            f"that a gradient of an earlier round corrects nothing; expected one of {able} with "
            "training.control_variates"
        )
    if config.aggregation.robust != "none":
        raise ValueError(
            f"aggregation.robust {config.aggregation.robust!r} holds updates and not control variates against bad "
            "sites; expected 'none' with training.control_variates"
        )
    if config.aggregation.norm_bound_of_median is not None:
        raise ValueError(
            "aggregation.norm_bound_of_median holds updates back until the round's end and their control variates are "
            "taken as they come; expected max_update_norm, or none, with training.control_variates"
        )
    if config.aggregation.max_weight is not None:
        raise ValueError(
            "aggregation.max_weight cuts the weights of the sites asked, and the coordinator's control variate "
            "is a mean over all sites by their own; expected none with training.control_variates"
        )
    if config.federation.carries:
        raise ValueError(
            "training.control_variates is set and late updates are carried, whose variates are of an adapter that has "
            "moved on; expected updates that count in their round alone"
        )
    communication = config.communication
    lossy = communication.codec != "fp32" or communication.down_codec != "fp32" or communication.top_k is not None
    if lossy:
        raise ValueError(
            f"communication.codec {communication.codec!r}, down or top_k would part the coordinator's control variate "
            "from the mean of the sites' a little more every round; expected 'fp32' and no top_k with "
            "training.control_variates"
        )
