"""Documents of the HTTP interface, from which OpenAPI has its schemas.

A number that is not finite is the text "NaN", "Infinity" or "-Infinity", since JSON has no number for it.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

from gradwatch_server.store.tokens import Scope

Number = float | Literal["NaN", "Infinity", "-Infinity"]
Measured = Number | None
"""None: the parameter had no gradient in this step."""
_WITHOUT_NUL = r"^[^\x00]*$"
"""PostgreSQL stores no NUL in a text."""
AnyDocument = dict[str, Any]


class Problem(BaseModel):
    """An RFC 9457 problem document: what is wrong and what to do about it."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str


class Registered(BaseModel):
    """A run is registered."""

    id: str
    url: str = Field(description="the run's page")
    created: bool = Field(description="false: the run existed already")


class Resumable(BaseModel):
    """A run that did not end by itself, as an agent sees it that may go on with it."""

    id: str
    attempt: int = Field(description="number of its latest attempt")
    status: str | None = Field(description="failed, killed or null: it did not say how it ended")
    last_step: int | None = Field(description="last step that is stored")
    silent_seconds: float = Field(description="since it was last heard of")
    attributes: dict[str, str]
    parameters: str = Field(description="checksum over the names and shapes of its parameters")


class Stored(BaseModel):
    """A batch is committed and synced to disk."""

    id: str
    samples: int = Field(description="samples that this request stored")
    duplicate: bool = Field(description="true: the batch was stored before, and nothing changed")
    left_out: int = Field(description="samples of it that are not stored: a later attempt has replaced their steps")


class Run(BaseModel):
    """One training job."""

    id: str
    project: str
    name: str
    state: Literal["running", "stalled", "finished"]
    status: str | None = Field(description="how it ended: completed, failed or killed")
    exit_code: int | None
    last_step: int | None
    sample_count: int
    started_at: float = Field(description="Unix seconds")
    last_seen_at: float = Field(description="Unix seconds")
    finished_at: float | None = Field(description="Unix seconds")
    firing: int = Field(description="number of alerts that fire")
    worst_rule: str | None = Field(
        description="rule of the most severe alert that fires, or that fired when the run ended"
    )
    worst_severity: str | None
    scalars: dict[str, Number] = Field(description="the latest value of each scalar")
    dropped: dict[str, int] = Field(description="what the agent had to drop: samples, bytes, errors, values")


class KnownParameter(BaseModel):
    """One parameter of a run."""

    name: str
    shape: list[int]
    dtype: str
    depth: int
    units: int
    trainable: bool
    kind: str


class LastEvent(BaseModel):
    """The last event of one kind that an agent has reported."""

    kind: str = Field(description="such as disarmed, not_measured, not_stepped, skipped_step, nonfinite_step")
    count: int = Field(description="events of this kind")
    step: int
    at: float = Field(description="Unix seconds")
    message: str
    parameter: str | None


class RunDetail(Run):
    """One training job with its parameters, in the order of depth."""

    attributes: dict[str, str]
    parameters: list[KnownParameter]
    events: list[LastEvent] = Field(description="the last of each kind, the newest first")


class Series(BaseModel):
    """One statistic of one parameter, or one scalar of the run, in at most ``points`` buckets of samples."""

    run: str
    statistic: str
    parameter: str | None
    steps: list[int] = Field(description="first step of each bucket")
    last_steps: list[int] = Field(description="last step of each bucket")
    min: list[Measured] = Field(description="smallest finite value of each bucket")
    max: list[Measured] = Field(description="largest finite value of each bucket")
    mean: list[Measured] = Field(description="mean of the finite values of each bucket")
    last: list[Measured] = Field(description="newest value of each bucket, finite or not")
    nonfinite: list[int] = Field(description="values of each bucket that are NaN or infinite")


class Profile(BaseModel):
    """One statistic of all parameters in the order of depth, summarised over a range of samples."""

    run: str
    statistic: str
    parameters: list[str]
    first_step: int
    last_step: int
    min: list[Measured]
    max: list[Measured]
    mean: list[Measured]
    last: list[Measured]
    nonfinite: list[int]


class Latest(BaseModel):
    """Everything measured at the newest sample of a run."""

    run: str
    step: int
    at: float = Field(description="Unix seconds")
    parameters: list[str]
    statistics: dict[str, list[Measured]]
    scalars: dict[str, Number]


class Thirds(BaseModel):
    """Share of units that each threshold would have clipped, by thirds of the depth from the input."""

    first: list[float]
    middle: list[float]
    last: list[float]


class ClipAdvice(BaseModel):
    """What adaptive clipping would have done at several thresholds, had it been on."""

    run: str
    from_step: int | None
    to_step: int | None
    samples: int = Field(description="samples from which this is computed, spread over the range")
    thresholds: list[float]
    shares: list[float] = Field(description="share of units over all samples that each threshold would have clipped")
    thirds: Thirds
    steps: list[int]
    rates: list[list[float]] = Field(description="share of units at each step, one for each threshold")
    clip: float | None = Field(description="threshold in force; null: adaptive clipping is off")
    recommended: float | None
    reason: str


class Map(BaseModel):
    """One statistic of all parameters: rows are buckets of samples, columns are parameters in the order of depth."""

    run: str
    statistic: str
    parameters: list[str]
    steps: list[int]
    last_steps: list[int]
    min: list[list[Measured]]
    max: list[list[Measured]]
    last: list[list[Measured]]
    nonfinite: list[list[int]]


class Blame(BaseModel):
    """A parameter that an alert blames."""

    name: str
    value: Number
    limit: Number


class Alert(BaseModel):
    """One rule that holds, or held, for one run."""

    id: str
    run: str
    rule: str
    severity: Literal["warning", "critical"]
    state: Literal["pending", "firing", "resolved"]
    first_step: int
    fired_step: int | None
    resolved_step: int | None
    first_at: float
    fired_at: float | None
    resolved_at: float | None
    resolution: str | None = Field(description="why it ended")
    muted: str | None = Field(
        description="why receivers were not notified, or not of the escalation: a silence, another rule, an "
        "acknowledgement; null: they were"
    )
    flaps: int = Field(description="times that it fired again within 10 minutes of resolving")
    acknowledged_at: float | None = Field(description="Unix seconds")
    acknowledged_by: str | None
    parameters: list[Blame] = Field(description="worst first")
    parameters_left_out: int
    evidence: dict[str, Number]
    summary: str
    cause: str
    remedy: str


class Acknowledgement(BaseModel):
    """Who acknowledges an alert."""

    author: str = Field(min_length=1, max_length=200, pattern=_WITHOUT_NUL)


class NewSilence(BaseModel):
    """A silence to add: alerts that match all its patterns, with ``*`` and ``?``, are muted for a while."""

    project: str = Field("*", max_length=512, pattern=_WITHOUT_NUL)
    run: str = Field("*", max_length=512, pattern=_WITHOUT_NUL)
    rule: str = Field("*", max_length=512, pattern=_WITHOUT_NUL)
    author: str = Field(min_length=1, max_length=200, pattern=_WITHOUT_NUL)
    comment: str = Field("", max_length=2_000, pattern=_WITHOUT_NUL)
    ends_at: float = Field(description="Unix seconds", le=1e11)


class Silence(NewSilence):
    """A silence in force."""

    id: str
    created_at: float = Field(description="Unix seconds")


class Attempt(BaseModel):
    """One attempt of a delivery."""

    number: int
    at: float = Field(description="Unix seconds")
    seconds: float
    status: int | None = Field(description="HTTP status; null: no response")
    error: str


class Delivery(BaseModel):
    """Delivery of one transition to one receiver."""

    id: str = Field(description="the webhook-id")
    alert: str
    number: int = Field(description="order within the alert")
    receiver: str
    state: Literal["due", "delivered", "dead"]
    attempts: int
    created_at: float = Field(description="Unix seconds")
    due_at: float = Field(description="Unix seconds: when the next attempt is made")
    delivered_at: float | None = Field(description="Unix seconds")
    error: str = Field(description="why the last attempt failed")


class AlertDelivery(BaseModel):
    """Delivery of one transition to one receiver."""

    id: str
    receiver: str
    transition: str = Field(description="the state that the receiver is notified of: firing or resolved")
    step: int
    state: str = Field(description="due, delivered or dead")
    created_at: float
    due_at: float
    delivered_at: float | None
    attempts: list[Attempt]


class DeliveryDetail(Delivery):
    """One delivery with its payload and every attempt."""

    payload: AnyDocument
    log: list[Attempt]


class Replayed(BaseModel):
    """How many deliveries are due again."""

    deliveries: int


class Receiver(BaseModel):
    """A configured receiver, without its address and its secrets."""

    name: str
    type: str
    disabled: str | None = Field(description="why nothing is sent to it; null: it is in use")
    due: int
    dead: int


class ReceiverHealth(BaseModel):
    """A receiver with the counts of its deliveries and its last error."""

    name: str
    host: str = Field(description="of its address, the rest of which may hold a secret")
    signed: bool
    configured: bool = Field(description="false: it has deliveries, but is no longer in the configuration")
    due: int
    delivered: int
    dead: int
    last_delivered_at: float | None
    last_error: str | None = Field(description="of the last failed attempt within a day")
    last_error_at: float | None
    disabled: str | None = Field(description="why nothing is sent to it; null: it is in use")


class Overview(BaseModel):
    """The state of the server in numbers."""

    version: str
    ready: bool
    database: str
    runs: int
    parameters: int
    samples: int = Field(description="samples stored, over all runs")
    stored_batches: int = Field(description="since the server started, like all that follows")
    duplicate_batches: int
    stored_values: int
    queued_batches: int
    queue_capacity: int
    commits: int
    mean_commit_seconds: float | None
    dropped: dict[str, int] = Field(description="what agents had to drop, over all runs")
    receivers: list[ReceiverHealth]


class Login(BaseModel):
    """A token, as ``gradwatch token create`` printed it."""

    token: str = Field(min_length=1, max_length=200)


class Session(BaseModel):
    """What the token of a request allows."""

    login: bool = Field(description="whether this server requires a token")
    scope: Scope | None = Field(description="null: log in first")
    project: str | None = Field(description="the one project that the token is for; null: every project")


class Health(BaseModel):
    """Whether the process lives, or the server is ready for requests."""

    status: str
    version: str
    """Version of the server."""
