"""The table of calls against the contracts."""

import pytest
from google.protobuf import descriptor_pool

from shoal.client.transport import methods
from shoal.client.transport.methods import Method

TABLE = {name: value for name, value in vars(methods).items() if isinstance(value, Method)}
NOT_REPEATED = {
    "MODEL_STREAM_INFER",
    "REMOVE_MODEL",
    "REQUEUE_DEAD_LETTERS",
    "PURGE_DEAD_LETTERS",
    "START_JOB_OPERATION",
    "BACK_UP",
    "RESTORE",
    "PUT_SCHEDULE",
    "TRY_MODEL",
    "REMOVE_SCHEDULE",
    "APPLY_POLICY",
    "ROLL_BACK_POLICY",
    "CREATE_KEY",
    "ROTATE_SIGNER",
}


@pytest.mark.parametrize("name", TABLE)
def test_every_call_is_in_the_contract_with_these_messages(name: str) -> None:
    method = TABLE[name]
    service, _, rpc = method.path.strip("/").partition("/")
    described = descriptor_pool.Default().FindServiceByName(service).methods_by_name[rpc]
    assert described.input_type.full_name == method.request.DESCRIPTOR.full_name
    assert described.output_type.full_name == method.response.DESCRIPTOR.full_name
    assert method.name == rpc


def test_what_is_not_repeated() -> None:
    assert {name for name, method in TABLE.items() if not method.idempotent} == NOT_REPEATED
