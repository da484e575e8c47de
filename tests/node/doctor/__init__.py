"""Tests that share one node: the tests of this folder run one after the other in the same process."""
