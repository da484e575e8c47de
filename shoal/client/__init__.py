"""Python client of Shoal; `shoal.Client` and `shoal.AsyncClient` are its entry points."""

from __future__ import annotations

from shoal.client.access import KeyInfo, NewKey, NewSigner, PolicyDocument, PolicyVersion
from shoal.client.aio import AsyncClient
from shoal.client.audit import AuditEntry, AuditProblem, AuditVerified
from shoal.client.blocking import Client
from shoal.client.history import History, HistoryNode
from shoal.client.inference.arrays import BFloat16
from shoal.client.inference.inference import InferRequest, InferResult
from shoal.client.jobs.batch import Batch, BatchFormat, BatchState, BatchStep
from shoal.client.jobs.connectors import Connector, ConnectorLane, ConnectorPhase
from shoal.client.jobs.dead_letters import Handled
from shoal.client.jobs.job import Job, JobRequest, JobRetry, JobState, Ran, Submitted, Transition
from shoal.client.jobs.job_operations import JobAction, JobOperation, JobOperationState, JobSelection
from shoal.client.jobs.job_retention import JobRetention
from shoal.client.jobs.job_watch import JobChange, JobFilter
from shoal.client.jobs.schedules import Schedule
from shoal.client.models.registry import ModelFile, ModelPush, ModelVersion, Progress, Pushed
from shoal.client.models.serving import IndexEntry, ModelMetadata, ModelStatistics, TensorMetadata
from shoal.client.spans import Span, Spans
from shoal.client.status import EnvoyStatus, Instance, InstanceState, Leader, Status
from shoal.client.store.backups import BackupProgress
from shoal.client.store.export import Exported
from shoal.client.store.result import JobResult, Outcome, ResultFilter
from shoal.client.store.retention import Kept, RetentionRule, StoreUsage, TenantUsage
from shoal.client.store.store import Collected, Finding, FindingKind, Verified
from shoal.client.tenants import Tenant, TenantSettings
from shoal.client.transport.retry import RetryPolicy

__all__ = [
    "AsyncClient",
    "AuditEntry",
    "AuditProblem",
    "AuditVerified",
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
    "History",
    "HistoryNode",
    "IndexEntry",
    "InferRequest",
    "InferResult",
    "Instance",
    "InstanceState",
    "Job",
    "JobAction",
    "JobChange",
    "JobFilter",
    "JobOperation",
    "JobOperationState",
    "JobRequest",
    "JobResult",
    "JobRetention",
    "JobRetry",
    "JobSelection",
    "JobState",
    "Kept",
    "KeyInfo",
    "Leader",
    "ModelFile",
    "ModelMetadata",
    "ModelPush",
    "ModelStatistics",
    "ModelVersion",
    "NewKey",
    "NewSigner",
    "Outcome",
    "PolicyDocument",
    "PolicyVersion",
    "Progress",
    "Pushed",
    "Ran",
    "ResultFilter",
    "RetentionRule",
    "RetryPolicy",
    "Schedule",
    "Span",
    "Spans",
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
