"""Which requests run together, when, and for whom (docs/scheduling.md).

queue, group, fairness, slo, batcher, cost and rules decide; scheduler and decoupled wait; worker and execution run.
"""
