"""Scheduling of requests: batching, order and execution (docs/scheduling.md).

queue, stack_group, fairness, slo, batcher, cost and rules decide; scheduler and decoupled wait; workers and executions
run.
"""
