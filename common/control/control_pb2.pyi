from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class StatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PauseRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ResumeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopRequest(_message.Message):
    __slots__ = ("after_round",)
    AFTER_ROUND_FIELD_NUMBER: _ClassVar[int]
    after_round: bool
    def __init__(self, after_round: _Optional[bool] = ...) -> None: ...

class SetRequest(_message.Message):
    __slots__ = ("key", "value")
    KEY_FIELD_NUMBER: _ClassVar[int]
    VALUE_FIELD_NUMBER: _ClassVar[int]
    key: str
    value: str
    def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...

class SiteView(_message.Message):
    __slots__ = ("site", "status", "reason", "bytes_up", "bytes_down", "answered_after_s")
    SITE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    ANSWERED_AFTER_S_FIELD_NUMBER: _ClassVar[int]
    site: str
    status: str
    reason: str
    bytes_up: int
    bytes_down: int
    answered_after_s: float
    def __init__(self, site: _Optional[str] = ..., status: _Optional[str] = ..., reason: _Optional[str] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., answered_after_s: _Optional[float] = ...) -> None: ...

class RunView(_message.Message):
    __slots__ = ("run", "phase", "round", "rounds", "completed_rounds", "sites", "round_elapsed_s", "round_timeout_s", "sites_per_round", "epsilon", "bytes_up", "bytes_down", "metrics", "paused", "stops_after_round", "ended", "reason")
    class MetricsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    RUN_FIELD_NUMBER: _ClassVar[int]
    PHASE_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ROUNDS_FIELD_NUMBER: _ClassVar[int]
    COMPLETED_ROUNDS_FIELD_NUMBER: _ClassVar[int]
    SITES_FIELD_NUMBER: _ClassVar[int]
    ROUND_ELAPSED_S_FIELD_NUMBER: _ClassVar[int]
    ROUND_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    SITES_PER_ROUND_FIELD_NUMBER: _ClassVar[int]
    EPSILON_FIELD_NUMBER: _ClassVar[int]
    BYTES_UP_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    PAUSED_FIELD_NUMBER: _ClassVar[int]
    STOPS_AFTER_ROUND_FIELD_NUMBER: _ClassVar[int]
    ENDED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    phase: str
    round: int
    rounds: int
    completed_rounds: int
    sites: _containers.RepeatedCompositeFieldContainer[SiteView]
    round_elapsed_s: float
    round_timeout_s: float
    sites_per_round: int
    epsilon: float
    bytes_up: int
    bytes_down: int
    metrics: _containers.ScalarMap[str, float]
    paused: bool
    stops_after_round: bool
    ended: str
    reason: str
    def __init__(self, run: _Optional[str] = ..., phase: _Optional[str] = ..., round: _Optional[int] = ..., rounds: _Optional[int] = ..., completed_rounds: _Optional[int] = ..., sites: _Optional[_Iterable[_Union[SiteView, _Mapping]]] = ..., round_elapsed_s: _Optional[float] = ..., round_timeout_s: _Optional[float] = ..., sites_per_round: _Optional[int] = ..., epsilon: _Optional[float] = ..., bytes_up: _Optional[int] = ..., bytes_down: _Optional[int] = ..., metrics: _Optional[_Mapping[str, float]] = ..., paused: _Optional[bool] = ..., stops_after_round: _Optional[bool] = ..., ended: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...
