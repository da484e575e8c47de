"""coord: the control plane. Who is here, who leads, and what each Envoy is told."""
