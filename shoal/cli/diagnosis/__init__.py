"""Diagnosis of a node: facts that are gathered once, and checks that are pure functions of them."""
