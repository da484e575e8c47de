"""moto's server with two of its faults mended, as Kinesis' documentation has it: when a shard was split, its records
stay in it, and what is written later goes to its children."""

from __future__ import annotations

import sys
from collections import OrderedDict
from typing import Any

from moto.kinesis import models
from moto.server import main

_for_any_shard = models.Stream.get_shard_for_key
_split = models.Stream.split_shard


def for_open_shard(stream: Any, partition_key: str, explicit_hash_key: str) -> Any:
    every = stream.shards
    stream.shards = OrderedDict((name, shard) for name, shard in every.items() if shard.is_open)
    try:
        return _for_any_shard(stream, partition_key, explicit_hash_key)
    finally:
        stream.shards = every


def split(stream: Any, shard_to_split: str, new_starting_hash_key: str) -> None:
    shard = stream.shards[shard_to_split]
    kept, shard.records = shard.records, OrderedDict()
    try:
        _split(stream, shard_to_split, new_starting_hash_key)
    finally:
        shard.records = kept


models.Stream.get_shard_for_key = for_open_shard  # type: ignore[method-assign]
models.Stream.split_shard = split  # type: ignore[method-assign]

if __name__ == "__main__":
    main(sys.argv[1:])
