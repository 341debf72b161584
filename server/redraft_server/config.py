"""The one schema of every server setting. Where values come from is `settings.py`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from redraft.traffic.patterns import PatternName, patterns_of

ProposerName = Literal["none", "ngram", "draft_model", "ngram+draft_model"]

Port = Annotated[int, Field(ge=0, le=65535)]
PositiveInt = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9._-]{0,64}$")]
Fraction = Annotated[float, Field(ge=0.0, le=1.0, allow_inf_nan=False)]


class _Group(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)


class ModelConfig(_Group):
    """Which models to serve, and on what."""

    target: str = Field(default="demo", min_length=1)
    """The big model: `demo`, a Hugging Face id (`Qwen/Qwen3-0.6B`), a local directory, or a .gguf file."""
    draft: str | None = Field(default=None, min_length=1)
    """The small model that proposes tokens, named like the target. It must share the target's tokenizer."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Number format of weights and KV cache. auto: float32 on CPU, the checkpoint's own on a GPU."""
    weights: Literal["full", "int8", "int4"] = "full"
    """How the target's weights are kept, on a CPU in float32. full: as dtype says. int4, int8: weights of a GGUF file
    that has them so stay what they are, others are rounded, which makes another model of it (docs/quantised.md)."""
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    cache_dir: Path | None = None
    """Where converted models are kept. Default: the user's cache directory."""
    tensor_parallel: PositiveInt = 1
    """Processes on this machine that the target is split over, each with a GPU of its own (docs/scale.md)."""
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of the models. Default: OMP_NUM_THREADS, else every core this process may use."""


class EngineConfig(_Group):
    """How requests share the models; everything here is reserved or bounded at start-up."""

    max_running_requests: PositiveInt = 16
    """Sequences decoded together in one step; each of a request's n samples counts."""
    max_waiting_requests: int = Field(default=256, ge=0)
    """Requests that may queue. One more is refused with RESOURCE_EXHAUSTED and a time to retry."""
    max_batch_tokens: PositiveInt = 512
    """Token budget of one step: long prompts are prefilled in chunks of at most this, beside running decodes."""
    kv_cache_tokens: PositiveInt = 16384
    """Token positions of KV cache to reserve, shared by all requests (the banner shows the memory)."""
    kv_block_size: PositiveInt = 16
    """Positions in one KV block, the unit of allocation and of prefix sharing."""
    max_model_len: int | None = Field(default=None, ge=2)
    """Longest prompt plus completion. Default: the target's context length, at most kv_cache_tokens."""
    prefix_cache: bool = True
    """Reuse the KV blocks of prompts that start alike."""


class SpeculationConfig(_Group):
    """How tokens are proposed before the target verifies them. The output's distribution never depends on it."""

    proposer: ProposerName = "ngram"
    """none, ngram (look the tail up in the request's own tokens), draft_model, or ngram+draft_model (ngram where
    it matches, else the draft). Default: draft_model if model.draft or registry.url is set, else ngram."""
    num_speculative_tokens: int = Field(default=8, ge=0, le=64)
    """Most tokens proposed per step and sequence (k). 0: no speculation."""
    adaptive: bool = True
    """Choose k up to that limit per sequence, from its acceptance, how sure the draft is of each token, and measured
    step cost; 0 while it loses."""
    ngram_min: int = Field(default=2, ge=1, le=32)
    """Shortest tail of tokens that the ngram proposer looks up."""
    ngram_max: int = Field(default=4, ge=1, le=32)
    """Longest tail, tried first."""


class GrpcConfig(_Group):
    """The API's listener."""

    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on. 0.0.0.0 or [::] serves other machines: then set up TLS and auth.keys_file too."""
    port: Port = 50051
    """TCP port. 0: any free one, named in the banner."""
    max_message_bytes: int = Field(default=16 * 2**20, ge=1024, le=2**30)
    """Largest message taken or sent; a larger one is refused with RESOURCE_EXHAUSTED."""
    max_concurrent_streams: PositiveInt = 1024
    """Calls in flight per connection; further ones wait in the client."""
    tls_cert: Path | None = None
    """PEM certificate chain of the server. With tls_key, turns TLS on. The TLS files are read anew when they change."""
    tls_key: Path | None = None
    """PEM private key of tls_cert."""
    tls_client_ca: Path | None = None
    """PEM certificates of who signs clients: only clients that present such a certificate are served (mTLS)."""

    @model_validator(mode="after")
    def _check_tls(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together: set both, or neither for plain text")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca needs tls_cert and tls_key")
        return self


class AuthConfig(_Group):
    """Who may call. Off unless keys_file is set; then all calls but health checks need an API key."""

    keys_file: Path | None = None
    """YAML or JSON file with the hashes of the API keys, their tenants, roles and limits. Read anew when it changes."""


class MetricsConfig(_Group):
    """Prometheus metrics and probes over HTTP: /metrics, /livez, /readyz."""

    enabled: bool = True
    """Serve them."""
    host: str = Field(default="127.0.0.1", min_length=1)
    """Address to listen on."""
    port: Port = 9090
    """TCP port. 0: any free one, named in the banner."""


class TracingConfig(_Group):
    """Spans of the requests, sent to an OpenTelemetry collector. Off unless endpoint is set; needs redraft[otel]."""

    endpoint: str | None = Field(default=None, pattern=r"^https?://\S+$")
    """OTLP/HTTP receiver, path included: http://collector:4318/v1/traces. Unset: no spans, but trace ids in the log."""
    sample_ratio: Fraction = 1.0
    """Fraction of traces recorded. For a trace that a caller began, the caller's own decision holds."""


class TrafficLogConfig(_Group):
    """What is kept of the traffic to train drafts on: token ids, which decode to text. Off unless url is set."""

    url: str | None = Field(default=None, min_length=1)
    """Directory or fsspec URL (s3://bucket/prefix) for the Parquet shards. Unset: nothing is recorded."""
    sample_rate: Fraction = 1.0
    """Fraction of requests recorded."""
    tenants: tuple[TenantName, ...] = ()
    """Only requests of these tenants are recorded; "" is a request without a tenant. Empty: all."""
    exclude_tenants: tuple[TenantName, ...] = ()
    """Requests of these tenants are never recorded."""
    redact: tuple[PatternName, ...] = ()
    """A record whose text holds one of these is not stored at all (docs/privacy.md)."""
    redact_patterns: tuple[str, ...] = Field(default=(), max_length=32)
    """Nor is one that matches one of these RE2 expressions. On the command line, put each in double quotes."""
    teacher_top_n: int = Field(default=32, ge=0, le=1024)
    """Target log-probabilities kept at every verified position, best first. 0: none."""
    max_queue_records: PositiveInt = 1024
    """Records waiting for the writer. When full, further ones are dropped and counted, never waited for."""
    roll_bytes: int = Field(default=64 * 2**20, ge=2**10)
    """Size at which a shard is closed and a new one begun."""
    roll_seconds: float = Field(default=300.0, gt=0.0, le=86_400.0)
    """Age at which a shard is closed, whatever its size."""
    spool_dir: Path | None = None
    """Local directory where shards wait for an object store; one server's alone. Default: in the cache directory."""
    spool_bytes: int = Field(default=2**30, ge=2**20)
    """Most bytes that wait there. While the store is away and it is full, the oldest shards are dropped and counted."""
    retention_days: float | None = Field(default=30.0, gt=0.0, allow_inf_nan=False)
    """Age at which shards are deleted. null: never."""

    @field_validator("redact_patterns")
    @classmethod
    def _check_patterns(cls, patterns: tuple[str, ...]) -> tuple[str, ...]:
        patterns_of((), patterns)
        return patterns

    def covers(self, tenant: str) -> bool:
        """Whether requests of this tenant may be recorded."""
        return tenant not in self.exclude_tenants and (not self.tenants or tenant in self.tenants)


class RegistryConfig(_Group):
    """Where new drafts come from. Off unless url is set; then the server starts with the registry's current draft."""

    url: str | None = Field(default=None, min_length=1)
    """Directory or fsspec URL (s3://bucket/prefix) of the draft registry. Unset: model.draft serves for good."""
    poll_s: float = Field(default=10.0, gt=0.0, allow_inf_nan=False)
    """Time between two looks at it; up to two minutes while it cannot be read. The drafts in memory serve on."""


class RolloutConfig(_Group):
    """How a new draft gets from the registry into service: shadow, canary, then all requests, or back out."""

    shadow_positions: int = Field(default=500, ge=0)
    """Verified positions that a new draft is scored at before it serves anybody. 0: no shadow."""
    shadow_share: Fraction = 0.25
    """Fraction of requests that may be followed for it; scoring takes at most a tenth of the engine's time."""
    canary_share: Fraction = 0.1
    """Fraction of requests that it then drafts for, beside the active draft. 0: no canary."""
    canary_max_s: float = Field(default=3600.0, gt=0.0, allow_inf_nan=False)
    """Time after which the means decide if the test has not."""
    level: float = Field(default=0.05, gt=0.0, lt=0.5)
    """Probability that a draft as good as the active one is rolled back as worse."""
    margin: Fraction = 0.02
    """Expected acceptance that a draft may be below the active one and still count as good as it."""
    promise_margin: Fraction = 0.1
    """Expected acceptance that it may be below what its manifest promises, or in the shadow below the active one."""
    max_resident_drafts: int = Field(default=3, ge=2, le=16)
    """Drafts in memory, each with KV of its own: active, candidate, and the previous one for a quick roll-back."""


class LimitsConfig(_Group):
    """What one request may ask for."""

    max_prompt_tokens: int | None = Field(default=None, ge=1)
    """Longest prompt. Default: the context length less one."""
    max_new_tokens: PositiveInt = 4096
    """Highest max_new_tokens."""
    request_timeout_s: float = Field(default=600.0, gt=0.0, allow_inf_nan=False)
    """Longest that any request may take; it then ends with what it has and FINISH_REASON_DEADLINE."""
    max_n: int = Field(default=16, ge=1, le=16)
    """Most samples of one prompt."""
    max_logprobs: int = Field(default=20, ge=0, le=20)
    """Most alternatives per token in logprobs and prompt_logprobs."""


class LoggingConfig(_Group):
    """Log lines on stderr. They never hold prompt or completion text."""

    format: Literal["text", "json"] = "text"
    """text for people, json for collectors."""
    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe level written."""


class DrainConfig(_Group):
    """How the server ends on SIGTERM or SIGINT. A second signal ends it at once."""

    delay_s: Seconds = 0.0
    """Time to go on serving after health turned NOT_SERVING, so that load balancers notice (about 5 behind one)."""
    grace_s: Seconds = 30.0
    """Time that running requests then get; what is left ends with FINISH_REASON_SHUTDOWN."""


class ServerConfig(_Group):
    """Every setting of `redraft-server`."""

    model: ModelConfig = ModelConfig()
    engine: EngineConfig = EngineConfig()
    speculation: SpeculationConfig = SpeculationConfig()
    grpc: GrpcConfig = GrpcConfig()
    auth: AuthConfig = AuthConfig()
    metrics: MetricsConfig = MetricsConfig()
    tracing: TracingConfig = TracingConfig()
    traffic_log: TrafficLogConfig = TrafficLogConfig()
    registry: RegistryConfig = RegistryConfig()
    rollout: RolloutConfig = RolloutConfig()
    limits: LimitsConfig = LimitsConfig()
    logging: LoggingConfig = LoggingConfig()
    drain: DrainConfig = DrainConfig()

    @model_validator(mode="after")
    def _choose_proposer(self) -> Self:
        """Giving a draft, or a registry, is asking for it, so that the common case needs one flag."""
        gives_drafts = self.model.draft is not None or self.registry.url is not None
        if gives_drafts and "proposer" not in self.speculation.model_fields_set:
            chosen = self.speculation.model_copy(update={"proposer": "draft_model"})
            object.__setattr__(self, "speculation", chosen)
        return self

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        uses_draft = "draft_model" in self.speculation.proposer
        if uses_draft and self.model.draft is None and self.registry.url is None:
            needs = "model.draft or registry.url"
            raise ValueError(f"speculation.proposer is {self.speculation.proposer}, which needs {needs}")
        given = "model.draft" if self.model.draft is not None else "registry.url"
        if (self.model.draft is not None or self.registry.url is not None) and not uses_draft:
            raise ValueError(
                f"{given} is set but speculation.proposer is {self.speculation.proposer}, which would not use it: "
                "remove one of the two"
            )
        if self.model.tensor_parallel > 1 and self.model.device != "auto":
            raise ValueError("model.tensor_parallel takes the GPUs in order: leave model.device at auto")
        if self.model.weights != "full" and self.model.dtype not in ("auto", "float32"):
            raise ValueError(f"model.weights {self.model.weights} needs model.dtype float32")
        if self.model.weights != "full" and (self.model.tensor_parallel > 1 or self.model.device.startswith("cuda")):
            raise ValueError(f"model.weights {self.model.weights} is for one process on a CPU: set model.device to cpu")
        if self.speculation.ngram_min > self.speculation.ngram_max:
            raise ValueError("speculation.ngram_min must be at most speculation.ngram_max")
        if self.engine.max_batch_tokens < self.engine.max_running_requests:
            raise ValueError("engine.max_batch_tokens must be at least engine.max_running_requests")
        if self.engine.kv_block_size > self.engine.kv_cache_tokens:
            raise ValueError("engine.kv_block_size must be at most engine.kv_cache_tokens")
        if self.engine.max_model_len is not None and self.engine.max_model_len > self.engine.kv_cache_tokens:
            raise ValueError("engine.max_model_len must be at most engine.kv_cache_tokens")
        return self
