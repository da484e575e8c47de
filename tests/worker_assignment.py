"""Assignment of test files to the workers of a parallel run: the last worker runs the files that mostly wait.

    workers 1 to n - 1 ──> every other file, the longest first; at most one at a time runs files of NODES
    worker n ──> PATIENT, and nothing else

Files that wait for a clock or for a broker occupy a worker for minutes and a core for seconds. Beside two workers on
two cores, a third worker for these files uses idle time, and delays the others very little.

`make test` uses this schedule (`pytest -n 3 --dist loadfile --patient`). `make test-fast` (`--fast`) leaves out the
files that wait and the files that are slow.
"""

from __future__ import annotations

from typing import Any

from xdist.scheduler.loadfile import LoadFileScheduling

PATIENT = (
    "tests/node/doctor",
    "tests/ingest/connectors/test_connector_contract.py",
    "tests/ingest/connectors/test_kafka.py",
    "tests/mesh/xds/test_xds_envoy.py",
    "tests/ingest/batches/test_batch_life.py",
    "tests/coord/test_coord_mesh.py",
    "tests/store/test_store_outages.py",
    "tests/store/test_records_kills.py",
    "tests/chaos/test_primary_dies.py",
    "tests/store/backups/test_backups.py",
    "tests/ingest/test_ingest_kills.py",
    "tests/ingest/test_job_life.py",
    "tests/store/artifacts/test_object_store.py",
    "tests/ingest/test_ingest_outages.py",
    "tests/ingest/intake/test_disk_full.py",
    "tests/ingest/intake/test_mongo_gone.py",
    "tests/mesh/cluster/test_membership_etcd.py",
    "tests/mesh/cluster/test_election.py",
    "tests/mesh/rpc/fronts/test_front_calls.py",
    "tests/store/garbage/test_interleavings.py",
    "tests/infer/model_process/test_model_process.py",
    "tests/mesh/xds/test_malformed_requests.py",
    "tests/mesh/rpc/fronts/test_front_wire.py",
    "tests/infer/test_wire_fuzz.py",
    "tests/mesh/rpc/fronts/test_lean_client.py",
    "tests/infer/model_process/python/test_decoupled_models.py",
    "tests/node/test_rest_fronts.py",
    "tests/node/test_victoria_metrics.py",
    "tests/store/audit/test_audit_log.py",
    "tests/node/test_connectors_on_a_node.py",
    "tests/node/test_history.py",
    "tests/mesh/h2/test_h2_connection.py",
    "tests/mesh/rpc/fronts/test_front_ends.py",
    "tests/cli/test_node_commands.py",
    "tests/cli/test_up_options.py",
    "tests/client/models/test_push.py",
)
"""Files, and folders of TOGETHER, that use less than half of a core. Together they last nearly as long as a whole run,
so that no worker is idle at its end. The folder whose tests look at a whole node comes first, beside whole nodes that
wait, too: those of LONG that load a server come later."""

TOGETHER = ("tests/infer/conformance", "tests/node/one_node", "tests/node/doctor")
"""Folders of which one worker runs all files, in the order of the collection: their tests share servers or a node.
Alone, each file would start them again."""

LONG = (
    "tests/node/test_access_attacks.py",
    "tests/node/test_access_wire_forms.py",
    "tests/node/test_access_streams.py",
    "tests/node/test_up.py",
    "tests/node/one_node",
    "tests/infer/conformance",
    "tests/siege/test_siege.py",
    "tests/chaos/test_chaos.py",
    "tests/node/test_fronts.py",
    "tests/packaging/test_wheel.py",
    "tests/mesh/rpc/fronts/test_front_life.py",
    "tests/node/test_serve.py",
    "tests/convert/test_originals.py",
    "tests/node/test_kills.py",
    "tests/examples/test_embeddings.py",
    "tests/clients/test_cpp.py",
    "tests/node/test_bad_input.py",
    "tests/kernels/test_compile_only.py",
    "tests/node/test_batches.py",
    "tests/chaos/test_kill_jobs.py",
    "tests/infer/runtimes/test_runtime_contract.py",
    "tests/node/test_shared_models.py",
    "tests/infer/test_soak.py",
    "tests/kernels/test_simulator.py",
)
"""Files, and folders of TOGETHER, of 30 s and more. They run first: started last, one of them would keep one worker
busy at the end."""

NODES = (
    "tests/chaos/",
    "tests/examples/",
    "tests/node/",
    "tests/packaging/",
    "tests/siege/",
)
"""Folders whose tests start a whole node, or load a server as much as they can. Two of them at the same time need more
than two cores: what one of them waits for comes late."""

SLOW_MARKS = {"node", "envoy", "etcd", "s3"}
SLOW = (
    "tests/chaos",
    "tests/clients",
    "tests/compress",
    "tests/convert/test_originals.py",
    "tests/coord",
    "tests/examples",
    "tests/infer/conformance",
    "tests/infer/ensembles/test_on_one_gpu.py",
    "tests/infer/model_process",
    "tests/infer/models/test_unload_memory.py",
    "tests/infer/remote",
    "tests/infer/scheduling/test_overload.py",
    "tests/infer/test_infer_process.py",
    "tests/infer/triton",
    "tests/ingest/batches/test_batch_kills.py",
    "tests/ingest/batches/test_batch_life.py",
    "tests/ingest/batches/test_batch_locations.py",
    "tests/ingest/connectors",
    "tests/ingest/dispatch/test_cascade.py",
    "tests/ingest/intake/test_claim_check.py",
    "tests/ingest/queries/test_watch_many.py",
    "tests/ingest/schedules/test_schedules.py",
    "tests/ingest/test_ingest_kills.py",
    "tests/kernels/test_backend.py",
    "tests/kernels/test_simulator.py",
    "tests/mesh/rpc/fronts",
    "tests/node",
    "tests/packaging",
    "tests/store/exports",
    "tests/store/retention/test_rounds.py",
    "tests/store/test_artifact_rpc.py",
    "tests/store/test_records_kills.py",
    "tests/store/test_registry_rpc.py",
    "tests/store/test_result_rpc.py",
    "tests/store/usage/test_payloads.py",
)
"""Files and folders that `make test-fast` leaves out, besides PATIENT, LONG and the marks above: they start processes
for each test. `make test` runs all of them, before a change is submitted."""


class PatientScheduling(LoadFileScheduling):
    """xdist's schedule by file, or by folder of TOGETHER, with the last worker reserved for PATIENT files."""

    def _split_scope(self, nodeid: str) -> str:
        file: str = super()._split_scope(nodeid)
        return next((folder for folder in TOGETHER if file.startswith(f"{folder}/")), file)

    def _assign_work_unit(self, node: Any) -> None:
        files = [scope for scope in self.workqueue if (scope in PATIENT) == self._is_patient(node)]
        if not files and self._is_patient(node):
            node.shutdown()
            return
        files = files or [*self.workqueue]
        if not self._is_patient(node):
            has_node = any(self._has_a_node(other) for other in self.nodes if other is not node)
            files = [scope for scope in files if scope.startswith(NODES) != has_node] or files
        # Among equal ranks, xdist's order.
        first = min(files, key=_rank)
        self.workqueue.move_to_end(first, last=False)
        super()._assign_work_unit(node)

    def _has_a_node(self, node: Any) -> bool:
        """Return True when the worker has tests of NODES left to run. Files of PATIENT use little, and do not count."""
        return any(
            scope.startswith(NODES) and not all(tests.values())
            for scope, tests in self.assigned_work.get(node, {}).items()
            if scope not in PATIENT
        )

    def _is_patient(self, node: Any) -> bool:
        return len(self.nodes) > 1 and node.gateway.id == f"gw{self.numnodes - 1}"


def is_slow(file: str) -> bool:
    """Return True when `make test-fast` leaves out this file or folder, a path from the root of the checkout."""
    return file in PATIENT or file in LONG or any(file == each or file.startswith(f"{each}/") for each in SLOW)


def _rank(scope: str) -> int:
    for files in (PATIENT, LONG):
        if scope in files:
            return files.index(scope)
    return len(LONG)
