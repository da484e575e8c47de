"""Python client of Shoal; `shoal.Client` and `shoal.AsyncClient` are its entry points."""

from __future__ import annotations

from shoal.client.aio import AsyncClient
from shoal.client.arrays import BFloat16
from shoal.client.backups import BackupProgress
from shoal.client.batch import Batch, BatchFormat, BatchState, BatchStep
from shoal.client.blocking import Client
from shoal.client.connectors import Connector, ConnectorLane, ConnectorPhase
from shoal.client.dead_letters import Handled
from shoal.client.export import Exported
from shoal.client.inference import InferRequest, InferResult
from shoal.client.job import Job, JobRequest, JobRetry, JobState, Ran, Submitted, Transition
from shoal.client.job_retention import JobRetention
from shoal.client.job_watch import JobChange, JobFilter
from shoal.client.keeping import Kept, RetentionRule, StoreUsage, TenantUsage
from shoal.client.registry import ModelFile, ModelVersion, Progress, Pushed
from shoal.client.result import JobResult, Outcome, ResultFilter
from shoal.client.retry import RetryPolicy
from shoal.client.schedules import Schedule
from shoal.client.serving import IndexEntry, ModelMetadata, ModelStatistics, TensorMetadata
from shoal.client.status import EnvoyStatus, Instance, InstanceState, Leader, Status
from shoal.client.store import Collected, Finding, FindingKind, Verified
from shoal.client.tenants import Tenant, TenantSettings

__all__ = [
    "AsyncClient",
    "BFloat16",
    "BackupProgress",
    "Batch",
    "BatchFormat",
    "BatchState",
    "BatchStep",
    "Client",
    "Collected",
    "Connector",
    "ConnectorLane",
    "ConnectorPhase",
    "EnvoyStatus",
    "Exported",
    "Finding",
    "FindingKind",
    "Handled",
    "IndexEntry",
    "InferRequest",
    "InferResult",
    "Instance",
    "InstanceState",
    "Job",
    "JobChange",
    "JobFilter",
    "JobRequest",
    "JobResult",
    "JobRetention",
    "JobRetry",
    "JobState",
    "Kept",
    "Leader",
    "ModelFile",
    "ModelMetadata",
    "ModelStatistics",
    "ModelVersion",
    "Outcome",
    "Progress",
    "Pushed",
    "Ran",
    "ResultFilter",
    "RetentionRule",
    "RetryPolicy",
    "Schedule",
    "Status",
    "StoreUsage",
    "Submitted",
    "Tenant",
    "TenantSettings",
    "TenantUsage",
    "TensorMetadata",
    "Transition",
    "Verified",
]
